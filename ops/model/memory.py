"""How much of --max-memory is left for activations that wait."""

from __future__ import annotations

from math import prod

from tersor.formats.errors import TersorError
from tersor.formats.report import resident_bytes
from tersor.ops.model.skeleton import Skeleton

# A filled block in float32, the same again for what an algorithm makes of its largest layers, and slack for the allocator.
BLOCK_COPIES = 3


def parking_space(max_memory_bytes: int | None, skeleton: Skeleton) -> int | None:
    """Bytes of activations that may wait in memory; None without a cap. Raises TersorError when a block does not fit."""
    if max_memory_bytes is None:
        return None
    blocks = range(len(skeleton.blocks))
    largest = max(
        sum(4 * prod(skeleton.view.tensors[name].shape) for name in skeleton.checkpoint_names(i)) for i in blocks
    )
    left = max_memory_bytes - resident_bytes() - BLOCK_COPIES * largest
    if left < 0:
        raise TersorError(
            f"--max-memory {max_memory_bytes} bytes is {-left} too little: the largest block takes {BLOCK_COPIES * largest} "
            "while it is worked on",
            "raise --max-memory, or use --method rtn, which needs a few panels only",
        )
    return left

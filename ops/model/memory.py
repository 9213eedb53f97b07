"""What the process does with memory: freed pages are kept for reuse, and --max-memory says how much may wait."""

from __future__ import annotations

import ctypes
import functools
from math import prod

from tersor.formats.errors import TersorError
from tersor.formats.report import resident_bytes
from tersor.ops.model.skeleton import Skeleton

# A filled block in float32, the same again for what an algorithm makes of its largest layers, and slack for the allocator.
BLOCK_COPIES = 3

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


@functools.cache
def keep_freed_memory() -> None:
    """Have malloc reuse freed buffers instead of returning them to the system.

    Panels and activations are made and freed all the time; getting zeroed pages anew for each takes longer than most of
    what is done with them. One arena, so that threads share what is free. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for setting, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_ARENA_MAX, 1)):
        mallopt(setting, value)


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
            "raise --max-memory, or use a method that runs no text (rtn of quantize, magnitude of prune)",
        )
    return left

"""What --dry-run says for every command that writes a checkpoint: from headers, without torch."""

from __future__ import annotations

from collections import defaultdict

from tersor.formats.checkpoint import Checkpoint

LIBRARY_BYTES = 220 << 20  # Python with torch
MODEL_LIBRARY_BYTES = 450 << 20  # and with transformers
LIVE_COPIES = 6  # of a batch's hidden state, while it waits inside a block


def table(
    checkpoint: Checkpoint,
    changes: dict[str, tuple[str, int, str]],
    output_bytes: int,
    scratch_bytes: int,
    peak_bytes: int,
    warnings: list[str],
) -> dict:
    """The answer. `changes` has action, bytes written and reason by tensor; `scratch_bytes` of disk are given back."""
    rows = []
    for name, info in checkpoint.tensors.items():
        action, after, reason = changes[name]
        rows.append(
            {
                "name": name,
                "action": action,
                "shape": list(info.shape),
                "before_bytes": info.nbytes,
                "after_bytes": after,
                "reason": reason,
            }
        )
    side = sum(path.stat().st_size for path in checkpoint.side_files())
    return {
        "tensors": rows,
        "input_bytes": checkpoint.nbytes,
        "output_bytes": output_bytes,
        "disk_bytes": output_bytes + scratch_bytes + side,
        "peak_memory_bytes": peak_bytes,
        "warnings": warnings,
    }


def calibrated_peak(checkpoint: Checkpoint, request, hidden: int, block_copies: int, extra_bytes: int = 0) -> int:
    """Memory of a pass over the blocks: some copies of the largest in float32, and the text that waits, `[tokens, hidden]`."""
    blocks: dict[str, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            blocks[".".join(parts[: number + 1])] += 4 * info.params
    waiting = 4 * request.samples * request.seq_len * hidden * LIVE_COPIES
    peak = MODEL_LIBRARY_BYTES + block_copies * max(blocks.values(), default=0) + waiting + extra_bytes
    return peak if request.max_memory_bytes is None else min(peak, request.max_memory_bytes)

"""What --dry-run says."""

from __future__ import annotations

from collections import defaultdict

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.request import Request

LIBRARY_BYTES = 220 << 20  # Python with torch
MODEL_LIBRARY_BYTES = 450 << 20  # and with transformers
LIVE_COPIES = 6  # of a batch's hidden state, while it waits inside a block


def forecast(checkpoint: Checkpoint, plan: Plan, request: Request) -> dict:
    """Action, bytes and reason for each tensor; exact output bytes, estimated memory, disk needed."""
    rows = []
    for name, info in checkpoint.tensors.items():
        action = plan.actions[name]
        rows.append(
            {
                "name": name,
                "action": action.action,
                "shape": list(info.shape),
                "before_bytes": info.nbytes,
                "after_bytes": action.nbytes,
                "reason": action.reason,
            }
        )
    side = sum(path.stat().st_size for path in checkpoint.side_files())
    return {
        "tensors": rows,
        "input_bytes": checkpoint.nbytes,
        "output_bytes": plan.nbytes,
        "disk_bytes": plan.nbytes * (2 if request.rounds > 1 else 1) + side,
        "peak_memory_bytes": _peak(checkpoint, request),
        "warnings": plan.warnings,
    }


def _peak(checkpoint: Checkpoint, request: Request) -> int:
    largest = max((info.params for info in checkpoint.tensors.values()), default=0)
    if request.method in ("magnitude", "random", "svd", "even"):
        return LIBRARY_BYTES + 4 * 4 * largest
    blocks: dict[str, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            blocks[".".join(parts[: number + 1])] += 4 * info.params
    hidden = (checkpoint.config or {}).get("hidden_size") or 0
    waiting = 4 * request.samples * request.seq_len * hidden * LIVE_COPIES
    peak = MODEL_LIBRARY_BYTES + 3 * max(blocks.values(), default=0) + waiting
    return peak if request.max_memory_bytes is None else min(peak, request.max_memory_bytes)

"""What --dry-run says: from headers, without torch."""

from __future__ import annotations

from collections import defaultdict
from math import prod

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.quantize.plan import Plan

PANEL_BYTES = 24 << 20  # a worker's panel of weights and what the clip search makes of it
LIBRARY_BYTES = 220 << 20  # Python with torch
MODEL_LIBRARY_BYTES = 450 << 20  # and with transformers
LIVE_COPIES = 6  # of a batch's hidden state, while it waits inside a block


def forecast(checkpoint: Checkpoint, plan: Plan, request) -> dict:
    """Action, bytes and reason for each tensor; exact output bytes, estimated memory, disk needed."""
    rows = []
    for name, info in checkpoint.tensors.items():
        step = plan.steps.get(name)
        rows.append(
            {
                "name": name,
                "action": "quantize" if step else "keep",
                "shape": list(info.shape),
                "before_bytes": info.nbytes,
                "after_bytes": step.nbytes if step else info.nbytes,
                "reason": step.reason if step else plan.kept[name],
            }
        )
    side = sum(path.stat().st_size for path in checkpoint.side_files())
    return {
        "tensors": rows,
        "input_bytes": checkpoint.nbytes,
        "output_bytes": plan.nbytes,
        "disk_bytes": plan.nbytes + side,
        "peak_memory_bytes": _peak(checkpoint, plan, request),
        "format": plan.format,
        "warnings": plan.warnings,
    }


def _peak(checkpoint: Checkpoint, plan: Plan, request) -> int:
    largest = max(prod(step.linear.shape) for step in plan.steps.values())
    if request.method == "rtn":
        return LIBRARY_BYTES + 2 * (PANEL_BYTES + 2 * largest)  # codes and packed words of a layer, on two workers
    blocks: dict[str, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            blocks[".".join(parts[: number + 1])] += 4 * info.params
    widest = max(step.linear.shape[1] for step in plan.steps.values())
    hidden = (checkpoint.config or {}).get("hidden_size") or min(step.linear.shape[1] for step in plan.steps.values())
    waiting = 4 * request.samples * request.seq_len * hidden * LIVE_COPIES
    peak = MODEL_LIBRARY_BYTES + 2 * max(blocks.values(), default=0) + 5 * 4 * widest**2 + waiting
    return peak if request.max_memory_bytes is None else min(peak, request.max_memory_bytes)

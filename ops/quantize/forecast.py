"""What --dry-run says: from headers, without torch."""

from __future__ import annotations

from math import prod

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.dry_run import LIBRARY_BYTES, calibrated_peak, table
from tersor.ops.quantize.plan import Plan

PANEL_BYTES = 24 << 20  # a worker's panel of weights and what the clip search makes of it


def forecast(checkpoint: Checkpoint, plan: Plan, request) -> dict:
    """Action, bytes and reason for each tensor; exact output bytes, estimated memory, disk needed, and the format."""
    changes = {name: ("keep", checkpoint.tensors[name].nbytes, reason) for name, reason in plan.kept.items()}
    changes |= {name: ("quantize", step.nbytes, step.reason) for name, step in plan.steps.items()}
    peak = _peak(checkpoint, plan, request)
    return table(checkpoint, changes, plan.nbytes, 0, peak, plan.warnings) | {"format": plan.format}


def _peak(checkpoint: Checkpoint, plan: Plan, request) -> int:
    if request.method == "rtn":  # codes and packed words of a layer, on two workers
        largest = max(prod(step.linear.shape) for step in plan.steps.values())
        return LIBRARY_BYTES + 2 * (PANEL_BYTES + 2 * largest)
    widths = [step.linear.shape[1] for step in plan.steps.values()]
    if request.stats is not None:  # a layer's Hessian, its factor and the weight that is worked on
        largest = max(prod(step.linear.shape) for step in plan.steps.values())
        return LIBRARY_BYTES + 5 * 4 * max(widths) ** 2 + 4 * 4 * largest
    hidden = (checkpoint.config or {}).get("hidden_size") or min(widths)
    return calibrated_peak(checkpoint, request, hidden, block_copies=2, extra_bytes=5 * 4 * max(widths) ** 2)

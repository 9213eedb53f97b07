"""What --dry-run says."""

from __future__ import annotations

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.dry_run import LIBRARY_BYTES, calibrated_peak, table
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.request import Request

WITHOUT_TEXT = ("magnitude", "random", "svd", "even", "prefix")


def forecast(checkpoint: Checkpoint, plan: Plan, request: Request) -> dict:
    """Action, bytes and reason for each tensor; exact output bytes, estimated memory, disk needed."""
    changes = {name: (action.action, action.nbytes, action.reason) for name, action in plan.actions.items()}
    scratch = plan.nbytes if request.rounds > 1 else 0  # the round before
    return table(checkpoint, changes, plan.nbytes, scratch, _peak(checkpoint, request), plan.warnings)


def _peak(checkpoint: Checkpoint, request: Request) -> int:
    if request.stats is not None:  # a layer's Hessian and its factor
        widest = max(
            (max(info.shape, default=0) for info in checkpoint.tensors.values() if len(info.shape) == 2), default=0
        )
        return LIBRARY_BYTES + 5 * 4 * widest**2
    if request.method in WITHOUT_TEXT:
        return LIBRARY_BYTES + 4 * 4 * max((info.params for info in checkpoint.tensors.values()), default=0)
    return calibrated_peak(checkpoint, request, (checkpoint.config or {}).get("hidden_size") or 0, block_copies=3)

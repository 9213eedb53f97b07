"""Learning rates over a run: functions of the step alone, so that a resumed run needs to remember nothing."""

from __future__ import annotations

import math

import torch
from tersor.formats.errors import TersorError

SCHEDULES = "constant", "linear", "cosine"
FLOOR = 0.1  # of the peak: where linear and cosine end


def default_warmup(steps: int) -> int:
    """A tenth of the run, at most 100 steps: Adam's second moments know a thousand gradients at best anyway."""
    return min(100, steps // 10)


def learning_rate(schedule: str, step: int, steps: int, peak: float, warmup: int | None = None) -> float:
    """Rate of `step` (1..steps): up in a line to `peak` at step `warmup`, then as `schedule` says.

    `linear` and `cosine` reach a tenth of the peak at the last step. `warmup` None is `default_warmup`. Raises TersorError
    for an unknown schedule or a warm-up longer than the run."""
    if schedule not in SCHEDULES:
        raise TersorError(f"schedule {schedule!r} is unknown", f"one of {', '.join(SCHEDULES)}")
    warmup = default_warmup(steps) if warmup is None else warmup
    if not 0 <= warmup <= steps:
        raise TersorError(f"{warmup} steps of warm-up in a run of {steps}", f"--warmup from 0 to {steps}")
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    first = max(warmup, 1)  # the last step at the peak
    done = (step - first) / max(1, steps - first)
    share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (FLOOR + (1 - FLOOR) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr

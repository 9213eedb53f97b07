"""A run made again from its log: no data, no teacher, no forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from tersor.formats.errors import TersorError
from tersor.ops.distill.forward_only.build import METHODS
from tersor.ops.distill.forward_only.log import Log
from torch import nn


def replay(parameters: Mapping[str, nn.Parameter], log: Log, steps: int | None = None) -> int:
    """Apply the log, or its first `steps`, to `parameters` as they were before the run; returns the number of steps.

    Gives the bytes that the run gave. Raises TersorError when the log is of other parameters, of a method that is not
    known, or shorter than `steps`."""
    if log.method not in METHODS:
        raise TersorError(f"the log is of {log.method!r}", f"known are {', '.join(METHODS)}")
    if steps is not None and not 0 <= steps <= len(log.steps):
        raise TersorError(f"the log has {len(log.steps)} steps, not {steps}", "replay fewer")
    method = METHODS[log.method].from_settings(parameters, log.settings)
    chosen = log.steps[:steps]
    for entry in chosen:
        method.apply(entry["seed"], entry["scalar"], entry["lr"])
    return len(chosen)

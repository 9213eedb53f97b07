"""How much a weight matters to a pattern: its magnitude, times the norm of its input where statistics are given (Wanda)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.collected import Collected
from tersor.ops.model.selection import Linear
from tersor.ops.model.statistics import is_starved


class Importance:
    """`importance(name, weight)` float32 `[out, in]` of a weight `[out, in]`."""

    def __init__(self, stats: Path | None, checkpoint: Checkpoint, linears: Collection[Linear], device: torch.device):
        """Raises TersorError when the statistics are another checkpoint's, or lack one of `linears`."""
        self.collected = stats and Collected(stats, checkpoint, linears, {"column_norms"}, device)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        magnitude = weight.float().abs()
        statistics = self.collected.statistics(name) if self.collected else None
        if is_starved(statistics):
            return magnitude
        return magnitude * statistics.column_norms.to(weight.device)

"""The smallest weights of each layer go. No data."""

from __future__ import annotations

import torch
from tersor.ops.prune.weights.by_score import ByScore


class Magnitude(ByScore):
    def scores(self, weight: torch.Tensor, statistics, name: str) -> torch.Tensor:
        return weight.abs()

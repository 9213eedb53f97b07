"""RIA: a weight's share of its row and of its column, times a root of its input's norm.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024).
"""

from __future__ import annotations

import torch
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.prune.weights.by_score import ByScore

EXPONENT = 0.5


class RIA(ByScore):
    needs = frozenset({"column_norms"})

    def scores(self, weight: torch.Tensor, statistics: InputStatistics | None, name: str) -> torch.Tensor:
        """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^0.5; without statistics the first factor."""
        magnitude = weight.abs()
        tiny = torch.finfo(torch.float32).tiny
        relative = magnitude / magnitude.sum(1, keepdim=True).clamp_min(tiny)
        relative += magnitude / magnitude.sum(0, keepdim=True).clamp_min(tiny)
        return relative if statistics is None else relative * statistics.column_norms**EXPONENT

"""Wanda: weights by magnitude times the norm of their input, compared within each output row.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
"""

from __future__ import annotations

import torch
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.prune.weights.by_score import ByScore


class Wanda(ByScore):
    needs = frozenset({"column_norms"})
    per_row = True

    def scores(self, weight: torch.Tensor, statistics: InputStatistics | None, name: str) -> torch.Tensor:
        """|W_ij| ||X_j||; without statistics (an expert that hardly a token reached) |W_ij|."""
        return weight.abs() if statistics is None else weight.abs() * statistics.column_norms

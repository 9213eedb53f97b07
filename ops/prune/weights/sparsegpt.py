"""SparseGPT: the weights that cost least go, and those to their right make up for them.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv:2301.00774).
Shares the error-compensation kernel with GPTQ.
"""

from __future__ import annotations

from math import ceil

import torch
from tersor.kernels.error_compensation import compensate
from tersor.ops.model.inverse_hessian import DAMPING, inverse_factor
from tersor.ops.model.patterns import Pattern, keep_mask
from tersor.ops.model.statistics import InputStatistics

BLOCK = 128  # columns whose mask is chosen together


class SparseGPT:
    """Masks by w^2 / [U_jj]^2, U the upper Cholesky factor of the inverse Hessian, in blocks of 128 columns."""

    needs = frozenset({"hessian"})

    def __init__(self, damping: float = DAMPING):
        self.damping = damping

    def prune(
        self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, name: str
    ) -> torch.Tensor:
        """`weight` float32 `[out, in]` with zeros, the others updated. What is zero already goes first and stays zero.

        Without statistics (an expert that hardly a token reached) the smallest weights go.
        """
        alive = weight != 0
        if statistics is None:
            return torch.where(keep_mask(weight.abs(), pattern, sparsity), weight, 0)
        if "sparsegpt" not in statistics.prepared:
            statistics.prepared["sparsegpt"] = inverse_factor(statistics.hessian, self.damping)
        factor = statistics.prepared["sparsegpt"]
        cost = factor.diagonal()

        def choose(view: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            """The mask of columns `start..stop` from what the weights are by now."""
            scores = torch.where(alive[:, start:stop], (view / cost[start:stop]).abs(), -1.0)
            return keep_mask(scores.contiguous(), pattern, sparsity)

        every = pattern.m if pattern.kind == "n:m" else BLOCK
        if pattern.kind == "tile":
            every = ceil(BLOCK / pattern.columns) * pattern.columns
        keep = None if bool(alive.all()) else alive
        return compensate(weight, factor, keep=keep, prepare=choose, prepare_every=every).weight

"""Methods that give every weight a score and drop the lowest, leaving the others as they are."""

from __future__ import annotations

import torch
from tersor.ops.model.patterns import Pattern, keep_mask
from tersor.ops.model.statistics import InputStatistics


class ByScore:
    """A subclass has `scores`; `per_row` compares within each output row instead of the whole matrix."""

    needs: frozenset[str] = frozenset()
    per_row = False

    def scores(self, weight: torch.Tensor, statistics: InputStatistics | None, name: str) -> torch.Tensor:
        """Not negative, `[out, in]` like `weight`."""
        raise NotImplementedError

    def prune(
        self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, name: str
    ) -> torch.Tensor:
        """`weight` float32 `[out, in]` with at least the share `sparsity` of zeros. What is zero already goes first."""
        scores = torch.where(weight == 0, -1.0, self.scores(weight, statistics, name))
        return torch.where(keep_mask(scores, pattern, sparsity, self.per_row), weight, 0)

"""The best values of the weights that stay, for a mask that is given: least squares by conjugate gradients.

Wanda and RIA leave what stays as it was. SparseGPT fixes columns from left to right, so a weight never makes up for what
goes later to its right. Some steps of conjugate gradients on all that stay, of all rows at once, win that back (as in
ALPS, Meng et al., arXiv:2406.07831).
"""

from __future__ import annotations

import torch
from tersor.ops.model.patterns import Pattern
from tersor.ops.model.statistics import InputStatistics

STEPS = 8


class Repaired:
    """Another method's mask, and the values that fit it best."""

    needs = frozenset({"hessian"})  # whose diagonal holds the column norms

    def __init__(self, chosen, damping: float):
        self.chosen, self.damping = chosen, damping

    def prune(
        self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, name: str
    ) -> torch.Tensor:
        """`weight` float32 `[out, in]` with the zeros of the method. Without statistics the others stay as they are."""
        pruned = self.chosen.prune(weight, statistics, pattern, sparsity, name)
        return pruned if statistics is None else refit(weight, pruned, statistics.hessian, self.damping)


def refit(
    weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor, damping: float, steps: int = STEPS
) -> torch.Tensor:
    """`pruned` float32 `[out, in]` with its zeros, the others moved to lower tr((W - V) (H + damping mean(diag H)) (W - V)^T).

    `weight` is the dense W `[out, in]`, `hessian` `[in, in]`. The error of no row grows.
    """
    keep = (pruned != 0).float()
    ridge = damping * hessian.diagonal().mean()
    scale = (hessian.diagonal() + ridge).clamp_min(torch.finfo(torch.float32).tiny)  # the preconditioner

    def curved(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix @ hessian).add_(ridge * matrix).mul_(keep)

    found = pruned.clone()
    rest = curved(weight - pruned)  # half of the descent direction
    direction = rest / scale
    energy = (rest * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = curved(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)
        found.addcmul_(step, direction)
        rest.addcmul_(step, image, value=-1)
        conditioned = rest / scale
        renewed = (rest * conditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(energy > 0, renewed / energy, 0)).add_(conditioned)
        energy = renewed
    return found

"""The layer behind what was removed is refitted, so that what is left makes up for it as far as it can.

Least squares on the layer's own inputs, as in the reconstruction step of channel pruning (He, Zhang, Sun, ICCV 2017),
from the second moments H = X^T X alone.
"""

from __future__ import annotations

import torch
from tersor.ops.model.statistics import InputStatistics

HELD_OUT = 4  # one token of so many is not fitted
FACTORS = (10, 100, 1000)
FLOOR = 1e-3
DAMPINGS = 12  # each ten times the last


def refit(weight: torch.Tensor, hessian: torch.Tensor, places: torch.Tensor, damping: float) -> torch.Tensor:
    """The weight `[out, kept]` that gives X[:, places] the output nearest to X W^T. weight `[out, in]`, hessian `[in, in]`.

    Minimises |X W^T - X_k V^T|^2 + damping * mean(diag H) * |V - W_k|^2, whose solution is
    V = W_k + W_r H_rk (H_kk + damping * mean(diag H) I)^-1, with k kept and r removed. The ridge pulls towards the weights
    as they are and not to zero: in directions that the calibration text never takes, nothing changes.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[places] = False
    kept = weight[:, places].float()
    strength = damping * hessian.diagonal().mean()
    if not bool(strength > 0):
        strength = torch.finfo(torch.float32).eps * hessian.diagonal().max().clamp(min=1e-30)
    matrix = hessian[places][:, places].clone()
    target = weight[:, removed].float() @ hessian[removed][:, places]  # [out, kept]
    for _ in range(DAMPINGS):
        damped = matrix.clone()
        damped.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return kept + torch.cholesky_solve(target.T, factor).T
        strength = strength * 10  # singular: more damping, as little as it takes
    return kept


def held_out_damping(
    weight: torch.Tensor, statistics: InputStatistics, places: torch.Tensor, damping: float
) -> float | None:
    """How much of `damping` and its multiples refits best: judged on inputs that the fit does not see.

    As many unknowns as calibration tokens fit these tokens and nothing else. `statistics` holds the second moments of all
    tokens and the first rows themselves: a quarter of the tokens at most is left out, and the error is theirs. None: the
    weights as they are do best on them.
    """
    rows = statistics.samples[: statistics.tokens // HELD_OUT]
    kept_tokens = statistics.tokens - len(rows)
    rest = (statistics.hessian * statistics.tokens - rows.T @ rows) / kept_tokens
    expected = rows @ weight.T

    def error(new: torch.Tensor) -> float:
        return (rows[:, places] @ new.T - expected).square().sum().item()

    best, least = None, error(weight[:, places])
    for choice in (damping, *(max(damping, FLOOR) * factor for factor in FACTORS)):
        found = error(refit(weight, rest, places, choice))
        if found < least:
            best, least = choice, found
    return best

"""Truncated SVD in the norm of the layer's output (SVD-LLM, arXiv 2403.07378; the idea goes back to DRONE).

||(W - W') X||^2 = ||(W - W') L||^2 with L L^T = X X^T. So W L is truncated, and L is undone on the right factor: of all
matrices of this rank, the one whose output on the calibration text is nearest.
"""

from __future__ import annotations

import torch
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.prune.ranks.svd import Product, truncated_svd

LEAST_DAMPING, MOST_DAMPING = 1e-6, 1.0


def whitening(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower L `[in, in]`, float64, with L L^T = H + damping * mean(diag H) * I.

    The damping grows tenfold while that is not positive definite (fewer tokens than inputs, and no damping asked for).
    Raises ValueError when even the largest does not help: the inputs hold NaN or infinities.
    """
    hessian = hessian.double()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = float(hessian.diagonal().mean())
    if mean == 0:
        return identity  # the layer saw nothing but zeros: every direction counts the same
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed and bool(torch.isfinite(lower).all()):
            return lower
        if damping >= MOST_DAMPING:
            raise ValueError(f"X X^T of {len(hessian)} inputs is not positive definite with damping {damping}")
        damping = max(10 * damping, LEAST_DAMPING)


def whitened(weight: torch.Tensor, rank: int, statistics: InputStatistics, damping: float) -> Product:
    """Factors `[out, rank]`, `[rank, in]` of `weight` `[out, in]`, float64. `energy` is that of W L.

    Layers that read the same input share L. Raises ValueError as `whitening` does.
    """
    if "whitening" not in statistics.prepared:
        statistics.prepared["whitening"] = whitening(statistics.hessian, damping)
    lower = statistics.prepared["whitening"]
    left, singular, right, energy = truncated_svd(weight.double() @ lower, rank)
    unwhitened = torch.linalg.solve_triangular(lower, right, upper=False, left=False)  # right @ L^-1
    root = singular.sqrt()
    return Product(left * root, root[:, None] * unwhitened, energy)

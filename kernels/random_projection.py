"""Gaussian projections of gradients that are never stored: what APOLLO keeps its moments of (arXiv:2412.05270).

A projection is `P / sqrt(rank)` with P from `normal(seed)`, made a panel at a time and multiplied at once, so that memory
follows the panel, not the matrix. The same seed gives the same P on every device and in every process."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check
from tersor.kernels.perturb import normal, reference_normal
from torch import Tensor

PANEL = 1 << 20  # numbers of P that exist at a time


def reference_random_projection(gradient, rank, seed, side="left"):
    """The definition: all of P at once; column i of P (`[rank, m]`) is numbers `i * rank` to `(i + 1) * rank`."""
    size = gradient.shape[0 if side == "left" else 1]
    numbers = torch.from_numpy(reference_normal(seed, 0, size * rank)).to(gradient.device).view(size, rank)
    projection = numbers.t() / rank**0.5
    g = gradient.float()
    return projection @ g if side == "left" else g @ projection.t()


def random_projection(gradient: Tensor, rank: int, seed: int, side: str = "left", out: Tensor | None = None) -> Tensor:
    """`P @ G` float32 `[rank, n]` of `gradient` `[m, n]` (side "left"), or `G @ P^T` `[m, rank]` (side "right").

    P is Gaussian with variance 1 / rank, so that norms are kept on average; it is a function of `seed` (0..2^63-1), of
    the rank and of the projected dimension. `out` receives the result. Raises ValueError for other shapes."""
    check(gradient.ndim == 2, f"gradient must be a matrix, not {tuple(gradient.shape)}")
    check(side in ("left", "right"), f"side must be left or right, not {side!r}")
    check(rank >= 1, f"rank {rank} is not positive")
    rows, columns = gradient.shape
    size, shape = (rows, (rank, columns)) if side == "left" else (columns, (rows, rank))
    if out is None:
        out = torch.empty(shape, device=gradient.device)
    check(out.shape == shape and out.dtype == torch.float32, f"out must be float32 {shape}")
    if backend(gradient) == "reference":
        return out.copy_(reference_random_projection(gradient, rank, seed, side))
    out.zero_()
    step = max(1, PANEL // rank)
    for first in range(0, size, step):
        last = min(size, first + step)
        panel = normal(seed, first * rank, (last - first) * rank, gradient.device).view(-1, rank)
        if side == "left":
            out.addmm_(panel.t(), gradient[first:last].float(), alpha=rank**-0.5)
        else:
            out.addmm_(gradient[:, first:last].float(), panel, alpha=rank**-0.5)
    return out

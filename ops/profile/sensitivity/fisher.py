"""What a change of a weight does to the model's prediction, to second order.

For a small change D of a weight, the KL divergence between the old and the new prediction is about half of d^T F d, F the
Fisher information. Rounding errors of different weights hardly correlate, so its diagonal is enough: half of the sum of
F_ij D_ij^2, as in SqueezeLLM (Kim et al., arXiv:2306.07629), with F from labels drawn from the model (the true Fisher, not
the empirical one).
"""

from __future__ import annotations

import torch


class FisherDiagonal:
    """Sums the squared gradients of one weight `[out, in]`, a window at a time."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """What came in, `[windows, positions, in]`, and the loss's gradient with respect to what came out, `[..., out]`.

        Without a dimension of windows (an expert's tokens) all rows count as one window.
        """
        if inputs.dim() < 3:
            inputs, gradients = inputs[None], gradients[None]
        for x, g in zip(inputs.flatten(0, -3), gradients.flatten(0, -3), strict=True):
            gradient = g.float().T @ x.float()
            if self._sum is None:
                self._sum = torch.zeros_like(gradient)
            self._sum.addcmul_(gradient, gradient)

    def damage(self, change: torch.Tensor, positions: int) -> float:
        """Half of d^T diag(F) d per position, for a change `[out, in]`; 0 for a weight that no token reached."""
        if self._sum is None:
            return 0.0
        return float((self._sum * change * change).sum(dtype=torch.float64)) / 2 / positions

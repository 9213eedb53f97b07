"""How much a unit matters. Everything here sees what has been summed over the weights of the units, never a model.

The five scores of HESSO ("Towards Automatic Efficient and User-Friendly Neural Network Training and Pruning", Chen et
al. 2024; its code divides each by its norm over all groups and adds them with equal shares). There `d` is the direction
that the optimiser subtracts from the weights; a command that does not train has the gradient of its calibration loss.
"""

from __future__ import annotations

import torch

PANEL_VALUES = 1 << 22
SHARE = 0.2  # of each of the five scores
SCORES = ("magnitude", "average magnitude", "cosine", "first-order Taylor", "second-order Taylor")


class Moments:
    """Sums over all weights w of each unit, and over their gradients d: |w|^2, |d|^2, <w, d>, each `[units]`."""

    def __init__(self, count: int):
        self.weights = torch.zeros(count)
        self.gradients = torch.zeros(count)
        self.products = torch.zeros(count)
        self.size = 0  # weights per unit

    def add(self, weights: torch.Tensor, gradients: torch.Tensor | None = None) -> None:
        """Take in one tensor's share `[units, values]`."""
        self.size += weights.shape[1]
        rows = max(1, PANEL_VALUES // max(weights.shape[1], 1))
        for start in range(0, len(weights), rows):
            panel = slice(start, start + rows)
            values = weights[panel].float()
            self.weights[panel] += values.square().sum(1).cpu()
            if gradients is not None:
                self.gradients[panel] += gradients[panel].square().sum(1).cpu()
                self.products[panel] += (values * gradients[panel]).sum(1).cpu()


def magnitude(moments: Moments) -> torch.Tensor:
    """L2 norm of each unit's weights `[units]`."""
    return moments.weights.sqrt()


def taylor(moments: Moments) -> torch.Tensor:
    """|<w, d>|: how much the loss would change, to first order, if the unit were zero `[units]`."""
    return moments.products.abs()


def five_scores(moments: Moments) -> torch.Tensor:
    """L2 norm, L2 norm / size, cos(w, d) + 1, |<w, d>| and <w, d>^2 / 2 of each unit `[5, units]`."""
    norms = moments.weights.sqrt()
    cosine = moments.products / (norms + 1e-8) / (moments.gradients.sqrt() + 1e-8)
    return torch.stack(
        [norms, norms / max(moments.size, 1), cosine + 1, moments.products.abs(), moments.products.square() / 2]
    )


def saliency(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    """The five scores `[5, units]` of every group, each divided by its L2 norm over all groups, added: `[units]` each."""
    if not scores:
        return []
    norms = torch.cat(scores, dim=1).double().norm(dim=1).clamp(min=1e-30)
    return [SHARE * (group.double() / norms[:, None]).sum(0).float() for group in scores]


def activation(squares: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Norm of the unit's activation times the norm of the column that reads it, over the columns of each unit.

    `squares` `[units, k]` are mean squares of the inputs, `columns` `[units, k]` are squared norms of the columns.
    """
    return (squares * columns).sum(1).sqrt()


def strongest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` units with the highest scores, in ascending order; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:kept].sort().values

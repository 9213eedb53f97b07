"""What calibration learns about the inputs of a linear layer. One object serves all layers that read the same tensor."""

from __future__ import annotations

import math

import torch

PANEL_COLUMNS = 192
# Below this many tokens the statistics of a layer (an expert) say little, and methods do without them.
FEWEST_TOKENS = 16
KINDS = ("column_norms", "column_means", "hessian", "samples")


class InputStatistics:
    """Sums and means over the rows `[tokens, in]` that arrive at a layer, in float32.

    `needs` names what to collect: `column_norms` (sum of squares), `column_means` (sum of magnitudes),
    `hessian` (X^T X), `samples` (the first `max_samples` rows themselves).
    """

    def __init__(self, needs: frozenset[str] | set[str], max_samples: int = 512):
        unknown = set(needs) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown statistics: {sorted(unknown)}")
        self.needs, self.max_samples = needs, max_samples
        self.tokens = 0
        self.prepared: dict[str, object] = {}  # what algorithms derive once for all layers with this input
        self._squares = self._magnitudes = self._products = None
        self._mirrored = False  # whether the lower triangle of the products is up to date
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Take in one batch, any shape `[..., in]`."""
        x = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if "samples" in self.needs and self.tokens < self.max_samples:
            self._rows.append(x[: self.max_samples - self.tokens].clone())
        self.tokens += x.shape[0]
        if "column_norms" in self.needs:
            squares = torch.linalg.vector_norm(x, dim=0).square()
            self._squares = squares if self._squares is None else self._squares.add_(squares)
        if "column_means" in self.needs:
            magnitudes = torch.linalg.vector_norm(x, ord=1, dim=0)
            self._magnitudes = magnitudes if self._magnitudes is None else self._magnitudes.add_(magnitudes)
        if "hessian" in self.needs:
            if self._products is None:
                self._products = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            _add_products(self._products, x, self.tokens)
            self._mirrored = False

    @classmethod
    def restored(
        cls, tokens: int, squares: torch.Tensor | None = None, hessian: torch.Tensor | None = None
    ) -> InputStatistics:
        """What was collected before: sums of squares `[in]`, and a whole X^T X / tokens `[in, in]`."""
        found = cls({"column_norms"} if hessian is None else {"hessian"})
        found.tokens, found._squares, found._products, found._mirrored = tokens, squares, hessian, True
        return found

    @property
    def column_norms(self) -> torch.Tensor:
        """Root of the sum of squares of each input `[in]`."""
        if self._squares is None and self._products is not None:
            return (self._products.diagonal() * self.tokens).sqrt()
        return self._squares.sqrt()

    @property
    def squares(self) -> torch.Tensor:
        """Sum of squares of each input `[in]`."""
        return self._squares

    @property
    def column_means(self) -> torch.Tensor:
        """Mean magnitude of each input `[in]`."""
        return self._magnitudes / max(self.tokens, 1)

    @property
    def hessian(self) -> torch.Tensor:
        """X^T X / tokens `[in, in]`: half the second derivative of the mean squared output error. Not to be written to."""
        if not self._mirrored:
            _mirror(self._products)
            self._mirrored = True
        return self._products

    def rescale(self, factor: torch.Tensor) -> None:
        """What would have been collected had every input been multiplied by `factor` `[in]`."""
        self.prepared.clear()
        if self._squares is not None:
            self._squares.mul_(factor.square())
        if self._magnitudes is not None:
            self._magnitudes.mul_(factor.abs())
        if self._products is not None:
            self._products.mul_(factor).mul_(factor[:, None])
            self._mirrored = False  # the rounding of the two products differs between the triangles
        self._rows = [rows * factor for rows in self._rows]

    @property
    def samples(self) -> torch.Tensor:
        """The first rows that arrived `[≤ max_samples, in]`."""
        return torch.cat(self._rows)


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """||X W^T||^2 per row of X, of a weight or of a change of one `[out, in]`, from X^T X `[in, in]`."""
    return float((weight @ hessian * weight).sum())


def is_starved(statistics: InputStatistics | None) -> bool:
    """Whether so few tokens reached a layer that methods do without its statistics."""
    return statistics is None or statistics.tokens < FEWEST_TOKENS


def starved_warning(names: list[str], fate: str) -> list[str]:
    """What the report says of the layers `names`, and of what was done to them instead."""
    if not names:
        return []
    few = f"{len(names)} layers saw fewer than {FEWEST_TOKENS} calibration tokens"
    return [f"{few} and were {fate}, for example {names[0]}"]


def output_error(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """||X (W - V)^T||^2 / ||X W^T||^2 of two weights `[out, in]` from X^T X `[in, in]`: the error of the layer's output."""
    energy = output_energy(weight, hessian)
    return output_energy(weight - changed, hessian) / energy if energy > 0 else 0.0


def weight_error(weight: torch.Tensor, stored: torch.Tensor) -> dict:
    """What the stored weight is off, in the words of every report: ||W - V||^2 / ||W||^2, and the same in decibels."""
    error, norm = torch.linalg.vector_norm(weight - stored.float()), torch.linalg.vector_norm(weight)
    return in_decibels(float(error / norm) ** 2 if error else 0.0)


def in_decibels(relative_mse: float) -> dict:
    return {"relative_mse": relative_mse, "sqnr_db": -10 * math.log10(relative_mse) if relative_mse > 0 else None}


def _add_products(products: torch.Tensor, x: torch.Tensor, tokens: int) -> None:
    """Take the rows `x` into the mean x^T x of `tokens` rows, these included.

    Only on the upper block triangle: the lower one is its mirror, so half of the work is saved.
    """
    tokens = max(tokens, 1)
    before, share = (tokens - x.shape[0]) / tokens, 1 / tokens
    for start in range(0, x.shape[1], PANEL_COLUMNS):
        panel = x[:, start : start + PANEL_COLUMNS]
        products[start : start + PANEL_COLUMNS, start:].addmm_(panel.T, x[:, start:], beta=before, alpha=share)


def _mirror(products: torch.Tensor) -> None:
    """Copy the upper triangle to the lower one, panel by panel, without a second matrix."""
    for start in range(0, products.shape[1], PANEL_COLUMNS):
        stop = start + PANEL_COLUMNS
        corner = products[start:stop, start:stop].triu()
        products[start:stop, start:stop] = corner + corner.triu(diagonal=1).T
        products[stop:, start:stop] = products[start:stop, stop:].T

"""Which weights may be zero together, and the mask with the least loss under that rule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError

if TYPE_CHECKING:
    import torch

N_OF_M = re.compile(r"(\d+):(\d+)")
FEW = 8  # up to so many scores, comparing each with each beats sorting
TILE = re.compile(r"(block|vector):(\d+)x(\d+)")


@dataclass(frozen=True)
class Pattern:
    """`unstructured`; `n:m`: at most n of m neighbouring inputs are not zero; `tile`: `rows` x `columns` at once."""

    kind: str = "unstructured"
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a weight `[out, in]` cannot have this pattern."""
        out, columns = shape
        if self.kind == "n:m" and columns % self.m:
            return f"{columns} inputs are not divisible by {self.m}"
        if self.kind == "tile" and (out % self.rows or columns % self.columns):
            return f"[{out}, {columns}] does not divide into tiles of {self.rows}x{self.columns}"
        return None


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, `2:4`, `block:16x16`, `vector:32x1`. Raises TersorError for anything else."""
    if text == "unstructured":
        return Pattern()
    if found := N_OF_M.fullmatch(text):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return Pattern("n:m", n, m)
        raise TersorError(f"--pattern {text}: keeps {n} of {m} weights", "N must be between 1 and M - 1, as in 2:4")
    if found := TILE.fullmatch(text):
        rows, columns = int(found[2]), int(found[3])
        if rows * columns > 1 and (found[1] == "block" or 1 in (rows, columns)):
            return Pattern("tile", rows=rows, columns=columns)
    raise TersorError(f"--pattern {text!r} is not known", "unstructured, N:M as 2:4, block:16x16 or vector:32x1")


def keep_mask(scores: torch.Tensor, pattern: Pattern, sparsity: float, per_row: bool = False) -> torch.Tensor:
    """True for the weights that stay, bool `[out, in]`.

    The floor(sparsity * n) least `scores` `[out, in]` go, of equal ones the first. They are compared within the whole
    matrix, or with `per_row` within each row (row of tiles), as Wanda does; n:m compares within its m. A tile's score is
    the sum of its squared scores. A negative score is that of a weight that is gone already.
    """
    import torch

    if pattern.kind == "n:m":
        groups = scores.unflatten(1, (-1, pattern.m))
        return _largest(groups, pattern.m - pattern.n).flatten(1)
    if pattern.kind == "tile":
        tiles = scores.unflatten(1, (-1, pattern.columns)).unflatten(0, (-1, pattern.rows))
        energy = tiles.clamp_min(0).square().sum((1, 3))
        energy = torch.where(tiles.amax((1, 3)) < 0, -1.0, energy)
        keep = keep_mask(energy, Pattern(), sparsity, per_row)
        return keep.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    if per_row:
        return _largest(scores, removed(scores.shape[1], sparsity))
    return _largest(scores.reshape(-1), removed(scores.numel(), sparsity)).view(scores.shape)


def removed(count: int, sparsity: float) -> int:
    """floor(sparsity * count), where 0.7 * 10 is 7."""
    return int(sparsity * count + 1e-6)


def _largest(scores: torch.Tensor, drop: int) -> torch.Tensor:
    """All but the `drop` least of the last dimension, of equal ones the first go."""
    import torch

    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.shape[-1] <= FEW:
        rank = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)  # how many go before it
        columns, ranks = scores.unbind(-1), rank.unbind(-1)
        for right in range(len(columns)):
            for left in range(right):
                left_goes = (columns[left] <= columns[right]).view(torch.uint8)
                ranks[right].add_(left_goes)
                ranks[left].add_(1 - left_goes)
        return rank >= drop
    rows = scores.reshape(-1, scores.shape[-1])
    limit = rows.kthvalue(drop, dim=-1, keepdim=True).values
    keep = rows > limit
    surplus = rows.shape[-1] - drop - keep.sum(-1)  # how many that equal the limit stay: the last ones
    for row in surplus.nonzero().flatten().tolist():
        equal = (rows[row] == limit[row]).nonzero().flatten()
        keep[row, equal[len(equal) - surplus[row] :]] = True
    return keep.view(scores.shape)

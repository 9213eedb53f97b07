"""LIM: how little a block's output looks like its input, on calibration text.

Dumitru et al. (arXiv:2406.17415, see `zd`): LIM = -cos(input, output), both as one long vector. Larger: more important.
"""

from __future__ import annotations

import torch


class Lim:
    """Adds up over batches what the cosine is made of."""

    def __init__(self) -> None:
        self._product = self._before = self._after = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Input and output of the block, `[..., hidden]`."""
        before, after = before.double().flatten(), after.double().flatten()
        self._product += float(before @ after)
        self._before += float(before @ before)
        self._after += float(after @ after)

    @property
    def score(self) -> float:
        """In [-1, 1]; 0 where one of them is zero."""
        norm = (self._before * self._after) ** 0.5
        return -self._product / norm if norm else 0.0

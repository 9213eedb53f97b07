"""From the magnitudes of a layer's inputs to the threshold below which a given share of them lies."""

from __future__ import annotations

import torch

DROPPED_BITS = 12  # of 23 in the mantissa of a float32: a bin is 1/2048 of its power of two wide
BINS = 1 << (31 - DROPPED_BITS)


class MagnitudeHistogram:
    """How often each magnitude came: 2^19 bins, which are the leading bits of the float32 number itself.

    So bins are fine wherever the numbers are, no range has to be known before, and memory is 4 MiB whatever comes. The
    first bin holds 0 and what is below 1e-40.
    """

    def __init__(self):
        self.counts: torch.Tensor | None = None
        self.total = 0
        self._below: torch.Tensor | None = None  # how many are in a bin or below it

    def add(self, x: torch.Tensor) -> None:
        """Take in one batch of any shape."""
        self.add_counts(magnitude_counts(x), x.numel())

    def add_counts(self, counts: torch.Tensor, total: int) -> None:
        """Take in what `magnitude_counts` made of `total` numbers."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.total += total
        self._below = None

    @property
    def zeros(self) -> float:
        """Share of the numbers that are zero already."""
        return float(self.counts[0]) / self.total

    def threshold(self, share: float) -> float:
        """The least bin edge t such that at least `share` of the numbers have |x| <= t; 0 where zeros are enough."""
        if self._below is None:
            self._below = self.counts.cumsum(0)
        found = int(torch.searchsorted(self._below, min(share, 1.0) * self.total))
        if found == 0:
            return 0.0
        edge = torch.tensor(((found + 1) << DROPPED_BITS) - 1, dtype=torch.int32)  # the largest float in the bin
        return float(edge.view(torch.float32))


def magnitude_counts(x: torch.Tensor) -> torch.Tensor:
    """Numbers of `x` in each bin `[BINS]`, int64, on the CPU."""
    bits = x.detach().to(torch.float32).abs().reshape(-1).view(torch.int32)
    return torch.bincount(bits >> DROPPED_BITS, minlength=BINS).cpu()

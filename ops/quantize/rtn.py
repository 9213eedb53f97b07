"""Rounding to nearest: no data, any size of model, seconds."""

from __future__ import annotations

import torch
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.statistics import InputStatistics


class RTN:
    """Nearest grid point, with the range of each group clipped where that lowers the squared error.

    With calibration statistics at hand the error is weighted by each input's energy.
    """

    needs = frozenset()

    def __init__(self, clip: bool = True):
        self.clip = clip

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """`weight` `[out, in]` of any float dtype."""
        energy = statistics.column_norms.square() if statistics is not None else None
        return round_to_nearest(weight, scheme, scale_dtype, energy, self.clip)

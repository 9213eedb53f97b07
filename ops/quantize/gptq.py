"""GPTQ: each column's rounding error is made up for by the columns not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Columns go in
order of falling input energy ("activation order"); groups and their scales are fixed before that on the original
columns ("static groups"), so that the stored weights need no column index and load everywhere. With all codes known,
the scales are fitted once more (`refit_scale`).
"""

from __future__ import annotations

import torch
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.kernels.error_compensation import compensate
from tersor.ops.model.grid import find_grid, round_to_nearest
from tersor.ops.model.inverse_hessian import DAMPING, inverse_factor
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.quantize.refit_scale import refit_scale


class GPTQ:
    """Error-compensated rounding on a grid found by clip search weighted with the input energies.

    `clip` searches the ranges, `refit` fits the scales to the codes in the end, `keep_zeros` leaves weights alone that
    are zero on arrival.
    """

    needs = frozenset({"hessian"})

    def __init__(
        self,
        damping: float = DAMPING,
        activation_order: bool = True,
        clip: bool = True,
        keep_zeros: bool = True,
        refit: bool = True,
    ):
        self.damping, self.activation_order, self.clip = damping, activation_order, clip
        self.keep_zeros, self.refit = keep_zeros, refit

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """`weight` `[out, in]`. No statistics: rounding to nearest."""
        if scheme.kind == "float" or statistics is None:
            return round_to_nearest(weight, scheme, scale_dtype, clip=self.clip)
        weight = weight.float()
        energy, order, factor = self._prepare(statistics)
        scale, zero_point = find_grid(weight, scheme, scale_dtype, energy, self.clip)
        group = torch.arange(weight.shape[1], device=weight.device) // (scheme.group_size or weight.shape[1])
        keep = weight != 0
        codes = compensate(
            weight[:, order],
            factor,
            scale=scale.float(),
            zero_point=zero_point,
            group_index=group[order],
            bits=scheme.bits,
            keep=keep[:, order] if self.keep_zeros and not bool(keep.all()) else None,
        ).codes
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        codes = codes[:, inverse].contiguous()
        if self.refit:
            scale = refit_scale(weight, codes, scale, zero_point, statistics.hessian)
        return QuantizedWeight(codes, scale, zero_point)

    def _prepare(self, statistics: InputStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input energies, column order and factor; layers that share an input share them."""
        if "gptq" not in statistics.prepared:
            hessian = statistics.hessian
            energy = hessian.diagonal().clone()
            order = torch.arange(len(energy), device=energy.device)
            if self.activation_order:
                order = torch.argsort(energy, descending=True, stable=True)
            factor = inverse_factor(hessian[order][:, order], self.damping)
            statistics.prepared["gptq"] = energy, order, factor
        return statistics.prepared["gptq"]

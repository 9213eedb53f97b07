"""GPTQ: each column's rounding error is made up for by the columns not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Columns go in
order of falling input energy ("activation order"); groups and their scales are fixed before that on the original
columns ("static groups"), so that the stored weights need no column index and load everywhere.
"""

from __future__ import annotations

import torch
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.kernels.error_compensation import compensate
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.quantize.grid import find_grid, round_to_nearest

DAMPING = 0.01
LEAST_DAMPING = 1e-4  # after none was not enough
MOST_DAMPING = 10.0


class GPTQ:
    """Error-compensated rounding on a grid found by clip search weighted with the input energies."""

    needs = frozenset({"hessian"})

    def __init__(
        self, damping: float = DAMPING, activation_order: bool = True, clip: bool = True, keep_zeros: bool = True
    ):
        self.damping, self.activation_order, self.clip, self.keep_zeros = damping, activation_order, clip, keep_zeros

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """`weight` `[out, in]`. With `keep_zeros`, weights that are zero on arrival stay zero. No statistics: rounding to nearest."""
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
        return QuantizedWeight(codes[:, inverse].contiguous(), scale, zero_point)

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


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse, H^-1 = U^T U, of the damped Hessian `[in, in]`.

    Damping adds a share of the mean diagonal; it grows tenfold while the matrix is not positive definite (fewer tokens
    than inputs). An input that was never active gets a unit diagonal, which leaves its column without influence.
    Raises TersorError when even the largest damping does not help.
    """
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal().mean()
    hessian = hessian.clone()
    hessian.diagonal()[dead] = mean if mean > 0 else 1.0
    share = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        if share >= MOST_DAMPING:
            raise TersorError(
                f"the Hessian of {len(hessian)} inputs is not positive definite with damping {share}",
                "look for NaN or huge activations, or use more calibration text",
            )
        share = max(10 * share, LEAST_DAMPING)

"""From a weight and a scheme to scales, zero points and codes: rounding to nearest on a grid.

Scales are rounded to the dtype they are stored in before any code is computed (formats: compressed-tensors).
"""

from __future__ import annotations

import torch
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.kernels.group_quantize import group_quantize
from tersor.kernels.search_clip import search_clip

FP8_MAX = 448.0


def find_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    column_weight: torch.Tensor | None = None,
    clip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of an integer scheme for `weight` `[out, in]`: `[out, G]`.

    With `clip`, each group's range is shrunk by the ratio that makes the error weighted by `column_weight` `[in]` least.
    """
    size = _group_width(weight, scheme)
    ratios = {} if clip else {"ratios": (1.0,)}
    grid = search_clip(weight, scheme.bits, size, scheme.symmetric, scale_dtype, column_weight=column_weight, **ratios)
    if scheme.symmetric or not scheme.least_zero_point:
        return grid
    return _raise_zero_point(*grid, scheme.bits)


def _group_width(weight: torch.Tensor, scheme: Scheme) -> int:
    return scheme.group_size if scheme.strategy == "group" else weight.shape[1]


def _raise_zero_point(scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero points at the lowest code move up by one, and their scales grow so that the range is still covered.

    Groups with hardly a negative weight want the lowest; GPTQ v1 stores zero points less one and cannot hold it.
    """
    lowest = zero_point == -(2 ** (bits - 1))
    steps = 2**bits - 1
    return torch.where(lowest, scale * (steps / (steps - 1)), scale), zero_point + lowest.to(zero_point.dtype)


def round_to_nearest(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    column_weight: torch.Tensor | None = None,
    clip: bool = True,
) -> QuantizedWeight:
    """Quantize `weight` `[out, in]` without regard to how errors of different weights add up."""
    if scheme.kind == "float":
        return _to_fp8(weight.float(), scheme, scale_dtype)
    scale, zero_point = find_grid(weight, scheme, scale_dtype, column_weight, clip)
    size = _group_width(weight, scheme)
    return QuantizedWeight(group_quantize(weight, scale, zero_point, scheme.bits, size), scale, zero_point)


def _to_fp8(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """E4M3 with scale max|w| / 448 per row, tensor or block."""
    if scheme.strategy == "channel":
        peak = weight.abs().amax(dim=1, keepdim=True)
    elif scheme.strategy == "tensor":
        peak = weight.abs().amax().reshape(1)
    else:
        peak = block_amax(weight, scheme.block)
    scale = (peak / FP8_MAX).to(scale_dtype)
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale)
    spread = scale.float() if scheme.strategy != "block" else spread_blocks(scale.float(), scheme.block, weight.shape)
    codes = (weight / spread).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(codes, scale, None)


def block_amax(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude in each tile: `[ceil(out / rows), ceil(in / columns)]`."""
    rows, columns = block
    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).amax(dim=(1, 3))


def spread_blocks(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """One scale per tile to one per weight, `[out, in]`."""
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]

"""How far quantized weights are from the original, in one pass.

A measure for the report, not part of any algorithm: on a GPU plain torch is fast enough, so there is no Triton kernel."""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.group_range import on_grid
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor


def reference_quantization_error(weight, codes, scale, zero_point=None):
    """The definition."""
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        grouped = grouped - zero_point.float()[..., None]
    weight = weight.double()
    difference = (grouped * scale.float()[..., None]).view_as(weight).double() - weight
    return float(difference.square().sum()), float(weight.square().sum()), int((weight == 0).sum())


@compiled
def _sums(weight, codes, scale, zero_point, sums, begin, end):
    """Error, squares and zeros of rows `begin..end`, into `sums` float64 `[rows, 3]`."""
    size = weight.shape[1] // max(1, scale.shape[1])
    for row in range(begin, end):
        for group in range(scale.shape[1]):
            values = weight[row, group * size : (group + 1) * size]
            code = codes[row, group * size : (group + 1) * size]
            s = scale[row, group]
            z = zero_point[row, group] if len(zero_point) else np.float32(0)
            error = squares = np.float32(0)
            zeros = np.int32(0)
            for i in range(len(values)):
                difference = (np.float32(code[i]) - z) * s - values[i]
                error += difference * difference
                squares += values[i] * values[i]
                zeros += np.int32(values[i] == 0)
            sums[row, 0] += error
            sums[row, 1] += squares
            sums[row, 2] += zeros


def quantization_error(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> tuple[float, float, int]:
    """Sum of squared differences, sum of squared weights, and number of zero weights.

    `weight` `[out, in]`, `codes` int8 `[out, in]`, `scale` and `zero_point` `[out, G]`: `weight ~ (codes - zero_point) *
    scale`. Raises ValueError when shapes disagree."""
    scale, zero_point = on_grid(scale, zero_point, weight.shape[0], scale.shape[-1])
    if weight.device.type != "cpu":
        return reference_quantization_error(weight, codes, scale, zero_point)
    inputs = (
        array(weight, torch.float32, 2),
        array(codes, torch.int8, 2),
        array(scale, torch.float32, 2),
        array(zero_point, torch.float32, 2),
    )
    sums = np.zeros((weight.shape[0], 3))
    over_rows(lambda first, last: _sums(*inputs, sums, first, last), weight.shape[0])
    error, squares, zeros = sums.sum(0)
    return float(error), float(squares), int(zeros)

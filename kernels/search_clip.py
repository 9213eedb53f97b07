"""Clipping search: the range of a quantization group that minimizes its squared error.

Min-max scales spend codes on the largest weight of a group; a range shrunk by some ratio clips that weight and rounds
all others more finely. For every group the ratio with the smallest `sum column_weight * (w - dequantized)^2` wins
(`column_weight`: the mean square of the inputs gives the error of the layer's output, as in AWQ, arXiv:2306.00978).
"""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, integer_range, tl, triton
from tersor.kernels.group_range import (
    TILE,
    check_group_size,
    extremes,
    group_extremes,
    minmax_scale,
    round_half_even,
    scale_of,
    scales_for,
    storage_code,
)
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor

RATIOS = tuple(1 - 0.04 * i for i in range(16))

# The error falls, then grows with what is clipped. After so many ratios without a better one the CPU loop ends: half of
# the work, and an error within a percent of the best.
PATIENCE = 4
_PANEL = 1 << 20  # weights that a CPU holds in float32 at a time, with the scales of all ratios


def reference_search_clip(weight, bits, group_size, symmetric, scale_dtype, column_weight=None, ratios=RATIOS):
    """The definition: try every ratio, keep for each group the first with the smallest weighted squared error."""
    size = check_group_size(weight, group_size)
    grouped = weight.float().unflatten(1, (-1, size))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    lowest, highest = integer_range(bits)
    importance = 1.0 if column_weight is None else column_weight.float().view(-1, size)
    tried = []
    for ratio in ratios:
        scale, zero_point = scales_for(low, high, ratio, bits, symmetric, scale_dtype)
        shift = torch.zeros_like(scale) if zero_point is None else zero_point
        codes = (grouped / scale[..., None] + shift[..., None]).round().clamp(lowest, highest)
        error = ((grouped - (codes - shift[..., None]) * scale[..., None]).square() * importance).sum(2)
        tried.append((error, scale, shift))
    error, scale, shift = (torch.stack(kind) for kind in zip(*tried, strict=True))
    best = error.argmin(0, keepdim=True)
    zero_point = None if symmetric else shift.gather(0, best)[0].to(torch.int8)
    return scale.gather(0, best)[0].to(scale_dtype), zero_point


@triton.jit
def _search_clip_kernel(
    weight_ptr,
    column_weight_ptr,
    ratios_ptr,
    scale_ptr,
    zero_point_ptr,
    n,
    group_size,
    groups,
    weight_row_stride,
    n_ratios,
    EPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program tries all ratios on `BLOCK_N` of the `n` groups, which it reads once per ratio, from cache but for the
    first time."""
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    item = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = weight_ptr + (item // groups) * weight_row_stride + (item % groups) * group_size
    low, high = group_extremes(start, item < n, group_size, BLOCK_N, BLOCK_COLUMNS)
    best_error = tl.full([BLOCK_N], float("inf"), tl.float32)
    best_scale = tl.full([BLOCK_N], 1.0, tl.float32)
    best_zero_point = tl.zeros([BLOCK_N], tl.float32)
    for i in range(n_ratios):
        ratio = tl.load(ratios_ptr + i)
        scale, zero_point = scale_of(low, high, ratio, EPS, BITS, SYMMETRIC, DTYPE)
        error = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, group_size, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            inside = (item < n)[:, None] & (column < group_size)[None, :]
            w = tl.load(start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            code = tl.div_rn(w, scale[:, None] + w * 0) + zero_point[:, None]
            code = round_half_even(tl.minimum(tl.maximum(code, LOWEST), -1 - LOWEST))
            difference = w - (code - zero_point[:, None]) * scale[:, None]
            difference = tl.where(inside, difference * difference, 0.0)
            if WEIGHTED:
                at = (item % groups)[:, None] * group_size + column[None, :]
                difference *= tl.load(column_weight_ptr + at, mask=inside, other=0.0)
            error += tl.sum(difference, axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero_point = tl.where(better, zero_point, best_zero_point)
    tl.store(scale_ptr + item, best_scale, mask=item < n)
    if not SYMMETRIC:
        tl.store(zero_point_ptr + item, best_zero_point.to(tl.int8), mask=item < n)


@compiled
def _least_error(weight, scale, zero_point, importance, lowest, highest, best, begin, end):
    """Index of the ratio with the least error for the groups of rows `begin..end`, into `best` `[rows, G]`.

    `scale` and `zero_point` `[ratios, rows, G]`; `zero_point` and `importance` `[in]` may be empty. With t = w / scale +
    zero_point the error is scale^2 (t - clamp(round(t)))^2.
    """
    size = weight.shape[1] // best.shape[1]
    for row in range(begin, end):
        for group in range(best.shape[1]):
            # Slices counted from 0: an index that might be negative keeps numba from making vector code.
            values = weight[row, group * size : (group + 1) * size]
            weights = importance[group * size : (group + 1) * size]
            least = np.float32(np.inf)
            for ratio in range(scale.shape[0]):
                inverse = np.float32(1) / scale[ratio, row, group]
                shift = zero_point[ratio, row, group] if len(zero_point) else np.float32(0)
                error = np.float32(0)
                if len(weights):
                    for i in range(len(values)):
                        t = values[i] * inverse + shift
                        difference = t - min(max(np.rint(t), lowest), highest)
                        error += difference * difference * weights[i]
                else:
                    for i in range(len(values)):
                        t = values[i] * inverse + shift
                        difference = t - min(max(np.rint(t), lowest), highest)
                        error += difference * difference
                error *= scale[ratio, row, group] ** 2
                if error < least:
                    least = error
                    best[row, group] = ratio
                elif ratio - best[row, group] >= PATIENCE:
                    break


def _search(weight, bits, size, symmetric, scale_dtype, importance, ratios):
    """Scale float32 and zero point float32 `[rows, G]` of a panel `[rows, in]`."""
    rows, groups = weight.shape[0], weight.shape[1] // size
    weight = weight.float()
    values = array(weight, torch.float32, 2)
    low, high = extremes(weight, groups)
    scale, zero_point = scales_for(low, high, torch.tensor(ratios).view(-1, 1, 1), bits, symmetric, scale_dtype)
    best = torch.zeros(rows, groups, dtype=torch.int64)
    inputs = array(scale, torch.float32, 3), array(zero_point, torch.float32, 3), array(importance, torch.float32, 1)
    lowest, highest = (np.float32(value) for value in integer_range(bits))
    over_rows(lambda first, last: _least_error(values, *inputs, lowest, highest, best.numpy(), first, last), rows)
    return [None if kind is None else kind.gather(0, best[None])[0] for kind in (scale, zero_point)]


def search_clip(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    column_weight: Tensor | None = None,
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[Tensor, Tensor | None]:
    """Scales `[out, G]` in `scale_dtype` and zero points int8 `[out, G]` (None when symmetric) of `weight` `[out, in]`.

    Every group's range is shrunk by one of `ratios` (descending from 1), the one with the smallest squared error
    weighted by `column_weight` `[in]`; on a CPU the first after which four in a row are worse. Safe to call from several threads.
    Raises ValueError when shapes disagree."""
    size = check_group_size(weight, group_size)
    check(column_weight is None or column_weight.shape == weight.shape[1:], "column_weight must be [in]")
    check(len(ratios) > 0, "ratios is empty")
    if tuple(ratios) == (1.0,):
        return minmax_scale(weight, bits, size, symmetric, scale_dtype)
    kind = backend(weight)
    if kind == "reference":
        return reference_search_clip(weight, bits, size, symmetric, scale_dtype, column_weight, ratios)
    rows, groups = weight.shape[0], weight.shape[1] // size
    scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    zero_point = None if symmetric else torch.empty(rows, groups, dtype=torch.int8, device=weight.device)
    importance = None if column_weight is None else column_weight.float().contiguous()
    if kind == "triton":
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        block_columns = min(TILE, triton.next_power_of_2(size))
        block_n = TILE // block_columns
        _search_clip_kernel[(triton.cdiv(rows * groups, block_n),)](
            weight,
            scale if importance is None else importance,
            torch.tensor(ratios, dtype=torch.float32, device=weight.device),
            scale,
            scale if symmetric else zero_point,
            rows * groups,
            size,
            groups,
            weight.stride(0),
            len(ratios),
            EPS=torch.finfo(scale_dtype).eps,
            BITS=bits,
            SYMMETRIC=symmetric,
            DTYPE=storage_code(scale_dtype),
            WEIGHTED=importance is not None,
            BLOCK_N=block_n,
            BLOCK_COLUMNS=block_columns,
        )
        return scale.to(scale_dtype), zero_point
    step = max(1, _PANEL // max(weight.shape[1], groups * len(ratios)))
    for first in range(0, rows, step):
        panel = weight[first : first + step].cpu()
        found = _search(
            panel, bits, size, symmetric, scale_dtype, None if importance is None else importance.cpu(), ratios
        )
        for target, value in zip((scale, zero_point), found, strict=True):
            if value is not None:
                target[first : first + step] = value
    return scale.to(scale_dtype), zero_point

"""Clipping search: the range of a quantization group that minimizes its squared error.

Min-max scales spend codes on the largest weight of a group; a range shrunk by some ratio clips that weight and rounds
all others more finely. For every group the ratio with the smallest `sum column_weight * (w - dequantized)^2` wins
(`column_weight`: the mean square of the inputs gives the error of the layer's output, as in AWQ, arXiv:2306.00978).
"""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, integer_range, tl, triton
from tersor.kernels.group_range import (
    CHUNK,
    WIDEST,
    check_group_size,
    minmax_scale,
    round_half_even,
    scale_of,
    scales_for,
    storage_code,
)
from torch import Tensor

RATIOS = tuple(1 - 0.04 * i for i in range(16))

_PANEL = 1024  # rows whose scales a CPU holds in float32 at a time
_CHUNK = (
    131072  # weights per torch call: few enough for the cache, enough that two threads rarely meet at Python's lock
)


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
    n_ratios,
    EPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program reads `BLOCK_N` groups of a contiguous weight once and tries all ratios on them in registers."""
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    item = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (item < n)[:, None] & (column < group_size)[None, :]
    w = tl.load(weight_ptr + item[:, None] * group_size + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        at = (item % groups)[:, None] * group_size + column[None, :]
        importance = tl.load(column_weight_ptr + at, mask=inside, other=0.0)
    low = tl.minimum(tl.min(w, axis=1), 0.0)
    high = tl.maximum(tl.max(w, axis=1), 0.0)
    best_error = tl.full([BLOCK_N], float("inf"), tl.float32)
    best_scale = tl.full([BLOCK_N], 1.0, tl.float32)
    best_zero_point = tl.zeros([BLOCK_N], tl.float32)
    for i in range(n_ratios):
        ratio = tl.load(ratios_ptr + i)
        scale, zero_point = scale_of(low, high, ratio, EPS, BITS, SYMMETRIC, DTYPE)
        code = tl.div_rn(w, scale[:, None] + w * 0) + zero_point[:, None]
        code = round_half_even(tl.minimum(tl.maximum(code, LOWEST), -1 - LOWEST))
        difference = w - (code - zero_point[:, None]) * scale[:, None]
        difference = tl.where(inside, difference * difference, 0.0)
        if WEIGHTED:
            difference *= importance
        error = tl.sum(difference, axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero_point = tl.where(better, zero_point, best_zero_point)
    tl.store(scale_ptr + item, best_scale, mask=item < n)
    if not SYMMETRIC:
        tl.store(zero_point_ptr + item, best_zero_point.to(tl.int8), mask=item < n)


def _coarse_to_fine(items, importance, bits, symmetric, scale_dtype, ratios):
    """Best scale float32 and zero point `[A, N]` of `items` `[A, N, group_size]`, whose `importance` is `[A,
    group_size]`.

    Tries every fourth ratio, then the neighbours of the best at distance 2, then 1: 8 tries instead of 16, the first
    ratio always among them. The error is close to unimodal in the ratio, so that the total stays within a percent of
    the exhaustive search."""
    low, high = _extremes(items)
    ratio = torch.tensor(ratios, device=items.device)
    last = len(ratios) - 1
    steps = torch.tensor([-1, 1], device=items.device).view(2, 1, 1)

    def errors(tries):
        scale, shift = scales_for(low, high, ratio[tries], bits, symmetric, scale_dtype)
        return _errors(items, importance, scale, shift, bits)

    tries = torch.arange(0, len(ratios), 4, device=items.device).view(-1, 1, 1)
    error, best = errors(tries).min(0, keepdim=True)
    best *= 4
    for step in (2, 1) if last else ():
        tries = (best + steps * step).clamp_(0, last)
        error, at = torch.cat((error, errors(tries))).min(0, keepdim=True)
        best = torch.cat((best, tries)).gather(0, at)
    return scales_for(low, high, ratio[best[0]], bits, symmetric, scale_dtype)


def _extremes(items):
    """Smallest value or zero, and largest value or zero, of `items` `[A, N, group_size]`: each `[A, N]`."""
    low = torch.empty(items.shape[:2], device=items.device)
    high = torch.empty_like(low)
    step = max(1, CHUNK // items.shape[2])
    for a in range(items.shape[0]):
        for first in range(0, items.shape[1], step):
            chunk = items[a, first : first + step].float()
            torch.amin(chunk, 1, out=low[a, first : first + step])
            torch.amax(chunk, 1, out=high[a, first : first + step])
    return low.clamp_(max=0), high.clamp_(min=0)


def _errors(items, importance, scale, shift, bits):
    """Weighted squared errors `[T, A, N]` of `items` `[A, N, group_size]` under T scales and zero points `[T, A, N]`.

    With t = w / scale + zero_point the error is `scale^2 |t - clamp(round(t))|^2`, one pass less than dequantizing.
    """
    lowest, highest = integer_range(bits)
    a_total, n_total, size = items.shape
    n_step = min(n_total, max(1, _CHUNK // size))
    a_step = min(a_total, max(1, _CHUNK // size // n_step))
    buffers = torch.empty(3, a_step, n_step, size, device=items.device)
    inverse = scale.reciprocal()[..., None]
    shift = None if shift is None else shift[..., None]
    result = torch.empty_like(scale)
    for a in range(0, a_total, a_step):
        for n in range(0, n_total, n_step):
            at = slice(a, min(a + a_step, a_total)), slice(n, min(n + n_step, n_total))
            weight, scaled, code = buffers[:, : at[0].stop - a, : at[1].stop - n].unbind(0)
            weight.copy_(items[at])
            for i in range(len(scale)):
                torch.mul(weight, inverse[i][at], out=scaled)
                if shift is not None:
                    scaled.add_(shift[i][at])
                torch.round(scaled, out=code)
                code.clamp_(lowest, highest)
                torch.ops.aten.mse_loss.out(scaled, code, 0, out=scaled)  # (scaled - code)^2 in one pass
                for k in range(len(scaled)):
                    torch.mv(scaled[k], importance[a + k], out=result[i, a + k, at[1]])
    return result.mul_(scale.square_())


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
    weighted by `column_weight` `[in]`. On a CPU the search is coarse to fine. Safe to call from several threads.
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
    if kind == "triton" and size <= WIDEST:
        block_columns = max(16, triton.next_power_of_2(size))
        block_n = max(1, 1024 // block_columns)
        _search_clip_kernel[(triton.cdiv(rows * groups, block_n),)](
            weight.contiguous(),
            scale if importance is None else importance,
            torch.tensor(ratios, dtype=torch.float32, device=weight.device),
            scale,
            scale if symmetric else zero_point,
            rows * groups,
            size,
            groups,
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
    for first in range(0, rows, _PANEL):
        panel = weight[first : first + _PANEL]
        if importance is None:  # all groups are alike
            items, vectors = panel.reshape(1, -1, size), torch.ones(1, size, device=weight.device)
        else:  # groups of the same columns share a vector
            items, vectors = panel.unflatten(1, (groups, size)).transpose(0, 1), importance.view(groups, size)
        found = _coarse_to_fine(items, vectors, bits, symmetric, scale_dtype, ratios)
        for target, value in zip((scale, zero_point), found, strict=True):
            if value is not None:
                value = value.view(-1, groups) if importance is None else value.t()
                target[first : first + _PANEL] = value
    return scale.to(scale_dtype), zero_point

"""The range of a quantization group and what follows from it: min-max scale and zero point.

A group is `group_size` consecutive columns of one row (`None`: the whole row). Scales are rounded to the dtype in
which they will be stored before anything is computed from them. The definitions are those of the compressed-tensors
format."""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, integer_range, tl, triton
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor

CHUNK = 65536  # weights that the CPU paths process at a time: two float32 buffers of this size stay in a 1 MB cache
TILE = 1024  # weights that a program of the Triton kernels holds at a time: some groups, or a part of one


def check_group_size(weight: Tensor, group_size: int | None) -> int:
    """Columns of a group of `weight` `[out, in]`. Raises ValueError when groups do not fill a row."""
    check(weight.ndim == 2, f"weight must be [out, in], not {tuple(weight.shape)}")
    return whole_groups(weight.shape[1], group_size)


def whole_groups(columns: int, group_size: int | None) -> int:
    """`group_size`, or `columns` when None. Raises ValueError when such groups do not fill a row."""
    size = columns if group_size is None else group_size
    check(size > 0 and columns % size == 0, f"{columns} columns are not divisible by group_size {size}")
    return size


def on_grid(scale: Tensor, zero_point: Tensor | None, rows: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """Views `[rows, groups]` of a scale and zero point that broadcast to it. Raises ValueError when one does not."""
    grid = []
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        try:
            grid.append(None if tensor is None else tensor.expand(rows, groups))
        except RuntimeError:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit [{rows}, {groups}]") from None
    return grid[0], grid[1]


def same_strides(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of the same shape, laid out alike: kernels address both with one offset."""
    if zero_point is None or zero_point.stride() == scale.stride():
        return scale, zero_point
    return scale.contiguous(), zero_point.contiguous()


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows that together hold about `CHUNK` weights."""
    step = max(1, CHUNK // columns)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


@triton.jit
def round_half_even(x):
    """Nearest integer of |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_to_storage(x, DTYPE: tl.constexpr):
    """Round float32 to bfloat16 (1), float16 (2) or nothing (0), keeping float32."""
    if DTYPE == 1:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    if DTYPE == 2:
        return x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def scale_of(low, high, ratio, EPS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):
    """Scale (rounded to storage) and zero point of groups whose values span `low <= 0 <= high`, shrunk by `ratio`."""
    STEPS: tl.constexpr = 2**BITS - 1
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(high, -low) * 2, low * 0 + STEPS) * ratio
    else:
        scale = tl.div_rn(high - low, low * 0 + STEPS) * ratio
    scale = _round_to_storage(scale, DTYPE)
    scale = tl.where(scale == 0, EPS, scale)
    zero_point = low * 0
    if not SYMMETRIC:
        LOWEST: tl.constexpr = -(2 ** (BITS - 1))
        zero_point = LOWEST - tl.div_rn(low * ratio, scale)
        zero_point = round_half_even(tl.minimum(tl.maximum(zero_point, LOWEST), -1 - LOWEST))
    return scale, zero_point


def reference_minmax_scale(weight, bits, group_size, symmetric, scale_dtype):
    """The definition."""
    grouped = weight.float().unflatten(1, (-1, check_group_size(weight, group_size)))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale, zero_point = scales_for(low, high, 1.0, bits, symmetric, scale_dtype)
    return scale.to(scale_dtype), None if zero_point is None else zero_point.to(torch.int8)


@triton.jit
def group_extremes(start, real, group_size, BLOCK_N: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Smallest value or zero, and largest value or zero, of the groups that begin at `start`, where `real`."""
    low = tl.zeros([BLOCK_N], tl.float32)
    high = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, group_size, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = real[:, None] & (column < group_size)[None, :]
        w = tl.load(start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(w, axis=1))
        high = tl.maximum(high, tl.max(w, axis=1))
    return low, high


@triton.jit
def _minmax_scale_kernel(
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    n,
    group_size,
    groups,
    weight_row_stride,
    EPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program: the scales of `BLOCK_N` of the `n` groups of a weight."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = weight_ptr + (item // groups) * weight_row_stride + (item % groups) * group_size
    low, high = group_extremes(start, item < n, group_size, BLOCK_N, BLOCK_COLUMNS)
    scale, zero_point = scale_of(low, high, 1.0, EPS, BITS, SYMMETRIC, DTYPE)
    tl.store(scale_ptr + item, scale, mask=item < n)
    if not SYMMETRIC:
        tl.store(zero_point_ptr + item, zero_point.to(tl.int8), mask=item < n)


def minmax_scale(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales `[out, G]` in `scale_dtype` and, unless symmetric, zero points int8 `[out, G]` that span each group's
    values and zero, of `weight` `[out, in]` (float32, bfloat16, float16).

    Symmetric: `max|w| * 2 / (2^bits - 1)`; else `(max - min) / (2^bits - 1)`. A scale of zero becomes the dtype's
    epsilon. Raises ValueError when groups do not fill a row."""
    size = check_group_size(weight, group_size)
    rows, groups = weight.shape[0], weight.shape[1] // size
    kind = backend(weight)
    if kind == "reference":
        return reference_minmax_scale(weight, bits, size, symmetric, scale_dtype)
    if kind == "triton":
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        scale = torch.empty(rows, groups, device=weight.device)
        zero_point = None if symmetric else torch.empty(rows, groups, dtype=torch.int8, device=weight.device)
        block_columns = min(TILE, triton.next_power_of_2(size))
        block_n = TILE // block_columns
        _minmax_scale_kernel[(triton.cdiv(rows * groups, block_n),)](
            weight,
            scale,
            scale if symmetric else zero_point,
            rows * groups,
            size,
            groups,
            weight.stride(0),
            EPS=torch.finfo(scale_dtype).eps,
            BITS=bits,
            SYMMETRIC=symmetric,
            DTYPE=storage_code(scale_dtype),
            BLOCK_N=block_n,
            BLOCK_COLUMNS=block_columns,
        )
        return scale.to(scale_dtype), zero_point
    scale, zero_point = scales_for(*extremes(weight, groups), 1.0, bits, symmetric, scale_dtype)
    return scale.to(scale_dtype), None if zero_point is None else zero_point.to(torch.int8)


@compiled
def _extremes(bits, low, high, begin, end):
    """Of rows `begin..end`, as int32 bits of float32. Flipping the lower bits of negative values orders them as integers,
    whose minimum is vector code where that of floats is not; NaN is the largest."""
    size = bits.shape[1] // low.shape[1]
    for row in range(begin, end):
        for group in range(low.shape[1]):
            values = bits[row, group * size : (group + 1) * size]
            smallest = largest = np.int32(0)
            for i in range(len(values)):
                key = np.int32(values[i] ^ ((values[i] >> 31) & np.int32(0x7FFFFFFF)))
                smallest, largest = min(key, smallest), max(key, largest)
            low[row, group] = smallest ^ ((smallest >> 31) & np.int32(0x7FFFFFFF))
            high[row, group] = largest


def extremes(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Smallest value or zero, and largest value or zero, of each group of `weight` `[out, in]`: float32 `[out, G]`."""
    if weight.device.type != "cpu":
        grouped = weight.float().unflatten(1, (groups, -1))
        return grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    low, high = torch.empty(2, weight.shape[0], groups, dtype=torch.int32)
    bits = array(weight, torch.float32, 2).view(np.int32)
    over_rows(lambda first, last: _extremes(bits, low.numpy(), high.numpy(), first, last), weight.shape[0])
    return low.view(torch.float32), high.view(torch.float32)


def scales_for(low, high, ratio, bits, symmetric, scale_dtype):
    """Float32 scales (values that `scale_dtype` holds exactly) and zero points for ranges `low <= 0 <= high` shrunk by
    `ratio`."""
    lowest, highest = integer_range(bits)
    steps = 2**bits - 1
    span = torch.maximum(high, -low) * 2 if symmetric else high - low
    scale = (span / steps * ratio).to(scale_dtype).float()
    scale.masked_fill_(scale == 0, torch.finfo(scale_dtype).eps)
    if symmetric:
        return scale, None
    return scale, (lowest - low * ratio / scale).round_().clamp_(lowest, highest)


def storage_code(dtype: torch.dtype) -> int:
    """What kernels call the dtype that scales are stored in. Raises ValueError for one that they are not."""
    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    check(dtype in codes, f"scales cannot be stored as {dtype}")
    return codes[dtype]

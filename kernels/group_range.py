"""The range of a quantization group and what follows from it: scale and zero point.

A group is `group_size` consecutive columns of one row (`None`: the whole row). Scales are rounded to the dtype in
which they will be stored before anything is computed from them."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import check, integer_range, tl, triton
from torch import Tensor

CHUNK = 65536  # weights that the CPU paths process at a time: two float32 buffers of this size stay in a 1 MB cache
WIDEST = 4096  # columns of a group that the fused Triton kernels hold in registers; wider groups take the torch path


def check_group_size(weight, group_size):
    columns = weight.shape[-1]
    size = columns if group_size is None else group_size
    check(weight.ndim == 2, f"weight must be [out, in], not {tuple(weight.shape)}")
    check(size > 0 and columns % size == 0, f"{columns} columns are not divisible by group_size {size}")
    return size


def row_chunks(rows, columns):
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


def minmax_scale(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales `[out, G]` in `scale_dtype` and, unless symmetric, zero points int8 `[out, G]` that span each group's
    values and zero.

    Symmetric: `max|w| * 2 / (2^bits - 1)`; else `(max - min) / (2^bits - 1)`. A scale of zero becomes the dtype's
    epsilon."""
    size = check_group_size(weight, group_size)
    groups = weight.shape[1] // size
    low = torch.empty(weight.shape[0], groups, device=weight.device)
    high = torch.empty_like(low)
    for first, last in row_chunks(*weight.shape):
        chunk = weight[first:last].unflatten(1, (groups, size)).float()
        torch.amin(chunk, 2, out=low[first:last])
        torch.amax(chunk, 2, out=high[first:last])
    scale, zero_point = scales_for(low.clamp_(max=0), high.clamp_(min=0), 1.0, bits, symmetric, scale_dtype)
    return scale.to(scale_dtype), None if zero_point is None else zero_point.to(torch.int8)


def scales_for(low, high, ratio, bits, symmetric, scale_dtype):
    """Float32 scales (values that `scale_dtype` holds exactly) and zero points for ranges `low <= 0 <= high` shrunk by
    `ratio`."""
    steps = 2**bits - 1
    span = torch.maximum(high, -low) * 2 if symmetric else high - low
    scale = (span / steps * ratio).to(scale_dtype).float()
    scale.masked_fill_(scale == 0, torch.finfo(scale_dtype).eps)
    if symmetric:
        return scale, None
    lowest, highest = integer_range(bits)
    return scale, (lowest - low * ratio / scale).round_().clamp_(lowest, highest)


def storage_code(dtype):
    check(dtype in (torch.float32, torch.bfloat16, torch.float16), f"scales cannot be stored as {dtype}")
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]

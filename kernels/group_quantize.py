"""Integer quantization of weights in groups: codes for given scales, and min-max scales with codes and packing in one
pass.

A group is `group_size` consecutive columns of one row, so a weight `[out, in]` has scales `[out, G]`, `G = in /
group_size` (`group_size=None`: the whole row). Codes are signed, `weight ~ (codes - zero_point) * scale`. Everything
is computed in float32 from scales already rounded to their stored dtype, with the definitions of the
compressed-tensors format."""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, integer_range, tl, triton
from tersor.kernels.group_range import (
    TILE,
    check_group_size,
    minmax_scale,
    on_grid,
    reference_minmax_scale,
    round_half_even,
    same_strides,
    scale_of,
    storage_code,
)
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor

WIDEST = 4096  # columns of a group that are quantized and packed in registers; wider groups take one kernel per step

# ---------------------------------------------------------------- codes for given scales


def reference_group_quantize(weight, scale, zero_point=None, bits=4, group_size=None):
    """The definition: `clamp(round(w / scale + zero_point))`, ties to even."""
    size = check_group_size(weight, group_size)
    low, high = integer_range(bits)
    grouped = weight.float().reshape(weight.shape[0], -1, size)
    codes = grouped / scale.float().expand(grouped.shape[:2])[..., None]
    if zero_point is not None:
        codes = codes + zero_point.float().expand(grouped.shape[:2])[..., None]
    return codes.round().clamp(low, high).to(torch.int8).reshape(weight.shape)


@triton.jit
def _group_quantize_kernel(
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    columns,
    group_size,
    weight_row_stride,
    scale_row_stride,
    scale_column_stride,
    out_row_stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * scale_row_stride + (column // group_size) * scale_column_stride
    scale = tl.load(scale_ptr + at, mask=inside, other=1.0).to(tl.float32)
    w = tl.load(weight_ptr + row * weight_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    code = tl.div_rn(w, scale)
    if HAS_ZERO_POINT:
        code += tl.load(zero_point_ptr + at, mask=inside, other=0).to(tl.float32)
    code = round_half_even(tl.minimum(tl.maximum(code, LOW), HIGH))
    tl.store(out_ptr + row * out_row_stride + column, code.to(tl.int8), mask=inside)


@compiled
def _codes(weight, scale, zero_point, low, high, out, begin, end):
    """Codes of rows `begin..end`. `scale` and `zero_point` `[rows, G]`; `zero_point` may be empty."""
    size = weight.shape[1] // max(1, scale.shape[1])
    for row in range(begin, end):
        for group in range(scale.shape[1]):
            values = weight[row, group * size : (group + 1) * size]
            codes = out[row, group * size : (group + 1) * size]
            s = scale[row, group]
            z = zero_point[row, group] if len(zero_point) else np.float32(0)
            for i in range(len(values)):
                codes[i] = np.int8(min(max(np.rint(values[i] / s + z), low), high))


def group_quantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bits: int = 4,
    group_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Codes int8 `[out, in]` of `weight` `[out, in]` (float32, bfloat16, float16) for given scales.

    `scale` and `zero_point` are `[out, G]`, or anything that broadcasts to it (`[1]`: one for the whole tensor). `out`
    int8 `[out, in]` receives the codes. Raises ValueError when shapes disagree."""
    size = check_group_size(weight, group_size)
    rows, columns = weight.shape
    low, high = integer_range(bits)
    groups = columns // size
    scale, zero_point = on_grid(scale, zero_point, rows, groups)
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    check(out.shape == weight.shape and out.dtype == torch.int8, "out must be int8 of the weight's shape")
    kind = backend(weight)
    if kind == "reference":
        return out.copy_(reference_group_quantize(weight, scale, zero_point, bits, size))
    if kind == "triton":
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        target = out if out.stride(1) == 1 else torch.empty_like(weight, dtype=torch.int8)
        scale, zero_point = same_strides(scale, zero_point)
        block = min(1024, triton.next_power_of_2(columns))
        _group_quantize_kernel[(rows, triton.cdiv(columns, block))](
            weight,
            scale,
            scale if zero_point is None else zero_point,
            target,
            columns,
            size,
            weight.stride(0),
            *scale.stride(),
            target.stride(0),
            LOW=low,
            HIGH=high,
            HAS_ZERO_POINT=zero_point is not None,
            BLOCK=block,
        )
        return out if target is out else out.copy_(target)
    if weight.device.type != "cpu":
        return out.copy_(reference_group_quantize(weight, scale, zero_point, bits, size))
    values = array(weight, torch.float32, 2)
    grid = array(scale, torch.float32, 2), array(zero_point, torch.float32, 2)
    limits = np.float32(low), np.float32(high)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    over_rows(lambda first, last: _codes(values, *grid, *limits, target.numpy(), first, last), rows)
    return out if target is out else out.copy_(target)


# ---------------------------------------------------------------- min-max scales, codes and packing in one pass


def _pack(codes, bits):
    """Codes int8 `[out, in]` as a little-endian bit stream per row, int32 `[out, ceil(in * bits / 32)]` (bits 2, 4,
    8)."""
    per_word = 32 // bits
    unsigned = codes.view(torch.uint8) ^ 0x80 if bits == 8 else (codes + (1 << (bits - 1))).view(torch.uint8)
    if codes.shape[1] % per_word:
        unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word))
    packed = unsigned[:, :: 8 // bits].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8 // bits):
        packed |= unsigned[:, i :: 8 // bits] << (i * bits)
    return packed.view(torch.int32)


def reference_quantize_and_pack(weight, bits, group_size, symmetric, scale_dtype):
    """The definition, one step after the other."""
    scale, zero_point = reference_minmax_scale(weight, bits, group_size, symmetric, scale_dtype)
    codes = reference_group_quantize(weight, scale, zero_point, bits, group_size).int() + (1 << (bits - 1))
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word)).long()
    words = (codes << (torch.arange(per_word, device=codes.device) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int(), scale, zero_point


@triton.jit
def _quantize_and_pack_kernel(
    weight_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    n,
    group_size,
    EPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One program reads `BLOCK_N` of the `n` groups of a contiguous weight once and packs each into `group_size * BITS
    / 32` words."""
    PER_WORD: tl.constexpr = 32 // BITS
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    item = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    slot = tl.arange(0, PER_WORD)[None, None, :]
    column = word[None, :, None] * PER_WORD + slot
    inside = (item < n)[:, None, None] & (column < group_size)
    at = item[:, None, None] * group_size + column
    w = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(tl.min(w, axis=2), axis=1), 0.0)
    high = tl.maximum(tl.max(tl.max(w, axis=2), axis=1), 0.0)
    scale, zero_point = scale_of(low, high, 1.0, EPS, BITS, SYMMETRIC, DTYPE)
    code = tl.div_rn(w, scale[:, None, None] + w * 0) + zero_point[:, None, None]
    code = round_half_even(tl.minimum(tl.maximum(code, LOWEST), -1 - LOWEST))
    packed = tl.sum((code.to(tl.int32) - LOWEST) << (slot * BITS), axis=2)
    words = group_size // PER_WORD
    in_words = (item < n)[:, None] & (word < words)[None, :]
    tl.store(packed_ptr + item[:, None] * words + word[None, :], packed, mask=in_words)
    tl.store(scale_ptr + item, scale, mask=item < n)
    if not SYMMETRIC:
        tl.store(zero_point_ptr + item, zero_point.to(tl.int8), mask=item < n)


def quantize_and_pack(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Min-max quantization of `weight` `[out, in]` to 2, 4 or 8 bits, packed.

    Returns `packed` int32 `[out, ceil(in * bits / 32)]` (unsigned codes, low bits first), `scale` `[out, G]` in
    `scale_dtype`, and `zero_point` int8 `[out, G]` (None when symmetric): `minmax_scale` and `group_quantize` in one
    pass. Raises ValueError for other bits and groups that do not fill a row."""
    check(bits in (2, 4, 8), f"packing takes 2, 4 or 8 bits, not {bits}")
    size = check_group_size(weight, group_size)
    kind = backend(weight)
    if kind == "reference":
        return reference_quantize_and_pack(weight, bits, group_size, symmetric, scale_dtype)
    per_word = 32 // bits
    if kind == "triton" and size % per_word == 0 and size <= WIDEST:
        rows, columns = weight.shape
        packed = torch.empty(rows, columns // per_word, dtype=torch.int32, device=weight.device)
        scale = torch.empty(rows, columns // size, device=weight.device)
        zero_point = None if symmetric else torch.empty(scale.shape, dtype=torch.int8, device=weight.device)
        block_words = triton.next_power_of_2(size // per_word)
        block_n = max(1, TILE // (block_words * per_word))
        _quantize_and_pack_kernel[(triton.cdiv(scale.numel(), block_n),)](
            weight.contiguous(),
            packed,
            scale,
            scale if symmetric else zero_point,
            scale.numel(),
            size,
            EPS=torch.finfo(scale_dtype).eps,
            BITS=bits,
            SYMMETRIC=symmetric,
            DTYPE=storage_code(scale_dtype),
            BLOCK_N=block_n,
            BLOCK_WORDS=block_words,
        )
        return packed, scale.to(scale_dtype), zero_point
    scale, zero_point = minmax_scale(weight, bits, group_size, symmetric, scale_dtype)
    return _pack(group_quantize(weight, scale, zero_point, bits, group_size), bits), scale, zero_point

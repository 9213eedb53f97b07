"""Codes back to weights: `(codes - zero_point) * scale` in float32, rounded once to the wanted dtype.

Codes are signed int8 `[out, in]`, or the bit stream of the compressed-tensors format (unsigned codes, low bits first)
in int32 `[out, ceil(in * bits / 32)]`. Scales and zero points are `[out, G]`, a group being `group_size` consecutive
columns of a row."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.group_range import on_grid, row_chunks, same_strides, whole_groups
from torch import Tensor


def reference_dequantize(codes, scale, zero_point, group_size, dtype):
    """The definition; `scale` and `zero_point` are `[out, G]`."""
    index = torch.arange(codes.shape[1], device=codes.device) // group_size
    zero_point = 0 if zero_point is None else zero_point.float()[:, index]
    return ((codes.float() - zero_point) * scale.float()[:, index]).to(dtype)


def reference_unpack(packed, bits, columns):
    """The definition: signed codes int8 `[out, columns]` of a bit stream int32 `[out, words]`."""
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    unsigned = (packed[..., None] >> shifts) & (2**bits - 1)
    return (unsigned.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    columns,
    group_size,
    codes_row_stride,
    scale_row_stride,
    scale_column_stride,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One program: `BLOCK_WORDS` words of a row, each of `PER_WORD` codes (1: an int8). `WHOLE_WORDS`: no word holds
    codes of two groups, so that one load of the scale serves a word."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[:, None]
    slot = tl.arange(0, PER_WORD)[None, :]
    column = word * PER_WORD + slot
    code = tl.load(codes_ptr + row * codes_row_stride + word, mask=word * PER_WORD < columns, other=0)
    if PER_WORD > 1:
        code = ((code >> (slot * BITS)) & (2**BITS - 1)) - 2 ** (BITS - 1)
    value = code.to(tl.float32)
    first = word * PER_WORD if WHOLE_WORDS else column
    at = row * scale_row_stride + (first // group_size) * scale_column_stride
    if HAS_ZERO_POINT:
        value -= tl.load(zero_point_ptr + at, mask=first < columns, other=0).to(tl.float32)
    value *= tl.load(scale_ptr + at, mask=first < columns, other=0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, value.to(out_ptr.dtype.element_ty), mask=column < columns)


def _dequantize_triton(codes, scale, zero_point, bits, per_word, group_size, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    scale, zero_point = same_strides(scale, zero_point)
    block_words = min(1024 // per_word, triton.next_power_of_2(codes.shape[1]))
    _dequantize_kernel[(shape[0], triton.cdiv(codes.shape[1], block_words))](
        codes,
        scale,
        scale if zero_point is None else zero_point,
        out,
        shape[1],
        group_size,
        codes.stride(0),
        *scale.stride(),
        BITS=bits,
        PER_WORD=per_word,
        WHOLE_WORDS=group_size % per_word == 0,
        HAS_ZERO_POINT=zero_point is not None,
        BLOCK_WORDS=block_words,
    )
    return out


def _dequantize_chunk(codes, scale, zero_point, size, out):
    """Dequantize some rows: `codes` float32 `[n, in]` is overwritten, the result goes into `out`."""
    grouped = codes.unflatten(1, (-1, size))
    if zero_point is not None:
        grouped.sub_(zero_point[..., None].float())
    grouped.mul_(scale[..., None].float())
    out.copy_(codes)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Weights `[out, in]` in `dtype` from int8 codes `[out, in]`; `group_size=None`: a group is a row.

    `scale` and `zero_point` are `[out, G]` or broadcast to it. Raises ValueError when shapes disagree.
    """
    check(codes.ndim == 2, f"codes must be [out, in], not {tuple(codes.shape)}")
    rows, columns = codes.shape
    size = whole_groups(columns, group_size)
    scale, zero_point = on_grid(scale, zero_point, rows, columns // size)
    kind = backend(codes)
    if kind == "reference":
        return reference_dequantize(codes, scale, zero_point, size, dtype)
    if kind == "triton":
        return _dequantize_triton(codes, scale, zero_point, 8, 1, size, codes.shape, dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for first, last in row_chunks(rows, columns):
        zeros = None if zero_point is None else zero_point[first:last]
        _dequantize_chunk(codes[first:last].float(), scale[first:last], zeros, size, out[first:last])
    return out


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Weights of `shape` `[out, in]` in `dtype` from int32 words `[out, ceil(in * bits / 32)]` of 2, 4 or 8-bit codes.

    Raises ValueError for other bits and when shapes disagree.
    """
    rows, columns = shape
    check(bits in (2, 4, 8), f"packed codes have 2, 4 or 8 bits, not {bits}")
    check(
        packed.dtype == torch.int32 and packed.shape == (rows, -(-columns * bits // 32)),
        f"packed {tuple(packed.shape)} {packed.dtype} does not hold [{rows}, {columns}] codes of {bits} bits",
    )
    size = whole_groups(columns, group_size)
    scale, zero_point = on_grid(scale, zero_point, rows, columns // size)
    kind = backend(packed)
    if kind == "reference":
        return reference_dequantize(reference_unpack(packed, bits, columns), scale, zero_point, size, dtype)
    if kind == "triton":
        return _dequantize_triton(packed, scale, zero_point, bits, 32 // bits, size, shape, dtype)
    per_byte = 8 // bits
    stream = packed.contiguous().view(torch.uint8)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    for first, last in row_chunks(rows, columns):
        part = stream[first:last]
        values = torch.empty(last - first, part.shape[1], per_byte, device=packed.device)
        for i in range(per_byte):
            values[..., i] = (part >> (i * bits)) & (2**bits - 1)
        codes = values.flatten(1)[:, :columns].sub_(2 ** (bits - 1))
        zeros = None if zero_point is None else zero_point[first:last]
        _dequantize_chunk(codes, scale[first:last], zeros, size, out[first:last])
    return out

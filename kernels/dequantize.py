"""Codes back to weights: `(codes - zero_point) * scale` in float32, rounded once to the wanted dtype.

Codes are signed int8 `[out, in]`, or the bit stream of the compressed-tensors format (unsigned codes, low bits first)
in int32 `[out, ceil(in * bits / 32)]`. Scales and zero points are `[out, G]`, a group being `group_size` consecutive
columns of a row."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.group_range import row_chunks
from torch import Tensor


def reference_dequantize(codes, scale, zero_point, group_size, dtype):
    """The definition."""
    index = torch.arange(codes.shape[1], device=codes.device) // group_size
    zero_point = 0 if zero_point is None else zero_point.float()[:, index]
    return ((codes.float() - zero_point) * scale.float()[:, index]).to(dtype)


def reference_unpack(packed, bits, columns):
    """Signed codes int8 `[out, columns]` of a bit stream `[out, words]`."""
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
    PACKED: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if PACKED:
        PER_WORD: tl.constexpr = 32 // BITS
        word = tl.load(codes_ptr + row * codes_row_stride + column // PER_WORD, mask=inside, other=0)
        code = ((word >> (column % PER_WORD * BITS)) & (2**BITS - 1)) - 2 ** (BITS - 1)
    else:
        code = tl.load(codes_ptr + row * codes_row_stride + column, mask=inside, other=0)
    value = code.to(tl.float32)
    at = row * scale_row_stride + (column // group_size) * scale_column_stride
    if HAS_ZERO_POINT:
        value -= tl.load(zero_point_ptr + at, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale_ptr + at, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(codes, scale, zero_point, bits, packed, group_size, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    if zero_point is not None and zero_point.stride() != scale.stride():
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
    block = min(1024, triton.next_power_of_2(shape[1]))
    _dequantize_kernel[(shape[0], triton.cdiv(shape[1], block))](
        codes,
        scale,
        scale if zero_point is None else zero_point,
        out,
        shape[1],
        group_size,
        codes.stride(0),
        *scale.stride(),
        BITS=bits,
        PACKED=packed,
        HAS_ZERO_POINT=zero_point is not None,
        BLOCK=block,
    )
    return out


def _on_grid(scale, zero_point, rows, columns, group_size):
    """Group size and `[rows, G]` views of scale and zero point."""
    size = columns if group_size is None else group_size
    check(size > 0 and columns % size == 0, f"{columns} columns are not divisible by group_size {size}")
    grid = (rows, columns // size)
    check(
        scale.ndim <= 2 and all(a in (1, b) for a, b in zip(scale.shape[::-1], grid[::-1], strict=False)),
        f"scale {tuple(scale.shape)} does not fit {list(grid)}",
    )
    return size, scale.expand(grid), None if zero_point is None else zero_point.expand(grid)


def _chunk(codes, scale, zero_point, size, out):
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
    size, scale, zero_point = _on_grid(scale, zero_point, *codes.shape, group_size)
    kind = backend(codes)
    if kind == "reference":
        return reference_dequantize(codes, scale, zero_point, size, dtype)
    if kind == "triton":
        return _launch(codes, scale, zero_point, 8, False, size, codes.shape, dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for first, last in row_chunks(*codes.shape):
        zeros = None if zero_point is None else zero_point[first:last]
        _chunk(codes[first:last].float(), scale[first:last], zeros, size, out[first:last])
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
    size, scale, zero_point = _on_grid(scale, zero_point, rows, columns, group_size)
    kind = backend(packed)
    if kind == "reference":
        return reference_dequantize(reference_unpack(packed, bits, columns), scale, zero_point, size, dtype)
    if kind == "triton":
        return _launch(packed, scale, zero_point, bits, True, size, (rows, columns), dtype)
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
        _chunk(codes, scale[first:last], zeros, size, out[first:last])
    return out

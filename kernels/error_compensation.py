"""Column-by-column error compensation, the inner loop that GPTQ and SparseGPT share.

With H the Hessian of a layer's output error (`X X^T` over the inputs) and U the upper Cholesky factor of its inverse
(`H^-1 = U^T U`), columns are fixed from left to right: column j becomes q_j (quantized, masked, or both), its scaled
error e_j = (w_j - q_j) / U_jj is what the output error grows by (|e_j|^2), and every later column k absorbs what it
can: w_k -= e_j U_jk. Frantar et al., GPTQ (arXiv:2210.17323) and SparseGPT (arXiv:2301.00774).

`compensate` runs whole matrices: inside a block of 128 columns the updates are immediate, the columns after the block
are updated with one matrix product per block. `compensate_block` is one such block."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from tersor.kernels.dispatch import backend, check, integer_range, tl, triton
from tersor.kernels.error_compensation_cpu import fix_columns
from torch import Tensor

BLOCK = 128


class Compensated(NamedTuple):
    """Result of `compensate`: `codes` int8 `[out, in]` or None, `weight` float32 `[out, in]` (dequantized and masked),
    `loss` float64 scalar: sum of squared scaled errors, the growth of the layer's squared output error under H."""

    codes: Tensor | None
    weight: Tensor
    loss: Tensor


def reference_compensate_block(weight, factor, scale=None, zero_point=None, bits=4, keep=None):
    """The definition; see `compensate_block`. Works in the dtype of `weight` (tests use float64)."""
    low, high = integer_range(bits)
    weight = weight.clone()
    codes = None if scale is None else torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    quantized, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        w = weight[:, j]
        if scale is None:
            q = w.clone()
        else:
            s, z = scale[:, j].to(w.dtype), 0 if zero_point is None else zero_point[:, j].to(w.dtype)
            code = torch.clamp(torch.round(w / s + z), low, high)
            if keep is not None:
                code = torch.where(keep[:, j], code, torch.as_tensor(z, dtype=w.dtype, device=w.device))
            codes[:, j] = code.to(torch.int8)
            q = (code - z) * s
        if keep is not None:
            q = torch.where(keep[:, j], q, 0)
        quantized[:, j] = q
        error[:, j] = (w - q) / factor[j, j]
        weight[:, j + 1 :] -= error[:, j, None] * factor[None, j, j + 1 :]
    return codes, quantized, error


@triton.jit
def _compensate_block_kernel(
    weight_ptr,
    factor_ptr,
    scale_ptr,
    zero_point_ptr,
    group_index_ptr,
    keep_ptr,
    codes_ptr,
    quantized_ptr,
    error_ptr,
    rows,
    columns,
    weight_row_stride,
    weight_column_stride,
    factor_row_stride,
    scale_row_stride,
    scale_column_stride,
    keep_row_stride,
    keep_column_stride,
    out_row_stride,
    out_column_stride,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program holds `BLOCK_ROWS` rows of the block in registers and walks over its columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < rows
    inside = in_rows[:, None] & (column < columns)[None, :]
    tile = row[:, None] * weight_row_stride + column[None, :] * weight_column_stride
    w = tl.load(weight_ptr + tile, mask=inside, other=0.0)
    quantized = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    error = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for j in range(columns):
        here = (column == j)[None, :]
        w_j = tl.sum(tl.where(here, w, 0.0), axis=1)
        q_j = w_j
        if HAS_KEEP:
            kept = tl.load(keep_ptr + row * keep_row_stride + j * keep_column_stride, mask=in_rows, other=0) != 0
        if HAS_SCALE:
            group = tl.load(group_index_ptr + j)
            at = row * scale_row_stride + group * scale_column_stride
            scale = tl.load(scale_ptr + at, mask=in_rows, other=1.0).to(tl.float32)
            code = tl.div_rn(w_j, scale)
            if HAS_ZERO_POINT:
                zero_point = tl.load(zero_point_ptr + at, mask=in_rows, other=0).to(tl.float32)
                code += zero_point
            # Round half to even: adding 1.5 * 2^23 leaves no fraction bits. The clamp comes first, to stay in its
            # range.
            code = tl.minimum(tl.maximum(code, LOW), HIGH)
            code = (code + 12582912.0) - 12582912.0
            if HAS_ZERO_POINT:
                if HAS_KEEP:
                    code = tl.where(kept, code, zero_point)
                q_j = (code - zero_point) * scale
            else:
                if HAS_KEEP:
                    code = tl.where(kept, code, 0.0)
                q_j = code * scale
            out = row * out_row_stride + j * out_column_stride
            tl.store(codes_ptr + out, code.to(tl.int8), mask=in_rows)
        elif HAS_KEEP:
            q_j = tl.where(kept, q_j, 0.0)
        factor_row = factor_ptr + j * factor_row_stride
        e_j = tl.div_rn(w_j - q_j, tl.load(factor_row + j))
        after = (column > j) & (column < columns)
        factor = tl.load(factor_row + column, mask=after, other=0.0)
        w -= e_j[:, None] * factor[None, :]
        quantized = tl.where(here, q_j[:, None], quantized)
        error = tl.where(here, e_j[:, None], error)
    tile = row[:, None] * out_row_stride + column[None, :] * out_column_stride
    tl.store(quantized_ptr + tile, quantized, mask=inside)
    tl.store(error_ptr + tile, error, mask=inside)


def _block_triton(work, factor, scale, zero_point, group_index, keep, bits, codes, error):
    """Fix the columns of `work` `[B, rows]` in place with the Triton kernel; `error`, `codes` are `[B, rows]` like
    it."""
    columns, rows = work.shape
    low, high = integer_range(bits)
    block_rows = 32
    _compensate_block_kernel[(triton.cdiv(rows, block_rows),)](
        work,
        factor,
        work if scale is None else scale,
        work if zero_point is None else zero_point,
        work if scale is None else group_index,
        work if keep is None else keep.view(torch.uint8),
        work if codes is None else codes,
        work,
        error,
        rows,
        columns,
        work.stride(1),
        work.stride(0),
        factor.stride(0),
        *((0, 0) if scale is None else scale.stride()),
        *((0, 0) if keep is None else keep.stride()),
        work.stride(1),
        work.stride(0),
        LOW=low,
        HIGH=high,
        HAS_SCALE=scale is not None,
        HAS_ZERO_POINT=zero_point is not None,
        HAS_KEEP=keep is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=max(16, triton.next_power_of_2(columns)),
        num_warps=4,
    )


def _fix_columns(kind, work, factor, scale, zero_point, group_index, keep, bits, codes, error):
    """Fix the columns of `work` `[B, rows]` in place; `codes` and `error` are `[B, rows]`, `scale` `[rows, G]`, `keep`
    `[rows, B]`."""
    if kind == "triton":
        _block_triton(work, factor, scale, zero_point, group_index, keep, bits, codes, error)
    elif kind == "reference" or work.device.type != "cpu":
        expanded = [None if t is None else t[:, group_index] for t in (scale, zero_point)]
        new_codes, quantized, new_error = reference_compensate_block(work.t(), factor, *expanded, bits, keep)
        work.copy_(quantized.t())
        error.copy_(new_error.t())
        if codes is not None:
            codes.copy_(new_codes.t())
    else:
        fix_columns(work, factor, scale, zero_point, group_index, keep, bits, codes, error)


def compensate_block(weight, factor, scale=None, zero_point=None, bits=4, keep=None):
    """Fix all columns of one block.

    Args: `weight` `[rows, B]`; `factor` `[B, B]` upper Cholesky factor of the inverse Hessian, restricted to the
    block; `scale` and `zero_point` `[rows, B]`, already expanded per column (None: no quantization, no zero point);
    `keep` bool `[rows, B]`, False where a weight is pruned (None: nothing is). Returns `codes` int8 `[rows, B]` (None
    without `scale`), the dequantized and masked `quantized` float32 `[rows, B]`, and `error` float32 `[rows, B]`:
    `(w_j - q_j) / factor_jj` at the time column j was fixed. At most 128 columns run in Triton."""
    check(weight.ndim == 2 and factor.shape == (weight.shape[1],) * 2, f"factor does not fit {tuple(weight.shape)}")
    _check_matching(weight, keep, scale, zero_point)
    kind = backend(weight)
    check(kind != "triton" or weight.shape[1] <= BLOCK, f"a block has at most {BLOCK} columns, not {weight.shape[1]}")
    work = _transposed_copy(weight)
    codes = None if scale is None else torch.empty(work.shape, dtype=torch.int8, device=work.device)
    error = torch.empty_like(work)
    index = torch.arange(weight.shape[1], device=weight.device)
    _fix_columns(kind, work, factor.float().contiguous(), scale, zero_point, index, keep, bits, codes, error)
    codes = None if codes is None else _transposed_copy(codes, torch.int8)
    return codes, _transposed_copy(work), _transposed_copy(error)


def compensate(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_index: Tensor | None = None,
    bits: int = 4,
    keep: Tensor | None = None,
    prepare: Callable[[Tensor, int, int], Tensor | None] | None = None,
    prepare_every: int | None = None,
    block_size: int = BLOCK,
) -> Compensated:
    """Quantize and/or prune a whole matrix with error compensation.

    Args: `weight` `[out, in]` (not modified); `factor` `[in, in]` upper Cholesky factor of the inverse Hessian,
    columns in the order of `weight`; `scale`, `zero_point` `[out, G]`; `group_index` `[in]`: the group of every
    column, in any order (default: G equal runs); `keep` bool `[out, in]`, False where a weight must become zero.
    `prepare(view, start, stop)` is called before columns `start..stop` are fixed, every `prepare_every` columns
    (default `block_size`), with their current values `view` `[out, stop - start]`. It may write `scale` and
    `zero_point` in place (groups scaled from the compensated weights) and return the mask of these columns, bool
    `[out, stop - start]` (SparseGPT's choice), which is combined with `keep`; or None. With `prepare_every <=
    block_size`, `view` holds every update so far; with more, it holds those of all earlier blocks. Raises ValueError
    when shapes disagree."""
    rows, columns = weight.shape
    check(factor.shape == (columns, columns), f"factor {tuple(factor.shape)} does not fit weight {tuple(weight.shape)}")
    check(1 <= block_size <= BLOCK, f"block_size must be 1 to {BLOCK}, not {block_size}")
    _check_matching(weight, keep)
    if scale is not None:
        check(scale.ndim == 2 and scale.shape[0] == rows, f"scale {tuple(scale.shape)} does not have {rows} rows")
        check(zero_point is None or zero_point.shape == scale.shape, "zero_point and scale differ in shape")
        if group_index is None:
            check(columns % scale.shape[1] == 0, f"{columns} columns are not divisible into {scale.shape[1]} groups")
            group_index = torch.arange(columns, device=weight.device) // (columns // scale.shape[1])
        check(group_index.shape == (columns,), f"group_index has {group_index.numel()} entries for {columns} columns")
    kind = backend(weight)
    factor = factor.float().contiguous()
    work = _transposed_copy(weight)
    codes = None if scale is None else torch.empty(work.shape, dtype=torch.int8, device=work.device)
    error = torch.empty(min(block_size, columns), rows, device=work.device)
    loss = torch.zeros((), dtype=torch.float64, device=work.device)
    every = prepare_every or block_size
    prepared, prepared_at = None, 0
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        step = every if prepare is not None else block_size
        pieces = [start, *(first for first in range(start + 1, stop) if first % step == 0), stop]
        for first, last in pairwise(pieces):
            if prepare is not None and first % every == 0:
                end = min(first + every, columns)
                prepared, prepared_at = prepare(work[first:end].t(), first, end), first
            mask = None if keep is None else keep[:, first:last]
            if prepared is not None:
                chosen = prepared[:, first - prepared_at : last - prepared_at]
                mask = chosen if mask is None else mask & chosen
            part = error[first - start : last - start]
            _fix_columns(
                kind,
                work[first:last],
                factor[first:last, first:last],
                scale,
                zero_point,
                None if group_index is None else group_index[first:last],
                mask,
                bits,
                None if codes is None else codes[first:last],
                part,
            )
            if last < stop:
                work[last:stop].addmm_(factor[first:last, last:stop].t(), part, alpha=-1)
            loss += part.flatten().dot(part.flatten())
        if stop < columns:
            work[stop:].addmm_(factor[start:stop, stop:].t(), error[: stop - start], alpha=-1)
    return Compensated(None if codes is None else _transposed_copy(codes, torch.int8), _transposed_copy(work), loss)


def _transposed_copy(matrix, dtype=torch.float32):
    """`matrix` `[a, b]` as a new contiguous `[b, a]`, in panels of 128 rows: 3 to 4 times faster than one strided copy
    of it all."""
    result = torch.empty(matrix.shape[::-1], dtype=dtype, device=matrix.device)
    for row in range(0, matrix.shape[0], 128):
        result[:, row : row + 128].copy_(matrix[row : row + 128].t())
    return result


def _check_matching(weight, *others):
    for other in others:
        check(other is None or other.shape == weight.shape, f"expected shape {tuple(weight.shape)}")

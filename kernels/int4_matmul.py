"""`x @ W^T` with 4-bit weights in the compressed-tensors packing, unpacked on chip.

W is int32 `[N, ceil(K / 8)]`: 8 unsigned codes per word along K, low bits first; scale `[N, G]`, signed zero point
int8 `[N, G]` or none. Inside a group the product runs on the integer codes, which every dtype holds exactly; the
float32 accumulator is then scaled, so that weights are never rounded to the activation's dtype."""

from __future__ import annotations

import torch
from tersor.kernels.dequantize import dequantize_packed, reference_dequantize, reference_unpack
from tersor.kernels.dispatch import backend, check, dot_dtype, split_k, tl, triton
from torch import Tensor

DECODE = 16  # up to this many tokens the weights' bytes are the cost: split K until the GPU is full


def reference_int4_matmul(x, packed, scale, zero_point=None):
    """The definition: dequantize in float32, multiply in float32."""
    columns = x.shape[1]
    codes = reference_unpack(packed, 4, columns)
    weight = reference_dequantize(codes, scale, zero_point, columns // scale.shape[1], torch.float32)
    return (x.float() @ weight.t()).to(x.dtype)


@triton.jit
def _int4_matmul_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    M,
    N,
    K,
    group_size,
    x_row_stride,
    packed_row_stride,
    scale_row_stride,
    split_stride,
    blocks_per_split,
    HAS_ZERO_POINT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: a `[BLOCK_M, BLOCK_N]` tile of one slice of K. `group_size` is a multiple of `BLOCK_K`, or K
    itself."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_n = n < N
    slot = tl.arange(0, 8)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    for block in range(first, last):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row_stride + k[None, :], mask=x_mask, other=0.0).to(DOT)
        word = block * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        word_mask = in_n[:, None] & (word < tl.cdiv(K, 8))[None, :]  # as `word * 8 < K` it would hide the alignment
        words = tl.load(packed_ptr + n[:, None] * packed_row_stride + word[None, :], mask=word_mask, other=0)
        codes = (words[:, :, None] >> (slot * 4)[None, None, :]) & 15
        codes = tl.reshape(codes, [BLOCK_N, BLOCK_K]) - 8
        at = n * scale_row_stride + block * BLOCK_K // group_size
        if HAS_ZERO_POINT:
            codes -= tl.load(zero_point_ptr + at, mask=in_n, other=0).to(tl.int32)[:, None]
        scale = tl.load(scale_ptr + at, mask=in_n, other=0.0).to(tl.float32)
        product = tl.dot(x, tl.trans(codes.to(DOT)), input_precision="ieee")
        accumulator += product * scale[None, :]
    out = out_ptr + split * split_stride + m[:, None] * N + n[None, :]
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & in_n[None, :])


def launch_options(tokens: int, groups: int, group_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942), at 2 or 4 bytes per
    operand."""
    block_k = 128 if groups == 1 else next(b for b in (128, 64, 32) if group_size % b == 0)
    if dtype == torch.float32:
        m = 16 if tokens <= DECODE else 32
        return {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_K": min(64, block_k), "num_warps": 4, "num_stages": 2}
    if tokens <= DECODE:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def int4_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`[M, N]` in the dtype of `x` `[M, K]` (bfloat16, float16, float32), accumulated in float32.

    `packed` int32 `[N, ceil(K / 8)]`, `scale` `[N, G]`, `zero_point` int8 `[N, G]` or None. Groups have `K / G`
    columns: a multiple of 32, or anything when G is 1. K is not 0. Few tokens are summed from slices of K in a fixed order:
    results do not vary from run to run. Raises ValueError when shapes disagree."""
    check(x.ndim == 2 and packed.ndim == 2 and scale.ndim == 2, "x, packed and scale must be matrices")
    (tokens, columns), (rows, groups) = x.shape, scale.shape
    check(packed.dtype == torch.int32, f"packed must be int32, not {packed.dtype}")
    check(columns > 0 and groups > 0, f"x {tuple(x.shape)} and scale {tuple(scale.shape)} have no columns")
    check(
        packed.shape == (rows, -(-columns // 8)),
        f"packed {tuple(packed.shape)} does not hold [{rows}, {columns}] codes",
    )
    size = columns // groups
    check(columns % groups == 0 and (groups == 1 or size % 32 == 0), f"groups of {columns}/{groups} columns")
    check(zero_point is None or zero_point.shape == scale.shape, "zero_point and scale differ in shape")
    kind = backend(x)
    if kind == "reference":
        return reference_int4_matmul(x, packed, scale, zero_point)
    if kind == "torch":
        weight = dequantize_packed(packed, scale, zero_point, 4, size, (rows, columns), torch.float32)
        return (x.float() @ weight.t()).to(x.dtype)
    if tokens == 0 or rows == 0:
        return torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    options = launch_options(tokens, groups, size, x.dtype)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(rows, options["BLOCK_N"]))
    blocks = triton.cdiv(columns, options["BLOCK_K"])
    splits = split_k(grid[0] * grid[1], blocks, x.device, 2) if tokens <= DECODE else 1
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    out = torch.empty(splits, tokens, rows, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    _int4_matmul_kernel[(*grid, splits)](
        x,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        out,
        tokens,
        rows,
        columns,
        size,
        x.stride(0),
        packed.stride(0),
        scale.stride(0),
        tokens * rows,
        per_split,
        HAS_ZERO_POINT=zero_point is not None,
        DOT=dot_dtype(x.dtype),
        **options,
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)

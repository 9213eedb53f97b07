"""`x @ W^T` with 2:4 weights: two of every four columns are stored, 9/16 of the bytes of dense 16-bit weights.

W `[N, K]` is `compressed`, two values per four columns in column order, and `bitmask` uint8 `[N, ceil(K / 8)]` with exactly
two bits set per four columns. Where a value lies follows from four bits, without a scan and without a gather: values are
loaded as wide as dense weights would be, each column selects the first, the second or neither, and tensor cores multiply
the spread tile. That saves bytes, not arithmetic; sparse tensor cores save both, and are reached through torch
(`to_semi_structured`) where the GPU and its libraries have them."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from tersor.kernels.bitmap_matmul import DECODE
from tersor.kernels.bitmap_matmul_cpu import expand_rows, multiply_rows
from tersor.kernels.dispatch import backend, check, dot_dtype, split_k, tl, triton
from tersor.kernels.fp8_matmul import _decode_e4m3
from tersor.kernels.packed_values import check_operand, check_values, decode_values, times_scale, unpack_bits
from torch import Tensor

ROWS, COLUMNS = 32, 64  # torch's 16-bit weights come in multiples of these, whichever library multiplies them


def reference_expand(compressed, bitmask, columns, scale=None, bits=None, dtype=torch.float32):
    """The definition of the dense weights `[N, K]`."""
    values = decode_values(compressed, bits)[:, : columns // 2]
    weight = torch.zeros(len(values), columns, device=values.device)
    weight.masked_scatter_(unpack_bits(bitmask, columns), values)
    return times_scale(weight, scale).to(dtype)


def reference_semi_structured_matmul(x, compressed, bitmask, scale=None, bits=None):
    """The definition: expand in float32, multiply in float32."""
    return (x.float() @ reference_expand(compressed, bitmask, x.shape[1], scale, bits).t()).to(x.dtype)


@triton.jit
def _tile(
    compressed_at,
    bitmask_at,
    block,
    K,
    in_n,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights `[BLOCK_N, BLOCK_K]` of a block of columns; the pointers are `[BLOCK_N, 1]`, one per row."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    slot = block * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    byte = tl.load(bitmask_at + slot[None, :], mask=in_n[:, None] & (slot < tl.cdiv(K, 8))[None, :], other=0).to(
        tl.int32
    )
    four = tl.reshape(tl.join(byte & 15, byte >> 4), [BLOCK_N, GROUPS])
    if BITS == 4:
        group = block * GROUPS + tl.arange(0, GROUPS)
        pair = tl.load(compressed_at + group[None, :], mask=in_n[:, None] & (group < K // 4)[None, :], other=0)
        v0 = (((pair & 15) ^ 8).to(tl.int32) - 8).to(tl.int8)
        v1 = (((pair >> 4) ^ 8).to(tl.int32) - 8).to(tl.int8)
    else:
        place = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        values = tl.load(compressed_at + place[None, :], mask=in_n[:, None] & (place < K // 2)[None, :], other=0)
        v0, v1 = tl.split(tl.reshape(values, [BLOCK_N, GROUPS, 2]))
    zero = tl.zeros_like(v0)
    w0 = tl.where((four & 1) != 0, v0, zero)
    w1 = tl.where((four & 2) != 0, tl.where((four & 1) != 0, v1, v0), zero)
    w2 = tl.where((four & 4) != 0, tl.where((four & 3) != 0, v1, v0), zero)
    w3 = tl.where((four & 8) != 0, v1, zero)
    tile = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_N, BLOCK_K])
    if E4M3:
        tile = _decode_e4m3(tile)
    return tile.to(DOT)


@triton.jit
def _semi_structured_matmul_kernel(
    x_ptr,
    compressed_ptr,
    bitmask_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K,
    group_size,
    x_row_stride,
    compressed_row_stride,
    bitmask_row_stride,
    scale_row_stride,
    split_stride,
    blocks_per_split,
    HAS_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: a `[BLOCK_M, BLOCK_N]` tile of one slice of K. `group_size` is a multiple of `BLOCK_K`, or K itself."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_n = n < N
    compressed_at = compressed_ptr + n[:, None] * compressed_row_stride
    bitmask_at = bitmask_ptr + n[:, None] * bitmask_row_stride
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    for block in range(first, last):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row_stride + k[None, :], mask=x_mask, other=0.0).to(DOT)
        w = _tile(compressed_at, bitmask_at, block, K, in_n, BITS, E4M3, DOT, BLOCK_N, BLOCK_K)
        if HAS_SCALE:
            at = n * scale_row_stride + block * BLOCK_K // group_size
            scale = tl.load(scale_ptr + at, mask=in_n, other=0.0).to(tl.float32)
            accumulator += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
        else:
            accumulator = tl.dot(x, tl.trans(w), accumulator, input_precision="ieee")
    out = out_ptr + split * split_stride + m[:, None] * N + n[None, :]
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & in_n[None, :])


def launch_options(tokens: int, group_size: int | None, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942), at 2 or 4 bytes per operand;
    `group_size` None: one scale per row, or none."""
    block_k = 128 if group_size is None else next(b for b in (128, 64, 32) if group_size % b == 0)
    if dtype == torch.float32:
        m = 16 if tokens <= DECODE else 32
        return {"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": min(64, block_k), "num_warps": 4, "num_stages": 2}
    if tokens <= DECODE:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": min(64, block_k), "num_warps": 8, "num_stages": 3}


@cache
def _torch_class(device: torch.device, dtype: torch.dtype) -> type[Tensor] | None:
    """Torch's class of 2:4 weights that multiplies correctly on `device`. Which library serves which GPU (CUTLASS only
    sm_8x, cuSPARSELt by its version) is told by trying it on small integers."""
    weight = torch.tensor([0, 3, 0, -2, 1, 0, 4, 0], dtype=dtype, device=device).repeat(ROWS * 2, COLUMNS // 4)
    weight[:, ::8] = torch.arange(ROWS * 2, device=device, dtype=dtype)[:, None] % 5
    weight[:, 1::8] = 0
    x = (torch.arange(8 * weight.shape[1], device=device) % 7 - 3).reshape(8, -1).to(dtype)
    for name in ("SparseSemiStructuredTensorCUSPARSELT", "SparseSemiStructuredTensorCUTLASS"):
        try:
            kind = getattr(torch.sparse, name)
            found = torch.nn.functional.linear(x, kind.from_dense(weight))
        except (AttributeError, NotImplementedError, RuntimeError):
            continue
        if torch.equal(found.float(), x.float() @ weight.float().t()):
            return kind
    return None


def to_semi_structured(weight: Tensor) -> Tensor | None:
    """Torch's sparse tensor of 2:4 `weight` `[N, K]`, which `semi_structured_matmul` takes as `sparse`; None where torch
    has no sparse product for it: not a GPU, not 16-bit floats, N and K no multiples of 32 and 64, no library.

    Raises ValueError for a weight with more than two nonzeros in four columns: the libraries would drop them silently."""
    check(weight.ndim == 2, f"weight must be [N, K], not {tuple(weight.shape)}")
    rows, columns = weight.shape
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    if rows == 0 or columns == 0 or rows % ROWS or columns % COLUMNS:
        return None
    check(int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) <= 2, "weight has more than 2 nonzeros in 4 columns")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor", category=UserWarning)
        kind = _torch_class(weight.device, weight.dtype)
        return None if kind is None else kind.from_dense(weight.contiguous())


def _check(compressed, bitmask, columns, scale, bits):
    rows = len(bitmask)
    check(columns % 4 == 0, f"{columns} columns are not groups of 4")
    check(bits in (None, 4), f"bits must be 4 or None, not {bits}")
    fits = bitmask.dtype == torch.uint8 and bitmask.shape == (rows, -(-columns // 8))
    check(fits, f"bitmask {tuple(bitmask.shape)} {bitmask.dtype} does not hold [{rows}, {columns}] bits")
    held = columns // 4 if bits == 4 else columns // 2
    check(compressed.shape == (rows, held), f"compressed must be [{rows}, {held}], not {tuple(compressed.shape)}")
    check_values(compressed, scale, bits, (rows, columns), 32)


def _starts(rows: int, columns: int) -> Tensor:
    return torch.arange(rows) * (columns // 2)


def expand(
    compressed: Tensor,
    bitmask: Tensor,
    columns: int,
    scale: Tensor | None = None,
    bits: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense weights `[N, columns]` in `dtype`, rounded once; arguments and errors as in `semi_structured_matmul`."""
    _check(compressed, bitmask, columns, scale, bits)
    if backend(compressed) == "torch" and compressed.device.type == "cpu":
        starts = _starts(len(bitmask), columns)
        return expand_rows(compressed.flatten(), starts, bitmask, columns, scale, bits, dtype)
    return reference_expand(compressed, bitmask, columns, scale, bits, dtype)


def semi_structured_matmul(
    x: Tensor,
    compressed: Tensor,
    bitmask: Tensor,
    scale: Tensor | None = None,
    bits: int | None = None,
    sparse: Tensor | None = None,
) -> Tensor:
    """`[M, N]` in the dtype of `x` `[M, K]` (bfloat16, float16, float32), accumulated in float32.

    `compressed` `[N, K / 2]`: floats that the dtype of `x` holds exactly, int8, E4M3, or with `bits=4` uint8 `[N, K / 4]`
    of signed codes, the first of a pair in the low bits. `bitmask` uint8 `[N, ceil(K / 8)]`, two bits in every four
    columns. `scale` `[N, G]` or None: K / G is a multiple of 32, or G is 1. Few tokens are summed from slices of K in a fixed
    order. With `sparse`, what `to_semi_structured` made of the same weights in the dtype of `x`, more than 16 tokens are
    left to torch. Raises ValueError when shapes or dtypes disagree."""
    check_operand(x, compressed)
    (tokens, columns), rows = x.shape, len(bitmask)
    _check(compressed, bitmask, columns, scale, bits)
    if sparse is not None:
        check(sparse.shape == (rows, columns) and sparse.dtype == x.dtype, "sparse is not of these weights")
        if tokens > DECODE:
            return torch.nn.functional.linear(x.contiguous(), sparse)
    kind = backend(x)
    if kind == "torch" and x.device.type == "cpu":
        return multiply_rows(x, compressed.flatten(), _starts(rows, columns), bitmask, scale, bits)
    if kind != "triton":
        return reference_semi_structured_matmul(x, compressed, bitmask, scale, bits)
    if tokens == 0 or rows == 0:
        return torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    x, compressed, bitmask = x.contiguous(), compressed.contiguous(), bitmask.contiguous()
    scale = None if scale is None else scale.contiguous()
    options = launch_options(
        tokens, None if scale is None or scale.shape[1] == 1 else columns // scale.shape[1], x.dtype
    )
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(rows, options["BLOCK_N"]))
    blocks = triton.cdiv(columns, options["BLOCK_K"])
    splits = split_k(grid[0] * grid[1], blocks, x.device) if tokens <= DECODE else 1
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    out = torch.empty(splits, tokens, rows, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    e4m3 = compressed.dtype == torch.float8_e4m3fn
    _semi_structured_matmul_kernel[(*grid, splits)](
        x,
        compressed.view(torch.uint8) if e4m3 else compressed,
        bitmask,
        bitmask if scale is None else scale,
        out,
        tokens,
        rows,
        columns,
        columns if scale is None else columns // scale.shape[1],
        x.stride(0),
        compressed.stride(0),
        bitmask.stride(0),
        0 if scale is None else scale.stride(0),
        tokens * rows,
        per_split,
        HAS_SCALE=scale is not None,
        BITS=bits or 0,
        E4M3=e4m3,
        DOT=dot_dtype(x.dtype),
        **options,
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)

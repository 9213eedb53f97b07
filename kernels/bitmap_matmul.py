"""`x @ W^T` with weights that are stored without their zeros: one bit per weight says where the values belong.

Load as sparse, compute as dense (Flash-LLM, arXiv 2309.10285): with few tokens a matrix product waits for the weights'
bytes, so they cross the memory bus packed, a tile is spread out on chip, and tensor cores multiply all of it. W `[N, K]` is
`values` 1-D, row by row; `bitmask` uint8 `[N, ceil(K / 8)]`, column 0 the lowest bit; `offsets` int32 `[N, ceil(K /
block)]`, where the values of each `block` columns begin (`block_offsets`, once after loading). In 16 bits at 80 % zeros that
is 2 * 0.2 + 1 / 8 + 4 / 128 = 0.56 bytes per weight against 2.

Triton has no scatter to shared memory, so a weight's place is found the other way round: a lane takes 16 columns, counts its
bits, a scan over the 8 lanes of a block gives where its values begin, and every column loads its value, if it has one, from
a pointer that moves on at each set bit. That is one load and 12 instructions per *column*, zero or not (in the compiled loop,
sm_80 and sm_90, 16-bit values; 18 for int8, 22 for E4M3, 27 for 4 bits), of which an SM issues at most 128 a clock: where
memory is fast, instructions bound this kernel and not bytes. A dense 16-bit product can at most use 7 weights per clock and
SM on an A100 and 9 on an H200, this one 10: ahead with room on the first, near even on the second, and behind dense
products of 8-bit and 4-bit weights, where packing saves memory alone. These are counts, not measurements."""

from __future__ import annotations

import torch
from tersor.kernels.bitmap_matmul_cpu import expand_rows, multiply_rows
from tersor.kernels.dispatch import backend, check, dot_dtype, split_k, tl, triton
from tersor.kernels.fp8_matmul import _decode_e4m3
from tersor.kernels.packed_values import check_operand, check_values, decode_values, times_scale, unpack_bits
from torch import Tensor

BLOCKS = (32, 64, 128)  # columns per offset
DECODE = 16  # up to this many tokens the weights' bytes are the cost: split K until the GPU is full
TILE = 64  # up to this many tokens share one spread tile; more are worth a dense copy of the weights


def block_offsets(bitmask: Tensor, row_offsets: Tensor, block: int = 128) -> Tensor:
    """Int32 `[N, ceil(K / block)]`: where in `values` each `block` (32, 64 or 128) columns of a row begin.

    `bitmask` uint8 `[N, ceil(K / 8)]`, `row_offsets` int64 `[N]`, the starts of the rows. Groups that share a scale must
    be whole blocks. Raises ValueError when the rows' starts are not what the bits say."""
    check(block in BLOCKS, f"block must be one of {BLOCKS}, not {block}")
    check(bitmask.ndim == 2 and bitmask.dtype == torch.uint8, "bitmask must be uint8 [N, ceil(K / 8)]")
    check(
        row_offsets.shape == bitmask.shape[:1], f"row_offsets must be [{len(bitmask)}], not {tuple(row_offsets.shape)}"
    )
    step = block // 8
    ones = torch.arange(256, dtype=torch.uint8, device=bitmask.device)
    ones = sum((ones >> bit) & 1 for bit in range(8))
    counts = torch.nn.functional.pad(ones[bitmask.int()], (0, -bitmask.shape[1] % step)).unflatten(1, (-1, step)).sum(2)
    within = counts.cumsum(1)
    total = within[:, -1] if counts.shape[1] else counts.sum(1)
    ends = total.cumsum(0)
    check(torch.equal(ends - total, row_offsets.long()), "row_offsets do not agree with bitmask")
    check(not len(ends) or int(ends[-1]) < 2**31, "more than 2^31 values: offsets are int32")
    return (within - counts + row_offsets.long()[:, None]).int()


def reference_expand(values, bitmask, offsets, columns, scale=None, bits=None, dtype=torch.float32):
    """The definition of the dense weights `[N, K]`."""
    mask = unpack_bits(bitmask, columns)
    block = _block(offsets, columns)
    place = torch.arange(columns, device=values.device)
    before = mask.cumsum(1) - mask.long()  # ones in the row before each column
    first = place // block
    place = offsets.long()[:, first] + before - before[:, first * block]
    stored = torch.cat([decode_values(values, bits), torch.zeros(1, device=values.device)])
    weight = torch.where(mask, stored[place.clamp(max=len(stored) - 1)], 0.0)
    return times_scale(weight, scale).to(dtype)


def reference_bitmap_matmul(x, values, bitmask, offsets, scale=None, bits=None):
    """The definition: expand in float32, multiply in float32."""
    return (x.float() @ reference_expand(values, bitmask, offsets, x.shape[1], scale, bits).t()).to(x.dtype)


@triton.jit
def _take(values_ptr, at, word, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Codes of column `SLOT` of all words, 0 where the bit is not set, and where the next column's are. `at` is a pointer,
    or, with `BITS` per code, a number of codes."""
    bit = (word >> SLOT) & 1
    if BITS == 0:
        code = tl.load(at, mask=bit != 0, other=0)
    else:
        byte = tl.load(values_ptr + (at >> (3 - BITS // 2)), mask=bit != 0, other=0).to(tl.int32)
        code = (byte >> ((at & (8 // BITS - 1)) * BITS)) & ((1 << BITS) - 1)
        code = ((code ^ (1 << BITS - 1)) - (1 << BITS - 1)).to(tl.int8)
    return code, at + bit


@triton.jit
def _take_8(values_ptr, at, word, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Codes `[..., 2, 2, 2]` of 8 columns; a lane holds them next to each other."""
    w0, at = _take(values_ptr, at, word, FIRST, BITS)
    w1, at = _take(values_ptr, at, word, FIRST + 1, BITS)
    w2, at = _take(values_ptr, at, word, FIRST + 2, BITS)
    w3, at = _take(values_ptr, at, word, FIRST + 3, BITS)
    w4, at = _take(values_ptr, at, word, FIRST + 4, BITS)
    w5, at = _take(values_ptr, at, word, FIRST + 5, BITS)
    w6, at = _take(values_ptr, at, word, FIRST + 6, BITS)
    w7, at = _take(values_ptr, at, word, FIRST + 7, BITS)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd), at


@triton.jit
def _load_words(bitmask_at, block, stop, in_n, byte_stride, BLOCK_K: tl.constexpr):
    """Int32 `[BLOCK_N, BLOCK_K / 16]`: 16 bits of the bitmap each, 0 from byte `stop` on. `byte_stride` is 1, which the
    compiler must not know: it would give a lane several neighbouring words, and the loads of values, which follow that
    layout, would fall apart into one sector per lane."""
    slot = block * (BLOCK_K // 8) + 2 * tl.arange(0, BLOCK_K // 16)
    at = bitmask_at + slot[None, :] * byte_stride
    low = tl.load(at, mask=in_n[:, None] & (slot < stop)[None, :], other=0).to(tl.int32)
    high = tl.load(at + byte_stride, mask=in_n[:, None] & (slot + 1 < stop)[None, :], other=0).to(tl.int32)
    return low | (high << 8)


@triton.jit
def _tile(
    values_ptr,
    word,
    start,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights `[BLOCK_N, BLOCK_K]` of a block of columns whose values begin at `start` `[BLOCK_N]`."""
    count = word - ((word >> 1) & 0x55555555)  # compilers know this for a count of bits
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    count = (count * 0x01010101) >> 24
    at = start[:, None] + tl.cumsum(count, 1) - count
    if BITS == 0:
        at = values_ptr + at
    low, at = _take_8(values_ptr, at, word, 0, BITS)
    high, at = _take_8(values_ptr, at, word, 8, BITS)
    tile = tl.reshape(tl.permute(tl.join(low, high), [0, 1, 5, 2, 3, 4]), [BLOCK_N, BLOCK_K])
    if E4M3:
        tile = _decode_e4m3(tile)
    return tile.to(DOT)


@triton.jit(do_not_specialize=["byte_stride"])
def _bitmap_matmul_kernel(
    x_ptr,
    values_ptr,
    bitmask_ptr,
    offsets_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K,
    group_size,
    byte_stride,
    x_row_stride,
    bitmask_row_stride,
    offsets_row_stride,
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
    """One program: a `[BLOCK_M, BLOCK_N]` tile of one slice of K. `group_size` is a multiple of `BLOCK_K`, or K itself.
    Bits and offsets are read a block ahead: the loads of values wait for them."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_n = n < N
    bitmask_at = bitmask_ptr + n[:, None] * bitmask_row_stride
    offsets_at = offsets_ptr + n * offsets_row_stride
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    stop = tl.minimum(last * (BLOCK_K // 8), tl.cdiv(K, 8))
    word = _load_words(bitmask_at, first, stop, in_n, byte_stride, BLOCK_K)
    start = tl.load(offsets_at + first, mask=in_n, other=0)
    for block in range(first, last):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row_stride + k[None, :], mask=x_mask, other=0.0).to(DOT)
        next_word = _load_words(bitmask_at, block + 1, stop, in_n, byte_stride, BLOCK_K)
        next_start = tl.load(offsets_at + tl.minimum(block + 1, last - 1), mask=in_n, other=0)
        w = _tile(values_ptr, word, start, BITS, E4M3, DOT, BLOCK_N, BLOCK_K)
        if HAS_SCALE:
            at = n * scale_row_stride + block * BLOCK_K // group_size
            scale = tl.load(scale_ptr + at, mask=in_n, other=0.0).to(tl.float32)
            accumulator += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
        else:
            accumulator = tl.dot(x, tl.trans(w), accumulator, input_precision="ieee")
        word = next_word
        start = next_start
    out = out_ptr + split * split_stride + m[:, None] * N + n[None, :]
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["byte_stride"])
def _expand_kernel(
    values_ptr,
    bitmask_ptr,
    offsets_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    group_size,
    byte_stride,
    bitmask_row_stride,
    offsets_row_stride,
    scale_row_stride,
    HAS_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_N` rows of one block of columns."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = n < N
    bitmask_at = bitmask_ptr + n[:, None] * bitmask_row_stride
    word = _load_words(bitmask_at, block, tl.cdiv(K, 8), in_n, byte_stride, BLOCK_K)
    start = tl.load(offsets_ptr + n * offsets_row_stride + block, mask=in_n, other=0)
    w = _tile(values_ptr, word, start, BITS, E4M3, tl.float32, BLOCK_N, BLOCK_K)
    if HAS_SCALE:
        at = n * scale_row_stride + block * BLOCK_K // group_size
        w *= tl.load(scale_ptr + at, mask=in_n, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + n[:, None] * K + k[None, :]
    tl.store(at, w.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & (k < K)[None, :])


def launch_options(tokens: int, block: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942), at 2 or 4 bytes per
    operand."""
    if dtype == torch.float32:
        m = 16 if tokens <= DECODE else 32
        return {"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": block, "num_warps": 4, "num_stages": 1}
    if tokens <= DECODE:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 32 if tokens <= 32 else 64, "BLOCK_N": 64, "BLOCK_K": block, "num_warps": 4, "num_stages": 2}


def _block(offsets: Tensor, columns: int) -> int:
    for block in reversed(BLOCKS):
        if offsets.shape[1] == -(-columns // block):
            return block
    raise ValueError(f"offsets {tuple(offsets.shape)} are for no blocks of {columns} columns")


def _check(values, bitmask, offsets, columns, scale, bits):
    """(rows, columns per offset) of weights whose parts fit each other."""
    rows = bitmask.shape[0]
    check(values.ndim == 1, f"values must be 1-D, not {tuple(values.shape)}")
    fits = bitmask.dtype == torch.uint8 and bitmask.shape == (rows, -(-columns // 8))
    check(fits, f"bitmask {tuple(bitmask.shape)} {bitmask.dtype} does not hold [{rows}, {columns}] bits")
    fits = offsets.ndim == 2 and offsets.dtype == torch.int32 and len(offsets) == rows
    check(fits, f"offsets must be int32 [{rows}, blocks], not {tuple(offsets.shape)} {offsets.dtype}")
    block = _block(offsets, columns)
    check_values(values, scale, bits, (rows, columns), block)
    return rows, block


def expand(
    values: Tensor,
    bitmask: Tensor,
    offsets: Tensor,
    columns: int,
    scale: Tensor | None = None,
    bits: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense weights `[N, columns]` in `dtype`, rounded once; arguments and errors as in `bitmap_matmul`."""
    rows, block = _check(values, bitmask, offsets, columns, scale, bits)
    kind = backend(values)
    if kind == "torch" and values.device.type == "cpu":
        return expand_rows(values, offsets[:, 0], bitmask, columns, scale, bits, dtype)
    if kind != "triton":
        return reference_expand(values, bitmask, offsets, columns, scale, bits, dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=values.device)
    if rows:
        bitmask, offsets, scale = (
            bitmask.contiguous(),
            offsets.contiguous(),
            None if scale is None else scale.contiguous(),
        )
        e4m3 = values.dtype == torch.float8_e4m3fn
        _expand_kernel[(triton.cdiv(rows, 32), triton.cdiv(columns, block))](
            values.view(torch.uint8) if e4m3 else values,
            bitmask,
            offsets,
            offsets if scale is None else scale,
            out,
            rows,
            columns,
            columns if scale is None else columns // scale.shape[1],
            1,
            bitmask.stride(0),
            offsets.stride(0),
            0 if scale is None else scale.stride(0),
            HAS_SCALE=scale is not None,
            BITS=bits or 0,
            E4M3=e4m3,
            BLOCK_N=32,
            BLOCK_K=block,
        )
    return out


def bitmap_matmul(
    x: Tensor, values: Tensor, bitmask: Tensor, offsets: Tensor, scale: Tensor | None = None, bits: int | None = None
) -> Tensor:
    """`[M, N]` in the dtype of `x` `[M, K]` (bfloat16, float16, float32), accumulated in float32.

    `values` 1-D: floats that the dtype of `x` holds exactly, int8, E4M3, or with `bits` 4 or 2 a uint8 stream of signed
    codes, low bits first. `bitmask` uint8 `[N, ceil(K / 8)]`, `offsets` as `block_offsets` makes them, `scale` `[N, G]` or
    None: K / G is a multiple of their block, or G is 1. Values are multiplied as stored and the float32 sums are scaled. Few
    tokens are summed from slices of K in a fixed order: results do not vary from run to run. More tokens than 64 take a
    dense copy of the weights where no scale forbids it. Raises ValueError when shapes or dtypes disagree; what `bitmask` and
    `offsets` say is trusted on a GPU."""
    check_operand(x, values)
    (tokens, columns), parts = x.shape, (values, bitmask, offsets)
    check(bitmask.ndim == 2, f"bitmask must be a matrix, not {tuple(bitmask.shape)}")
    rows, block = _check(*parts, columns, scale, bits)
    kind = backend(x)
    if kind == "torch" and x.device.type == "cpu":
        return multiply_rows(x, values, offsets[:, 0], bitmask, scale, bits)
    if kind != "triton":
        return reference_bitmap_matmul(x, *parts, scale, bits)
    if tokens == 0 or rows == 0:
        return torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if scale is None and tokens > TILE:
        return x @ expand(*parts, columns, bits=bits, dtype=x.dtype).t()
    x, bitmask, offsets = x.contiguous(), bitmask.contiguous(), offsets.contiguous()
    scale = None if scale is None else scale.contiguous()
    options = launch_options(tokens, block, x.dtype)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(rows, options["BLOCK_N"]))
    blocks = triton.cdiv(columns, block)
    splits = split_k(grid[0] * grid[1], blocks, x.device) if tokens <= DECODE else 1
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    out = torch.empty(splits, tokens, rows, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    e4m3 = values.dtype == torch.float8_e4m3fn
    _bitmap_matmul_kernel[(*grid, splits)](
        x,
        values.view(torch.uint8) if e4m3 else values,
        bitmask,
        offsets,
        offsets if scale is None else scale,
        out,
        tokens,
        rows,
        columns,
        columns if scale is None else columns // scale.shape[1],
        1,
        x.stride(0),
        bitmask.stride(0),
        offsets.stride(0),
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

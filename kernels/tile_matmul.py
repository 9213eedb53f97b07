"""`x @ W^T` for a weight of which only the micro-tiles with nonzeros are stored.

Tiles of W `[N, K]` are `[count, R, C]`, edges padded with zeros; PIT (SOSP'23) packs them into dense tiles:

- K axis (R x 1 and R x C blocks): fibres are row blocks, `tile_index` the tiles' column blocks. 64 columns of a fibre's
  tiles make one dense tile; the inputs that they meet are gathered inside the load of x (SRead) and sums are stored
  plainly. Tokens are the long side of the product and the R rows of W the short one, which tensor cores want so. Columns
  of 1 to 8 are read from a transposed copy of x, where one input of many tokens is contiguous; wider tiles and few
  tokens read x itself. Many tokens: bound by moving x from the L2 cache, since 2 R operations come with each element
  moved. Few tokens: bound by reading the tiles once.
- M axis (1 x C): fibres are column blocks, `tile_index` the tiles' rows. 64 tiles of a fibre make one dense tile, and its
  outputs belong to 64 rows of W (SWrite). Instead of adding them there with atomics, whose order would vary, each tile's
  outputs are kept and then summed per row in the order of columns: results repeat exactly. Many tokens: bound by writing
  and reading those, 4 bytes per tile and token, in pieces that stay in the L2 cache. Few tokens: by reading the tiles once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from tersor.kernels.count_tiles import grid_of, is_m_axis
from tersor.kernels.dispatch import backend, check, dot_dtype, tl, triton
from tersor.kernels.tile_loops import add_columns, add_rows
from torch import Tensor

DECODE = 16  # up to this many tokens the tiles' bytes are the cost: split fibres until the GPU is full
WIDE = 16  # columns of a tile from which one row of x is read in pieces worth a memory transaction (32 bytes)
SCRATCH = 1 << 23  # float32 outputs of tiles kept at a time: 32 MiB
LOOPS = 16  # tokens up to which a CPU is faster with loops than with gathered products (4096 x 4096 at 90 %, one core)


class ByRow(NamedTuple):
    """Tiles of the M axis by row of W: those of row n are `tile[start[n] : start[n + 1]]`, in the order of columns.
    `start` int32 `[N + 1]`, `tile` int32 `[count]`, `block` int32 `[count]` the column block of each."""

    start: Tensor
    tile: Tensor
    block: Tensor


def tiles_by_row(tile_index: Tensor, tile_ptr: Tensor, rows: int) -> ByRow:
    """What the M axis sums by; made once per weight."""
    device = tile_index.device
    listed = torch.arange(len(tile_index), device=device) < tile_ptr[-1]
    index = torch.where(listed, tile_index.long(), rows)  # an index built on a GPU may be longer than its lists
    order = torch.argsort(index, stable=True)
    start = torch.searchsorted(index[order], torch.arange(rows + 1, device=device))
    block = torch.searchsorted(tile_ptr[1:].long(), order, right=True)
    return ByRow(start.int(), order.int(), block.int())


def reference_tiles(tile_values, tile_index, tile_ptr, shape):
    """The dense weight `[N, K]`."""
    count, (height, width) = int(tile_ptr[-1]), tile_values.shape[1:]
    fibres, tiles = grid_of(shape, (height, width))
    dense = tile_values.new_zeros(fibres, tiles, height, width)
    fibre = torch.arange(fibres, device=tile_ptr.device).repeat_interleave(tile_ptr.diff().long())
    dense[fibre, tile_index[:count].long()] = tile_values[:count]
    order = (1, 2, 0, 3) if is_m_axis((height, width)) else (0, 2, 1, 3)
    dense = dense.permute(order).flatten(2, 3).flatten(0, 1)
    return dense[: shape[0], : shape[1]]


def reference_tile_matmul(x, tile_values, tile_index, tile_ptr, shape):
    """The definition: multiply with the dense weight in float32."""
    return (x.float() @ reference_tiles(tile_values, tile_index, tile_ptr, shape).float().t()).to(x.dtype)


@triton.jit
def _tile_columns_kernel(
    x_ptr,
    values_ptr,
    index_ptr,
    start_ptr,
    out_ptr,
    M,
    N,
    K,
    x_tokens,
    x_stride,
    out_split_stride,
    splits,
    R: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_M` tokens times `BLOCK_R` rows of one fibre, one slice of its tiles.

    `x_stride` is the distance of inputs where x is TRANSPOSED, of tokens where it is not; x has room for `x_tokens`."""
    PARTS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    fibre = tl.program_id(0).to(tl.int64) // PARTS
    r = tl.program_id(0) % PARTS * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    in_x, in_r = m < x_tokens, r < R
    start = tl.load(start_ptr + fibre).to(tl.int64)
    length = (tl.load(start_ptr + fibre + 1) - start).to(tl.int32) * C  # columns of the fibre's tiles side by side
    steps = tl.cdiv(length, BLOCK_K)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    accumulator = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < length
        tile = start + k // C
        column = tl.load(index_ptr + tile, mask=in_k, other=0) * C + k % C
        if C > 1 and C & (C - 1) == 0 and C <= BLOCK_K:
            column = tl.max_contiguous(tl.multiple_of(column, C), C)
        x_mask = in_x[:, None] & (in_k & (column < K))[None, :]
        if TRANSPOSED:
            x_at = column.to(tl.int64)[None, :] * x_stride + m[:, None]
        else:
            x_at = m[:, None] * x_stride + column[None, :]
        x = tl.load(x_ptr + x_at, mask=x_mask, other=0.0).to(DOT)
        at = (tile * (R * C) + k % C)[:, None] + r[None, :] * C
        values = tl.load(values_ptr + at, mask=in_k[:, None] & in_r[None, :], other=0.0).to(DOT)
        accumulator = tl.dot(x, values, accumulator, input_precision="ieee")
    n = fibre * R + r
    out = out_ptr + split * out_split_stride + m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (in_r & (n < N))[None, :]
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_rows_kernel(
    x_ptr,
    values_ptr,
    start_ptr,
    products_ptr,
    M,
    K,
    x_row_stride,
    products_row_stride,
    C: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`products[tile, m] = tile . x[m, its columns]`. One program: the slice of one fibre's tiles that it comes to by
    steps of all programs of the fibre, times `BLOCK_M` tokens."""
    fibre = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    start = tl.load(start_ptr + fibre).to(tl.int64)
    count = (tl.load(start_ptr + fibre + 1) - start).to(tl.int32)
    for group in range(tl.program_id(2), tl.cdiv(count, BLOCK_T), tl.num_programs(2)):
        t = group * BLOCK_T + tl.arange(0, BLOCK_T)
        in_t = t < count
        accumulator = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
        for first in tl.static_range(0, C, BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)
            column = fibre * C + c
            values = tl.load(
                values_ptr + (start + t)[:, None] * C + c[None, :], mask=in_t[:, None] & (c < C)[None, :], other=0.0
            )
            x_mask = (column < K)[:, None] & (c < C)[:, None] & in_m[None, :]
            x = tl.load(x_ptr + m[None, :] * x_row_stride + column[:, None], mask=x_mask, other=0.0)
            accumulator = tl.dot(values.to(DOT), x.to(DOT), accumulator, input_precision="ieee")
        at = (start + t)[:, None] * products_row_stride + m[None, :]
        tl.store(products_ptr + at, accumulator, mask=in_t[:, None])  # there is room for whole blocks of tokens


@triton.jit
def _sum_rows_kernel(
    products_ptr,
    row_start_ptr,
    row_tile_ptr,
    out_ptr,
    M,
    N,
    products_row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`out[m, n]`: the products of row n's tiles, added in the order of columns."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    start = tl.load(row_start_ptr + n, mask=in_n, other=0)
    count = tl.load(row_start_ptr + n + 1, mask=in_n, other=0) - start
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(0, tl.max(count, axis=0)):
        there = i < count
        tile = tl.load(row_tile_ptr + start + i, mask=there, other=0).to(tl.int64)
        at = tile[:, None] * products_row_stride + m[None, :]
        total += tl.load(products_ptr + at, mask=there[:, None], other=0.0)
    out = out_ptr + m[None, :] * N + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def launch_options(tokens: int, tile: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps of `_tile_columns_kernel` or `_tile_rows_kernel` that fit the shared memory of every supported GPU
    (64 KiB on gfx942). Loads of x wait for the index, which takes half of the stages: 5 keep two or three blocks."""
    double = dtype == torch.float32
    block_m = next((m for m in (16, 64) if tokens <= m), 64 if double else 128)
    if is_m_axis(tile):
        block_k = max(16, min(64, triton.next_power_of_2(tile[1])))
        return {"BLOCK_M": min(block_m, 64), "BLOCK_T": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 2}
    block_r = max(16, min(64 if double else 128, triton.next_power_of_2(tile[0])))
    stages = 2 if double else 5 if block_r <= 32 else 4 if block_r <= 64 else 3
    return {"BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}


def _slices(programs, blocks, device):
    """Slices of each fibre that fill the GPU, where fibres have `blocks` steps on average; each slice one step at
    least."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(4 * processors // max(1, programs), int(blocks)))


def _columns_on_triton(x, values, index, start, shape):
    (tokens, columns), (count, height, width) = x.shape, values.shape
    options = launch_options(tokens, (height, width), x.dtype)
    transposed = tokens > DECODE and width < WIDE
    room = tokens
    if transposed:
        room = triton.cdiv(tokens, 16) * 16  # rows of x^T that start at multiples of 32 bytes are loaded whole
        x = x.t().contiguous() if room == tokens else torch.nn.functional.pad(x.t(), (0, room - tokens))
    x = x.contiguous()
    fibres = len(start) - 1
    grid = fibres * triton.cdiv(height, options["BLOCK_R"]), triton.cdiv(tokens, options["BLOCK_M"])
    blocks = count * width / fibres / options["BLOCK_K"]
    splits = _slices(grid[0] * grid[1], blocks, x.device) if tokens <= DECODE else 1
    out = torch.empty(splits, tokens, shape[0], dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    _tile_columns_kernel[(*grid, splits)](
        x,
        values,
        index,
        start,
        out,
        tokens,
        shape[0],
        columns,
        room,
        x.stride(0),
        tokens * shape[0],
        splits,
        R=height,
        C=width,
        TRANSPOSED=transposed,
        DOT=dot_dtype(x.dtype),
        **options,
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def _rows_on_triton(x, values, start, by_row, shape):
    x = x.contiguous()
    (tokens, columns), (count, _, width) = x.shape, values.shape
    options = launch_options(tokens, (1, width), x.dtype)
    block_m, fibres = options["BLOCK_M"], len(start) - 1
    piece = block_m * max(1, min(triton.cdiv(tokens, block_m), SCRATCH // count // block_m))
    products = torch.empty(count, piece, device=x.device)
    out = torch.empty(tokens, shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, tokens, piece):
        part, target = x[first : first + piece], out[first : first + piece]
        grid = fibres, triton.cdiv(len(part), block_m)
        slices = _slices(grid[0] * grid[1], count / fibres / options["BLOCK_T"], x.device)
        _tile_rows_kernel[(*grid, slices)](
            part,
            values,
            start,
            products,
            len(part),
            columns,
            x.stride(0),
            piece,
            C=width,
            DOT=dot_dtype(x.dtype),
            **options,
        )
        _sum_rows_kernel[(triton.cdiv(shape[0], 32), triton.cdiv(len(part), block_m))](
            products, by_row.start, by_row.tile, target, len(part), shape[0], piece, BLOCK_M=block_m, BLOCK_N=32
        )
    return out


def _on_torch(x, values, index, start, by_row, shape):
    """Few tokens: loops on a CPU. Many: a product per fibre of the inputs that it meets, gathered as rows of x^T."""
    (tokens, columns), (_, height, width) = x.shape, values.shape
    m_axis = is_m_axis((height, width))
    x = torch.nn.functional.pad(x, (0, -columns % width))
    if tokens <= LOOPS and x.device.type == "cpu":
        if m_axis:
            return add_rows(x, values[:, 0], *by_row).to(x.dtype)
        return add_columns(x, values, index, start)[:, : shape[0]].to(x.dtype)
    inputs = x.float().t().contiguous().unflatten(0, (-1, width))  # [column blocks, C, M]
    fibres = len(start) - 1
    y = x.new_zeros(shape[0] if m_axis else fibres * height, tokens, dtype=torch.float32)
    bounds = start.tolist()
    for fibre, (begin, end) in enumerate(pairwise(bounds)):
        tiles, at = values[begin:end].float(), index[begin:end]
        if m_axis:
            y.index_add_(0, at, tiles[:, 0] @ inputs[fibre])  # one tile per row: no order to vary
        elif end > begin:
            weight = tiles[:, :, 0].t() if width == 1 else tiles.permute(1, 0, 2).flatten(1)
            torch.mm(weight, inputs.index_select(0, at).flatten(0, 1), out=y[fibre * height : (fibre + 1) * height])
    return y[: shape[0]].t().to(x.dtype).contiguous()


def tile_matmul(
    x: Tensor,
    tile_values: Tensor,
    tile_index: Tensor,
    tile_ptr: Tensor,
    shape: tuple[int, int],
    by_row: ByRow | None = None,
) -> Tensor:
    """`[M, N]` in the dtype of `x` `[M, K]` (bfloat16, float16, float32), accumulated in float32.

    `tile_values` `[count, R, C]` in the dtype of x, `tile_index` int32 `[count]`, `tile_ptr` int32 `[fibres + 1]`, `shape`
    `(N, K)`. The order of tiles within a fibre is free. 1 x C tiles are summed by `by_row`, which `tiles_by_row` makes; do
    so once per weight. Lists are not searched for wrong entries on a GPU: check what comes from outside before. Results do
    not vary from run to run. Raises ValueError when shapes or dtypes disagree."""
    check(x.ndim == 2 and tile_values.ndim == 3, "x must be a matrix, tile_values [count, R, C]")
    check(x.dtype == tile_values.dtype, f"x is {x.dtype}, tile_values are {tile_values.dtype}")
    check(x.shape[1] == shape[1], f"x {tuple(x.shape)} and a weight {tuple(shape)} do not multiply")
    tile = tuple(tile_values.shape[1:])
    check(min(tile) > 0 and min(shape) > 0, f"tiles {tile} of a weight {tuple(shape)} hold nothing")
    fibres, tiles = grid_of(shape, tile)
    check(tile_index.ndim == 1 and len(tile_index) >= len(tile_values), "tile_index is shorter than tile_values")
    check(tile_ptr.shape == (fibres + 1,), f"tile_ptr {tuple(tile_ptr.shape)}, expected [{fibres + 1}]")
    kind = backend(x)
    if kind == "reference":
        return reference_tile_matmul(x, tile_values, tile_index, tile_ptr, shape)
    if len(x) == 0 or len(tile_values) == 0:
        return x.new_zeros(len(x), shape[0])
    tile_index, tile_ptr = tile_index.int().contiguous(), tile_ptr.int().contiguous()
    if x.device.type == "cpu":
        _check_lists(tile_index, tile_ptr, len(tile_values), tiles)
    if is_m_axis(tile) and by_row is None:
        by_row = tiles_by_row(tile_index, tile_ptr, shape[0])
    if kind == "torch":
        return _on_torch(x, tile_values, tile_index, tile_ptr, by_row, shape)
    tile_values = tile_values.contiguous()
    if is_m_axis(tile):
        return _rows_on_triton(x, tile_values, tile_ptr, by_row, shape)
    return _columns_on_triton(x, tile_values, tile_index, tile_ptr, shape)


def _check_lists(index, start, count, tiles):
    """On a CPU, where the loops would read out of bounds."""
    steps = start.diff()
    rises = int(start[0]) == 0 and int(steps.min()) >= 0 and int(start[-1]) <= count
    check(rises, f"tile_ptr does not rise from 0 to {count}, the number of tiles")
    lowest, highest = (int(bound) for bound in index[: start[-1]].aminmax()) if start[-1] else (0, 0)
    check(lowest >= 0 and highest < tiles, f"tile_index {lowest}..{highest}, but a fibre has {tiles} tiles")

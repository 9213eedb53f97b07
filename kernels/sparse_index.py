"""The index of covered micro-tiles, built at run time for sparsity that is not known before.

PIT (SOSP'23) needs no sorted index: the order of tiles along the reduction axis changes a product only by rounding. So
two kernels do it in one pass each. The first looks at every micro-tile and takes the next free position of its fibre for
each that is covered; the second moves the fibres' lists together and, on demand, copies the tiles' values.

Bound by reading the matrix once (index), or by that and the covered part twice more (values)."""

from __future__ import annotations

import torch
from tersor.kernels.count_tiles import (
    check_tiled,
    covered_tiles,
    find_tiles,
    grid_of,
    in_tiles,
    is_m_axis,
    launch_options,
    tile_places,
)
from tersor.kernels.dispatch import backend, tl, triton
from torch import Tensor


def reference_build_index(x, tile):
    """The definition, ascending within each fibre."""
    return _listed((in_tiles(x, tile) != 0).any(3).any(2))


def reference_pack_tiles(x, tile):
    """The definition, ascending within each fibre."""
    tiles = in_tiles(x, tile)
    covered = (tiles != 0).any(3).any(2)
    start, index = _listed(covered)
    return tiles[covered], index, start


def _listed(covered):
    """Start of each fibre's list and the lists, of a bool matrix `[fibres, tiles]`."""
    start = torch.zeros(len(covered) + 1, dtype=torch.int32, device=covered.device)
    torch.cumsum(covered.sum(1), 0, out=start[1:])
    return start, covered.nonzero()[:, 1].int()


@triton.jit
def _compact_kernel(
    list_ptr,
    start_ptr,
    x_ptr,
    index_ptr,
    values_ptr,
    rows,
    columns,
    tiles,
    row_stride,
    VALUES: tl.constexpr,
    COLUMN_FIBRES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: `BLOCK_T` entries of one fibre's list `[fibres, tiles]` to where they belong."""
    fibre = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + fibre).to(tl.int64)
    count = tl.load(start_ptr + fibre + 1) - start
    entry = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    listed = entry < count
    t = tl.load(list_ptr + fibre * tiles + entry, mask=listed, other=0)
    tl.store(index_ptr + start + entry, t, mask=listed)
    if VALUES:
        r, c, row, column = tile_places(fibre, t, COLUMN_FIBRES, R, C, BLOCK_R, BLOCK_C)
        stored = listed[:, None, None] & (r < R) & (c < C)
        mask = stored & (row < rows) & (column < columns)
        value = tl.load(x_ptr + row * row_stride + column, mask=mask, other=0)
        at = (start + entry)[:, None, None] * (R * C) + r * C + c
        tl.store(values_ptr + at, value, mask=stored)


def _on_triton(x, tile, values):
    fibres, tiles = grid_of(x.shape, tile)
    x = x if x.stride(1) == 1 else x.contiguous()
    start = torch.zeros(fibres + 1, dtype=torch.int32, device=x.device)
    lists = torch.empty(fibres, tiles, dtype=torch.int32, device=x.device)
    torch.cumsum(find_tiles(x, tile, lists), 0, out=start[1:])
    index = torch.empty(fibres * tiles, dtype=torch.int32, device=x.device)
    packed = torch.empty(fibres * tiles if values else 0, *tile, dtype=x.dtype, device=x.device)
    if index.numel():
        options = launch_options(tile)
        # Integers of the width move any dtype unchanged.
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        _compact_kernel[(fibres, triton.cdiv(tiles, options["BLOCK_T"]))](
            lists,
            start,
            x.view(width),
            index,
            packed.view(width),
            *x.shape,
            tiles,
            x.stride(0),
            VALUES=values,
            COLUMN_FIBRES=is_m_axis(tile),
            R=tile[0],
            C=tile[1],
            **options,
        )
    return packed, start, index


def build_index(x: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the covered tiles of a matrix or mask `[rows, columns]` are: start int32 `[fibres + 1]` of each fibre's list,
    and the lists, int32, of column blocks (of rows for 1 x C tiles).

    On a GPU lists are in no fixed order, and their tensor is as long as if every tile were covered, since waiting for
    the count would cost more than the memory: entries from `start[-1]` on mean nothing. Raises ValueError as
    `count_tiles` does."""
    check_tiled(x, tile)
    kind = backend(x)
    if kind == "triton":
        return _on_triton(x, tile, False)[1:]
    if kind == "reference" or x.device.type != "cpu":
        return reference_build_index(x, tile)
    return _listed(covered_tiles(x, tile))


def pack_tiles(x: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`build_index` with the tiles themselves: values `[count, R, C]` in the order of the lists, index, start; what
    `tile_matmul` multiplies with. Edges are padded with zeros.

    With few nonzeros in the *activations* `x` `[M, K]` and many tokens, `tile_matmul(weight, *pack_tiles(x, (32, 1)),
    x.shape)` is the transpose of `x @ W^T`."""
    check_tiled(x, tile)
    kind = backend(x)
    if kind == "triton":
        packed, start, index = _on_triton(x, tile, True)
        return packed, index, start
    if kind == "reference" or x.device.type != "cpu":
        return reference_pack_tiles(x, tile)
    covered = covered_tiles(x, tile)
    start, index = _listed(covered)
    return in_tiles(x, tile)[covered], index, start

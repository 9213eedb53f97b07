"""Which micro-tiles of a matrix hold a nonzero, counted per fibre.

PIT (SOSP'23) packs the covered tiles of one fibre side by side into dense tiles, so what a sparse product costs follows
from the counts per fibre, not from their total. Fibres are row blocks, along which tiles differ by their column block;
for tiles of one row and several columns they are column blocks, along which tiles differ by their row. A random pattern
of sparsity s covers `1 - s^e` of the tiles of e elements.

Bound by reading the matrix once, everywhere."""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.loops import compiled, over_rows
from torch import Tensor

LARGEST = 1 << 14  # elements of a tile: a program holds one at least


def is_m_axis(tile: tuple[int, int]) -> bool:
    """Whether fibres are column blocks: tiles 1 x C, that PIT permutes along the rows."""
    return tile[0] == 1 < tile[1]


def grid_of(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Fibres of a matrix, and tiles along each."""
    blocks = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
    return blocks[::-1] if is_m_axis(tile) else blocks


def in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """`[fibres, tiles, R, C]`, edges padded with zeros."""
    (rows, columns), (height, width) = x.shape, tile
    padded = torch.nn.functional.pad(x, (0, -columns % width, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return tiles.permute(2, 0, 1, 3) if is_m_axis(tile) else tiles.permute(0, 2, 1, 3)


def reference_count_tiles(x, tile):
    """The definition."""
    return (in_tiles(x, tile) != 0).any(3).any(2).sum(1)


@triton.jit
def tile_places(
    fibre,
    t,
    COLUMN_FIBRES: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of tiles `t` `[T]` of a fibre: row and column inside a tile, `[1, BLOCK_R, 1]` and `[1, 1, BLOCK_C]`, and in the
    matrix."""
    r = tl.arange(0, BLOCK_R)[None, :, None]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    if COLUMN_FIBRES:
        row = t[:, None, None].to(tl.int64) * R + r
        column = fibre * C + c
    else:
        row = fibre * R + r
        column = t[:, None, None] * C + c
    return r, c, row, column


@triton.jit
def _find_tiles_kernel(
    bits_ptr,
    count_ptr,
    index_ptr,
    rows,
    columns,
    tiles,
    row_stride,
    MASK: tl.constexpr,
    COLUMN_FIBRES: tl.constexpr,
    STORE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: `BLOCK_T` tiles of one fibre. It reserves room for all it finds with one atomic addition, and with
    `STORE` puts their numbers there, into `index_ptr` `[fibres, tiles]`: ascending within a program, programs in the
    order in which they finish."""
    fibre = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    r, c, row, column = tile_places(fibre, t, COLUMN_FIBRES, R, C, BLOCK_R, BLOCK_C)
    mask = (r < R) & (c < C) & (row < rows) & (column < columns)
    bits = tl.load(bits_ptr + row * row_stride + column, mask=mask, other=0)
    covered = ((bits & MASK) != 0).to(tl.int32)
    covered = tl.max(tl.max(covered, axis=2), axis=1)
    found = tl.sum(covered, axis=0)
    first = tl.atomic_add(count_ptr + fibre, found)
    if STORE:
        position = first + tl.cumsum(covered, axis=0) - covered
        tl.store(index_ptr + fibre * tiles + position, t, mask=covered != 0)


@compiled
def _cover(bits, mask, height, width, covered, first, last):
    """Row blocks `first..last` of `covered` `[row blocks, column blocks]`."""
    rows, columns = bits.shape
    union = np.zeros(columns, bits.dtype)
    for block in range(first, last):
        union[:] = 0
        for i in range(block * height, min(block * height + height, rows)):
            row = bits[i]
            for j in range(columns):
                union[j] |= row[j]
        flags = covered[block]
        if width == 1:
            for j in range(columns):
                flags[j] = (union[j] & mask) != 0
        else:
            for t in range(len(flags)):
                part, some = union[t * width : t * width + width], mask & 0
                for j in range(len(part)):
                    some |= part[j]
                flags[t] = (some & mask) != 0


def bits_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` as integers, and the mask of the bits that make an element nonzero: all but the sign of a float."""
    if x.dtype == torch.bool:
        return x.view(torch.uint8), 0xFF
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if not x.dtype.is_floating_point:
        return x.view(integer), 0xFF if integer == torch.uint8 else -1
    return x.view(integer), (1 << (8 * x.element_size() - 1)) - 1


def check_tiled(x: Tensor, tile: tuple[int, int]) -> None:
    """Raise ValueError unless `x` can be cut into tiles."""
    check(x.ndim == 2, f"a matrix has tiles, {tuple(x.shape)} has none")
    check(not x.dtype.is_complex, f"{x.dtype} has no zero bits to look for")
    check(len(tile) == 2 and min(tile) > 0, f"tile {tuple(tile)} must be two positive extents")
    check(tile[0] * tile[1] <= LARGEST, f"tile {tuple(tile)} has more than {LARGEST} elements")


def covered_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """Bool `[fibres, tiles]` on the CPU: which tiles of `x` hold a nonzero."""
    check_tiled(x, tile)
    bits, mask = bits_of(x.contiguous())
    covered = torch.zeros(-(-x.shape[0] // tile[0]), -(-x.shape[1] // tile[1]), dtype=torch.bool)
    if covered.numel():
        array, flags, size, (height, width) = bits.numpy(), covered.numpy(), x.element_size(), tile
        if width * size % 8 == 0 and x.shape[1] * size % 8 == 0 and bits.data_ptr() % 8 == 0:  # eight bytes at a time
            repeated = (mask & (1 << 8 * size) - 1).to_bytes(size, "little") * (8 // size)
            mask = int.from_bytes(repeated, "little", signed=True)
            array, width = array.view("int64"), width * size // 8
        mask = array.dtype.type(mask)
        over_rows(lambda first, last: _cover(array, mask, height, width, flags, first, last), len(covered), fewest=1)
    return covered.t() if is_m_axis(tile) else covered


def launch_options(tile: tuple[int, int]) -> dict[str, int]:
    """About 4096 elements for the 128 threads of a program."""
    height, width = (1 << (extent - 1).bit_length() for extent in tile)
    return {
        "BLOCK_R": height,
        "BLOCK_C": width,
        "BLOCK_T": max(1, min(1024, 4096 // (height * width))),
        "num_warps": 4,
    }


def find_tiles(x: Tensor, tile: tuple[int, int], index: Tensor | None = None) -> Tensor:
    """Counts int32 `[fibres]` by the Triton kernel, which also fills `index` int32 `[fibres, tiles]`."""
    fibres, tiles = grid_of(x.shape, tile)
    count = torch.zeros(fibres, dtype=torch.int32, device=x.device)
    if fibres == 0 or tiles == 0:
        return count
    bits, mask = bits_of(x if x.stride(1) == 1 else x.contiguous())
    options = launch_options(tile)
    _find_tiles_kernel[(fibres, triton.cdiv(tiles, options["BLOCK_T"]))](
        bits,
        count,
        count if index is None else index,
        *x.shape,
        tiles,
        bits.stride(0),
        MASK=mask,
        COLUMN_FIBRES=is_m_axis(tile),
        STORE=index is not None,
        R=tile[0],
        C=tile[1],
        **options,
    )
    return count


def count_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """Covered tiles of each fibre, int64 `[fibres]`, of a weight, mask or element matrix `[rows, columns]`.

    Fibres are row blocks (`ceil(rows / R)`), for 1 x C tiles column blocks (`ceil(columns / C)`). -0.0 is a zero, NaN is
    not. Raises ValueError for what is no matrix, or no tile of at most 16384 elements."""
    check_tiled(x, tile)
    kind = backend(x)
    if kind == "reference":
        return reference_count_tiles(x, tile)
    if kind == "torch":
        return (covered_tiles(x, tile) if x.device.type == "cpu" else (in_tiles(x, tile) != 0).any(3).any(2)).sum(1)
    return find_tiles(x, tile).long()

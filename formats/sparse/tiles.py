"""`vector` and `block`: the tiles of a weight that are not all zero, and where they lie.

A tile has R rows and C columns; edges are filled up with zeros. `<module>.tile_values` `[count, R, C]` holds the tiles fibre
by fibre, `.tile_ptr` `[fibres + 1]` where each fibre begins, `.tile_index` the number of each tile along its fibre,
ascending. Fibres are row blocks, so that a matmul gathers along its reduction axis and writes without a scatter (PIT,
SOSP'23: K axis); for tiles of one row they are column blocks and the numbers are rows (PIT's M axis). Codes of 2, 3 or 4
bits are a stream of bytes over all tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError
from tersor.formats.sparse.elements import check, check_count, new, new_elements, parts, raw, values_layout

if TYPE_CHECKING:
    import numpy as np
    from tersor.formats.sparse.packed import Packed
    from torch import Tensor

MOST_ELEMENTS = 1 << 16  # of a tile
MOST_IN_U16 = 1 << 16
MOST_TILES = (1 << 31) - 1


def is_m_axis(tile: tuple[int, int]) -> bool:
    """Whether tiles are gathered along rows: those of one row and several columns."""
    return tile[0] == 1 < tile[1]


def extents(rows: int, columns: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Fibres of a matrix, and tiles along each."""
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    return (across, down) if is_m_axis(tile) else (down, across)


def fibres(packed: Packed) -> int:
    """Row blocks, or column blocks where tiles are gathered along rows."""
    return extents(packed.rows, packed.columns, packed.tile)[0]


def misfit(packed: Packed) -> str | None:
    """Why a tensor cannot be packed so."""
    height, width = packed.tile
    number, length = extents(packed.rows, packed.columns, packed.tile)
    if height * width > MOST_ELEMENTS:
        return f"tiles {height}x{width} have more than {MOST_ELEMENTS} elements"
    if packed.bits < 8 and height * width % 8:
        return f"tiles {height}x{width} of {packed.bits}-bit elements fill no whole bytes: R times C must be a multiple of 8"
    if packed.count > min(number * length, MOST_TILES):
        return f"{packed.count} tiles {height}x{width} in {[packed.rows, packed.columns]}"
    if length > MOST_TILES:
        return f"{length} tiles {height}x{width} in a row of {[packed.rows, packed.columns]}"
    return None


def fibre_counts(elements: Tensor, tile: tuple[int, int]) -> Tensor:
    """Tiles of each fibre that are not all zero, int64 `[fibres]`."""
    import torch
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import count_strips, count_tiles

    number, _ = extents(*elements.shape, tile)
    counts, source = torch.empty(number, dtype=torch.int64), raw(elements)
    out = counts.numpy()
    loop, sizes = (count_strips, tile[1:]) if is_m_axis(tile) else (count_tiles, tile)
    over_runs(partial(loop, source, *sizes, out), number, source.size)
    return counts


def count(elements: Tensor, tile: tuple[int, int]) -> int:
    """Tiles to store."""
    return int(fibre_counts(elements, tile).sum())


def layout(packed: Packed) -> dict[str, tuple[str, tuple[int, ...]]]:
    shape = (packed.count, *packed.tile)
    if packed.bits < 8:
        shape = (packed.count * packed.tile[0] * packed.tile[1],)
    number, length = extents(packed.rows, packed.columns, packed.tile)
    return {
        f"{packed.module}.tile_values": values_layout(packed, shape),
        f"{packed.module}.tile_index": ("U16" if length <= MOST_IN_U16 else "I32", (packed.count,)),
        f"{packed.module}.tile_ptr": ("I32", (number + 1,)),
    }


def encode(packed: Packed, elements: Tensor) -> dict[str, Tensor]:
    """The tensors of `layout`. Raises TersorError for a tile that cannot be stored, ValueError for another tensor."""
    import numpy as np
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import gather_strips, gather_tiles

    check(packed, elements)
    if why := misfit(packed):
        raise TersorError(f"tensor {packed.name!r}: {why}", "choose another tile")
    number = fibres(packed)
    starts = np.zeros(number + 1, np.int64)
    np.cumsum(fibre_counts(elements, packed.tile).numpy(), out=starts[1:])
    check_count(packed, int(starts[-1]))
    tensors = new(layout(packed))
    values, index, ptr = (raw(tensor) for tensor in tensors.values())
    values, ptr[:] = values.reshape(-1), starts
    source = raw(elements)
    loop, sizes = (gather_strips, packed.tile[1:]) if is_m_axis(packed.tile) else (gather_tiles, packed.tile)
    over_runs(partial(loop, source, *sizes, starts, packed.bits, index, values), number, source.size)
    return tensors


def decode(packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
    """Elements `[rows, columns]`. Raises TersorError where index and values are not those of a matrix."""
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import scatter_strips, scatter_tiles

    values, index, ptr = parts(packed, read)
    values, starts = values.reshape(-1), ptr.view("i4").astype("i8")
    _check_index(packed, index, starts)
    elements = new_elements(packed)
    out = raw(elements)
    loop, sizes = (scatter_strips, packed.tile[1:]) if is_m_axis(packed.tile) else (scatter_tiles, packed.tile)
    wrong = over_runs(partial(loop, values, index, starts, *sizes, packed.bits, out), fibres(packed), out.size)
    for tile in (tile for tile in wrong if tile >= 0):
        raise packed.damaged(f"'{packed.module}.tile_values' tile {tile} is all zero, or not zero beyond the edge")
    return elements


def _check_index(packed: Packed, index: np.ndarray, starts: np.ndarray) -> None:
    """Raises TersorError when `.tile_ptr` or `.tile_index` are not those of a matrix; loops trust them."""
    import numpy as np
    from tersor.formats.sparse.tile_loops import first_unordered

    name, length = f"{packed.module}.tile_ptr", extents(packed.rows, packed.columns, packed.tile)[1]
    if starts[0] != 0 or starts[-1] != packed.count:
        raise packed.damaged(f"{name!r} goes from {starts[0]} to {starts[-1]}, expected 0 to {packed.count}")
    falling = np.flatnonzero(starts[1:] < starts[:-1])
    if len(falling):
        fibre = int(falling[0])
        raise packed.damaged(f"{name!r} goes from {starts[fibre]} to {starts[fibre + 1]} at fibre {fibre}")
    tile = first_unordered(index, starts, length)
    if tile >= 0:
        number = index[tile] if index.itemsize == 2 else index.view("i4")[tile]
        raise packed.damaged(
            f"'{packed.module}.tile_index' of tile {tile} is {number}, not below {length} or not above the one before"
        )

"""`tiled-csl`: what the kernels of Flash-LLM (VLDB'24, InitSparseMatrixA_API of its SpMM_API.cu) load, byte for byte.

For elements of 16 bits. Tiles of 128 rows and 64 columns, row by row; edges are filled up with zeros. `<module>.csl_items`
holds an int32 for each nonzero: its bits in the low half (the half that comes first in memory), its place in the tile in
the high one, `row * 64 + (column ^ (row % 8) * 8)`, which is how a tile lies in shared memory. Zeros fill the items of a
tile up to a multiple of four. Items are ordered so that the 32 lanes of a warp write to different banks.
`.csl_offsets` `[tiles + 2]`: where each tile begins, in units of four items, then the end twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError
from tersor.formats.sparse.elements import check, check_count, new, new_elements, parts, raw

if TYPE_CHECKING:
    import numpy as np
    from tersor.formats.sparse.packed import Packed
    from torch import Tensor

TILE = (128, 64)
VECTOR = 4  # items that a lane loads at once
MOST_VECTORS = (1 << 31) - 1


def grid(rows: int, columns: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-rows // TILE[0]), -(-columns // TILE[1])


def misfit(packed: Packed) -> str | None:
    """Why a tensor cannot be packed so."""
    down, across = grid(packed.rows, packed.columns)
    if packed.bits != 16:
        return f"elements of {packed.bits} bits, tiled-csl holds 16"
    if packed.count % VECTOR or packed.count > min(down * across * TILE[0] * TILE[1], MOST_VECTORS * VECTOR):
        return f"{packed.count} items in {[packed.rows, packed.columns]}"
    return None


def tile_counts(elements: Tensor) -> Tensor:
    """Nonzeros of each tile, int64 `[tile rows, tile columns]`."""
    import torch
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import count_csl

    counts, source = torch.empty(grid(*elements.shape), dtype=torch.int64), raw(elements)
    out = counts.numpy()
    over_runs(partial(count_csl, source, out), len(out), source.size)
    return counts


def count(elements: Tensor, tile: tuple[int, int] | None = None) -> int:
    """Items to store, the zeros that fill tiles up among them."""
    return int((-(-tile_counts(elements) // VECTOR)).sum()) * VECTOR


def layout(packed: Packed) -> dict[str, tuple[str, tuple[int, ...]]]:
    down, across = grid(packed.rows, packed.columns)
    return {
        f"{packed.module}.csl_items": ("I32", (packed.count,)),
        f"{packed.module}.csl_offsets": ("I32", (down * across + 2,)),
    }


def encode(packed: Packed, elements: Tensor) -> dict[str, Tensor]:
    """The tensors of `layout`. Raises TersorError for elements of another width, ValueError for another tensor."""
    import numpy as np
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import gather_csl

    check(packed, elements)
    if why := misfit(packed):
        raise TersorError(f"tensor {packed.name!r}: {why}", "choose another format")
    counts = tile_counts(elements).numpy()
    starts = np.zeros(counts.size + 1, np.int64)
    np.cumsum(-(-counts.reshape(-1) // VECTOR) * VECTOR, out=starts[1:])
    check_count(packed, int(starts[-1]))
    tensors = new(layout(packed))
    items, offsets = (raw(tensor) for tensor in tensors.values())
    offsets[:-1], offsets[-1] = starts // VECTOR, starts[-1] // VECTOR
    source = raw(elements)
    over_runs(partial(gather_csl, source, starts, items), len(counts), source.size)
    return tensors


def decode(packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
    """Elements `[rows, columns]`. Raises TersorError where offsets and items are not those of a matrix."""
    from tersor.formats.sparse.loops import over_runs
    from tersor.formats.sparse.tile_loops import scatter_csl

    items, offsets = parts(packed, read)
    starts = offsets.view("i4").astype("i8") * VECTOR
    _check_offsets(packed, starts)
    elements = new_elements(packed)
    out = raw(elements)
    wrong = over_runs(partial(scatter_csl, items, starts, out), grid(*elements.shape)[0], out.size)
    for item in (item for item in wrong if item >= 0):
        raise packed.damaged(
            f"'{packed.module}.csl_items' item {item} ({items[item]:#010x}) is beyond its tile or the matrix, "
            "at a place that is taken, or one zero too many"
        )
    return elements


def _check_offsets(packed: Packed, starts: np.ndarray) -> None:
    """Raises TersorError when `.csl_offsets` are not those of tiles; loops trust them."""
    import numpy as np

    name = f"{packed.module}.csl_offsets"
    if starts[0] != 0 or starts[-2] != packed.count or starts[-1] != packed.count:
        found, end = starts[[0, -2, -1]] // VECTOR, packed.count // VECTOR
        raise packed.damaged(f"{name!r} goes from {found[0]} to {found[1]}, {found[2]}, expected 0 to {end}, {end}")
    falling = np.flatnonzero(starts[1:] < starts[:-1])
    if len(falling):
        tile = int(falling[0])
        before, after = starts[tile] // VECTOR, starts[tile + 1] // VECTOR
        raise packed.damaged(f"{name!r} goes from {before} to {after} at tile {tile}")

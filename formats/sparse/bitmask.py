"""`sparse-bitmask`: one bit for each weight, and the values where it is set (compressed-tensors ≤ 0.14).

`<module>.compressed` holds the nonzeros row by row, `.bitmask` bit c of a row (from bit 0 of byte 0 upwards) for column c,
`.row_offsets` the place of each row's first value, `.shape` the extents. Codes of 2, 3 or 4 bits are a stream of bytes:
value i takes bits [i bits, i bits + bits) from bit 0 of byte 0 upwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tersor.formats.sparse.elements import (
    check,
    check_count,
    new,
    new_elements,
    nonzero_counts,
    parts,
    raw,
    values_layout,
)

if TYPE_CHECKING:
    from tersor.formats.sparse.packed import Packed
    from torch import Tensor


def misfit(packed: Packed) -> str | None:
    """Why a tensor cannot be packed so."""
    if packed.count > packed.rows * packed.columns:
        return f"{packed.count} values in {[packed.rows, packed.columns]}"
    return None


def count(elements: Tensor, tile: tuple[int, int] | None = None) -> int:
    """Values to store: the nonzeros."""
    return int(nonzero_counts(elements).sum())


def layout(packed: Packed) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        f"{packed.module}.compressed": values_layout(packed, (packed.count,)),
        f"{packed.module}.bitmask": ("U8", (packed.rows, -(-packed.columns // 8))),
        f"{packed.module}.row_offsets": ("I64", (packed.rows,)),
        f"{packed.module}.shape": ("I64", (2,)),
    }


def encode(packed: Packed, elements: Tensor) -> dict[str, Tensor]:
    """The tensors of `layout`. Raises ValueError when the elements are not those that were counted."""
    import numpy as np
    from tersor.formats.sparse.loops import over_runs, period, squeeze

    check(packed, elements)
    starts = np.zeros(packed.rows + 1, np.int64)
    np.cumsum(nonzero_counts(elements).numpy(), out=starts[1:])
    check_count(packed, int(starts[-1]))
    tensors = new(layout(packed))
    values, bitmask, offsets, shape = (raw(tensor) for tensor in tensors.values())
    offsets[:], shape[:] = starts[:-1], (packed.rows, packed.columns)
    source, cut = raw(elements), period(packed.bits)
    over_runs(
        partial(squeeze, source, starts, packed.bits, cut, bitmask, values),
        packed.rows, source.size, starts[:-1] % cut == 0,
    )  # fmt: skip
    return tensors


def decode(packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
    """Elements `[rows, columns]`. Raises TersorError where bitmask, offsets and values do not agree."""
    import numpy as np
    from tersor.formats.sparse.loops import count_set_bits, over_runs, spread

    values, bitmask, offsets, shape = parts(packed, read)
    offsets, shape = offsets.view("i8"), shape.view("i8")
    if tuple(shape) != (packed.rows, packed.columns):
        raise packed.damaged(f"'{packed.module}.shape' is {shape.tolist()}, expected {[packed.rows, packed.columns]}")
    starts = np.zeros(packed.rows + 1, np.int64)
    counts = np.empty(packed.rows, np.int64)
    wrong = over_runs(
        partial(count_set_bits, bitmask, packed.columns, counts),
        packed.rows, bitmask.size,
    )  # fmt: skip
    for row in (row for row in wrong if row >= 0):
        raise packed.damaged(f"'{packed.module}.bitmask' row {row} has a bit beyond column {packed.columns - 1}")
    np.cumsum(counts, out=starts[1:])
    if starts[-1] != packed.count:
        raise packed.damaged(f"'{packed.module}.bitmask' has {starts[-1]} bits set for {packed.count} values")
    differing = np.flatnonzero(offsets != starts[:-1])
    if len(differing):
        row = int(differing[0])
        raise packed.damaged(
            f"'{packed.module}.row_offsets' row {row} is {offsets[row]}, the bitmask has {starts[row]} bits before it"
        )
    if packed.bits < 8 and packed.count * packed.bits % 8 and values[-1] >> (packed.count * packed.bits % 8):
        raise packed.damaged(f"'{packed.module}.compressed' has bits set after its {packed.count} values")
    elements = new_elements(packed)
    out = raw(elements)
    wrong = over_runs(partial(spread, values, bitmask, starts, packed.bits, out), packed.rows, out.size)
    for row in (row for row in wrong if row >= 0):
        raise packed.damaged(f"'{packed.module}.compressed' has a value 0 in row {row}, where its bitmask has a bit")
    return elements

"""`sparse-24-bitmask`: two values of every four consecutive columns, and one bit for each weight (compressed-tensors ≤ 0.14).

`<module>.compressed` `[rows, columns / 2]`, `.bitmask` as in sparse-bitmask, `.shape` `[2, 1]`. A group stores its nonzeros
and, where these are fewer than two, its first zeros, all in column order. Codes of 2, 3 or 4 bits are a stream of bytes in
each row.
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


def misfit(packed: Packed) -> str | None:
    """Why a tensor cannot be packed so."""
    if packed.columns % 4:
        return f"{packed.columns} columns are no whole groups of four"
    if packed.count != packed.rows * packed.columns // 2:
        return f"{packed.count} values in {[packed.rows, packed.columns]} at two of four"
    return None


def admits(elements: Tensor) -> bool:
    """Whether no group of four has more than two nonzeros."""
    return elements.shape[1] % 4 == 0 and _crowded(raw(elements)) is None


def _crowded(source: np.ndarray) -> int | None:
    """A row that has a group with more than two nonzeros."""
    from tersor.formats.sparse.loops import first_crowded, over_runs

    rows = over_runs(partial(first_crowded, source), len(source), source.size)
    return next((row for row in rows if row >= 0), None)


def count(elements: Tensor, tile: tuple[int, int] | None = None) -> int:
    """Values to store: half of all."""
    return elements.shape[0] * elements.shape[1] // 2


def layout(packed: Packed) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        f"{packed.module}.compressed": values_layout(packed, (packed.rows, packed.columns // 2)),
        f"{packed.module}.bitmask": ("U8", (packed.rows, -(-packed.columns // 8))),
        f"{packed.module}.shape": ("I64", (2, 1)),
    }


def encode(packed: Packed, elements: Tensor) -> dict[str, Tensor]:
    """The tensors of `layout`. Raises TersorError when the columns are no groups of four, or one has too many nonzeros."""
    from tersor.formats.sparse.loops import over_runs, squeeze_pairs

    check(packed, elements)
    if packed.columns % 4:
        raise TersorError(
            f"tensor {packed.name!r}: {misfit(packed)}", "2:4 needs a multiple of 4; choose another format"
        )
    check_count(packed, count(elements))
    tensors = new(layout(packed))
    values, bitmask, shape = (raw(tensor) for tensor in tensors.values())
    shape[:, 0] = (packed.rows, packed.columns)
    source = raw(elements)
    for row in over_runs(partial(squeeze_pairs, source, packed.bits, bitmask, values), packed.rows, source.size):
        if row >= 0:
            nonzeros = (source[row].reshape(-1, 4) != 0).sum(axis=1)
            group = int((nonzeros > 2).argmax())
            raise TersorError(
                f"tensor {packed.name!r}: {nonzeros[group]} nonzeros in row {row}, columns {4 * group} to {4 * group + 3}, "
                "2:4 holds two",
                "prune it to the pattern 2:4 first, or pack it as sparse-bitmask",
            )
    return tensors


def decode(packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
    """Elements `[rows, columns]`. Raises TersorError where bitmask and values do not agree."""
    from tersor.formats.sparse.loops import over_runs, spread_pairs

    values, bitmask, shape = parts(packed, read)
    if tuple(shape[:, 0]) != (packed.rows, packed.columns):
        found = shape.view("i8")[:, 0].tolist()
        raise packed.damaged(f"'{packed.module}.shape' is {found}, expected {[packed.rows, packed.columns]}")
    _check_rest(packed, "bitmask", bitmask, packed.columns)
    if packed.bits < 8:
        _check_rest(packed, "compressed", values, packed.columns // 2 * packed.bits)
    elements = new_elements(packed)
    out = raw(elements)
    for row in over_runs(partial(spread_pairs, values, bitmask, packed.bits, out), packed.rows, out.size):
        if row >= 0:
            raise packed.damaged(_what_is_wrong(packed, bitmask[row], row))
    return elements


def _check_rest(packed: Packed, part: str, rows: np.ndarray, bits: int) -> None:
    """Raises TersorError when a row has a bit after its `bits` bits."""
    if bits % 8 and (wrong := rows[:, -1] >> (bits % 8)).any():
        raise packed.damaged(f"'{packed.module}.{part}' row {int(wrong.argmax())} has a bit after its {bits} bits")


def _what_is_wrong(packed: Packed, bits: np.ndarray, row: int) -> str:
    import numpy as np

    groups = np.unpackbits(bits, bitorder="little")[: packed.columns].reshape(-1, 4).sum(axis=1)
    if (groups != 2).any():
        group = int((groups != 2).argmax())
        return (
            f"'{packed.module}.bitmask' has {groups[group]} bits in row {row}, columns {4 * group} to {4 * group + 3}"
        )
    return f"'{packed.module}.compressed' has a value 0 in row {row}, where its bitmask has a nonzero"

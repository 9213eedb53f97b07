"""Which format a tensor's zeros pay in: sizes to the byte, coverage per fibre, and time where a device was measured.

A tile format stores a tile as soon as one weight in it is not zero, so what counts is the share of tiles that are
**covered**, not the share of zeros. Of random zeros at sparsity s, tiles of e weights cover `1 - s^e`: 97 % for 32x1 at
90 %. Coverage is counted per fibre (row block; column block for tiles along a row), because a kernel packs tiles within
a fibre only (PIT, SOSP'23).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object
from tersor.formats.sparse import two_four
from tersor.formats.sparse.elements import nonzero_counts
from tersor.formats.sparse.packed import FORMATS, Packed, codec
from tersor.formats.units import finite
from tersor.kernels.count_tiles import count_tiles, is_m_axis
from tersor.ops.model.sparse_samples import DENSE, Kind, axis, kernel_name, label
from tersor.ops.model.tile_costs import KINDS as MEASURED
from tersor.ops.model.tile_costs import TileCosts
from torch import Tensor

KINDS: tuple[Kind, ...] = ((DENSE, None), *MEASURED)  # from the simplest on: of equals the first is taken
SCHEMA = "tersor.sparse-plan/1"
FILE_NAME = "plan.json"
GOALS = ("size", "time")
SPREAD = ("least", "median", "greatest")


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor `[out, in]`.

    count: values or tiles stored. nbytes: of all its tensors. coverage: the share of weights that is stored, zeros in
    covered tiles included; fibre_coverage is its least, median and greatest over fibres, `per_fibre` int64 `[fibres]` what
    each stores. seconds: predicted time of a product by number of tokens, empty where costs were not measured.
    """

    format: str
    tile: tuple[int, int] | None
    count: int
    nbytes: int
    coverage: float
    fibre_coverage: tuple[float, float, float]
    per_fibre: Tensor = field(repr=False, compare=False)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.format, self.tile

    @property
    def name(self) -> str:
        return label(self.kind)


def candidates(
    nonzero: Tensor,
    bits: int,
    stored_nbytes: int,
    dtype: str,
    in_words: bool = False,
    formats: Iterable[str] | None = None,
    tiles: Iterable[tuple[int, int]] = (),
) -> list[Candidate]:
    """The dense tensor and every format that its zeros admit, none of which has to be smaller, in the order of KINDS.

    nonzero: bool `[out, in]` on the CPU. bits: of one weight as it is stored in `dtype`, in int32 words where `in_words`.
    formats: only these, `dense` aside. tiles: besides the usual ones, for `vector` those with a side of 1, for `block` the
    others. Of the usual ones those that cannot make the tensor smaller are left out, most without being counted, unless
    `formats` asks for them.
    """
    rows, columns = nonzero.shape
    shape = (rows, -(-columns * bits // 32)) if in_words else (rows, columns)

    everything = torch.full((rows,), columns)
    found = [Candidate(DENSE, None, rows * columns, stored_nbytes, 1.0, (1.0, 1.0, 1.0), everything)]

    def add(format: str, tile: tuple[int, int] | None, count: int, per_fibre: Tensor, whole: int, least: bool) -> None:
        """`whole`: what a fibre without zeros stores. `least`: only if it is smaller."""
        packed = Packed("module.weight", format, dtype, shape, rows, columns, bits, count, tile=tile)
        if packed.codec.misfit(packed) or (least and packed.nbytes >= stored_nbytes):
            return
        shares = per_fibre.double() / whole
        spread = float(shares.min()), float(shares.median()), float(shares.max())
        coverage = int(per_fibre.sum()) / (whole * len(per_fibre))
        found.append(Candidate(format, tile, count, packed.nbytes, coverage, spread, per_fibre))

    elements = nonzero.contiguous().view(torch.uint8)
    per_row = nonzero_counts(elements)
    values = int(per_row.sum())
    asked = set(tiles)
    full: list[tuple[int, int]] = []  # whose covered tiles alone take as much as the dense tensor
    for format, tile in _wanted(formats, asked):
        forced = formats is not None or tile in asked
        if format == "sparse-24-bitmask":
            if int(per_row.max()) <= columns // 2 and two_four.admits(elements):
                add(format, None, rows * columns // 2, everything // 2, columns, False)
        elif tile is None:
            add(format, None, codec(format).count(elements, None), per_row, columns, False)
        elif forced or not (values * bits >= 8 * stored_nbytes or any(_divides(small, tile) for small in full)):
            per_fibre = count_tiles(nonzero, tile)
            count = int(per_fibre.sum())
            add(format, tile, count, per_fibre, rows if is_m_axis(tile) else -(-columns // tile[1]), not forced)
            if count * tile[0] * tile[1] * bits >= 8 * stored_nbytes:
                full.append(tile)
    return found


def _wanted(formats: Iterable[str] | None, tiles: set[tuple[int, int]]) -> list[Kind]:
    kinds = [*MEASURED, *(("vector" if 1 in tile else "block", tile) for tile in sorted(tiles))]
    if formats is None:
        return list(dict.fromkeys(kinds))
    return [kind for kind in dict.fromkeys([*kinds, ("tiled-csl", None)]) if kind[0] in formats]


def _divides(small: tuple[int, int], large: tuple[int, int]) -> bool:
    return small != large and large[0] % small[0] == 0 and large[1] % small[1] == 0


def timed(
    found: Sequence[Candidate], costs: TileCosts, shape: tuple[int, int], tokens: Sequence[int]
) -> list[Candidate]:
    """The candidates with their predicted seconds, as far as `costs` knows them. They are those of float weights."""

    def seconds(one: Candidate, count: int) -> float:
        if one.format == DENSE:
            return costs.dense_seconds(shape, count)
        return costs.seconds(one.format, one.tile, shape, count, one.per_fibre)

    known = [count for count in tokens if costs.knows((DENSE, None), shape, count)]
    return [
        replace(one, seconds={count: seconds(one, count) for count in known if costs.knows(one.kind, shape, count)})
        for one in found
    ]


def choose(found: Sequence[Candidate], goal: str = "size") -> Candidate:
    """The smallest, or with goal `time` the fastest: by the geometric mean where several numbers of tokens were timed.

    Of equals the simpler one, dense before all. Raises ValueError for `time` without measured costs, or another goal.
    """
    if goal not in GOALS:
        raise ValueError(f"goal {goal!r} is neither of {GOALS}")
    if goal == "size":
        return min(found, key=lambda one: (one.nbytes, _rank(one)))
    counts = max((one.seconds.keys() for one in found), key=len)
    if not counts:
        raise ValueError("nothing was measured: call timed() first")
    known = [one for one in found if one.seconds.keys() == counts]
    return min(known, key=lambda one: (prod(one.seconds[n] for n in counts), _rank(one)))


def _rank(one: Candidate) -> int:
    return KINDS.index(one.kind) if one.kind in KINDS else len(KINDS)


def break_even(bits: int, columns: int, format: str, tile: tuple[int, int] | None = None) -> float:
    """The sparsity from which `format` is smaller than a dense tensor of `bits` bits per weight with `columns` columns.

    For tile formats it is the share of tiles that are empty. 1.0 where it never is. What does not grow with the tensor
    (its shape, pointers per fibre) is left out. Raises ValueError for a format without one.
    """
    if format == "sparse-bitmask":
        share = (-(-columns // 8) + 8) * 8 / (columns * bits)  # the mask, and where the row begins
    elif format == "sparse-24-bitmask":
        share = 0.5 if bits > 2 else 1.0
    elif format == "tiled-csl":
        share = 1 - bits / 32
    elif tile is not None:
        values, index = tile[0] * tile[1] * bits / 8, 2  # a 16-bit index
        share = index / (values + index)
    else:
        raise ValueError(f"format {format!r} has no break-even without a tile")
    return min(share, 1.0)


def plan_entry(
    found: Sequence[Candidate],
    chosen: Candidate,
    costs: TileCosts | None = None,
    tokens: Sequence[int] = (),
    goal: str = "size",
) -> dict:
    """What `plan.json` says of one tensor: the choice, its coverage, what it gains, and what came second.

    `chosen` is one of `found`. `costs` and `tokens` time candidates that were not yet; without, only bytes are told. `goal`
    is what the runner-up is second by.
    """
    dense = next(one for one in found if one.format == DENSE)
    shape = (len(dense.per_fibre), int(dense.per_fibre[0]))
    if costs is not None and tokens:
        at = found.index(chosen)
        found = timed(found, costs, shape, tokens)
        chosen, dense = found[at], next(one for one in found if one.format == DENSE)
    others = [one for one in found if one.kind != chosen.kind and (goal == "size" or one.seconds)]
    return {
        "shape": list(shape),
        **_summary(chosen),
        "axis": axis(chosen.kind),
        "kernel": kernel_name(chosen.kind),
        "dense_bytes": dense.nbytes,
        "fibres": len(chosen.per_fibre),
        "coverage_per_fibre": dict(zip(SPREAD, chosen.fibre_coverage, strict=True)),
        "predicted": [
            {
                "tokens": count,
                "seconds": seconds,
                "dense_seconds": dense.seconds[count],
                "gain": dense.seconds[count] / seconds,
            }
            for count, seconds in chosen.seconds.items()
        ],
        "runner_up": _summary(choose(others, goal)) if others else None,
    }


def _summary(one: Candidate) -> dict:
    tile = None if one.tile is None else list(one.tile)
    return {"format": one.format, "tile": tile, "bytes": one.nbytes, "coverage": one.coverage}


def write_plan(folder: Path, goal: str, device: str | None, entries: dict[str, dict]) -> None:
    """`plan.json`. `device`: whose costs the predictions are of, None where bytes alone decided."""
    content = {"schema": SCHEMA, "goal": goal, "device": device, "tensors": entries}
    (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_plan(path: Path) -> dict:
    """The content of a `plan.json`. Raises TersorError for a file that `write_plan` would not write."""

    def damaged(what: str) -> TersorError:
        return TersorError(f"{path}: {what}", "write it again with `tersor sparsify`")

    content = read_object(path, "write it again with `tersor sparsify`")
    if content.get("schema") != SCHEMA:
        raise damaged(f"schema is {content.get('schema')!r}, not {SCHEMA!r}")
    if content.get("goal") not in GOALS:
        raise damaged(f"goal is {content.get('goal')!r}")
    if not isinstance(content.get("device"), str | None):
        raise damaged(f"device is {content['device']!r}")
    entries = content.get("tensors")
    if not isinstance(entries, dict):
        raise damaged("'tensors' is missing or not an object")
    for name, entry in entries.items():
        if why := _misfit(entry):
            raise damaged(f"tensor {name!r}: {why}")
    return content


def _misfit(entry: object) -> str | None:
    """What is wrong with one tensor of a plan."""
    if not isinstance(entry, dict):
        return "is not an object"
    if entry.get("format") not in (DENSE, *FORMATS):
        return f"format {entry.get('format')!r} is not known"
    if (entry.get("tile") is not None) != (entry["format"] in ("vector", "block")) or not _is_pair(
        entry.get("tile") or [1, 1]
    ):
        return f"format {entry['format']} and tile {entry.get('tile')!r} do not go together"
    if not _is_pair(entry.get("shape")):
        return f"shape is {entry.get('shape')!r}"
    for key in ("bytes", "dense_bytes"):
        if not isinstance(entry.get(key), int) or isinstance(entry[key], bool) or entry[key] < 0:
            return f"{key} is {entry.get(key)!r}"
    spread = entry.get("coverage_per_fibre")
    shares = [entry.get("coverage"), *(spread.get(key) if isinstance(spread, dict) else None for key in SPREAD)]
    if not all((value := finite(share)) is not None and 0 <= value <= 1 for share in shares):
        return f"coverage {entry.get('coverage')!r}, by fibre {spread!r}, are not shares"
    predicted = entry.get("predicted")
    keys = ("tokens", "seconds", "dense_seconds", "gain")
    if not isinstance(predicted, list) or not all(
        isinstance(row, dict) and all((finite(row.get(key)) or 0) > 0 for key in keys) for row in predicted
    ):
        return f"predicted is {predicted!r}"
    return None


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(extent) is int and extent > 0 for extent in value)

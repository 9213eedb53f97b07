"""The names that `--format` takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tersor.formats.errors import TersorError
from tersor.formats.sparse.packed import FORMATS

GOALS = {"auto": "size", "fastest": "time"}
TILES = {"vector": (32, 1), "block": (16, 16)}  # where no extents are given
TILED = re.compile(r"(vector|block):(\d+)x(\d+)")


@dataclass(frozen=True)
class Format:
    """One format with its tile, or a `goal` by which to choose: size or time."""

    name: str | None
    tile: tuple[int, int] | None = None
    goal: str | None = None

    def __str__(self) -> str:
        return self.name if self.tile is None else f"{self.name}:{self.tile[0]}x{self.tile[1]}"


def parse_format(text: str) -> Format:
    """`auto`, `fastest`, `sparse-bitmask`, `vector:16x1`, … Raises TersorError for anything else."""
    if text in GOALS:
        return Format(None, goal=GOALS[text])
    if text in FORMATS:
        return Format(text, TILES.get(text))
    if found := TILED.fullmatch(text):
        rows, columns = int(found[2]), int(found[3])
        if rows * columns > 1 and rows * columns <= 1 << 16 and (found[1] == "block" or 1 in (rows, columns)):
            return Format(found[1], (rows, columns))
    raise TersorError(
        f"--format {text!r} is not known",
        f"{' '.join(GOALS)} {' '.join(FORMATS)}, or with a tile: vector:16x1 block:32x32",
    )

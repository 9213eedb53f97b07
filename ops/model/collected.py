"""Statistics from a file in the place of a calibration run, for the commands with `--stats`.

They are those of the dense model: what reaches a layer is not yet changed by what was done to the layers before it, as
it is when a calibrated run goes block by block. In return nothing has to be run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.statistics import Statistics
from tersor.ops.model.selection import Linear
from tersor.ops.model.statistics import InputStatistics

INSIDE = re.compile(r"\.\d+\.")  # a block
# What algorithms ask for -> what a file holds.
KIND_OF = {"column_norms": "norms", "hessian": "hessian"}


class Collected:
    """The statistics that an algorithm needs, layer by layer; one layer's input is in memory at a time."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        linears: Collection[Linear],
        needs: Collection[str],
        device: torch.device,
        instead: str = "",
    ):
        """Raises TersorError when the file is another checkpoint's, or lacks what `needs` of one of `linears`.

        Layers outside the blocks, which no run collects of, have no statistics. `instead` is another way out, for the hint.
        """
        self.file, self.device = Statistics(path), device
        self.file.belongs_to(checkpoint)
        self.kinds = set()
        for need in needs:
            kind = KIND_OF[need]
            if kind == "norms" and kind not in self.file.kinds and "hessian" in self.file.kinds:
                kind = "hessian"  # whose diagonal they are
            if kind not in self.file.kinds:
                raise TersorError(
                    f"{self.file.path}: holds {' and '.join(self.file.kinds) or 'nothing'}, {kind} is needed",
                    f"collect it: tersor profile {checkpoint.path} --collect {kind} -o DIR{instead}",
                )
            self.kinds.add(kind)
        for kind in self.kinds:
            for linear in linears:
                if INSIDE.search(linear.name):
                    self.file.check(linear.name, linear.shape[1], kind)
        self._owner: str | None = None
        self._held: InputStatistics | None = None

    def statistics(self, name: str) -> InputStatistics | None:
        """None for a layer that no token reached. Layers that share an input get the same object, one after the other."""
        if not INSIDE.search(name):
            return None
        owner = self.file.owner(name)
        tokens = self.file.tokens(name)
        if not tokens:
            return None
        if owner != self._owner:
            self._held = None  # frees the last one before the next is read
            squares = self.file.squares(name).to(self.device) if "norms" in self.kinds else None
            hessian = self.file.hessian(name).to(self.device) if "hessian" in self.kinds else None
            self._owner, self._held = owner, InputStatistics.restored(tokens, squares, hessian)
        return self._held

    def in_order(self, names: Collection[str]) -> list[str]:
        """`names` so that layers which share an input follow each other, else in the order given."""
        first: dict[str, int] = {}
        for place, name in enumerate(names):
            first.setdefault(self.file.owner(name), place)
        return sorted(names, key=lambda name: first[self.file.owner(name)])

"""Permutations put into tensors: each is an exact gather along an axis, whatever the dtype."""

from __future__ import annotations

import torch
from tersor.ops.model.units import Units


class Fold:
    """For every tensor that moves, where each place of an axis takes its values from."""

    def __init__(self):
        self.moves: dict[str, dict[int, torch.Tensor]] = {}

    @property
    def names(self) -> set[str]:
        return set(self.moves)

    def add(self, units: Units, order: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        """After all that is folded already, channel order[c] of `units` comes to where channel c is. `shapes`: name ->
        shape of the tensors as they are stored."""
        if torch.equal(order, torch.arange(len(order))):
            return
        for slot in units.slots:
            source = gather_index(slot.index, order, shapes[slot.name][slot.axis])
            axes = self.moves.setdefault(slot.name, {})
            axes[slot.axis] = axes[slot.axis][source] if slot.axis in axes else source

    def remove(self, names: set[str]) -> None:
        for name in names:
            self.moves.pop(name, None)

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `name` as the permuted model holds it; the very tensor where nothing moves."""
        for axis, source in self.moves.get(name, {}).items():
            tensor = tensor.index_select(axis, source.to(tensor.device))
        return tensor


def gather_index(index: torch.Tensor, order: torch.Tensor, places: int) -> torch.Tensor:
    """Which place each place takes its values from `[places]` when channel order[c] comes to where channel c is."""
    source = torch.arange(places)
    source[index.flatten()] = index[order].flatten()
    return source

"""What belongs to a unit (a neuron, a KV head with its query heads, a hidden channel), and taking it out of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Slot:
    """One tensor's share in some units: `index` `[units, k]` are the places along `axis` of the tensor as it is stored."""

    name: str
    axis: int
    index: torch.Tensor

    def of_units(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values that belong to each unit `[units, values]`."""
        return tensor.movedim(self.axis, 0)[self.index.flatten()].reshape(self.index.shape[0], -1)

    def places(self, units: torch.Tensor) -> torch.Tensor:
        """Where `units` lie along the axis, in ascending order, so that fused parts stay in their order."""
        return self.index[units].flatten().sort().values

    def shape(self, shape: tuple[int, ...], kept: int) -> tuple[int, ...]:
        """The shape that is left of `shape` with `kept` units."""
        return tuple(kept * self.index.shape[1] if axis == self.axis else n for axis, n in enumerate(shape))


@dataclass
class Units:
    """Units of one kind that are chosen from together: all neurons of an FFN or an expert, all heads of an attention.

    `slots` are everything a unit owns. `readers` are the names of those layers that read the units, one column for each
    unit or more; they make up for what is removed.
    """

    module: str
    block: int | None  # None: the hidden channels, which every block shares
    count: int
    slots: list[Slot]
    readers: list[str] = field(default_factory=list)

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)


def kept_count(count: int, sparsity: float, multiple_of: int) -> int:
    """How many of `count` units stay when the share `sparsity` goes: rounded up to a multiple, `count` at most."""
    wanted = math.ceil(round(count * (1 - sparsity), 6))
    return min(count, -(-wanted // multiple_of) * multiple_of)


def take(tensor: torch.Tensor, slot: Slot, kept: torch.Tensor) -> torch.Tensor:
    """The tensor without the units that are not in `kept`."""
    return tensor.index_select(slot.axis, slot.places(kept)).contiguous()


def put(tensor: torch.Tensor, slot: Slot, kept: torch.Tensor, extent: int) -> torch.Tensor:
    """The reverse of `take`: `extent` places along the axis, zeros where units are missing."""
    shape = [extent if axis == slot.axis else n for axis, n in enumerate(tensor.shape)]
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(slot.axis, slot.places(kept), tensor)


def mask(tensor: torch.Tensor, slot: Slot, kept: torch.Tensor) -> torch.Tensor:
    """The tensor with zeros for the units that are not in `kept`."""
    return put(take(tensor, slot, kept), slot, kept, tensor.shape[slot.axis])


def pack(kept: torch.Tensor, count: int) -> str:
    """The kept units as hexadecimal digits, for the journal."""
    bits = 0
    for unit in kept.tolist():
        bits |= 1 << unit
    return f"{bits:0{-(-count // 4)}x}"


def unpack(digits: str) -> torch.Tensor:
    bits = int(digits, 16)
    return torch.tensor([unit for unit in range(bits.bit_length()) if bits >> unit & 1])


@dataclass
class Details:
    """What the plan of this target knows and its run needs. `kept` is how many units stay, by how many there were."""

    kind: str
    units: list[Units]
    kept: dict[int, int]
    skeleton: object
    calibrated: bool  # whether text goes through the model while it is cut: repair, or activation scores
    repair: bool
    choice: dict[str, torch.Tensor] = field(default_factory=dict)  # module of the units -> the kept ones
    quality: dict = field(default_factory=dict)
    gains: dict = field(default_factory=dict)  # norm weight -> what 1 is to it: see channels.py

    def slots(self) -> dict[str, list[tuple[Units, Slot]]]:
        """Tensor name -> everything that is cut from it."""
        result: dict[str, list[tuple[Units, Slot]]] = {}
        for units in self.units:
            for slot in units.slots:
                result.setdefault(slot.name, []).append((units, slot))
        return result

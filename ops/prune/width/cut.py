"""Taking units (neurons, KV heads with their query heads, hidden channels) out of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from tersor.ops.model.units import Slot, Units


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
    blocks: list[int] | None = None  # those that stay, where some go as well
    silent: set[str] = field(default_factory=set)  # tensors that become all zeros

    def kept_of(self, units: Units) -> int:
        chosen = self.choice.get(units.module)
        return self.kept[units.count] if chosen is None else len(chosen)

    def slots(self) -> dict[str, list[tuple[Units, Slot]]]:
        """Tensor name -> everything that is cut from it."""
        result: dict[str, list[tuple[Units, Slot]]] = {}
        for units in self.units:
            for slot in units.slots:
                result.setdefault(slot.name, []).append((units, slot))
        return result

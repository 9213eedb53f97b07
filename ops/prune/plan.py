"""What becomes of every tensor of the input: each target makes such a plan, and the run executes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import tensor_bytes
from tersor.formats.writer import Layout

POLICY_KEYS = {"sparsity", "keep"}
OF_QUANTIZE = {"scheme", "group_size", "symmetric"}  # one policy can serve both commands


@dataclass
class Action:
    """`action` is keep, mask, slice, drop, move, factorise or fold; `outputs` are the tensors written for it.

    Where these are factors of the input tensor, `stands_for` is the shape that they multiply out to.
    """

    action: str
    reason: str
    outputs: Layout
    stands_for: tuple[int, ...] | None = None

    @property
    def written(self) -> str:
        """The name under which the one tensor is written that stays of the input's."""
        return next(iter(self.outputs))

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.outputs.values())


@dataclass
class Plan:
    """`config` are the changes to config.json, `details` is what the target itself wants to know later."""

    actions: dict[str, Action] = field(default_factory=dict)  # by the name of the input tensor, in its order
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: Any = None

    @property
    def layout(self) -> Layout:
        return {name: entry for action in self.actions.values() for name, entry in action.outputs.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.layout.values())


def keep(checkpoint: Checkpoint, name: str, reason: str) -> Action:
    info = checkpoint.tensors[name]
    return Action("keep", reason, {name: (info.dtype, info.shape)})


def share_of(settings: dict, name: str, default: float) -> float:
    """The sparsity that a policy's entry for tensor `name` asks for. Raises TersorError for a malformed entry."""
    unknown = settings.keys() - POLICY_KEYS - OF_QUANTIZE
    if unknown:
        raise TersorError(
            f"policy for {name}: unknown keys {sorted(unknown)}", f"known: {' '.join(sorted(POLICY_KEYS))}"
        )
    if not isinstance(settings.get("keep", False), bool):
        raise TersorError(f"policy for {name}: keep is {settings['keep']!r}", "it should be true or false")
    share = settings.get("sparsity", default)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise TersorError(f"policy for {name}: sparsity {share!r} is not in [0, 1)", "0.5 removes half")
    return share

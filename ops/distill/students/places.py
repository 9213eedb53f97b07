"""Where each checkpoint tensor lies in the parameters of a model: all of one, or the slice of an expert in fused ones.

The same places serve three ways: weights in, trained weights out, and masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tersor.ops.model.skeleton import Source, transforms
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """`parameter` whole, or of the slice of `expert` along `stack` the numbers [start, start + length) of `axis`."""

    parameter: str
    expert: int | None = None
    stack: int = 0
    axis: int | None = None
    start: int = 0
    length: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the parameter, or of a tensor of its shape, as a view."""
        if self.expert is None:
            return tensor
        tensor = tensor.select(self.stack, self.expert)
        return tensor if self.axis is None else tensor.narrow(self.axis, self.start, self.length)


def places(
    model: nn.Module, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Place]:
    """The place of each tensor of `sources`.

    `shapes` are those of the tensors in the file; without them, tensors that were concatenated share the axis evenly.
    """
    converters = transforms(model)[1]
    result: dict[str, Place] = {}
    fused: dict[tuple[str, int], dict[str, str]] = {}  # (parameter, expert) -> pattern -> checkpoint tensor
    for name, source in sources.items():
        if source.expert is None:
            result[name] = Place(source.parameter)
        else:
            fused.setdefault((source.parameter, source.expert), {})[source.pattern] = name
    for (parameter, expert), names in fused.items():
        converter = next(item for item in converters if next(iter(names)) in item.source_patterns)
        stack, *joins = converter.operations
        if not joins:
            result |= {name: Place(parameter, expert, stack.dim) for name in names.values()}
            continue
        axis = joins[0].dim - (joins[0].dim > stack.dim)
        start = 0
        for pattern in (pattern for pattern in converter.source_patterns if pattern in names):
            name = names[pattern]
            if shapes is None:
                length = model.get_parameter(parameter).shape[joins[0].dim] // len(names)
            else:
                length = shapes[name][axis]
            result[name] = Place(parameter, expert, stack.dim, axis, start, length)
            start += length
    return {name: result[name] for name in sources}

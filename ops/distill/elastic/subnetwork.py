"""A model in training, run as one of its sub-networks: nothing is copied or cut, parameters stay as they are.

The layer that reads neurons or heads gets zeros for those that are not in the sub-network, which is what it would get
without them: so no gradient reaches what makes them, nor the columns that read them. Blocks that are left out give what
they are given. Where a layer is not called as a module, its weight's columns are zero during the forward pass of the module
that multiplies with it: in experts that are fused into one tensor, and in feed-forward layers with a forward pass of
their own (`distill/nested.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from tersor.formats.elastic import SubNetwork
from tersor.formats.errors import TersorError
from tersor.ops.distill.elastic.order import Order
from tersor.ops.distill.students.places import Place, places
from tersor.ops.model.skeleton import EXPERTS, find_blocks
from torch import Tensor, nn


@dataclass
class _Reader:
    """A layer that reads units: `width` columns for each of `count`, all of its columns."""

    kind: str
    block: int
    count: int
    width: int
    module: str  # of the model: the layer, or the module that holds fused experts
    place: Place | None = None  # where it lies in a fused parameter
    axis: int = 0  # of its columns in that parameter


@dataclass
class _Seen:
    """Which blocks ran, and which readers of theirs."""

    blocks: set[int] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)


class Runner:
    """Sub-networks of `model`, which is that of the checkpoint that `order` sorted."""

    def __init__(self, model: nn.Module, order: Order):
        self.model, self.nesting, self.returns_tuple = model, order.nesting, order.returns_tuple
        self.blocks = find_blocks(model)[1]
        sources = order.skeleton.sources
        shapes = {name: entry.shape for name, entry in order.skeleton.view.tensors.items()}
        where = places(model, sources, shapes) if _has_fused(model, order) else {}
        self.readers: list[_Reader] = []
        for kind, groups in order.units.items():
            for group in groups:
                slot = group.slot(group.readers[0])
                source = sources[slot.name]
                reader = _Reader(kind, group.block, group.count, slot.index.shape[1], "")
                owner = source.parameter.rpartition(".")[0]
                if source.expert is None:
                    reader.module = owner
                elif hasattr(model.get_submodule(owner), EXPERTS):
                    reader.module = f"{owner}.{EXPERTS}.{source.expert}.{slot.name.split('.')[-2]}"
                else:
                    reader.module, reader.place = owner, where[slot.name]
                    reader.axis = slot.axis + (slot.axis >= reader.place.stack)
                self.readers.append(reader)

    @contextmanager
    def __call__(self, network: SubNetwork) -> Iterator[None]:
        """The model as `network`. Leave the context after the backward pass, which runs blocks again where activations are
        recomputed.

        Raises TersorError on leaving when a block ran without the layer that should have had zeros.
        """
        kept = set(self.nesting.kept_blocks(network.depth))
        seen, masked = _Seen(), []
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if index not in kept:
                    stack.enter_context(_skipped(block, self.returns_tuple))
                else:
                    _hook(stack, block, lambda *_, index=index: seen.blocks.add(index))
            fused: dict[str, list[tuple[_Reader, int]]] = {}
            for reader in self.readers:
                columns = self.nesting.kept_units(reader.count, network.shares(reader.kind)[reader.block] or 1)
                if reader.block not in kept or columns == reader.count:
                    continue
                if reader.place is not None:
                    fused.setdefault(reader.place.parameter, []).append((reader, columns * reader.width))
                else:
                    self._mask(stack, reader, columns * reader.width, seen)
                    masked.append(reader)
            for parameter, readers in fused.items():
                _mask_fused(stack, self.model, parameter, readers)
            yield
        for reader in masked:
            if reader.block in seen.blocks and reader.module not in seen.readers and EXPERTS not in reader.module:
                raise TersorError(
                    f"{reader.module}: its block ran and it was not called, so that its {reader.kind} were not left out",
                    "train without --elastic",
                )

    def _mask(self, stack: ExitStack, reader: _Reader, kept: int, seen: _Seen) -> None:
        """Zeros for all columns from `kept` on: in the layer's input, or in its weight where its parent multiplies."""
        layer = self.model.get_submodule(reader.module)
        parent = self.model.get_submodule(reader.module.rpartition(".")[0])
        if "forward" in vars(parent) and isinstance(layer, nn.Linear):

            def zero_columns() -> dict[str, Tensor]:
                seen.readers.add(reader.module)
                return {"weight": _first_columns(layer.weight, kept)}

            _override(stack, parent, layer, zero_columns)
            return

        def zero_inputs(_, args):
            seen.readers.add(reader.module)
            return _first_columns(args[0], kept), *args[1:]

        _hook(stack, layer, zero_inputs)


def _first_columns(x: Tensor, kept: int) -> Tensor:
    """x `[..., columns]` with zeros from column `kept` on."""
    return nn.functional.pad(x[..., :kept], (0, x.shape[-1] - kept))


def _mask_fused(stack: ExitStack, model: nn.Module, path: str, readers: list[tuple[_Reader, int]]) -> None:
    """Zeros in the columns of experts that are slices of one parameter, while the module that has it runs."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)

    def zero_columns() -> dict[str, Tensor]:
        weight = getattr(module, leaf)
        shape = [1] * weight.dim()
        reader = readers[0][0]
        shape[reader.place.stack], shape[reader.axis] = weight.shape[reader.place.stack], weight.shape[reader.axis]
        mask = torch.ones(shape, dtype=weight.dtype, device=weight.device)
        for reader, kept in readers:
            place = reader.place
            axis = reader.axis - (reader.axis > place.stack)
            mask.select(place.stack, place.expert).narrow(axis, kept, shape[reader.axis] - kept).zero_()
        return {leaf: weight * mask}

    _override(stack, module, module, zero_columns)


def _override(stack: ExitStack, runs: nn.Module, holder: nn.Module, make) -> None:
    """While `runs` runs, `holder` shows the tensors of `make()` in place of its parameters, which stay where they are."""

    def before(*_) -> None:
        vars(holder).update(make())

    def after(*_) -> None:
        for name in [name for name in vars(holder) if name in holder._parameters]:
            del vars(holder)[name]

    _hook(stack, runs, before)
    handle = runs.register_forward_hook(after, always_call=True)
    stack.callback(handle.remove)
    stack.callback(after)


def _hook(stack: ExitStack, module: nn.Module, before) -> None:
    stack.callback(module.register_forward_pre_hook(before).remove)


@contextmanager
def _skipped(block: nn.Module, returns_tuple: bool) -> Iterator[None]:
    """The block gives the hidden states that it is given."""
    own = vars(block).get("forward")

    def forward(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if returns_tuple else hidden

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _has_fused(model: nn.Module, order: Order) -> bool:
    owners = {s.parameter.rpartition(".")[0] for s in order.skeleton.sources.values() if s.expert is not None}
    return any(not hasattr(model.get_submodule(owner), EXPERTS) for owner in owners)

"""The residual stream: which axes of which tensors are as wide as the hidden channels.

The model's own constructor says so when config.json gives it another hidden size (`tersor.ops.model.resize`). Where that
changes the heads as well (GPT-2, OPT, BERT: head size = hidden / heads), a block is run to see which of its layers read what
comes into it and which add to what leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.coupling import BlockProbe
from tersor.ops.model.resize import Resized, Shapes, build_meta, quiet, resize, set_keys, shapes_of
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.units import Slot, Units, block_signature, is_conv1d, module_names, probe_pass
from torch import nn

HIDDEN = "hidden channels"


def stream_units(checkpoint: Checkpoint, skeleton: Skeleton) -> Units:
    """All hidden channels of the model as units. What is done to them has to be proven: see `probed_slots`."""
    width = hidden_states(skeleton).shape[-1]
    raw = checkpoint.require_config("which says what model this is")
    before = shapes_of(build_meta(checkpoint, raw))
    fixed = explicit_head_size(skeleton)
    if fixed:
        try:
            fixed = fixed if shapes_of(build_meta(checkpoint, set_keys(raw, dict(fixed)))) == before else {}
        except TersorError:
            fixed = {}
    for other in (2 * width, width // 2):
        with quiet():  # numbers that do not fit are tried on purpose
            found = resize_stream(checkpoint, skeleton, before, width, other, set_keys(raw, dict(fixed)))
        if found is not None:
            return Units(HIDDEN, None, width, list(stream_slots(skeleton, found.axes, width)))
    return Units(HIDDEN, None, width, list(probed_slots(skeleton, width)))


def probed_slots(skeleton: Skeleton, width: int) -> Iterator[Slot]:
    """Axes of linear layers in blocks by what a probe sees, of everything else by their extent: likely, not proven.

    Raises TersorError for a block that cannot be probed.
    """
    index = torch.arange(width)[:, None]
    run = probe_pass(skeleton)
    known: dict[tuple, dict[str, tuple[bool, bool]]] = {}
    for number, block in enumerate(skeleton.blocks):
        signature, prefix = block_signature(block), skeleton.block_name(number) + "."
        names = module_names(skeleton, number)
        if signature not in known:
            with skeleton.filled(number) as filled:
                known[signature] = _sides(BlockProbe(run, number, filled, skeleton.block_name(number)))
        linear = set()
        for module, (reads, adds) in known[signature].items():
            bias = f"{prefix}{module}.bias"
            linear |= {f"{prefix}{module}.weight", bias}
            if module in names:
                turned = is_conv1d(skeleton, number, module)
                for axis in ((1,) if reads else ()) + ((0,) if adds else ()):
                    yield Slot(names[module], 1 - axis if turned else axis, index)
            if adds:
                yield from (Slot(name, 0, index) for name in skeleton.by_parameter.get(bias, ()))
        for name in skeleton.checkpoint_names(number):
            if skeleton.sources[name].parameter not in linear and skeleton.view.tensors[name].shape == (width,):
                yield Slot(name, 0, index)
    inside = skeleton.block_prefix + "."
    for name, source in skeleton.sources.items():
        if not source.parameter.startswith(inside):
            shape = skeleton.view.tensors[name].shape
            yield from (Slot(name, axis, index) for axis, extent in enumerate(shape) if extent == width)


def _sides(probe: BlockProbe) -> dict[str, tuple[bool, bool]]:
    """For every linear layer of a block: whether its input has what comes into the block, and whether it adds to that."""
    before, hidden = probe.inputs, probe.hidden
    probe.hidden = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    try:
        after = probe.with_noise({})
    finally:
        probe.hidden = hidden
    reads = {
        name: name not in after or after[name].shape != x.shape or not torch.equal(after[name], x)
        for name, x in before.items()
    }
    sides = {}
    for name in before:
        changed, output = probe.changed({name: torch.ones(probe.noise[name].shape[-1], dtype=torch.bool)})
        adds = output or any(reads[other] and bool(columns.any()) for other, columns in changed.items())
        sides[name] = reads[name], adds
    return sides


def resize_stream(
    checkpoint: Checkpoint, skeleton: Skeleton, before: Shapes, width: int, other: int, config: dict
) -> Resized | None:
    """The change to config.json that gives the stream another width, the token embeddings with it."""
    table = token_table(skeleton)
    names = {name for name, value in skeleton.model.named_parameters() if value is table}
    return resize(checkpoint, before, width, other, lambda axes: bool(axes) and axes.keys() >= names, config)


def token_table(skeleton: Skeleton) -> nn.Parameter | None:
    """The token embeddings `[vocabulary, hidden]`; images have none."""
    return getattr(skeleton.model.get_input_embeddings(), "weight", None)


def hidden_states(skeleton: Skeleton) -> torch.Tensor:
    """What arrives at the first block when a few random tokens or images go in."""
    return probe_pass(skeleton).hidden.take(0)


def stream_slots(skeleton: Skeleton, axes: dict[str, int], width: int) -> Iterator[Slot]:
    """Experts are stacked by transformers, so that their axis is one less in the file."""
    index = torch.arange(width)[:, None]
    for parameter, axis in axes.items():
        for name in skeleton.by_parameter.get(parameter, ()):
            yield Slot(name, axis - (skeleton.sources[name].expert is not None), index)


def explicit_head_size(skeleton: Skeleton) -> dict[tuple[str, ...], int]:
    """What the model's attention modules call their head size, to be said in config.json: else it would be hidden / heads."""
    found = (getattr(module, "head_dim", None) for block in skeleton.blocks for module in block.modules())
    sizes = {size for size in found if type(size) is int}
    return {("head_dim",): sizes.pop()} if len(sizes) == 1 else {}

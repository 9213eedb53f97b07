"""The units of a whole model: one probe for every kind of block, its couplings put into the names of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite
from tersor.ops.model.coupling import BlockProbe, Coupling, find
from tersor.ops.model.skeleton import EXPERTS, Skeleton
from torch import nn

PROBE_TOKENS = 24
PROBE_WINDOWS = 2
PROBE_IMAGES = 8


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


def reads_text(skeleton: Skeleton) -> bool:
    return skeleton.model.main_input_name == "input_ids"


def probe_pass(skeleton: Skeleton) -> BlockPass:
    """A pass over a few random tokens or images."""
    generator = torch.Generator().manual_seed(0)
    config = skeleton.model.config
    name = skeleton.model.main_input_name
    if name == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        windows = torch.randint(0, vocabulary, (PROBE_WINDOWS, PROBE_TOKENS), generator=generator)
    elif name == "pixel_values":
        side = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        windows = torch.randn(PROBE_IMAGES, config.num_channels, *side, generator=generator)
    else:
        raise TersorError(
            f"{config.model_type}: reads {name}, neither text nor images", "--remove weights does not mind"
        )
    return BlockPass(skeleton, windows, input_name=name)


def find_units(checkpoint: Checkpoint, skeleton: Skeleton, kind: str) -> list[Units]:
    """All neurons or heads of the model. Raises TersorError where a layer cannot be proven to have such units."""
    run = probe_pass(skeleton)
    known: dict[tuple, list[Coupling]] = {}
    result, tied = [], []
    for index, block in enumerate(skeleton.blocks):
        signature = block_signature(block)
        if signature not in known:
            with skeleton.filled(index) as filled:
                for name, layer in skeleton.linears(index).items():
                    check_finite(layer.weight, name, checkpoint)
                probe = BlockProbe(run, index, filled, skeleton.block_name(index))
                known[signature] = find(probe, kind)
                tied += probe.tied
        names = module_names(skeleton, index)
        if any(coupling.reader not in names for coupling in known[signature]):
            raise TersorError(
                f"{skeleton.block_name(index)}: config.json lists a part of this block as dropped, and all blocks have to "
                f"lose the same {kind}",
                f"remove {kind} first, and what is dropped after it",
            )
        result += [_units(skeleton, index, coupling, names) for coupling in known[signature]]
    if not result:
        seen = f"; the inputs of {' and '.join(tied[:3])} all hang together" if tied else ""
        raise TersorError(f"{checkpoint.path}: no layer has {kind} that could be removed{seen}", WHY_NONE[kind])
    return result


WHY_NONE = {
    "neurons": "no linear layer reads another through elementwise functions alone; --remove weights works on any layer",
    "heads": "a single KV head, or a norm over all heads, ties all of them together; --remove weights or neurons",
}


def block_signature(block: nn.Module) -> tuple:
    """Equal for blocks with the same modules of the same classes and shapes."""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def module_names(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Module of a block, as in `named_modules` while it is filled -> the checkpoint name of its weight."""
    prefix = skeleton.block_name(index) + "."
    names = {}
    for name in skeleton.checkpoint_names(index):
        source = skeleton.sources[name]
        module, _, leaf = source.parameter.removeprefix(prefix).rpartition(".")
        if source.expert is not None:
            names[f"{module}.{EXPERTS}.{source.expert}.{name.split('.')[-2]}"] = name
        elif leaf == "weight":
            names[module] = name
    return names


def _units(skeleton: Skeleton, index: int, coupling: Coupling, names: dict[str, str]) -> Units:
    columns = torch.arange(coupling.count * coupling.width).reshape(coupling.count, coupling.width)
    return units_of(skeleton, index, coupling.reader, columns, coupling.rows, names)


def units_of(
    skeleton: Skeleton,
    index: int,
    reader: str,
    columns: torch.Tensor,
    rows: dict[str, torch.Tensor],
    names: dict[str, str],
) -> Units:
    """Units that own `columns` `[units, k]` of module `reader` and `rows` `[units, k]` of each writing module of a block,
    biases included. `names` as from `module_names`."""
    slots = []
    for module, places in rows.items():
        slots.append(Slot(names[module], int(is_conv1d(skeleton, index, module)), places))
        slots += [Slot(name, 0, places) for name in skeleton.by_parameter.get(_bias(skeleton, index, module), [])]
    name = names[reader]
    slots.append(Slot(name, int(not is_conv1d(skeleton, index, reader)), columns))
    return Units(name.removesuffix(".weight"), index, len(columns), slots, [name])


def _bias(skeleton: Skeleton, index: int, module: str) -> str:
    return f"{skeleton.block_name(index)}.{module}.bias"


def is_conv1d(skeleton: Skeleton, index: int, module: str) -> bool:
    return f".{EXPERTS}." not in module and not isinstance(skeleton.blocks[index].get_submodule(module), nn.Linear)

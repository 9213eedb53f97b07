"""A smaller model that starts from its teacher: fewer blocks, and narrower ones.

Blocks are taken evenly, the first and the last among them. Of neurons, heads (KV heads with their query heads) and hidden
channels the strongest stay: those with the largest sum of squares over everything they own; hidden channels are the same
ones in the whole model. Which rows and columns belong together is found by running the teacher (`model/coupling.py`,
`model/stream.py`), not from a table, so any other change of shape is refused. The vocabulary is the teacher's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES, SAFETENSORS_DTYPES, TORCH_DTYPES, TensorInfo, tensor_bytes
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.build import assemble
from tersor.ops.distill.students.places import places
from tersor.ops.distill.students.student import Student
from tersor.ops.model.resize import build_meta
from tersor.ops.model.skeleton import Skeleton, find_blocks, map_names
from tersor.ops.model.stream import stream_units
from tersor.ops.model.units import Slot, Units, find_units
from torch import Tensor, nn

Shape = tuple[int, ...]
Cut = tuple[Slot, Tensor]  # what a tensor owns of some units, and the ones that stay
KINDS = ("hidden channels", "neurons", "heads")
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")  # as attention modules call it
NUMBER = re.compile(r"(^|\.)(\d+)\.")


def from_config(
    config: dict, teacher: DenseView, request: Request, device: torch.device, path: Path = Path("config.json")
) -> Student:
    """The model of `config` with weights of `teacher`; `path` is where the config comes from, for messages.

    `.layout` names the tensors as the teacher does, in the dtype that the config declares, or the teacher's.
    Raises TersorError for a config that asks for more than the teacher has, or for a width that cannot be derived.
    """
    if config.get("quantization_config"):
        raise TersorError(f"{path}: has a quantization_config, and a new student is dense", "quantize it afterwards")
    view = DenseView(_Start(config, teacher, path))
    return assemble(view, *_definition(config), request, device)


def even_layers(count: int, of: int) -> list[int]:
    """`count` of `of` blocks, evenly, the first and the last among them; a single one is the first."""
    if count == 1:
        return [0]
    return [(2 * index * (of - 1) + count - 1) // (2 * (count - 1)) for index in range(count)]  # rounded half up


def _definition(config: dict) -> tuple[type, object]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    class_ = getattr(transformers, (config.get("architectures") or [""])[0], None)
    return class_ or transformers.MODEL_MAPPING[type(settings)], settings


@dataclass
class _Origin:
    """From which tensor of the teacher, and what is left of it."""

    name: str
    cuts: list[Cut] = field(default_factory=list)


class _Start(Checkpoint):
    """What a student starts with, as a checkpoint whose tensors are cut out of the teacher's while they are read."""

    def __init__(self, config: dict, teacher: DenseView, path: Path):
        self.path, self.config, self.teacher = path, config, teacher
        self.shards = teacher.checkpoint.shards
        skeleton = Skeleton(teacher, torch.device("cpu"), thresholds={})
        model = build_meta(self, config)
        named = _names(skeleton, model, path)
        sources = map_names(model, SimpleNamespace(tensors=named))
        wanted = _shapes(model, sources)
        _check_complete(model, sources, path)
        named = {name: origin for name, origin in named.items() if name in wanted}
        cuts = _cuts(skeleton, model, named, wanted, path)
        self.origins = {name: _Origin(origin, cuts.get(name, [])) for name, origin in named.items()}
        self.tensors = {name: self._describe(name, wanted[name]) for name in named}

    def _describe(self, name: str, shape: Shape) -> TensorInfo:
        entry = self.teacher.tensors[self.origins[name].name]
        dtype = entry.dtype
        declared = SAFETENSORS_DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")))
        if dtype in FLOAT_DTYPES and declared in FLOAT_DTYPES:
            dtype = declared
        return TensorInfo(name, dtype, shape, self.shards[0], 0, tensor_bytes(dtype, shape))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        origin = self.origins[name]
        tensor = self.teacher.read(origin.name)
        for slot, kept in origin.cuts:
            tensor = tensor.index_select(slot.axis, slot.places(kept))
        tensor = tensor.to(getattr(torch, TORCH_DTYPES[self.tensors[name].dtype])).contiguous()
        return tensor if rows is None else tensor[rows[0] : rows[1]].clone()

    def map(self, name: str) -> Tensor:
        return self.read(name)


def _names(skeleton: Skeleton, model: nn.Module, path: Path) -> dict[str, str]:
    """Tensor of the student -> tensor of the teacher. Raises TersorError when there are not as many blocks."""
    count, of = len(find_blocks(model)[1]), len(skeleton.blocks)
    if count > of:
        raise TersorError(f"{path}: {count} blocks, the teacher has {of}", "a student starts with what the teacher has")
    inside = {name: index for index in range(of) for name in skeleton.checkpoint_names(index)}
    number = {index: new for new, index in enumerate(even_layers(count, of))}
    result = {}
    for name in skeleton.sources:
        index = inside.get(name)
        if index is None:
            result[name] = name
        elif index in number:
            found = NUMBER.search(name)
            if found is None or int(found[2]) != index:
                raise TersorError(
                    f"{path}: tensor {name!r} does not say that it is of block {index}", "keep all blocks"
                )
            result[f"{name[: found.start(2)]}{number[index]}{name[found.end(2) :]}"] = name
    return result


def _shapes(model: nn.Module, sources: Mapping) -> dict[str, Shape]:
    """The shape that each checkpoint tensor has to have for `model`; none for what that has no use for: experts beyond
    its number, and a head that is its table."""
    state, tied = dict(model.state_dict()), dict(getattr(model, "all_tied_weights_keys", None) or {})
    filled = {source.parameter for source in sources.values()}
    result = {}
    for name, place in places(model, sources).items():
        whole = state[place.parameter]
        gone = place.expert is not None and place.expert >= whole.shape[place.stack]
        if not gone and tied.get(place.parameter, place.parameter) not in filled - {place.parameter}:
            result[name] = tuple(place.of(whole).shape)
    return result


def _check_complete(model: nn.Module, sources: Mapping, path: Path) -> None:
    """Raises TersorError for a parameter that no tensor of the teacher goes to."""
    filled = {id(model.get_parameter(s.parameter)) for s in sources.values() if _is_parameter(model, s.parameter)}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    filled |= {
        id(model.get_parameter(alias)) for alias, name in tied.items() if id(model.get_parameter(name)) in filled
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in filled and "pooler" not in name:
            raise TersorError(
                f"{path}: the teacher has no tensor for {name!r}",
                "the config must be of the teacher's model_type, with the same parts (biases, tied embeddings, experts)",
            )


def _is_parameter(model: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    return model.get_submodule(owner)._parameters.get(leaf) is not None


def _cuts(
    skeleton: Skeleton, model: nn.Module, named: dict[str, str], wanted: dict[str, Shape], path: Path
) -> dict[str, list[Cut]]:
    """What to cut from each tensor of the student, so that it has the wanted shape."""
    shapes = {name: skeleton.view.tensors[origin].shape for name, origin in named.items()}
    students = {origin: name for name, origin in named.items()}
    left = set()
    for name, shape in shapes.items():
        if len(shape) != len(wanted[name]):
            raise TersorError(f"{path}: {name!r} has other dimensions than in the teacher", "use its model_type")
        left |= {(name, axis) for axis, extent in enumerate(shape) if extent != wanted[name][axis]}
    cuts: dict[str, list[Cut]] = {}
    for kind in KINDS:
        if not left or (kind == "heads" and _head_sizes(skeleton.model) != _head_sizes(model)):
            continue
        for units in _units(skeleton, kind):
            slots = [(students[slot.name], slot) for slot in units.slots if slot.name in students]
            counts = {_count(slot, shapes[name], wanted[name]) for name, slot in slots}
            if len(counts) != 1 or counts & {None, units.count} or any((n, s.axis) not in left for n, s in slots):
                continue
            kept = _strongest(units, skeleton.view, counts.pop())
            for name, slot in slots:
                cuts.setdefault(name, []).append((slot, kept))
                left.remove((name, slot.axis))
    for name, axis in sorted(left):
        raise TersorError(
            f"{path}: {name!r} has {shapes[name][axis]} in the teacher and {wanted[name][axis]} here along axis {axis}, "
            "which is not done by leaving out hidden channels, neurons, or heads of the same size",
            "take from the teacher's config.json the head size, the query heads to a KV head, vocabulary and experts",
        )
    return cuts


def _count(slot: Slot, before: Shape, after: Shape) -> int | None:
    """How many units `after` has room for, None where they are not all that lies along the axis."""
    extent, width = after[slot.axis], slot.index.shape[1]
    whole = slot.index.numel() == before[slot.axis] and extent % width == 0 and extent <= before[slot.axis]
    return extent // width if whole else None


def _head_sizes(model: nn.Module) -> set[int]:
    found = (getattr(module, key, None) for module in model.modules() for key in HEAD_SIZES)
    return {size for size in found if type(size) is int}


def _units(skeleton: Skeleton, kind: str) -> list[Units]:
    """None where the teacher has no such units; what they were needed for is refused later, by its name."""
    try:
        if kind == "hidden channels":
            return [stream_units(skeleton.view.checkpoint, skeleton)]
        return find_units(skeleton.view.checkpoint, skeleton, kind)
    except TersorError:
        return []


def _strongest(units: Units, view: DenseView, count: int) -> Tensor:
    """The units with the largest sums of squares over all they own, in ascending order."""
    energy = torch.zeros(units.count, dtype=torch.float64)
    for slot in units.slots:
        energy += slot.of_units(view.read(slot.name).double()).square().sum(1)
    return energy.topk(count).indices.sort().values

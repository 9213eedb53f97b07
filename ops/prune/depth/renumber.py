"""Fewer blocks: new tensor names, and a config.json from which transformers builds just the blocks that are left.

No table of architectures. The number of blocks is a key of the config with this value that changes how many there are when
it is changed; per-layer lists are lists of this length, and lists of layers are cut to what is left of them. Every guess is
tried: the model built from the changed config must have, block by block, the shapes and settings of the blocks that were
kept, and outside of them nothing new.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import record_calls
from tersor.ops.model.branches import first_tensor, input_tensor, probe_inputs, random_weights
from tersor.ops.model.resize import build_meta
from tersor.ops.model.skeleton import DROP_LISTS, Skeleton, assign
from torch import nn
from torch.utils._pytree import tree_leaves

PER_LAYER = re.compile(r"layer|block|pattern")
# Counts of layers from the first one: "the first k are dense", "window attention from layer k on".
BOUNDARIES = ("max_window_layers", "first_k_dense_replace")
TRIALS_PER_KEY = 16
Path = tuple[str, ...]


@dataclass(frozen=True)
class Numbering:
    """Checkpoint tensors of block i are called `{prefix}i.…`."""

    prefix: str

    def block(self, name: str) -> int | None:
        found = re.match(re.escape(self.prefix) + r"(\d+)\.", name)
        return int(found[1]) if found else None

    def renamed(self, name: str, new: int) -> str:
        return f"{self.prefix}{new}.{name.removeprefix(self.prefix).partition('.')[2]}"


def numbering(skeleton: Skeleton) -> Numbering:
    """How the checkpoint counts its blocks. Raises TersorError when the names of their tensors have no number in common."""
    shared: set[str] | None = None
    for index in range(len(skeleton.blocks)):
        for name in skeleton.checkpoint_names(index):
            parts = name.split(".")
            places = [place for place, part in enumerate(parts[:-1]) if part == str(index)]
            prefixes = {"".join(f"{part}." for part in parts[:place]) for place in places}
            shared = prefixes if shared is None else shared & prefixes
    if not shared:
        raise TersorError(
            f"{skeleton.view.checkpoint.path}: the tensors of a block share no number in their names",
            "blocks of this checkpoint cannot be renumbered: use --keep-shape",
        )
    return Numbering(min(shared, key=len))


def renumbered_config(skeleton: Skeleton, kept: list[int]) -> dict[str, Any]:
    """The top-level entries of config.json to replace, so that it describes the blocks `kept`, numbered anew.

    Raises TersorError when no change of the config that was tried builds that model.
    """
    checkpoint = skeleton.view.checkpoint
    problem = None  # of the likeliest trial
    for changes in _trials(checkpoint, skeleton, kept):
        config = copy.deepcopy(checkpoint.config)
        for (*above, key), value in changes.items():
            level = config
            for part in above:
                level = level[part]
            level[key] = value
        try:
            model = build_meta(checkpoint, config)
            found = _difference(skeleton, model, kept)
        except TersorError as error:
            found = str(error)
        if found is None:
            return {path[0]: config[path[0]] for path in changes}
        problem = problem or found
    problem = problem or "no entry has the number of blocks"
    raise TersorError(
        f"{checkpoint.path}: config.json cannot say that {len(kept)} of {len(skeleton.blocks)} blocks are left ({problem})",
        "keep the shapes and write zeros: --keep-shape",
    )


def _trials(checkpoint: Checkpoint, skeleton: Skeleton, kept: list[int]) -> Iterator[dict[Path, Any]]:
    """Sets of changes, the likely ones first."""
    count = len(skeleton.blocks)
    defaults = skeleton.model.config.to_dict()
    for path, level in _levels(checkpoint.config, defaults):
        counts = [key for key, value in level.items() if type(value) is int and value == count]
        counts.sort(key=lambda key: not PER_LAYER.search(key))
        together = [key for key in counts if PER_LAYER.search(key) and key not in BOUNDARIES]
        for keys in [[key] for key in counts] + ([together] if len(together) > 1 else []):
            number = {(*path, key): len(kept) for key in keys}
            ways = {
                (*path, key): options
                for key, value in level.items()
                if key not in keys and (options := _options(key, value, count, kept))
            }
            for choice in _by_preference(list(ways.values()))[:TRIALS_PER_KEY]:
                yield number | {way: value for way, value in zip(ways, choice, strict=True) if value != level[way[-1]]}


def _levels(config: dict, defaults: dict, path: Path = ()) -> Iterator[tuple[Path, dict]]:
    """The config and the configs inside it, with the values of what is not written down."""
    hidden = {key for key in defaults if key.startswith("_")}
    yield path, {key: value for key, value in (defaults | config).items() if key not in hidden}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and isinstance(defaults.get(key), dict):
            yield from _levels(value, defaults[key], (*path, key))


def _options(key: str, value: Any, count: int, kept: list[int]) -> list[Any]:
    """What an entry may have to become, the likely first; nothing for one that has nothing to do with layers."""
    if type(value) is int and key in BOUNDARIES:
        return [sum(index < value for index in kept), value]
    if not isinstance(value, list) or key in DROP_LISTS.values():
        return []
    options = []
    if value and all(type(item) is int and 0 <= item < count for item in value):
        options.append([kept.index(item) for item in value if item in kept])
    if len(value) == count:
        options.append([value[index] for index in kept])
        if len(set(map(str, value))) < count:
            options.reverse()  # entries that repeat are no list of layers
    return [*options, value] if PER_LAYER.search(key) else [value, *options] if options else []


def _by_preference(ways: list[list[Any]]) -> list[tuple]:
    """Every combination of one option each, by how many steps it is from the first options."""
    places = itertools.islice(itertools.product(*(range(len(options)) for options in ways)), 4096)
    return [
        tuple(options[place] for options, place in zip(ways, chosen, strict=True)) for chosen in sorted(places, key=sum)
    ]


def _difference(skeleton: Skeleton, model: nn.Module, kept: list[int]) -> str | None:
    """How `model` is not the old one with the blocks `kept`; None when it is."""
    try:
        blocks = model.get_submodule(skeleton.block_prefix)
    except AttributeError:
        return f"{skeleton.block_prefix} is no longer there"
    if len(blocks) != len(kept):
        return f"it gives {len(blocks)} blocks"
    if _shell(model, skeleton.block_prefix) != _shell(skeleton.model, skeleton.block_prefix):
        return "something outside the blocks changes"
    for new, old in enumerate(kept):
        found = _block_difference(skeleton.blocks[old], blocks[new], old, new)
        if found is not None:
            return f"block {old} would become another one: {found}"
    try:
        return _value_difference(skeleton, model, blocks, kept)
    except Exception as error:  # whatever a model's code says to settings that do not fit together
        return f"it does not run: {type(error).__name__} {error}"


def _shell(model: nn.Module, prefix: str) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items() if not name.startswith(f"{prefix}.")}


def _block_difference(old: nn.Module, new: nn.Module, before: int, after: int) -> str | None:
    shapes = [{name: value.shape for name, value in block.state_dict().items()} for block in (old, new)]
    if shapes[0] != shapes[1]:
        names = [name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)]
        return f"tensor {min(names)!r} differs"
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        if name not in modules or type(modules[name]) is not type(module):
            return f"module {name!r} differs"
        ours, theirs = _settings(module), _settings(modules[name])
        for key in ours.keys() | theirs.keys():
            same = ours.get(key) == theirs.get(key)
            if not same and not (type(ours.get(key)) is int and (ours[key], theirs.get(key)) == (before, after)):
                return f"{name}.{key} is {theirs.get(key)!r} instead of {ours.get(key)!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module was told: plain values, and lists of them."""
    plain = (bool, int, float, str, type(None))

    def is_plain(value: Any) -> bool:
        return isinstance(value, plain) or (isinstance(value, (list, tuple)) and all(map(is_plain, value)))

    return {key: value for key, value in vars(module).items() if not key.startswith("_") and is_plain(value)}


@torch.no_grad()
def _value_difference(skeleton: Skeleton, model: nn.Module, blocks: nn.ModuleList, kept: list[int]) -> str | None:
    """What running shows: blocks must be called with what they were called with, and not compute with their own number.

    The second is tried on one moved block of each kind, with the same random weights in its old and its new place.
    """
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = skeleton.model.config._attn_implementation
            module.config._experts_implementation = skeleton.model.config._experts_implementation
    shell = dict(skeleton.model.named_parameters()) | dict(skeleton.model.named_buffers())
    for name, value in shell.items():
        if not name.startswith(f"{skeleton.block_prefix}."):
            assign(model, name, value)
    inputs = probe_inputs(skeleton)
    before = record_calls(skeleton, **inputs)
    after = record_calls(SimpleNamespace(model=model, blocks=blocks, dtype=skeleton.dtype), **inputs)
    seen = set()
    for new, index in enumerate(kept):
        old, calls = skeleton.blocks[index], (before[index].calls[0], after[new].calls[0])
        if not _equal(*map(_arguments, calls)):
            return f"block {index} would be called with something else"
        kind = type(old), *((name, parameter.shape) for name, parameter in old.named_parameters())
        if index == new or kind in seen:
            continue
        seen.add(kind)
        for name, buffer in old.named_buffers():
            assign(blocks[new], name, buffer)
        hidden = torch.randn(input_tensor(*calls[0]).shape, generator=torch.Generator().manual_seed(1))
        hidden = hidden.to(skeleton.device, skeleton.dtype)
        with random_weights(skeleton, old, blocks[new]):
            outputs = [
                first_tensor(block(hidden, *args, **kwargs))
                for block, (args, kwargs) in zip((old, blocks[new]), map(_arguments, calls), strict=True)
            ]
        if not torch.allclose(*outputs, rtol=1e-5, atol=1e-5):
            return f"block {index} computes with its own number"
    return None


def _arguments(call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """Without the hidden states."""
    args, kwargs = call
    return args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _equal(before: object, after: object) -> bool:
    leaves = [tree_leaves(value) for value in (before, after)]
    if len(leaves[0]) != len(leaves[1]):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b)
        for a, b in zip(*leaves, strict=True)
    )

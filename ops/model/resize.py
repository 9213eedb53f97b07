"""Which number of config.json a dimension comes from, found by building the model with another one.

No table of architectures: every integer of config.json with the wanted value is tried, on the meta device, until the
model's own code gives tensors of exactly the new shapes and no other difference.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.skeleton import Source, map_names
from torch import nn

Shapes = dict[str, tuple[int, ...]]
Key = tuple[str, ...]


@dataclass
class Resized:
    """`config` are the top-level keys of config.json to replace, `axes` the parameters that change: name -> which axis."""

    paths: list[Key]
    config: dict
    axes: dict[str, int] = field(default_factory=dict)


def build_meta(checkpoint: Checkpoint, config: dict) -> nn.Module:
    """The model of `config` without memory for its weights. Raises TersorError when transformers cannot build it."""
    import transformers
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        settings.use_cache = False
        settings._attn_implementation = "eager"
        class_ = getattr(transformers, (config.get("architectures") or [""])[0], None)
        with torch.device("meta"):
            model = class_._from_config(settings) if class_ is not None else AutoModel.from_config(settings)
    except Exception as error:  # whatever a model's code says to numbers that do not fit together
        raise TersorError(
            f"{checkpoint.path}: transformers cannot build this model ({(str(error).splitlines() or [''])[0][:160]})",
            "update transformers, and check config.json",
        ) from error
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing about configurations that do not fit."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def set_keys(raw: dict, changes: dict[Key, Any]) -> dict:
    """`raw` with nested keys replaced; nothing shared is written to."""
    result = dict(raw)
    for key, value in changes.items():
        here = result
        for part in key[:-1]:
            here[part] = dict(here.get(part) or {})
            here = here[part]
        here[key[-1]] = value
    return result


def top_level(raw: dict, changes: dict[Key, Any]) -> dict[str, Any]:
    """The changes as whole top-level entries."""
    changed = set_keys(raw, changes)
    return {key[0]: changed[key[0]] for key in changes}


def shapes_of(model: nn.Module) -> Shapes:
    """Every parameter and stored buffer, tied ones under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def sources_of(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Source]:
    """Checkpoint tensor -> where it goes in `model`."""
    return map_names(model, DenseView(checkpoint))


def resize(
    checkpoint: Checkpoint,
    before: Shapes,
    old: int,
    new: int,
    wanted: Callable[[dict[str, int]], bool],
    config: dict | None = None,
) -> Resized | None:
    """The change to config.json that turns a dimension of `old` into `new` for the parameters that are `wanted`.

    `before` are the shapes of the model as it is, `config` what else is to be changed along with it. None: there is none.
    """
    base = config if config is not None else checkpoint.require_config("which says what model this is")
    candidates = list(_paths(base, old))
    # Two at once: a config may hold the same number under an old and a new name.
    for paths in itertools.chain(((path,) for path in candidates), itertools.combinations(candidates, 2)):
        changes = dict.fromkeys(paths, new)
        changed = set_keys(base, changes)
        try:
            after = shapes_of(build_meta(checkpoint, changed))
        except TersorError:
            continue
        axes = changed_axes(before, after, old, new)
        if axes is not None and wanted(axes):
            return Resized(list(paths), top_level(base, changes), axes)
    return None


def changed_axes(before: Shapes, after: Shapes, old: int, new: int) -> dict[str, int] | None:
    """Parameters with one axis that went from `old` to `new`; None when anything else differs."""
    if before.keys() != after.keys():
        return None
    axes: dict[str, int] = {}
    for name, shape in before.items():
        if shape == after[name]:
            continue
        if len(shape) != len(after[name]):
            return None
        differ = [axis for axis, pair in enumerate(zip(shape, after[name], strict=True)) if pair[0] != pair[1]]
        if len(differ) != 1 or (shape[differ[0]], after[name][differ[0]]) != (old, new):
            return None
        axes[name] = differ[0]
    return axes


def _paths(config: dict, value: int, above: Key = ()) -> Iterator[Key]:
    for key, found in config.items():
        if type(found) is int and found == value:
            yield (*above, key)
        elif isinstance(found, dict) and key.endswith("_config"):
            yield from _paths(found, value, (*above, key))

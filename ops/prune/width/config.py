"""Which keys of config.json make transformers build the smaller model: found by building it, not from a table.

Every integer of the configuration that equals the old width is a candidate. A set of changes is right when the model
that its class builds from it has exactly the shapes that the cut tensors have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.resize import Key, Shapes, build_meta, quiet, set_keys, shapes_of, top_level

MOST_KEYS = 10
TOKEN = "token_id"  # a number that is no width


@dataclass
class Built:
    """What a configuration gives: the shape of every tensor and all settings, or why there is no such model."""

    shapes: Shapes
    settings: dict[str, Any]
    error: str | None = None


def build(raw: dict, checkpoint: Checkpoint) -> Built:
    """The model of a config.json with this content, on the meta device."""
    try:
        with quiet():  # numbers that do not fit are tried on purpose
            model = build_meta(checkpoint, raw)
    except TersorError as error:
        return Built({}, {}, error=str(error).partition("(")[2].rstrip(")") or str(error))
    return Built(shapes_of(model), model.config.to_dict())


def integers(settings: dict, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every integer, list of integers and None among the settings, with the way to it."""
    for name, value in settings.items():
        if TOKEN in name:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole or value is None or (isinstance(value, list) and value and all(type(n) is int for n in value)):
            yield (*path, name), value
        elif isinstance(value, dict) and (not path) and name.endswith("_config"):
            yield from integers(value, (*path, name))


def candidates(settings: dict, widths: dict[int, int]) -> tuple[dict[Key, Any], dict[Key, Any]]:
    """Keys with an old width and the new value, and keys that are not set with every new width."""
    valued: dict[Key, Any] = {}
    unset: dict[Key, Any] = {}
    for key, value in integers(settings):
        if isinstance(value, list):
            if any(n in widths for n in value):
                valued[key] = [widths.get(n, n) for n in value]
        elif value is None:
            unset[key] = next(iter(widths.values()))
        elif value in widths:
            valued[key] = widths[value]
    return valued, unset


def search(
    checkpoint: Checkpoint, fixed: dict[Key, Any], offers: list[dict[Key, Any]], wanted: Shapes, what: str
) -> dict[str, Any]:
    """The entries of config.json to replace so that the model has the shapes `wanted` and all others as they were.

    `fixed` must be said whatever is chosen; `offers` are sets of changes, tried one after another, all smaller sets
    first. Raises TersorError naming the tensor that no set of changes brings to its shape.
    """
    raw, path = checkpoint.config, checkpoint.path
    old = build(raw, checkpoint).shapes
    if build(set_keys(raw, fixed), checkpoint).shapes != old:
        fixed = {}
    goal = old | wanted
    best: tuple[int, str] = (-1, "")
    for offer in offers:
        useful, keys = [], list(offer)
        for key in keys:
            built = build(set_keys(raw, {**fixed, key: offer[key]}), checkpoint)
            changed = {name for name in old.keys() | built.shapes.keys() if built.shapes.get(name) != old.get(name)}
            if built.error or (changed and changed <= wanted.keys()):
                useful.append(key)
        for size in range(1, min(len(useful), MOST_KEYS) + 1):
            for chosen in combinations(useful, size):
                changes = {**fixed, **{key: offer[key] for key in chosen}}
                built = build(set_keys(raw, changes), checkpoint)
                if built.shapes == goal:
                    return top_level(raw, changes)
                best = max(best, _judge(built, goal, wanted, chosen), key=lambda found: found[0])
    why = best[1] or _plainly(old, wanted)
    family = raw.get("model_type")
    raise TersorError(
        f"{path}: no setting in the config.json of {family} makes {what} smaller: {why}",
        "keep the shapes and write zeros with --keep-shape"
        + ("" if "multiple" not in why else ", or choose --multiple-of and --sparsity so that the number fits"),
    )


def _judge(built: Built, goal: Shapes, wanted: Shapes, chosen: tuple[Key, ...]) -> tuple[int, str]:
    keys = ", ".join(".".join(key) for key in chosen)
    if built.error:
        return 0, f"with another {keys}, {built.error}"
    wrong = [name for name in goal if built.shapes.get(name) != goal[name]]
    name = next((name for name in wrong if name in wanted), wrong[0] if wrong else "")
    found = list(built.shapes.get(name, ()))
    return 1 + len(goal) - len(wrong), f"with another {keys}, {name} is {found} and not {list(goal.get(name, ()))}"


def _plainly(old: Shapes, wanted: Shapes) -> str:
    name = next(iter(wanted))
    return f"{name} stays {list(old[name])} where {list(wanted[name])} is needed"

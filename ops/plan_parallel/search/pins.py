"""Choices that a user makes instead of the planner: a YAML file, or one line such as `tp=8,pp=2`.

    tp: 8                   # exactly this
    pp: [4, 8, 16]          # one of these
    stages: [15, 16, 16, 16, 16, 16, 16, 15]
    recompute: full

Keys are the fields of `Layout`, and `devices` for how many are used. What is not named, the planner chooses.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import OFFLOAD, RECOMPUTE, SCHEDULES, Layout, read_stages

Pins = dict[str, tuple]  # the values that are allowed, by field of Layout

TIERS = ("cpu", "nvme")
WORDS = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "offload": OFFLOAD, "tier": TIERS}
KEYS = (*(entry.name for entry in fields(Layout)), "devices")
ZERO_STAGES = (0, 1, 2, 3)


def load_pins(path: Path) -> Pins:
    """Raises TersorError for a file that is missing or no YAML, for unknown keys and for values that cannot be."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TersorError(f"{path}: no such file of pinned choices", "give an existing YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TersorError(f"{path}: {error}", "give a readable YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise TersorError(f"{path}: not readable as YAML{where}", "write lines such as `tp: 8`") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TersorError(
            f"{path}: holds a {type(content).__name__}, not keys with values", "write lines such as `tp: 8`"
        )
    return check_pins(content, str(path))


def parse_pins(text: str) -> Pins:
    """`tp=8,pp=2,stages=40+40`, as `Layout.describe` writes and --why-not reads."""
    found: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise TersorError(f"{text!r}: {part!r} is no choice", "write choices as in tp=8,pp=2,schedule=zbv")
        if key in found:
            raise TersorError(f"{text!r}: {key} is given twice", "give every choice once")
        if key == "stages":
            found[key] = _stages(value)
        else:
            found[key] = value if key in WORDS else _whole(value)
    if not found:
        raise TersorError(f"{text!r} names no choice", "write choices as in tp=8,pp=2,schedule=zbv")
    return check_pins(found, repr(text))


def check_pins(given: Mapping[str, object], source: str = "pins") -> Pins:
    """Every value becomes a tuple of those that are allowed. Tuples and lists are several, except for `stages`."""
    pins: Pins = {}
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
            raise TersorError(f"{source}: {key!r} cannot be pinned", hint)
        if key == "stages":
            several = value if _is_list(value) and value and all(_is_list(entry) for entry in value) else [value]
            pins[key] = tuple(_blocks(entry, source) for entry in several)
            continue
        values = tuple(value) if _is_list(value) else (value,)
        if not values:
            raise TersorError(f"{source}: {key} is an empty list", "give at least one value, or leave the key out")
        for entry in values:
            _check(key, entry, source)
        pins[key] = tuple(dict.fromkeys(values))
    return pins


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _blocks(value: object, source: str) -> tuple[int, ...]:
    if not _is_list(value) or not value or not all(_is_whole(entry, 0) for entry in value):
        raise TersorError(
            f"{source}: stages is {value!r}", "list how many blocks every stage has, as in [15, 16, 16, 15]"
        )
    return tuple(value)


def _check(key: str, value: object, source: str) -> None:
    if key in WORDS:
        if value not in WORDS[key]:
            raise TersorError(f"{source}: {key} is {value!r}", f"known are {', '.join(WORDS[key])}")
    elif key == "zero":
        if not _is_whole(value, 0) or value not in ZERO_STAGES:
            raise TersorError(f"{source}: zero is {value!r}", "ZeRO has stages 0 to 3")
    elif not _is_whole(value, 1):
        raise TersorError(f"{source}: {key} is {value!r}", "degrees are whole numbers from 1 on")


def _stages(value: str) -> list[int] | str:
    """The blocks that `value` writes, or the text itself for `check_pins` to refuse."""
    try:
        return list(read_stages(value))
    except ValueError:
        return value


def _whole(word: str) -> int | str:
    """The number that `word` writes, or the word itself for `check_pins` to refuse by name."""
    return int(word) if word.isascii() and word.isdigit() and len(word) < 10 else word

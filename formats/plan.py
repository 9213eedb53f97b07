"""`plan.json` of a folder that `tersor plan-parallel` writes: what was planned for which checkpoint on which cluster.

    schema     tersor.plan-parallel/1
    model      path, fingerprint, family, bytes, params
    cluster    name, nodes, devices_per_node, hardware
    workload   what the plan is for, by field
    layout     degrees and choices, by field; `stages` has the blocks of every stage
    ranks      the device of each rank, where that is not simply its number; to serve by role, as `layouts`
    predicted  times in seconds, bytes, what bounds the plan, sentences that explain it
    others     other plans that were looked at, best first, and why each of them lost
    pareto     plans that no other beats in both time and memory, by closed forms: schedules are not run block by block

The exports beside it are for runtimes; `shards/` is there where --shard was given.
"""

from __future__ import annotations

import json
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object
from tersor.formats.report import finite

FILE, SCHEMA = "plan.json", "tersor.plan-parallel/1"
REQUIRED = {"model": dict, "cluster": dict, "workload": dict, "layout": dict, "predicted": dict}
WAY_OUT = "give the folder that tersor plan-parallel wrote"


def write_plan(folder: Path, plan: dict) -> None:
    """NaN and infinities, which JSON does not have, become null."""
    text = json.dumps(finite({"schema": SCHEMA, **plan}), indent=1, ensure_ascii=False) + "\n"
    (folder / FILE).write_text(text, "utf-8", "backslashreplace")


def is_plan(path: Path) -> bool:
    """Whether a folder holds a plan, or this is its plan.json. Never raises."""
    file = path if path.name == FILE else path / FILE
    try:
        return read_object(file, WAY_OUT).get("schema") == SCHEMA
    except TersorError:
        return False


def read_plan(path: Path) -> dict:
    """The plan of a folder, or of a plan.json. Raises TersorError for anything else, naming the key that is wrong."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise TersorError(f"{path}: holds no {FILE}", WAY_OUT)
    plan = read_object(file, WAY_OUT)
    if plan.get("schema") != SCHEMA:
        raise TersorError(f"{file}: schema is {plan.get('schema')!r}, not {SCHEMA}", WAY_OUT)
    for key, kind in REQUIRED.items():
        if not isinstance(plan.get(key), kind):
            raise TersorError(f"{file}: {key} is {plan.get(key)!r}", "the file was changed; plan again")
    shards = plan.get("shards") or []
    if not isinstance(shards, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("folder"), str) for entry in shards
    ):
        raise TersorError(f"{file}: shards is {shards!r}", "the file was changed; plan again")
    for key in ("path", "fingerprint"):
        if not isinstance(plan["model"].get(key), str):
            raise TersorError(f"{file}: model.{key} is {plan['model'].get(key)!r}", "the file was changed; plan again")
    return plan


def require_same_model(plan: dict, file: Path, fingerprint: str, model: Path) -> None:
    """Raises TersorError where `plan` is for another checkpoint than `model`."""
    if plan["model"]["fingerprint"] != fingerprint:
        raise TersorError(
            f"{file}: is a plan for {plan['model']['path']}, which {model} is not (or has changed since)",
            "plan for this checkpoint, or give the one that the plan names",
        )

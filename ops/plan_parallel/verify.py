"""`verify` of a folder that plan-parallel wrote: the plan is one, and its shards are the checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.plan import read_plan, require_same_model
from tersor.formats.shards import ShardIndex
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.plan_parallel.shards.verify import verify_shards

Progress = Callable[[str, int, int], None]


@dataclass
class Result:
    """`against` is the checkpoint that the shards were compared with, None where it is not there any more: their hashes
    say what they were cut from."""

    path: Path
    tensors: int = 0
    files: int = 0
    against: Path | None = None
    problems: list[str] = field(default_factory=list)


def verify_plan(path: Path, against: str | None = None, progress: Progress = lambda *_: None) -> Result:
    """`against` stands in for the checkpoint that the plan names. Raises TersorError where plan or index cannot be read,
    or `against` is another checkpoint."""
    plan, result = read_plan(path), Result(path)
    source = _source(plan, path, against)
    result.against = None if source is None else source.path
    for entry in plan.get("shards") or []:
        folder = (path if path.is_dir() else path.parent) / entry["folder"]
        index = ShardIndex.load(folder)
        result.tensors += len(index.tensors)
        result.files += len(index.files)
        if index.source.get("fingerprint") != plan["model"]["fingerprint"]:
            result.problems.append(f"{folder}: the shards are of {index.source.get('path')}, the plan is not")
        result.problems += verify_shards(folder, source, progress)
    return result


def _source(plan: dict, path: Path, against: str | None) -> Checkpoint | None:
    given = Path(plan["model"]["path"]) if against is None else locate(against)
    if against is None and not given.exists():
        return None
    try:
        source = open_checkpoint(given)
    except TersorError:
        if against is not None:
            raise
        return None  # something else is there now
    if against is not None:
        require_same_model(plan, path, source.fingerprint(), source.path)
    return source if source.fingerprint() == plan["model"]["fingerprint"] else None

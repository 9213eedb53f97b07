"""A JSON file beside the weights that says what some of the tensors stand for: `lowrank.json`, `sparse.json`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object


def damaged(path: Path, what: str) -> TersorError:
    """`path` contradicts itself or the tensors."""
    return TersorError(f"{path}: {what}", "it does not belong to these weights: write them again")


def read_entries(path: Path, schema: str, key: str, parts: Collection[str], lacking: str) -> dict:
    """The object `key` of the description at `path`; nothing where there is none, and none of the tensors `parts` needs it.

    `lacking` says what `parts` are and what is missing of them. Raises TersorError for parts without a description, and for
    another file of that name where parts need it.
    """
    if not path.is_file():
        if parts:
            raise TersorError(
                f"{path.parent}: tensor {next(iter(parts))!r} {lacking.format(file=path.name)}",
                f"give the whole folder, with the {path.name} that was written with it",
            )
        return {}
    content = read_object(path, "write the checkpoint again")
    if content.get("schema") != schema:
        if not parts:
            return {}  # a file of that name which is none of ours
        raise damaged(path, f"schema is {content.get('schema')!r}, not {schema!r}")
    entries = content.get(key)
    if not isinstance(entries, dict):
        raise damaged(path, f"{key!r} is missing or not an object")
    return entries

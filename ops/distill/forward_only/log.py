"""`log.jsonl` of a forward-only run: all that is needed, besides the checkpoint it began with, to make its result again.

The first line is `{"schema", "base", "method", "settings"}`, `base` the fingerprint of that checkpoint; each of the
others is a step: `{"step", "seed", "scalar", "lr"}`, numbered from 1 without gaps. Floats are written so that they are read
back the same."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.formats.errors import TersorError

SCHEMA = "tersor.forward-only/1"


@dataclass
class Log:
    base: str
    method: str
    settings: dict
    steps: list[dict]  # each {"step", "seed", "scalar", "lr"}


class LogWriter:
    """Appends a line per step; a line that is written is on disk."""

    def __init__(self, path: Path, base: str, method: str, settings: Mapping, keep: int = 0):
        """Starts a log, or goes on with the first `keep` steps of the one at `path` and drops the others. Raises
        TersorError when that one has fewer steps or is of another checkpoint, method or settings."""
        header = {"schema": SCHEMA, "base": base, "method": method, "settings": dict(settings)}
        self._next = keep + 1
        if keep:
            size = _kept_bytes(path, header, keep)
            self._stream = open(path, "r+", encoding="utf-8")  # noqa: SIM115 (closed by close)
            self._stream.truncate(size)
            self._stream.seek(0, os.SEEK_END)
        else:
            self._stream = open(path, "w", encoding="utf-8")  # noqa: SIM115
            self._line(header)

    def write(self, numbers: Mapping[str, Any]) -> None:
        """One step, as `Mezo.step` returns it. Raises ValueError for a number that is not finite or a step out of order."""
        if numbers["step"] != self._next:
            raise ValueError(f"step {numbers['step']} after step {self._next - 1}")
        self._line({key: numbers[key] for key in ("step", "seed", "scalar", "lr")})
        self._next += 1

    def close(self) -> None:
        self._stream.close()

    def _line(self, entry: dict) -> None:
        self._stream.write(json.dumps(entry, allow_nan=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _kept_bytes(path: Path, header: dict, keep: int) -> int:
    """Bytes of the first line and `keep` steps at `path`, all of them checked."""
    lines = _lines(path)
    log = _parse(path, lines[: keep + 1])
    if len(log.steps) < keep:
        raise TersorError(f"{path}: {len(log.steps)} steps, the run has {keep}", "start again, without --resume")
    if json.loads(lines[0]) != json.loads(json.dumps(header)):
        raise TersorError(f"{path}: written by another run", "start again, without --resume")
    return sum(len(line.encode()) for line in lines[: keep + 1])


def read_log(path: Path, base: str | None = None) -> Log:
    """The log at `path`, checked. Raises TersorError, naming the line, when it is not one, has a gap or a number that is
    not finite, or when its run began with another checkpoint than that of fingerprint `base`."""
    log = _parse(path, _lines(path))
    if base is not None and log.base != base:
        raise TersorError(
            f"{path}: written for the checkpoint {log.base}, this one is {base}",
            "replay it on the checkpoint that the run began with",
        )
    return log


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise TersorError(f"{path}: {error}", "give the log.jsonl of a forward-only run") from None


def _parse(path: Path, lines: list[str]) -> Log:
    header = _entry(path, 1, lines[0]) if lines else {}
    if header.get("schema") != SCHEMA or not {"base", "method", "settings"} <= header.keys():
        raise TersorError(f"{path}: no log of a forward-only run", f"its first line has the schema {SCHEMA}")
    steps = []
    for number, line in enumerate(lines[1:], 2):
        entry = _entry(path, number, line)
        if entry.get("step") != number - 1:
            raise TersorError(
                f"{path}: line {number} is step {entry.get('step')}, not {number - 1}",
                "the log has lost or repeated lines",
            )
        seed, floats = entry.get("seed"), [entry.get("scalar"), entry.get("lr")]
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise TersorError(f"{path}: line {number}: seed {seed} is not within 0..2^63-1", "the log is damaged")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in floats):
            raise TersorError(
                f"{path}: line {number}: scalar and lr are {floats}, not finite numbers", "the log is damaged"
            )
        steps.append({"step": entry["step"], "seed": seed, "scalar": float(floats[0]), "lr": float(floats[1])})
    return Log(header["base"], header["method"], header["settings"], steps)


def _entry(path: Path, number: int, line: str) -> dict:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        entry = None
    if not isinstance(entry, dict) or not line.endswith("\n"):
        raise TersorError(f"{path}: line {number} is cut or no JSON object", "remove it if it is the last one")
    return entry

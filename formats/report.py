"""The report beside every checkpoint: `report.json` for programs, `report.html` for people.

A report carries the history of its input, so the last one tells the whole life of a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tersor import __version__
from tersor.formats.errors import TersorError

SCHEMA = "tersor.report/1"
KEYS = (
    "schema", "command", "version", "args", "seed", "device", "input", "output", "seconds", "peak_rss_bytes",
    "tensors", "totals", "quality", "warnings", "history",
)  # fmt: skip
TENSOR_KEYS = ("name", "action", "reason", "before", "after", "error", "sparsity", "bits", "seconds")


@dataclass
class TensorEntry:
    """What happened to one tensor. `before` and `after` are {dtype, shape, bytes}; `bits` counts scales as well.

    `params` may be added where the stored numbers are not those of `shape`: a dense weight that is held as factors.
    """

    name: str
    action: str
    reason: str | None
    before: dict
    after: dict
    error: dict | None = None
    sparsity: float | None = None
    bits: float | None = None
    seconds: float | None = None


@dataclass
class Report:
    """One step in the life of a checkpoint."""

    command: str
    args: dict
    seed: int
    device: str
    input: dict
    history: list[dict] = field(default_factory=list)
    output: dict | None = None
    version: str = __version__
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    tensors: list[TensorEntry] = field(default_factory=list)
    quality: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, command: str, args: dict, seed: int, device: str, checkpoint, history: list[dict]) -> Report:
        """Begin the report of a command on `checkpoint` (a formats.checkpoint.Checkpoint)."""
        report = cls(command, args, seed, device, describe(checkpoint), history)
        report._began = time.perf_counter()
        return report

    def finish(self, checkpoint, name: str | None = None) -> None:
        """Note the output, the time since `start` and the peak memory."""
        self.output = describe(checkpoint) | ({"path": name} if name else {})
        self.seconds = round(time.perf_counter() - self._began, 3)
        self.peak_rss_bytes = peak_rss_bytes()

    @staticmethod
    def history_of(folder: Path) -> list[dict]:
        """The history a new step on `folder` starts with: the one of its report, and that report's own step."""
        if not (folder / "report.json").is_file():
            return []
        previous = Report.load(folder)
        return [*previous.history, previous.step()]

    def step(self) -> dict:
        """This report in short, as later reports carry it."""
        keys = ("command", "version", "args", "seconds", "input", "output", "quality", "warnings")
        whole = self.to_dict()
        return {key: whole[key] for key in keys} | {"totals": whole["totals"]}

    def totals(self) -> dict:
        before = sum(entry.before["bytes"] for entry in self.tensors)
        after = sum(entry.after["bytes"] for entry in self.tensors)
        params_before = sum(params_of(entry.before) for entry in self.tensors)
        params_after = sum(params_of(entry.after) for entry in self.tensors)
        measured = [
            (entry.sparsity, math.prod(entry.after["shape"])) for entry in self.tensors if entry.sparsity is not None
        ]
        weight = sum(count for _, count in measured)
        return {
            "bytes_before": before,
            "bytes_after": after,
            "params_before": params_before,
            "params_after": params_after,
            "sparsity": sum(share * count for share, count in measured) / weight if weight else None,
            "bits_per_weight": 8 * after / params_after if params_after else None,
        }

    def to_dict(self) -> dict:
        """JSON-ready; NaN and infinities, which JSON does not have, become null."""
        whole = {"schema": SCHEMA, **asdict(self), "totals": self.totals()}
        return finite({key: whole[key] for key in KEYS})

    def write(self, folder: Path) -> None:
        """`report.json` and `report.html` in `folder`."""
        from tersor.formats.report_html import render

        self.write_json(folder)
        (folder / "report.html").write_text(render(self.to_dict()), "utf-8")

    def write_json(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        (folder / "report.json").write_text(text, "utf-8", "backslashreplace")  # a path may hold what is not UTF-8

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Raises TersorError when `folder` has no report, or one that is not ours."""
        path = folder / "report.json"
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TersorError(f"{path}: no readable report ({error})", "run the command that makes it again") from error
        problems = validate(content)
        if problems:
            raise TersorError(f"{path}: {problems[0]}", "the file was changed, or is of another version; remove it")
        fields = {key: content[key] for key in KEYS if key not in ("schema", "totals", "tensors")}
        return cls(**fields, tensors=[TensorEntry(**entry) for entry in content["tensors"]])


def describe(checkpoint) -> dict:
    return {
        "path": str(checkpoint.path),
        "fingerprint": checkpoint.fingerprint(),
        "bytes": checkpoint.nbytes,
        "params": sum(info.params for info in checkpoint.tensors.values()),
    }


def params_of(side: dict) -> int:
    """Numbers stored for one side of a tensor entry."""
    return side.get("params", math.prod(side["shape"]))


def validate(content: Any) -> list[str]:
    """What is wrong with a report, nothing when it is sound."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return [f"is not a {SCHEMA}"]
    problems = [f"key {key!r} is missing" for key in KEYS if key not in content]
    problems += [f"key {key!r} is not known" for key in content if key not in KEYS]
    if problems:
        return problems
    kinds = {
        "command": str, "version": str, "args": dict, "input": dict, "tensors": list, "totals": dict, "quality": dict,
        "warnings": list, "history": list,
    }  # fmt: skip
    problems += [
        f"{key!r} is not a {kind.__name__}" for key, kind in kinds.items() if not isinstance(content[key], kind)
    ]
    if problems:
        return problems
    for entry in content["tensors"]:
        if not isinstance(entry, dict) or set(entry) != set(TENSOR_KEYS):
            return [f"tensor entry {str(entry)[:80]} does not have the keys {' '.join(TENSOR_KEYS)}"]
        for side in ("before", "after"):
            if not isinstance(entry[side], dict) or set(entry[side]) - {"params"} != {"dtype", "shape", "bytes"}:
                return [f"tensor {entry['name']!r}: {side!r} is not dtype, shape, bytes"]
    return []


def finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def peak_rss_bytes() -> int:
    """The most memory this process ever had. getrusage would count what its parent had before the program began, too."""
    try:
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory of this process now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss_bytes()

"""What nccl-tests measured: its JSON (`-J FILE`), and the text that it prints.

Format: github.com/NVIDIA/nccl-tests, src/util.cu (JSON of version 3 and before; text of every version that lists its
devices). Sizes are of the whole buffer: gathered by all_gather, before reduce_scatter, held by one rank of all-to-all.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from tersor.formats.errors import TersorError

# Their programs by our name of the collective; others they have do not occur in training or serving.
PROGRAMS = {
    "all_gather_perf": "all_gather",
    "reduce_scatter_perf": "reduce_scatter",
    "all_reduce_perf": "all_reduce",
    "alltoall_perf": "all_to_all",
    "broadcast_perf": "broadcast",
    "sendrecv_perf": "send",
}
WAY_OUT = f"run one of {', '.join(PROGRAMS)} with -J FILE, or keep what it prints"
PROGRAM = re.compile(r"\b([a-z_]+_perf)\b")
RANK = re.compile(r"\s*#?\s*Rank\s+(\d+)(?:\s+Group\s+(\d+))?\s+Pid\s+\d+\s+on\s+(\S+)\s+device\b")
HEADER = re.compile(r"\s*#?\s*size\s+count\s+type\b")


@dataclass(frozen=True)
class Run:
    """One collective between `ranks` on `nodes`: (bytes, seconds) by rising size."""

    collective: str
    ranks: int
    nodes: int
    points: tuple[tuple[int, float], ...]


def read(path: Path | str) -> tuple[Run, ...]:
    """The runs in a file, JSON (one run, or a list of them) or text (any number), or in all files of a folder.

    Raises TersorError for a file without a run, wrong results among the measurements, and ranks spread unevenly.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise TersorError(f"{path}: an empty folder", WAY_OUT)
        return tuple(run for file in files for run in read(file))
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise TersorError(f"{path}: {error.strerror}", WAY_OUT) from error
    runs = _of_json(path, text) if text.lstrip()[:1] in ("{", "[") else _of_text(path, text)
    if not runs:
        raise TersorError(f"{path}: holds no measurement of nccl-tests", WAY_OUT)
    return tuple(runs)


def _of_json(path: Path, text: str) -> list[Run]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TersorError(
            f"{path}: not readable as JSON ({error})", "a run that was cut off leaves half a file"
        ) from error
    found = []
    for run in content if isinstance(content, list) else [content]:
        try:
            found.append(_of_object(path, run))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise TersorError(f"{path}: not a result of nccl-tests ({error!r})", WAY_OUT) from error
    return found


def _of_object(path: Path, run: dict) -> Run:
    collective = _collective(path, [str(run["args"][0]), path.name])
    devices = run["config"]["devices"]
    # One entry a process, whatever number of devices it drives.
    each = int(run["config"].get("nthreads", 1)) * int(run["config"].get("ngpus", 1))
    hosts = [str(device["hostname"]) for device in devices if device.get("group", 0) == devices[0].get("group", 0)]
    rows = []
    for result in run["results"]:
        body = result.get("out_of_place") or result.get("in_place")
        if body:
            rows.append((int(result["size"]), float(body.get("time", body.get("cpu_time"))), body.get("nwrong")))
    return _run(path, collective, [host for host in hosts for _ in range(each)], rows)


def _of_text(path: Path, text: str) -> list[Run]:
    found: list[Run] = []
    named: list[str] = []  # programs, since the last run
    hosts: list[tuple[str, str]] = []  # (group, host) of each rank
    columns: list[str] = []
    rows: list[tuple[int, float, object]] = []

    def finish() -> None:
        if rows:
            group = hosts[0][0] if hosts else ""
            collective = _collective(path, [*named, path.name])
            found.append(_run(path, collective, [host for each, host in hosts if each == group], list(rows)))
        named.clear(), hosts.clear(), columns.clear(), rows.clear()

    for line in text.splitlines():
        if (rank := RANK.match(line)) is not None:
            if rows:  # the ranks of the next run
                finish()
            hosts.append((rank[2] or "", rank[3]))
        elif HEADER.match(line):
            columns[:] = line.replace("#wrong", "wrong").replace("#", " ").split()
        elif columns and (row := _row(columns, line.split())) is not None:
            rows.append(row)
        elif (program := PROGRAM.search(line)) is not None:
            if rows and "concluded" not in line:
                finish()
            named.append(program[1])
    finish()
    return found


def _row(columns: list[str], words: list[str]) -> tuple[int, float, object] | None:
    """(bytes, microseconds, wrong results) of the first, out-of-place half."""
    label = "time" if "time" in columns else "cputime"
    if label not in columns or len(words) <= columns.index(label) or not words[0].isdigit():
        return None
    try:
        time = float(words[columns.index(label)])
    except ValueError:
        return None
    wrong = words[columns.index("wrong")] if "wrong" in columns and len(words) > columns.index("wrong") else None
    return int(words[0]), time, wrong


def _collective(path: Path, named: list[str]) -> str:
    programs = [program for text in named for program in PROGRAM.findall(text)]
    for program in reversed(programs):
        if program in PROGRAMS:
            return PROGRAMS[program]
    if programs:
        raise TersorError(f"{path}: {programs[-1]} measures nothing that a plan needs", WAY_OUT)
    for program, collective in PROGRAMS.items():
        if any(program.removesuffix("_perf") in text for text in named):
            return collective
    raise TersorError(
        f"{path}: does not say which collective it measured", f"name the file after it: {', '.join(PROGRAMS)}"
    )


def _run(path: Path, collective: str, hosts: list[str], rows: list[tuple[int, float, object]]) -> Run:
    nodes = len(set(hosts))
    if len(hosts) < 2:
        raise TersorError(f"{path}: {collective} among {len(hosts)} ranks", "measure between two devices or more")
    if len(hosts) % nodes or any(hosts.count(host) * nodes != len(hosts) for host in set(hosts)):
        raise TersorError(
            f"{path}: {collective} ran on {len(hosts)} ranks, unevenly on {nodes} nodes", "start as many on each node"
        )
    points = []
    for nbytes, time, wrong in rows:
        count = float(wrong) if wrong not in (None, "N/A") else 0.0
        if count > 0:
            raise TersorError(
                f"{path}: {collective} of {nbytes} bytes gave {count:g} wrong results",
                "links that alter data are to be repaired before they are measured",
            )
        if nbytes > 0 and math.isfinite(time) and time > 0:
            points.append((nbytes, 1e-6 * time))
    if not points:
        raise TersorError(f"{path}: {collective} has no time for any size", WAY_OUT)
    return Run(collective, len(hosts), nodes, tuple(sorted(points)))

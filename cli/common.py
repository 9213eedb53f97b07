"""What every subcommand does alike: input from a pipe, progress, errors, the one line on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from tersor.formats.errors import TersorError
from tersor.formats.units import size

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, .safetensors file, Hub id (org/name), or - for a path on stdin.")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write. Must be new or empty.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if there is one.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report on stdout instead of the path.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:0.")]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Cap such as 8GiB; waiting activations go to disk past it."),
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Only tensors whose name matches. Repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Leave tensors whose name matches. Repeatable.")
]
Policy = Annotated[Path | None, typer.Option(metavar="FILE", help="Per-tensor settings, JSON (tersor.policy/1).")]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="SRC", help="Calibration text: .txt .jsonl .parquet, Hub dataset, self. Default: shipped prose."
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Statistics of the dense model, from profile --collect, instead of calibrating."),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(min=8, help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Which windows are drawn, and random choices.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would happen to each tensor, and write nothing.")]
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
SECONDS_BETWEEN_LINES = 10.0


def parse_size(text: str | None) -> int | None:
    """Bytes of `8GiB`, `512MB`, `1e9` style sizes."""
    if text is None:
        return None
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise TersorError(f"--max-memory {text!r} is not a size", "write it like 8GiB or 500MB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def require_output(output: Path | None, otherwise: str = "") -> None:
    """Wrong usage where none is given; `otherwise` says how to do without."""
    if output is None:
        raise typer.BadParameter(f"an output folder is needed{otherwise}", param_hint="'-o' / '--output'")


def resolve_input(model: str) -> str:
    """`-` is the last non-empty line of stdin."""
    if model != "-":
        return model
    if sys.stdin.isatty():
        raise TersorError(
            "- reads the path from stdin, which is a terminal", "pipe another tersor command into this one"
        )
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise TersorError("- reads the path from stdin, which is empty", "the command before this one failed")
    return lines[-1]


@contextmanager
def reported_errors(debug: bool, resumable: bool = True) -> Iterator[None]:
    """One line of error, one of hint, exit 1; 130 when interrupted."""
    try:
        yield
    except TersorError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        if error.hint:
            sys.stderr.write(f"hint: {one_line(error.hint)}\n")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        way_on = "; continue with the same command and --resume" if resumable else ""
        sys.stderr.write(f"interrupted{way_on}\n")
        raise typer.Exit(130) from error
    except MemoryError as error:
        if debug:
            raise
        sys.stderr.write("error: out of memory\nhint: lower --samples or --seq-len, or set --max-memory\n")
        raise typer.Exit(1) from error


def one_line(text: str) -> str:
    return " ".join(text.split())


class Progress:
    """Progress on stderr: a live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool):
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self._stage, self._began, self._printed, self._bar, self._task = "", time.monotonic(), 0.0, None, None

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._printed = stage, now, 0.0
            if self.live:
                self._start_bar(total)
        if self.live:
            memory = _resident_gib()
            self._bar.update(self._task, completed=done, total=total, memory=f"{memory:.2f} GiB", note=note)
        elif now - self._printed > SECONDS_BETWEEN_LINES or (done == total and self._printed):
            self._printed = now
            left = (now - self._began) / done * (total - done) if done else 0.0
            eta = f", {left:.0f} s left" if done and done < total else ""
            said = f", {note}" if note else ""
            sys.stderr.write(f"{stage} {done}/{total}{eta}{said}, {_resident_gib():.2f} GiB\n")

    def _start_bar(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.close()
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"), TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(self._stage, total=total, memory="", note="")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    bar = Progress(quiet)
    try:
        yield bar
    finally:
        bar.close()


def _resident_gib() -> float:
    from tersor.formats.report import resident_bytes

    return resident_bytes() / 2**30


def show(rows: list[tuple[str, str]], warnings: list[str], quiet: bool) -> None:
    """The summary table at the end, on stderr."""
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False)


def emit(path: Path | str, report: dict | None) -> None:
    """The only thing on stdout."""
    sys.stdout.write((json.dumps(report, indent=2) if report is not None else str(path)) + "\n")
    sys.stdout.flush()


def show_forecast(found: dict, json: bool) -> None:
    """The dry run's answer: on stdout, since nothing else is produced."""
    if json:
        emit("", found)
        return
    for row in found["tensors"]:
        typer.echo(
            f"{row['action']:9s} {row['name']}  {row['shape']}  {row['before_bytes']} → {row['after_bytes']}  {row['reason']}"
        )
    typer.echo(f"output {size(found['output_bytes'])} (input {size(found['input_bytes'])})")
    typer.echo(f"peak memory about {size(found['peak_memory_bytes'])}, disk needed {size(found['disk_bytes'])}")
    for warning in found["warnings"]:
        typer.echo(f"warning: {warning}")

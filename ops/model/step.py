"""What every command that writes a checkpoint does alike, before the work and after it."""

from __future__ import annotations

from pathlib import Path

from tersor import __version__
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.report import Report
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.writer import CheckpointWriter

REORDERED = "channels reordered"  # in the reason of a tensor whose rows or columns have changed places
NOT_IN_THE_BYTES = {"output", "force", "resume", "max_memory_bytes", "model", "student"}


def settings(request) -> dict:
    """The settings of a request that decide the output bytes; another value of one of them is another run."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(request).items()
        if name not in NOT_IN_THE_BYTES
    }


def begin(command: str, checkpoint: Checkpoint, arguments: dict, device: str) -> tuple[dict, Report]:
    """What identifies the run for --resume, and its report, begun."""
    key = {"version": __version__, "input": checkpoint.fingerprint(), "device": device, **arguments}
    history = Report.history_of(checkpoint.path)
    return key, Report.start(command, arguments, arguments.get("seed", 0), device, checkpoint, history)


def publish(writer: CheckpointWriter, source: Checkpoint, report: Report) -> None:
    """All tensors are written: add what travels with them, re-open and prove it, write the report, give it its name."""
    from tersor.ops.model.soundness import check_folder

    writer.copy_side_files(source)
    problems = check_folder(writer.partial, expected=writer.layout, sample=True)
    if problems:
        raise TersorError(f"{writer.out}: the output is not sound: {problems[0]}", "please report this as a bug")
    report.finish(open_checkpoint(writer.partial), name=str(writer.out))
    report.write(writer.partial)
    writer.commit()

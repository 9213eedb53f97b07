"""`prune --rounds N`: N passes, each on the output of the one before, removing more and more.

The cubic schedule is that of Zhu and Gupta, "To prune, or not to prune" (arXiv:1710.01878).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.output import check_output
from tersor.formats.report import Report
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import Progress, plan
from tersor.ops.prune.run import prune as prune_once


def schedule(sparsity: float, rounds: int) -> list[float]:
    """Sparsity after each round: s (1 - (1 - t/N)^3)."""
    return [sparsity * (1 - (1 - step / rounds) ** 3) for step in range(1, rounds)] + [sparsity]


def prune(request: Request, progress: Progress = lambda stage, done, total: None) -> Report:
    """Like `run.prune`. What the rounds before the last write is removed when it has been read."""
    if request.rounds == 1:
        return prune_once(request, progress)
    if request.remove != "weights":
        raise TersorError(f"--remove {request.remove} is done at once", "leave --rounds out, or use --remove weights")
    if request.policy is not None:
        raise TersorError("--rounds and --policy do not go together", "leave one of them out")
    checkpoint, _ = plan(request)
    check_output(request.output, checkpoint.path, request.force, request.resume)
    source, report = request.model, None
    for number, sparsity in enumerate(schedule(request.sparsity, request.rounds), 1):
        last = number == request.rounds
        output = request.output if last else _round_folder(request.output, number)
        if not last and request.resume and output.is_dir():
            _remove(source, request.model)
            source = str(output)
            continue
        if not last and output.is_dir() and not request.force:
            raise TersorError(
                f"{output}: left by a run that did not finish", "continue it with --resume, or start over with --force"
            )
        step = replace(request, model=source, output=output, sparsity=sparsity)
        step.resume = request.resume and output.with_name(output.name + ".partial").exists()
        report = prune_once(step, lambda stage, done, total, n=number: progress(f"round {n}: {stage}", done, total))
        _remove(source, request.model)
        source = str(output)
    return report


def _round_folder(output: Path, number: int) -> Path:
    return output.with_name(f"{output.name}.round{number}")


def _remove(folder: str, original: str) -> None:
    if folder != original:
        shutil.rmtree(folder)

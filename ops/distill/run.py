"""`distill`: put together, train, write the checkpoint, prove it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tersor.formats import elastic
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.output import check_output
from tersor.formats.report import Report
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.writer import CheckpointWriter, writing
from tersor.ops.distill.forward_only.log import read_log
from tersor.ops.distill.forward_only.replay import replay
from tersor.ops.distill.loop import History
from tersor.ops.distill.loop import run as run_steps
from tersor.ops.distill.nested import nest, unnest
from tersor.ops.distill.optimizers.memory import memory_report
from tersor.ops.distill.ranks import Ranks, join, leave
from tersor.ops.distill.request import Request
from tersor.ops.distill.saved import Saved
from tersor.ops.distill.session import Session
from tersor.ops.distill.students.build import build
from tersor.ops.distill.write import Output
from tersor.ops.model.device import pick_device
from tersor.ops.model.step import begin, publish, settings

Progress = Callable[..., None]
LINES_FILE = "training.jsonl"
LOG_FILE = "log.jsonl"
CURVE_POINTS = 200
FREE_TO_CHANGE = {"lr", "clip_norm", "save_every", "log_dir"}  # by --resume: they are of the steps still to come


def distill(request: Request, progress: Progress = lambda *_: None) -> Report | None:
    """Train and write `request.output`. Raises TersorError, and leaves no output, only what --resume goes on from.

    Returns the report in the first process, None in others.
    """
    device = pick_device(request.device)
    ranks = join(device)
    try:
        if request.replay is not None:
            return _replay(request, device, progress)
        return _distill(request, device, ranks, progress)
    finally:
        leave(ranks)


def _distill(request: Request, device: torch.device, ranks: Ranks, progress: Progress) -> Report | None:
    source = locate(request.teacher if request.config is not None else request.student)
    checkpoint = open_checkpoint(source)
    # A run that was interrupted has no output folder yet: --resume is about the training state.
    check_output(request.output, checkpoint.path, request.force, False)
    if request.cache_teacher is not None:
        request = _with_cache(request, device, ranks, progress)
    session = Session(request, device, ranks)
    key, report = begin("distill", checkpoint, settings(request), str(device))
    identity = {name: value for name, value in key.items() if name not in FREE_TO_CHANGE} | {
        "data": session.data.facts()
    }
    if session.teacher is not None:
        identity["teacher_fingerprint"] = session.teacher.fingerprint
    saved = Saved(request.output, identity, ranks, request.resume, request.force)
    saved.folder.mkdir(parents=True, exist_ok=True)
    report.warnings += session.warnings
    log = saved.folder / LOG_FILE if session.is_forward_only else None
    try:
        with _board(request, ranks) as board:
            history = run_steps(session, saved, log, progress, board)
    except BaseException:
        saved.forget_nothing()
        raise
    report.quality["training"] = _numbers(session, history)
    if session.elastic is not None:
        report.quality["elastic"] = session.elastic.report()
    if session.ranks.count == 1:
        report.quality["memory"] = _memory(session)
    output = Output(session.student)
    if not ranks.is_first:
        for _ in session.student.export():  # gathering takes all processes
            pass
        saved.forget()
        return None
    with writing(CheckpointWriter(request.output, output.layout, key)) as writer:
        output.write(writer)
        _files(writer, history, log)
        if session.elastic is not None:
            (writer.partial / elastic.FILE).write_text(json.dumps(session.elastic.document()) + "\n", "utf-8")
        report.tensors = output.entries(session.student.view)
        progress("verify", 0, 1)
        publish(writer, checkpoint, report)
    saved.forget()
    return report


def _with_cache(request: Request, device: torch.device, ranks: Ranks, progress: Progress) -> Request:
    """Write the teacher's logits for the windows of this run, and go on with the file as the teacher."""
    from tersor.ops.distill.teachers.cached import write_cache

    if ranks.count > 1:
        raise TersorError(
            "--cache-teacher is for one process", "write the cache first, then start torchrun with --teacher FILE"
        )
    if request.teacher is None:
        raise TersorError("--cache-teacher without --teacher", "add the teacher's checkpoint")
    session = Session(request, device, ranks)
    if not session.objective.compared.logits:
        raise TersorError(f"--loss {request.loss} looks at no logits of the teacher", "leave --cache-teacher out")
    common = session.objective.logits.common
    write_cache(
        session.teacher, session.data, request.cache_teacher, request.top_k, request.temperature, common, request.force,
        progress,
    )  # fmt: skip
    return replace(request, teacher=str(request.cache_teacher), teacher_mode="auto", cache_teacher=None)


def _numbers(session: Session, history: History) -> dict:
    """What the report says of the training: a curve of at most CURVE_POINTS points, and where it went."""
    lines = history.lines
    every = max(1, -(-len(lines) // CURVE_POINTS))
    tokens = session.tokens_per_step * len(lines)
    return {
        "steps": len(lines),
        "tokens": tokens,
        "epochs": session.data.epochs,
        "first_loss": lines[0]["loss"] if lines else None,
        "last_loss": lines[-1]["loss"] if lines else None,
        "tokens_per_second": tokens / history.seconds if history.seconds else None,
        "training_seconds": history.seconds,
        "processes": session.ranks.count,
        "trained_weights": sum(parameter.numel() for parameter in session.parameters.values()),
        "nested_layers": session.nested,
        **session.facts,
        "curve": [{key: line[key] for key in ("step", "loss", "lr")} for line in lines[::every]],
    }


def _memory(session: Session) -> dict:
    """Measured bytes of a micro-batch, and those of plain AdamW."""
    ids = session.data.ids(0)[: session.request.micro_batch or session.request.batch]

    def loss() -> torch.Tensor:
        return session.loss(0, ids)[0] / session.tokens_per_step

    def eager() -> torch.Tensor:
        unnest(session.model)
        try:
            return loss()
        finally:
            if session.nested:
                nest(session.model)

    parameters = session.parameters.values()
    plain = None if session.is_forward_only else eager
    return memory_report(session.model, parameters, session.optimizer, loss, plain)


def _files(writer: CheckpointWriter, history: History, log: Path | None) -> None:
    """Every step, and the log that replays a forward-only run."""
    text = "".join(json.dumps(line) + "\n" for line in history.lines)
    (writer.partial / LINES_FILE).write_text(text, "utf-8")
    if log is not None:
        (writer.partial / LOG_FILE).write_bytes(log.read_bytes())


def _replay(request: Request, device: torch.device, progress: Progress) -> Report:
    """The checkpoint that a forward-only run gave, from its log."""
    checkpoint = open_checkpoint(locate(request.student))
    check_output(request.output, checkpoint.path, request.force, False)
    from tersor.formats.dense import DenseView

    log = read_log(request.replay, checkpoint.fingerprint())
    student = build(DenseView(checkpoint), request, device)
    parameters = {f"student.{name}": value for name, value in student.trainable().items()}
    key, report = begin("distill", checkpoint, settings(request), str(device))
    with torch.no_grad():
        steps = replay(parameters, log)
    student.after_step()
    output = Output(student)
    with writing(CheckpointWriter(request.output, output.layout, key)) as writer:
        output.write(writer)
        report.tensors = output.entries(student.view)
        report.quality["training"] = {"steps": steps, "replayed": str(request.replay)}
        progress("verify", 0, 1)
        publish(writer, checkpoint, report)
    return report


@contextlib.contextmanager
def _board(request: Request, ranks: Ranks) -> Iterator[Callable[[dict], None]]:
    """Scalars of each step for TensorBoard. Raises TersorError where --log-dir is asked for and it is not installed."""
    if request.log_dir is None or not ranks.is_first:
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TersorError("--log-dir needs tensorboard, which is not installed", "pip install tensorboard") from error
    writer = SummaryWriter(str(request.log_dir))

    def put(line: dict) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, line["step"])

    try:
        yield put
    finally:
        writer.close()

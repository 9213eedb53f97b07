"""`prune`: plan, measure what the choice needs, write the new checkpoint, prove it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import prod
from types import ModuleType

from tersor import __version__
from tersor.formats import encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.report import Report, TensorEntry
from tersor.formats.writer import CheckpointWriter, check_output, partial_path, writing
from tersor.ops.model.patterns import parse_pattern
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.request import ALLOCATIONS, TARGETS, Request

Progress = Callable[[str, int, int], None]


def plan(request: Request) -> tuple[Checkpoint, Plan, ModuleType]:
    """What would happen, before any text is read. Raises TersorError for anything that can be seen to fail."""
    if request.remove not in TARGETS:
        raise TersorError(f"--remove {request.remove!r} is not known", f"one of {' '.join(TARGETS)}")
    package, methods = TARGETS[request.remove]
    request.method = request.method or methods[0]
    if request.method not in methods:
        raise TersorError(f"--remove {request.remove} has no method {request.method!r}", f"one of {' '.join(methods)}")
    pattern = parse_pattern(request.pattern)
    if pattern.kind != "unstructured" and request.remove != "weights":
        raise TersorError(f"--remove {request.remove} has no --pattern", "leave --pattern out, or use --remove weights")
    if request.sparsity is None:
        request.sparsity = 0.5 if pattern.sparsity is None else pattern.sparsity
    if pattern.sparsity is not None and abs(request.sparsity - pattern.sparsity) > 1e-6:
        raise TersorError(
            f"--pattern {request.pattern} makes {pattern.sparsity:.1%} zeros, --sparsity asks for {request.sparsity:.1%}",
            "leave --sparsity out",
        )
    if not 0 <= request.sparsity < 1:
        raise TersorError(f"--sparsity {request.sparsity} is not in [0, 1)", "0.5 removes half")
    if request.allocate not in ALLOCATIONS:
        raise TersorError(f"--allocate {request.allocate!r} is not known", f"one of {' '.join(ALLOCATIONS)}")
    checkpoint = Checkpoint(locate(request.model))
    if encodings.detect(checkpoint.config, checkpoint.tensors) is not None:
        raise TersorError(
            f"{checkpoint.path}: is quantized, and codes cannot be pruned",
            "make it dense first: tersor convert MODEL --to dense -o DENSE",
        )
    low_rank.refuse(checkpoint, "their weights cannot be pruned")
    target = importlib.import_module(f"tersor.ops.prune.{package}.plan")
    return checkpoint, target.plan(checkpoint, request), target


def prune(request: Request, progress: Progress = lambda stage, done, total: None) -> Report:
    """Write a pruned checkpoint to `request.output`. Raises TersorError and leaves no output on failure."""
    checkpoint, steps, target = plan(request)
    check_output(request.output, checkpoint.path, request.force, request.resume)
    from tersor.ops.model.device import pick_device
    from tersor.ops.prune.job import Job

    device = pick_device(request.device)
    key = {"version": __version__, "input": checkpoint.fingerprint(), "device": str(device), **request.arguments()}
    report = Report.start(
        "prune", request.arguments(), request.seed, str(device), checkpoint, Report.history_of(checkpoint.path)
    )
    job = Job(checkpoint, request, device, progress)
    run = importlib.import_module(target.__name__.removesuffix(".plan") + ".run")
    steps = run.decide(job, steps)
    with writing(CheckpointWriter(request.output, steps.layout, key, request.resume)) as writer:
        report.quality |= run.execute(job, steps, writer)
        report.warnings += steps.warnings
        report.tensors = tensor_entries(checkpoint, steps, writer.journal.done)
        if checkpoint.config is not None:
            writer.add_json("config.json", {**checkpoint.config, **steps.config})
        writer.copy_side_files(checkpoint)
        progress("verify", 0, 1)
        _prove(partial_path(request.output), steps)
        report.finish(Checkpoint(partial_path(request.output)), name=str(request.output))
        report.write(writer.partial)
        writer.commit()
    return report


def tensor_entries(checkpoint: Checkpoint, steps: Plan, done: dict[str, object]) -> list[TensorEntry]:
    """A report line for every tensor of the input, under the name it has now; dropped ones under the one they had."""
    numbers: dict[str, dict] = {}
    for data in done.values():
        numbers |= data or {}
    entries = []
    for name, action in steps.actions.items():
        info = checkpoint.tensors[name]
        before = {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        measured = numbers.get(name, {})
        now, (dtype, shape) = next(iter(action.outputs.items()), (name, (info.dtype, (0,))))
        after = {"dtype": dtype, "shape": list(shape), "bytes": action.nbytes}
        if action.stands_for is not None:
            now, shape = name, action.stands_for
            params = sum(prod(extents) for _, extents in action.outputs.values())
            after |= {"shape": list(shape), "params": params}
        entries.append(
            TensorEntry(
                now, action.action, measured.get("reason", action.reason), before, after, measured.get("error"),
                measured.get("sparsity"), 8 * action.nbytes / max(prod(shape), 1), measured.get("seconds"),
            )
        )  # fmt: skip
    return entries


def _prove(folder, steps: Plan) -> None:
    """Re-open what was written: it must hold exactly the planned tensors."""
    from tersor.ops.model.soundness import check_folder

    problems = check_folder(folder, expected=steps.layout, sample=True)
    if problems:
        raise TersorError(f"{folder}: the output is not sound: {problems[0]}", "please report this as a bug")

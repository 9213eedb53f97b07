"""`prune`: plan, measure what the choice needs, write the new checkpoint, prove it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import prod

from tersor.formats import activation_thresholds, encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.output import check_output
from tersor.formats.report import Report, TensorEntry
from tersor.formats.sparse import view as sparse
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.statistics import Statistics
from tersor.formats.writer import CheckpointWriter, writing
from tersor.ops.model.patterns import parse_pattern
from tersor.ops.model.step import begin, publish, settings
from tersor.ops.prune.extract import plan as extract
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.request import ALLOCATIONS, TARGETS, Request

KEEP_INPUTS = ("weights", "ranks", "vocab")  # targets that leave names and inputs of the layers as they are
Progress = Callable[[str, int, int], None]


def plan(request: Request) -> tuple[Checkpoint, Plan]:
    """What would happen, before any text is read. Raises TersorError for anything that can be seen to fail."""
    if request.extract is not None:
        extract.check(request)
    elif request.remove not in TARGETS:
        raise TersorError(f"--remove {request.remove!r} is not known", f"one of {' '.join(TARGETS)}")
    else:
        _check_target(request)
    if request.stats is not None:
        _check_stats(request)
    checkpoint = open_checkpoint(locate(request.model))
    sparse.refuse(checkpoint, "and what is pruned would have to be packed again")
    if encodings.detect(checkpoint.config, checkpoint.tensors) is not None:
        raise TersorError(
            f"{checkpoint.path}: is quantized, and codes cannot be pruned",
            "make it dense first: tersor convert MODEL --to dense -o DENSE",
        )
    low_rank.refuse(checkpoint, "their weights cannot be pruned")
    if request.remove not in KEEP_INPUTS:
        activation_thresholds.refuse(checkpoint, f"--remove {request.remove} changes which inputs its layers have")
    return checkpoint, _module(request, "plan").plan(checkpoint, request)


def _check_target(request: Request) -> None:
    """Raises TersorError for a --remove and options that do not go together; fills in the defaults."""
    methods = TARGETS[request.remove][1]
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


def _module(request: Request, name: str):
    """`plan` or `run` of what the request is about."""
    package = extract.TARGET if request.extract is not None else TARGETS[request.remove][0]
    return importlib.import_module(f"tersor.ops.prune.{package}.{name}")


WITH_STATS = ("sparsegpt", "wanda", "ria")


def _check_stats(request: Request) -> None:
    """Raises TersorError where statistics of the dense layers are of no use, or not enough."""
    leave = "leave --stats out"
    if request.remove != "weights" or request.method not in WITH_STATS:
        raise TersorError(
            f"--remove {request.remove} --method {request.method} takes no --stats",
            f"{leave}, or use --remove weights with one of {' '.join(WITH_STATS)}",
        )
    if request.allocate in ("owl", "rd"):
        raise TersorError(
            f"--allocate {request.allocate} runs the blocks, --stats does not apply", f"{leave}, or use erk"
        )
    if request.rounds > 1:
        raise TersorError("--rounds changes the model after each round, and --stats is of one model", leave)
    if request.calib is not None:
        raise TersorError("--stats and --calib do not go together", "leave one of them out")


def prune(request: Request, progress: Progress = lambda stage, done, total: None) -> Report:
    """Write a pruned checkpoint to `request.output`. Raises TersorError and leaves no output on failure."""
    checkpoint, steps = plan(request)
    check_output(request.output, checkpoint.path, request.force, request.resume)
    from tersor.ops.model.device import pick_device
    from tersor.ops.prune.job import Job

    device = pick_device(request.device)
    key, report = begin("prune", checkpoint, settings(request), str(device))
    job = Job(checkpoint, request, device, progress)
    if request.stats is not None:
        key["stats"] = Statistics(request.stats).digest()
    run = _module(request, "run")
    steps = run.decide(job, steps)
    with writing(CheckpointWriter(request.output, steps.layout, key, request.resume)) as writer:
        report.quality |= run.execute(job, steps, writer)
        report.warnings += steps.warnings
        report.tensors = tensor_entries(checkpoint, steps, writer.journal.done)
        if checkpoint.config is not None:
            writer.add_json("config.json", {**checkpoint.config, **steps.config})
        progress("verify", 0, 1)
        publish(writer, checkpoint, report)
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

"""`quantize`: plan, then stream (data-free) or go block by block (calibrated), then prove the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats import activation_thresholds
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.output import check_output
from tersor.formats.report import Report, TensorEntry
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.writer import CheckpointWriter, writing
from tersor.ops.model.schemes import scheme_from_name
from tersor.ops.model.selection import load_policy
from tersor.ops.model.step import begin, publish, settings
from tersor.ops.quantize.plan import Plan, Step, build_plan

METHODS = ("rtn", "gptq", "awq")
Progress = Callable[[str, int, int], None]


@dataclass
class Request:
    """Everything that decides the output of one quantize run."""

    model: str
    output: Path
    scheme: str = "w4a16"
    method: str = "rtn"
    group_size: int | None = None
    symmetric: bool = True
    format: str = "auto"
    clip: bool = True
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    policy: Path | None = None
    strict: bool = False
    stats: Path | None = None  # statistics of `profile --collect`, in place of a calibration run
    calib: str | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    damping: float = 0.01
    activation_order: bool = True
    keep_zeros: bool = True
    device: str = "auto"
    max_memory_bytes: int | None = None
    force: bool = False
    resume: bool = False


def plan(request: Request) -> tuple[Checkpoint, Plan]:
    """Header-only part: what would happen. Raises TersorError for anything that would fail later and can be seen now."""
    if request.method not in METHODS:
        raise TersorError(f"unknown method {request.method!r}", f"one of {' '.join(METHODS)}")
    if request.stats is not None and request.method != "gptq":
        why = "uses no statistics" if request.method == "rtn" else "runs each block to find its scales"
        raise TersorError(
            f"--method {request.method} {why}, --stats does not apply", "use --method gptq, or leave --stats out"
        )
    if request.stats is not None and request.calib is not None:
        raise TersorError("--stats and --calib do not go together", "leave one of them out")
    if request.format not in ("auto", "compressed-tensors", "gptq"):
        raise TersorError(f"unknown format {request.format!r}", "one of auto compressed-tensors gptq")
    scheme = scheme_from_name(request.scheme, request.group_size, request.symmetric)
    checkpoint = open_checkpoint(locate(request.model))
    result = build_plan(
        checkpoint,
        scheme,
        request.format,
        request.include,
        request.exclude,
        load_policy(request.policy),
        request.strict,
    )
    if request.method == "awq":
        activation_thresholds.refuse(checkpoint, "--method awq scales the inputs of its layers")
    if request.method != "rtn" and request.stats is None:
        checkpoint.require_config(f"which --method {request.method} needs to run the model")
    return checkpoint, result


def quantize(request: Request, progress: Progress = lambda stage, done, total: None) -> Report:
    """Write a quantized checkpoint to `request.output`. Raises TersorError and leaves no output on failure."""
    checkpoint, steps = plan(request)
    check_output(request.output, checkpoint.path, request.force, request.resume)
    from tersor.ops.model.device import pick_device

    device = pick_device(request.device)
    key, report = begin("quantize", checkpoint, settings(request), str(device))
    report.warnings += steps.warnings
    prepared = _prepare(request, checkpoint, steps, device)
    if request.stats is not None:
        key["stats"] = prepared.file.digest()
    with writing(CheckpointWriter(request.output, steps.layout, key, request.resume)) as writer:
        if request.method == "rtn":
            from tersor.ops.quantize.data_free import quantize_streaming

            quantize_streaming(checkpoint, steps, writer, request.clip, device, progress)
        elif request.stats is not None:
            from tersor.ops.quantize.from_statistics import quantize_collected

            report.warnings += quantize_collected(checkpoint, steps, writer, request, prepared, device, progress)
        else:
            from tersor.ops.quantize.calibrated import quantize_blocks

            report.warnings += quantize_blocks(checkpoint, steps, writer, request, prepared, device, progress)
        report.tensors = tensor_entries(checkpoint, steps, writer.journal.done)
        _write_config(checkpoint, steps, writer)
        progress("verify", 0, 1)
        publish(writer, checkpoint, report)
    return report


def _prepare(request: Request, checkpoint: Checkpoint, steps: Plan, device):
    """Statistics, or calibration text and the model's skeleton, before anything is written: most bad input shows here."""
    if request.method == "rtn":
        return None
    if request.stats is not None:
        from tersor.ops.model.collected import Collected

        linears = [step.linear for step in steps.steps.values()]
        return Collected(request.stats, checkpoint, linears, {"hessian"}, device)
    from tersor.formats.dense import DenseView
    from tersor.ops.model.calibration import load_windows
    from tersor.ops.model.skeleton import Skeleton

    windows = load_windows(checkpoint.path, request.calib, request.samples, request.seq_len, request.seed)
    return windows, Skeleton(DenseView(checkpoint), device)


def _write_config(checkpoint: Checkpoint, steps: Plan, writer: CheckpointWriter) -> None:
    """Without a config.json the output gets one that holds the quantization alone: codes are nothing without it."""
    quantization = steps.quantization_config()
    writer.add_json("config.json", {**(checkpoint.config or {}), "quantization_config": quantization})
    if steps.format == "gptq":
        writer.add_json("quantize_config.json", quantization)


def tensor_entries(checkpoint: Checkpoint, steps: Plan, done: dict[str, object]) -> list[TensorEntry]:
    """A report line for every tensor of the input, in its order."""
    numbers: dict[str, dict] = {}
    for data in done.values():
        numbers |= data or {}
    entries = []
    for name, info in checkpoint.tensors.items():
        before = {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        measured = numbers.get(name, {})
        if name not in steps.steps:
            reason = measured.get("reason", steps.kept.get(name))
            entries.append(TensorEntry(name, "keep", reason, before, before, None, None, None, measured.get("seconds")))
            continue
        step = steps.steps[name]
        after = {"dtype": describe(step), "shape": list(info.shape), "bytes": step.nbytes}
        reason = measured.get("reason") or step.reason
        bits = 8 * step.nbytes / info.params
        entries.append(
            TensorEntry(
                name, "quantize", reason, before, after, measured.get("error"), measured.get("sparsity"), bits,
                measured.get("seconds"),
            )
        )  # fmt: skip
    return entries


def describe(step: Step) -> str:
    scheme = step.scheme
    grain = {"group": f"g{scheme.group_size}", "channel": "channel", "tensor": "tensor", "block": "128x128"}
    kind = f"INT{scheme.bits}" if scheme.kind == "int" else "F8_E4M3"
    return f"{kind} {grain[scheme.strategy]} {'symmetric' if scheme.symmetric else 'asymmetric'}"

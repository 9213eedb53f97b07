"""`profile`: what a checkpoint costs to store, to run and to train, and what compression would do to it.

Each part is a package of its own that turns a checkpoint into numbers and numbers into sections of a page; here they are
called in turn. torch is imported by the parts that run the model, and by nothing else.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware, load_hardware
from tersor.formats.locate import locate
from tersor.formats.output import check_output, output_folder
from tersor.formats.page import Section
from tersor.formats.report import Report
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.units import count, latency, number, size
from tersor.ops.profile.compare import compare, quality_of
from tersor.ops.profile.request import Request

Progress = Callable[[str, int, int], None]
SYNTHETIC = "synthetic"
POLICY_FILE = "policy.json"
METHODS = ("rtn", "gptq")


def profile(request: Request, progress: Progress = lambda stage, done, total: None) -> tuple[Report, list[Section]]:
    """The report and its page; with `request.output` both are written there. Raises TersorError, and leaves no output."""
    hardware = _hardware(request)
    checkpoints = [open_checkpoint(locate(model)) for model in request.models]
    _check(request, checkpoints)
    first = checkpoints[0]
    report = Report.start(
        "profile", _arguments(request), request.seed, request.device, first, Report.history_of(first.path)
    )
    if request.output is None:
        return report, _fill(report, request, checkpoints, hardware, None, progress)
    with output_folder(request.output) as folder:
        sections = _fill(report, request, checkpoints, hardware, folder, progress)
        _write(folder, report, sections)
    return report, sections


def _hardware(request: Request) -> Hardware:
    """What predictions are for. `host` is measured at once where measuring was asked for."""
    if request.measure and request.hardware == "host":
        from tersor.ops.model.device import pick_device
        from tersor.ops.profile.measure.host import host

        return host(pick_device(request.device))[0]
    return load_hardware(request.hardware)


def _check(request: Request, checkpoints: list[Checkpoint]) -> None:
    """What can be seen before any work."""
    single = {"--collect": request.collect, "--suggest": request.suggest, "--memory-trace": request.memory_trace}
    for option, value in single.items():
        if value and len(checkpoints) > 1:
            raise TersorError(
                f"{option} is for one model, {len(checkpoints)} were given", "call tersor profile for each of them"
            )
    if request.suggest is not None:
        from tersor.ops.profile.sensitivity.suggest import parse_target

        parse_target(request.suggest)
    if request.method not in METHODS:
        raise TersorError(f"--method {request.method!r} is not known here", f"one of {' '.join(METHODS)}")
    if request.output is not None:
        for checkpoint in checkpoints:
            check_output(request.output, checkpoint.path, request.force, resume=request.force)


def _fill(
    report: Report,
    request: Request,
    checkpoints: list[Checkpoint],
    hardware: Hardware,
    folder: Path | None,
    progress: Progress,
) -> list[Section]:
    """Put the numbers of every part into `report.quality`, files into `folder`. Returns the page."""
    models, sections = [], []
    for checkpoint, name in zip(checkpoints, _short_names(checkpoints), strict=True):
        found, pages = _profile_one(checkpoint, request, hardware, folder, progress)
        quality = quality_of(checkpoint.path)
        models.append(
            {"name": name, "path": str(checkpoint.path), "bytes": checkpoint.nbytes, "quality": quality, **found}
        )
        sections += [
            Section(f"{name}: {page.title}" if len(checkpoints) > 1 else page.title, page.items, page.lead)
            for page in pages
        ]
    report.quality = {"models": models}
    report.finish(checkpoints[0])
    return [*compare(models), *sections] if len(models) > 1 else sections


def _profile_one(
    checkpoint: Checkpoint, request: Request, hardware: Hardware, folder: Path | None, progress: Progress
) -> tuple[dict, list[Section]]:
    """Numbers by part, and the sections of each."""
    from tersor.ops.profile.headers import page as headers_page
    from tersor.ops.profile.headers.run import profile_headers

    found = {"headers": profile_headers(checkpoint, hardware, request.workload)}
    sections = headers_page.sections(found["headers"])
    if request.measure:
        from tersor.ops.model.device import pick_device
        from tersor.ops.profile.measure import page as measure_page
        from tersor.ops.profile.measure.run import measure

        found["measure"] = measure(checkpoint, request.workload, pick_device(request.device), progress)
        sections += measure_page.sections(found["measure"])
    if request.sparse_crossover:
        from tersor.ops.model.device import pick_device
        from tersor.ops.profile.crossover import page as crossover_page
        from tersor.ops.profile.crossover.run import sparse_crossover

        found["crossover"] = sparse_crossover(checkpoint, request.workload, pick_device(request.device), progress)
        sections += crossover_page.sections(found["crossover"])
    if request.sensitivity or request.collect or request.suggest:
        found["sensitivity"] = _sensitivity(checkpoint, request, hardware, folder, progress)
        from tersor.ops.profile.sensitivity import page as sensitivity_page

        sections += sensitivity_page.sections(found["sensitivity"])
    if request.memory_trace is not None:
        found["memory"] = _memory(checkpoint, request, hardware, folder)
        from tersor.ops.profile.memory import page as memory_page

        sections += memory_page.sections(found["memory"])
    return found, sections


def _sensitivity(
    checkpoint: Checkpoint, request: Request, hardware: Hardware, folder: Path | None, progress: Progress
) -> dict:
    from tersor.ops.model.device import pick_device
    from tersor.ops.profile.sensitivity.run import analyse

    found = analyse(checkpoint, request, pick_device(request.device), progress, folder)
    if request.suggest is not None:
        from tersor.ops.profile.sensitivity.step_time import step_time
        from tersor.ops.profile.sensitivity.suggest import parse_target, policy_of, suggest

        cost, rest = None, 0.0
        if parse_target(request.suggest).kind == "seconds":
            cost, rest = step_time(checkpoint, found, hardware, request.workload)
        found["suggestion"] = suggest(found, request.suggest, cost, rest, request.method)
        if folder is not None:
            policy = policy_of(found, found["suggestion"]["labels"])
            (folder / POLICY_FILE).write_text(json.dumps(policy, indent=1) + "\n", "utf-8")
    return found


def _memory(checkpoint: Checkpoint, request: Request, hardware: Hardware, folder: Path | None) -> dict:
    from tersor.ops.profile.memory.run import PLAN_FILE, load, memory_plan, write_plan

    if request.memory_trace == SYNTHETIC:
        from tersor.ops.profile.memory.training import training_trace

        trace = training_trace(checkpoint, request.workload)
    else:
        trace = load(Path(request.memory_trace))
    found, packing = memory_plan(trace, hardware.memory_bytes)
    if folder is not None:
        write_plan(folder / PLAN_FILE, trace, packing)
    return found


def _short_names(checkpoints: list[Checkpoint]) -> list[str]:
    """The folder's name, or the whole path where two are called alike."""
    names = [checkpoint.path.resolve().name for checkpoint in checkpoints]
    return [
        name if names.count(name) == 1 else str(checkpoint.path)
        for name, checkpoint in zip(names, checkpoints, strict=True)
    ]


def _arguments(request: Request) -> dict:
    skip = {"models", "output", "workload", "max_memory_bytes", "force"}
    own = {name: value for name, value in vars(request).items() if name not in skip and value not in (None, [], False)}
    return {"models": request.models, **own, **vars(request.workload)}


def _command(arguments: dict) -> str:
    """The shell line that asks for this again."""
    words = ["tersor", "profile", *arguments["models"]]
    for name, value in arguments.items():
        if name != "models":
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _write(folder: Path, report: Report, sections: list[Section]) -> None:
    """`report.json` and its page."""
    from tersor.formats.page_html import render

    report.write_json(folder)
    models = report.quality["models"]
    provenance = [
        ("command", _command(report.args)),
        ("tersor", report.version),
        ("input", f"{report.input['path']}, fingerprint {report.input['fingerprint']}"),
    ]
    title = f"Profile of {models[0]['name']}" if len(models) == 1 else f"{len(models)} checkpoints side by side"
    page = render(title, "tersor profile", _tiles(models[0]), sections, provenance)
    (folder / "report.html").write_text(page, "utf-8")


def _tiles(model: dict) -> list[tuple[str, str, str]]:
    """The numbers that a page begins with; those of the first model where there are several."""
    headers, name = model["headers"], model["name"]
    tiles = [("Size", size(model["bytes"]), name), ("Parameters", count(headers["params"]), name)]
    serving = headers.get("serving")
    if serving:
        on = f"predicted, {headers['hardware']['name']}"
        tiles.append(("First token", latency(serving["first_token_seconds"]), on))
        if serving["decode"]:
            tiles.append(("Tokens a second", number(serving["decode_tokens_per_second"]), on))
    if headers.get("kv_cache"):
        tiles.append(("A token of context", size(headers["kv_cache"]["bytes_per_token"]), "of cache"))
    return tiles

"""`plan-parallel`: read headers, search, explain, and write the plan with its exports, shards and proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

from tersor.formats.cluster import Cluster, load_cluster
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.nccl_tests import read as read_nccl_tests
from tersor.formats.output import check_output, output_folder
from tersor.formats.page import Notes, Section
from tersor.formats.page_html import render
from tersor.formats.plan import read_plan, require_same_model, write_plan
from tersor.formats.report import Report
from tersor.formats.report_html import command_line
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.units import count, latency, percent, size
from tersor.ops.plan_parallel import page
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.experts.reorder import reorder_experts
from tersor.ops.plan_parallel.export.write import summary, write_exports
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.planned import Planned
from tersor.ops.plan_parallel.request import Request, Workload
from tersor.ops.plan_parallel.search.pins import Pins, load_pins, parse_pins
from tersor.ops.plan_parallel.serving import plan_serving
from tersor.ops.plan_parallel.training import plan_training

Progress = Callable[[str, int, int], None]
SHARDS = "shards"


def plan_parallel(request: Request, progress: Progress = lambda *_: None) -> Report:
    """Plan, and write `request.output`. Raises TersorError, and leaves no output, where nothing fits."""
    cluster = load_cluster(request.cluster)
    links = Links(cluster, None if request.calibrate is None else read_nccl_tests(request.calibrate))
    pins = _pins(request)
    for line in request.why_not:
        parse_pins(line)  # which raises, before any work
    checkpoint = open_checkpoint(locate(request.model))
    check_output(request.output, checkpoint.path, request.force, resume=request.force)
    report = Report.start(
        "plan-parallel", _arguments(request), request.seed, "cpu", checkpoint, Report.history_of(checkpoint.path)
    )
    source = _source_shards(request, checkpoint)
    progress("search", 0, 1)
    model = PlanModel(checkpoint)
    planner = plan_training if request.workload.mode == "train" else plan_serving
    planned = planner(request, model, cluster, links, pins)
    report.warnings += planned.warnings
    with output_folder(request.output) as folder:
        _fill(folder, request, model, cluster, links, planned, source, report, progress)
    return report


def _pins(request: Request) -> Pins:
    """--pin and --fix, of which the line wins."""
    pins: Pins = {} if request.pin is None else load_pins(request.pin)
    for line in request.fix:
        pins |= parse_pins(line)
    return pins


def _source_shards(request: Request, checkpoint) -> Path | None:
    """The shards that --from names. Raises TersorError where they are not there, or of another checkpoint."""
    if request.source_plan is None:
        return None
    if not request.shard:
        raise TersorError("--from says where shards come from, and none are to be written", "add --shard")
    folder = request.source_plan if request.source_plan.is_dir() else request.source_plan.parent
    plan = read_plan(request.source_plan)
    require_same_model(plan, folder, checkpoint.fingerprint(), checkpoint.path)
    if not (folder / SHARDS).is_dir():
        raise TersorError(f"{folder}: this plan has no shards", "plan it with --shard, or leave --from out")
    return folder / SHARDS


def _fill(
    folder: Path, request: Request, model: PlanModel, cluster: Cluster, links: Links, planned: Planned,
    source: Path | None, report: Report, progress: Progress,
) -> None:  # fmt: skip
    """Everything that stands in the output, `planned` completed by what is made here."""
    document, sections, numbers = planned.document, planned.sections, planned.numbers
    described = {"path": str(model.checkpoint.path.absolute()), "fingerprint": model.checkpoint.fingerprint()}
    if request.routing is not None:
        layout = next(reversed(planned.layouts.values()))  # of the decoding side, where they are apart
        model, document["experts"] = reorder_experts(
            request.routing, model, layout, links, folder / "model", request.seed
        )
        model.checkpoint.path = request.output / "model"  # its name once all is written; files are known by theirs
        described = {"path": str(model.checkpoint.path.absolute()), "fingerprint": model.checkpoint.fingerprint()}
        sections.append(page.experts(document["experts"]))
    written = {}
    for role, layout in planned.layouts.items():
        instead = {runtime: other for (of, runtime), other in planned.instead.items() if of == role}
        workload = replace(request.workload, batch=planned.batches.get(role))
        found = summary(write_exports(folder / role, model, layout, workload, cluster, instead))
        for runtime, other in instead.items():
            found[runtime]["layout"] = other.describe()
        written |= {f"{role} {runtime}".strip(): entry for runtime, entry in found.items()}
    document["exports"] = written
    sections.append(page.exports(written))
    if request.shard:
        document["shards"] = _shards(folder, request, model, planned, source, progress)
        numbers["shards"] = "; ".join(
            f"{entry['files']:,} files, {size(entry['bytes'])}" for entry in document["shards"]
        )
    if request.execute_check:
        progress("run a shrunken copy", 0, 1)
        document["check"] = _proof(request, model, next(iter(planned.layouts.values())))
        numbers["check"] = document["check"]["verdict"]
        sections.append(page.check(document["check"]))
        if not document["check"]["passed"]:
            report.warnings.append(f"--execute-check: {numbers['check']}")
    facts = model.facts
    plan = {
        "version": report.version,
        "model": described | {
            "family": facts.family, "bytes": model.checkpoint.nbytes, "blocks": facts.layers,
            "params": sum(weight.params for weight in model.stored.values()),
        },
        "cluster": _cluster(cluster) | {"calibrated": request.calibrate is not None},
        "workload": asdict(request.workload) | {"convention": request.convention},
        **document,
    }  # fmt: skip
    write_plan(folder, plan)
    report.quality = {"plan": numbers}
    report.finish(model.checkpoint, name=str(request.output))
    report.write_json(folder)
    (folder / "report.html").write_text(_page(report, planned, cluster), "utf-8")


def _shards(
    folder: Path, request: Request, model: PlanModel, planned: Planned, source: Path | None, progress: Progress
) -> list[dict]:  # fmt: skip
    """Writes them; a line of numbers for each layout."""
    from tersor.ops.plan_parallel.shards.write import write_shards

    found = []
    for role, layout in planned.layouts.items():
        place = folder / role / SHARDS
        place.parent.mkdir(exist_ok=True)
        index = write_shards(model, layout, place, request.shard_format, source, progress)
        nbytes = sum(index.file_bytes)
        found.append(
            {"folder": str(Path(role) / SHARDS), "format": index.format, "files": len(index.files), "bytes": nbytes}
        )
    return found


def _proof(request: Request, model: PlanModel, layout: Layout) -> dict:
    """What plan.json holds of --execute-check."""
    from tersor.ops.plan_parallel.check.run import execute_check

    result = execute_check(model, layout, request.execute_check, request.seed)
    found = asdict(result) | {"layout": result.layout.describe()}
    for entry, run in zip(found["runs"], result.runs, strict=True):
        entry |= {"layout": run.layout.describe(), "passed": run.passed}
    found["verdict"] = (
        f"{'passed' if result.passed else 'FAILED'} on {request.execute_check} processes ({result.layout.describe()}): the loss "
        f"differs by {result.loss_difference:.1e}, gradients by {result.gradient_difference:.1e}"
    )
    return found


def _arguments(request: Request) -> dict:
    """By the names of the command's options, as far as they differ from the defaults."""
    workload, plain = request.workload, Workload()
    given = {"cluster": request.cluster, "mode": workload.mode}
    names = {"ttft_seconds": "ttft", "tpot_seconds": "tpot"}
    for entry in fields(Workload):
        value = getattr(workload, entry.name)
        if value != getattr(plain, entry.name):
            given[names.get(entry.name, entry.name)] = value
    names = {"routing": "experts", "runtime": "for", "map_ranks": "map", "source_plan": "from"}
    for entry in fields(Request):
        value = getattr(request, entry.name)
        if entry.name in ("model", "output", "cluster", "workload", "force") or value in (None, [], False):
            continue
        if entry.name == "tiers":
            value = ",".join(value)
        given[names.get(entry.name, entry.name)] = str(value) if isinstance(value, Path) else value
    return given


def _cluster(cluster: Cluster) -> dict:
    keys = ("name", "nodes", "devices_per_node", "network_gbps", "host_gbps", "nvme_gbps", "usable_memory")
    return {key: getattr(cluster, key) for key in keys} | {
        "hardware": cluster.hardware.name, "memory_bytes": cluster.hardware.memory_bytes, "links": cluster.describe(),
    }  # fmt: skip


def _page(report: Report, planned: Planned, cluster: Cluster) -> str:
    numbers = planned.numbers
    tiles = [("Devices", f"{cluster.devices:,}", cluster.hardware.name)]
    if numbers["mode"] == "train":
        tiles += [
            ("A step", latency(numbers["step_seconds"]), "predicted"),
            ("Tokens a second", count(numbers["tokens_per_second"]), "of all devices"),
            ("Use", percent(numbers["mfu"]), numbers["bound_by"]),
        ]
    else:
        tiles += [
            ("First token", latency(numbers["ttft_seconds"]), "predicted"),
            ("Next tokens", latency(numbers["tpot_seconds"]), "each"),
            ("Tokens a second", count(numbers["tokens_per_second"]), "written, of all devices"),
        ]
    tiles.append(("Memory", size(numbers["peak_bytes"]), f"of {size(numbers['device_bytes'])} usable, fullest device"))
    provenance = [
        ("command", command_line(report.step())),
        ("tersor", report.version),
        ("input", f"{report.input['path']}, fingerprint {report.input['fingerprint']}"),
        ("cluster", cluster.describe()),
    ]
    title = f"A plan for {Path(report.input['path']).name} on {cluster.name}"
    warnings = [Section("Mind", [Notes(report.warnings, warn=True)])] if report.warnings else []
    return render(title, "tersor plan-parallel", tiles, [*warnings, *planned.sections], provenance)

"""`--mode train`: the search, the plan it found on the clock, and what to say of both."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import NamedTuple

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.formats.units import latency
from tersor.ops.plan_parallel import page
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.communication.mapping import Mapping, map_ranks
from tersor.ops.plan_parallel.communication.messages import message_bytes
from tersor.ops.plan_parallel.cost.measured import Measured, read_measured
from tersor.ops.plan_parallel.cost.memory import even_stages
from tersor.ops.plan_parallel.cost.step import Costs, Estimate
from tersor.ops.plan_parallel.export.common import Unsupported
from tersor.ops.plan_parallel.export.write import accepted_by, export
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.planned import Planned
from tersor.ops.plan_parallel.request import RUNTIMES, Request
from tersor.ops.plan_parallel.schedule.pipeline import Timeline, build, simulate
from tersor.ops.plan_parallel.search.compare import changes, named, why_slower
from tersor.ops.plan_parallel.search.explain import explain, neighbours, no_plan, why_not
from tersor.ops.plan_parallel.search.pins import Pins
from tersor.ops.plan_parallel.search.price import Candidate
from tersor.ops.plan_parallel.search.train import SearchResult, best_for, search
from tersor.ops.plan_parallel.transform.inside import inside_blocks


def plan_training(request: Request, model: PlanModel, cluster: Cluster, links: Links, pins: Pins) -> Planned:
    """Raises TersorError, with the nearest plan and what it lacks, where nothing fits."""
    if request.map_ranks and cluster.bandwidth is None:
        raise TersorError(
            f"--map: {cluster.name} has no bandwidth matrix to place ranks by",
            "give a cluster file with `bandwidth`, or leave --map out",
        )
    workload = request.workload
    measured = None if request.measured is None else read_measured(request.measured, model, cluster.hardware)
    costs = Costs(model, cluster, links, workload, request.convention, measured)
    accepts = None if request.runtime == "any" else accepted_by(request.runtime, model, workload, cluster)
    result = search(model, costs, cluster, workload, pins, request.top, request.tiers, accepts)
    if not result.best:
        raise _refused(request, model, cluster, result)
    mapping = None
    if cluster.bandwidth is not None:
        placed = [_placed(request, model, candidate.layout, cluster, links, measured) for candidate in result.best]
        placed.sort(key=lambda one: one.candidate.rank)
        result.best, links, mapping = [one.candidate for one in placed], placed[0].links, placed[0].mapping
        costs = Costs(model, cluster, links, workload, request.convention, measured)
    best, *others = result.best
    layout = written_out(best.layout, model)
    estimate = costs.estimate(layout, exact=True)
    timeline = on_the_clock(layout, estimate) if layout.pp > 1 else None
    answers = {asked: why_not(asked, result) for asked in request.why_not}
    best = Candidate(layout, estimate)
    sentences = explain(result.best[0], others, cluster.memory_bytes)
    planned = Planned({"": layout}, {}, {}, [])
    if request.runtime == "any":
        planned.instead = _instead(request, model, layout, cluster, result)
    if result.fewer is not None:
        planned.warnings.append(_too_many(result))
    if mapping is not None:
        sentences.append(
            f"on the measured links a step talks between nodes for {latency(mapping.after_seconds)}, in the cluster's own "
            f"order for {latency(mapping.before_seconds)}"
        )
    inside = inside_blocks(model, layout, workload, links, cluster.hardware)
    planned.numbers = _numbers(request, cluster, estimate, answers)
    planned.document = {
        "layout": asdict(layout),
        "ranks": list(mapping.devices(cluster.devices_per_node)) if mapping is not None else None,
        "predicted": _predicted(estimate, sentences),
        "others": [_other(candidate, result.best[0]) for candidate in others],
        "pareto": [_point(candidate) for candidate in result.pareto],
        "inside_blocks": [one._asdict() for one in inside],
        "neighbours": dict(neighbours(result, result.best[0])),
        "why_not": answers,
        "searched": asdict(result.counted),
    }
    planned.sections = page.training(best, result, timeline, sentences, planned.document, cluster)
    return planned


def _refused(request: Request, model: PlanModel, cluster: Cluster, result: SearchResult) -> TersorError:
    """Why there is no plan: none fits, or none that does is one the runtime can run."""
    nearest = result.nearest
    if request.runtime == "any" or nearest is None or not nearest.estimate.fits:
        return no_plan(result)
    found = export(request.runtime, model, nearest.layout, request.workload, cluster)
    why = f", for example {named(nearest.layout)}: {'; '.join(found.reasons)}" if isinstance(found, Unsupported) else ""
    hint = f"leave --for {request.runtime} out" + (", or pin fewer choices" if result.space.pins else "")
    return TersorError(f"{request.runtime} can run none of the plans that fit on {result.devices} devices{why}", hint)


def written_out(layout: Layout, model: PlanModel) -> Layout:
    """With the blocks of every stage, so that nobody who reads the plan has to know how an even cut falls."""
    count = layout.pp * layout.chunks
    return layout if layout.stages or count == 1 else replace(layout, stages=even_stages(model.facts.layers, count))


def on_the_clock(layout: Layout, estimate: Estimate) -> Timeline:
    """One step of the pipeline, block by block."""
    grid = build(layout.schedule, layout.pp, estimate.micro_batches, layout.chunks)
    return simulate(
        grid,
        [stage.forward_seconds for stage in estimate.stages],
        [stage.backward_input_seconds for stage in estimate.stages],
        [stage.backward_weight_seconds for stage in estimate.stages],
        estimate.send_seconds,
    )


def _instead(
    request: Request, model: PlanModel, layout: Layout, cluster: Cluster, result: SearchResult
) -> dict[tuple[str, str], Layout]:
    """The fastest plan of each runtime that cannot run `layout`."""
    found = {}
    for runtime in RUNTIMES["train"][1:]:
        accepts = accepted_by(runtime, model, request.workload, cluster)
        if not accepts(layout):
            candidate = best_for(result, accepts)
            if candidate is not None:
                found["", runtime] = written_out(candidate.layout, model)
    return found


class Placed(NamedTuple):
    """A plan on the links that it meets."""

    candidate: Candidate
    links: Links
    mapping: Mapping | None


def _placed(
    request: Request, model: PlanModel, layout: Layout, cluster: Cluster, links: Links, measured: Measured | None
) -> Placed:
    """With --map the order of nodes that suits the layout best, else the cluster's own."""
    mapping = None
    if request.map_ranks:
        mapping = map_ranks(layout, cluster, message_bytes(model, layout, request.workload), request.seed)
    met = links.placed(layout, mapping.order if mapping else None)
    costs = Costs(model, cluster, met, request.workload, request.convention, measured)
    return Placed(Candidate(layout, costs.estimate(layout, exact=True)), met, mapping)


def _too_many(result: SearchResult) -> str:
    fewer, best = result.fewer, result.best[0]
    return (
        f"the model, or the batch, is small for {result.devices} devices: {fewer.layout.world} of them "
        f"({fewer.layout.describe()}) take {latency(fewer.estimate.step_seconds)} a step, all take "
        f"{latency(best.estimate.step_seconds)}"
    )


def _numbers(request: Request, cluster: Cluster, estimate: Estimate, answers: dict[str, str]) -> dict:
    numbers = {
        "mode": "train",
        "layout": estimate.layout.describe(),
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "bound_by": f"bound by {estimate.bound_by}",
        "peak_bytes": estimate.peak_bytes,
        "device_bytes": cluster.memory_bytes,
    }
    if request.workload.tokens:
        numbers["training_seconds"] = request.workload.tokens / estimate.tokens_per_second
    return numbers | ({"why_not": answers} if answers else {})


def _predicted(estimate: Estimate, sentences: list[str]) -> dict:
    found = asdict(estimate)
    del found["layout"], found["explain"]
    return found | {"explained": sentences}


def _other(candidate: Candidate, best: Candidate) -> dict:
    return _point(candidate) | {
        "differs": changes(best.layout, candidate.layout),
        "why": why_slower(best, candidate),
    }


def _point(candidate: Candidate) -> dict:
    return {
        "layout": candidate.layout.describe(),
        "step_seconds": candidate.estimate.step_seconds,
        "peak_bytes": candidate.estimate.peak_bytes,
    }

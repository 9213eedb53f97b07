"""`--mode serve`: the search, and what to say of the plan it found."""

from __future__ import annotations

from dataclasses import asdict, replace

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel import page
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.planned import Planned
from tersor.ops.plan_parallel.request import Request
from tersor.ops.plan_parallel.search.pins import Pins
from tersor.ops.plan_parallel.serve.plan import TOGETHER, Group, why_lost
from tersor.ops.plan_parallel.serve.search import ServeResult, no_plan, search, why_not

TRAINING_ONLY = {"measured": "--measured", "map_ranks": "--map"}


def plan_serving(request: Request, model: PlanModel, cluster: Cluster, links: Links, pins: Pins) -> Planned:
    """Raises TersorError, with the nearest plan and what it lacks, where none keeps to memory and limits."""
    for field, option in TRAINING_ONLY.items():
        if getattr(request, field):
            raise TersorError(f"{option} is for training plans", "leave it out, or use --mode train")
    workload = request.workload
    result = search(model, cluster, links, workload, pins, request.top)
    if not result.best:
        raise no_plan(result)
    best, *others = result.best
    answers = {asked: why_not(asked, result) for asked in request.why_not}
    sentences = result.explain()
    fullest = max(
        memory.holding(group.operating.batch) for group in best.groups for memory in result.costs.memory(group.instance)
    )
    layouts = {
        "" if best.kind == TOGETHER else group.operating.role: _written_out(group, result) for group in best.groups
    }
    document = {
        "layout": asdict(next(iter(layouts.values()))),
        "layouts": {role: asdict(layout) for role, layout in layouts.items()},
        "predicted": best.numbers() | {"explained": sentences},
        "others": [
            other.numbers() | {"layout": other.describe(), "why": why_lost(best, other, workload)} for other in others
        ],
        "pareto": [asdict(point) | {"layout": point.instance.describe()} for point in result.pareto],
        "why_not": answers,
        "searched": {"considered": result.considered, "fitting": result.fitting, "seconds": result.seconds},
    }
    for point in document["pareto"]:
        del point["instance"]
    numbers = {
        "mode": "serve",
        "layout": best.describe(),
        "ttft_seconds": best.ttft_seconds,
        "tpot_seconds": best.tpot_seconds,
        "tokens_per_second": best.tokens_per_second,
        "requests_per_second": best.requests_per_second,
        "peak_bytes": fullest,
        "device_bytes": cluster.hardware.memory_bytes,
        **({"why_not": answers} if answers else {}),
    }
    return Planned(layouts, document, numbers, page.serving(result, sentences, document))


def _written_out(group: Group, result: ServeResult) -> Layout:
    """All instances of a group as one layout, with the blocks of every stage."""
    layout = group.layout
    return replace(layout, stages=result.costs.steps.stages(group.instance)) if layout.pp > 1 else layout

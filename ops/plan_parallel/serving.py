"""`--mode serve`: the search, and what to say of the plan it found."""

from __future__ import annotations

from dataclasses import asdict

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel import page
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.export.write import accepted_by
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.planned import Planned
from tersor.ops.plan_parallel.request import Request
from tersor.ops.plan_parallel.search.pins import Pins
from tersor.ops.plan_parallel.serve.instance import devices_of, first_devices
from tersor.ops.plan_parallel.serve.plan import TOGETHER, ServePlan, why_lost
from tersor.ops.plan_parallel.serve.search import no_plan, search, why_not, written_out

TRAINING_ONLY = {"measured": "--measured", "map_ranks": "--map"}


def plan_serving(request: Request, model: PlanModel, cluster: Cluster, links: Links, pins: Pins) -> Planned:
    """Raises TersorError, with the nearest plan and what it lacks, where none keeps to memory and limits."""
    for field, option in TRAINING_ONLY.items():
        if getattr(request, field):
            raise TersorError(f"{option} is for training plans", "leave it out, or use --mode train")
    workload = request.workload
    accepts = None if request.runtime == "any" else accepted_by(request.runtime, model, workload, cluster)
    result = search(model, cluster, links, workload, pins, request.top, accepts=accepts)
    if not result.best:
        raise no_plan(result)
    best, *others = result.best
    answers = {asked: why_not(asked, result) for asked in request.why_not}
    sentences = result.explain()
    fullest = max(
        memory.holding(group.operating.batch) for group in best.groups for memory in result.costs.memory(group.instance)
    )
    layouts = {
        # all instances of a group as one layout
        "" if best.kind == TOGETHER else group.operating.role: written_out(group.layout, group.instance, result.costs)
        for group in best.groups
    }
    document = {
        "layout": asdict(next(iter(layouts.values()))),
        "layouts": {role: asdict(layout) for role, layout in layouts.items()},
        "ranks": dict(zip(layouts, _devices(best, cluster), strict=True)),
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
        "device_bytes": cluster.memory_bytes,
        **({"why_not": answers} if answers else {}),
    }
    batches = {
        role: group.operating.batch
        for role, group in zip(layouts, best.groups, strict=True)
        if group.operating.role != "prefill"  # whose prompts come one after the other
    }
    return Planned(layouts, document, numbers, page.serving(result, sentences, document), batches=batches)


def _devices(plan: ServePlan, cluster: Cluster) -> list[list[int] | None]:
    """Of the ranks of each group, None where they are simply counted."""
    firsts = first_devices(cluster, [(group.instance.devices, group.replicas) for group in plan.groups])
    found = [devices_of(group.instance, first) for group, first in zip(plan.groups, firsts, strict=True)]
    return [None if devices == list(range(len(devices))) else devices for devices in found]

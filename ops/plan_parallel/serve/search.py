"""The best plans to serve a model on a cluster, for throughput or latency, within limits on both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.formats.units import latency, number, size
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.search.pins import Pins, parse_pins
from tersor.ops.plan_parallel.search.space import Legality
from tersor.ops.plan_parallel.serve.costs import ServeCosts
from tersor.ops.plan_parallel.serve.disaggregated import Apart
from tersor.ops.plan_parallel.serve.instance import Instance, fit_on, instances
from tersor.ops.plan_parallel.serve.plan import Group, ServePlan, explain, rank, why_lost
from tersor.ops.plan_parallel.serve.rates import Limits, Operating, both

SERVE_PINS = ("tp", "pp", "dp", "ep", "etp", "stages", "devices")
SHOWN_BATCHES = tuple(2**power for power in range(11))

Accepts = Callable[[Layout], bool]


@dataclass(frozen=True)
class Point:
    """One instance at one batch, prompts and answers together: what a user gets against what a device gives."""

    instance: Instance
    batch: int
    tpot_seconds: float
    tokens_per_second_per_device: float


@dataclass(frozen=True)
class Nearest:
    """The plan that lacks least: `short_bytes` on its fullest device, or the times that are over the limits."""

    instance: Instance
    short_bytes: float
    ttft_seconds: float
    tpot_seconds: float
    text: str


@dataclass
class ServeResult:
    """`best` first, plans of both kinds; `pareto` by time between tokens, shortest first. `considered` instances, of which
    `fitting` have room for a sequence. `nearest` when `best` is empty, None where no instance is possible at all; `reason`
    where it is neither memory nor a limit that leaves none. `accepts` is what the search was given."""

    costs: ServeCosts
    workload: Workload
    legal: Legality
    pins: Pins
    devices: int
    best: list[ServePlan] = field(default_factory=list)
    pareto: list[Point] = field(default_factory=list)
    considered: int = 0
    fitting: int = 0
    seconds: float = 0.0
    nearest: Nearest | None = None
    others: list[ServePlan] = field(default_factory=list)  # what came behind `best`
    reason: str = ""
    accepts: Accepts | None = None

    def explain(self, index: int = 0) -> list[str]:
        """Of the plan at this place of `best`."""
        plan = self.best[index]
        return explain(
            plan, [other for other in (*self.best, *self.others) if other is not plan], self.costs, self.workload
        )


def search(
    model: PlanModel,
    cluster: Cluster,
    links: Links,
    workload: Workload,
    pins: Pins | None = None,
    top: int = 5,
    legal: Legality | None = None,
    imbalance: float = 1.0,
    accepts: Accepts | None = None,
) -> ServeResult:
    """Of layouts that `accepts` takes. Raises TersorError for a model that writes no text, and for pins that only training
    knows."""
    start, pins = time.perf_counter(), pins or {}
    for key in pins:
        if key not in SERVE_PINS:
            raise TersorError(f"{key} is pinned, a choice of training", f"to serve there are {', '.join(SERVE_PINS)}")
    devices = max(pins.get("devices", (cluster.devices,)))
    if devices > cluster.devices:
        raise TersorError(
            f"{devices} devices are pinned, {cluster.name} has {cluster.devices}", "pin fewer, or give a larger cluster"
        )
    if legal is None:
        from tersor.ops.plan_parallel.transform.legality import legal_ep, legal_etp, legal_tp

        legal = Legality(legal_tp(model), legal_ep(model), legal_etp(model))
    costs = ServeCosts(model, cluster, links, workload, imbalance)
    result = ServeResult(costs, workload, legal, pins, devices, accepts=accepts)
    candidates = list(instances(model, cluster, legal, pins, devices))
    fitting = [instance for instance in candidates if costs.room(instance)[0]]
    result.considered, result.fitting = len(candidates), len(fitting)
    if accepts is not None and fitting:
        fitting = [instance for instance in fitting if accepts(written_out(instance.layout, instance, costs))]
        result.reason = "" if fitting else f"the runtime can run none of the {result.fitting:,} instances that fit"
    plans = [plan for instance in fitting for plan in _together(costs, cluster, instance, workload, pins, devices)]
    if "dp" not in pins and "stages" not in pins:  # which speak of one group
        plans += Apart(costs, cluster, workload, devices).plans(fitting)
    if accepts is not None and plans:
        plans = [
            plan for plan in plans if all(accepts(written_out(one.layout, one.instance, costs)) for one in plan.groups)
        ]
        result.reason = "" if plans else "the runtime can run no plan of several instances"
    plans.sort(key=lambda plan: rank(plan, workload))
    result.best, result.others = plans[:top], plans[top:]
    result.pareto = pareto(costs, fitting)
    if not plans:
        result.nearest = _nearest(costs, candidates, fitting, Limits.of(workload), workload, devices)
        if fitting and not any(_copies(cluster, instance, pins, devices) for instance in fitting):
            result.reason = f"{devices} devices cannot be divided with dp={' or '.join(map(str, pins['dp']))}"
    result.seconds = time.perf_counter() - start
    return result


def written_out(layout: Layout, instance: Instance, costs: ServeCosts) -> Layout:
    """With the blocks of every stage, as those of `instance` are cut."""
    return replace(layout, stages=costs.steps.stages(instance)) if layout.pp > 1 else layout


def _copies(cluster: Cluster, instance: Instance, pins: Pins, devices: int) -> list[int]:
    """How many of an instance there may be."""
    counts = range(1, fit_on(cluster, devices, instance.devices) + 1)
    return [count for count in counts if "dp" not in pins or count * instance.layout.dp in pins["dp"]]


def _together(
    costs: ServeCosts, cluster: Cluster, instance: Instance, workload: Workload, pins: Pins, devices: int
) -> list[ServePlan]:
    counts, limits = _copies(cluster, instance, pins, devices), Limits.of(workload)
    if not counts:
        return []
    if workload.rate is None:
        alone = workload.objective == "latency"
        found = _alone(costs, instance, limits) if alone else both(costs, instance, limits)
        # One request at a time needs one instance; more of them do not make it quicker.
        return [] if found is None else [_plan(costs, instance, min(counts) if alone else max(counts), found)]
    unhurried = both(costs, instance, limits)
    if unhurried is None:
        return []
    enough = [count for count in counts if count >= ceil(workload.rate / unhurried.requests_per_second - 1e-9)]
    if workload.objective == "latency":
        enough = enough[-1:]
    for count in enough:
        found = both(costs, instance, limits, workload.rate / count)
        if found is not None:
            return [_plan(costs, instance, count, found)]
    return []


def _alone(costs: ServeCosts, instance: Instance, limits: Limits) -> Operating | None:
    ttft = costs.read(instance, 1).seconds
    tpot = costs.token_seconds(instance, 1) if costs.generate > 1 else 0.0
    if ttft > limits.ttft or tpot > limits.tpot:
        return None
    return Operating("both", 1 / (ttft + (costs.generate - 1) * tpot), 1, 1, ttft, tpot, "alone")


def _plan(costs: ServeCosts, instance: Instance, replicas: int, found: Operating) -> ServePlan:
    group = Group(instance, replicas, found)
    return ServePlan((group,), group.requests_per_second, found.ttft_seconds, found.tpot_seconds, costs.generate)


def pareto(costs: ServeCosts, fitting: Sequence[Instance]) -> list[Point]:
    """Points that no other beats in both, without limits and waiting."""
    points = []
    for instance in fitting if costs.generate > 1 else ():
        most, _ = costs.room(instance)
        busy = costs.read(instance, 1).slowest
        for batch in [batch for batch in SHOWN_BATCHES if batch < most] + [most]:
            tpot = costs.token_seconds(instance, batch) + batch * busy / (costs.generate - 1)
            rate = instance.layout.dp * batch / (tpot * (costs.generate - 1)) * costs.generate
            points.append(Point(instance, batch, tpot, rate / instance.devices))
    points.sort(key=lambda point: (point.tpot_seconds, -point.tokens_per_second_per_device))
    front: list[Point] = []
    for point in points:
        if not front or point.tokens_per_second_per_device > front[-1].tokens_per_second_per_device * (1 + 1e-9):
            front.append(point)
    return front


def _nearest(
    costs: ServeCosts,
    candidates: Sequence[Instance],
    fitting: Sequence[Instance],
    limits: Limits,
    workload: Workload,
    devices: int,
) -> Nearest | None:
    if not candidates:
        return None
    if not fitting:
        instance = min(candidates, key=lambda one: (costs.room(one)[1], one.devices))
        short = costs.room(instance)[1]
        text = f"{instance.describe()} is nearest, and lacks {size(short)} on its fullest device for one sequence"
        return Nearest(instance, short, inf, inf, text)

    def excess(instance: Instance) -> float:
        return max(costs.read(instance, 1).seconds / limits.ttft, costs.token_seconds(instance, 1) / limits.tpot)

    instance = min(fitting, key=lambda one: (excess(one), one.devices))
    ttft, tpot = costs.read(instance, 1).seconds, costs.token_seconds(instance, 1)
    words = [f"{instance.describe()} is nearest: alone, a request waits {latency(ttft)} for its first token"]
    words.append(f"and {latency(tpot)} for each other")
    if excess(instance) <= 1 and workload.rate is not None:
        carried = [
            found.requests_per_second * fit_on(costs.cluster, devices, one.devices)
            for one in fitting
            if (found := both(costs, one, limits)) is not None
        ]
        words.append(
            f"but of {workload.rate:g} requests a second the devices carry {number(max(carried, default=0.0))}"
        )
    return Nearest(instance, 0.0, ttft, tpot, " ".join(words))


def no_plan(result: ServeResult) -> TersorError:
    """Why there is none, for the user."""
    costs = result.costs
    name = costs.cluster.name
    if result.reason:
        return TersorError(
            f"no plan on {name}: {result.reason}", "pin fewer choices, or ask for another runtime (--for)"
        )
    if result.nearest is None:
        why = _why_none(result)
        return TersorError(
            f"no instance of {costs.model.checkpoint.path} can be laid out on {name} with these choices{why}",
            "pin fewer choices; degrees divide heads, experts and the devices of a node",
        )
    if not result.fitting:
        return TersorError(f"does not fit on {name}: {result.nearest.text}", "use more devices, or quantize the model")
    return TersorError(
        f"no plan on {name} keeps to the limits: {result.nearest.text}", "relax --ttft, --tpot or --rate"
    )


def _why_none(result: ServeResult) -> str:
    """`: ` and the first rule that leaves no instance, '' where none does alone."""
    pins, layers, each = result.pins, result.costs.model.facts.layers, result.costs.cluster.devices_per_node
    for axis in ("tp", "ep", "etp"):
        reasons = [result.legal.why_not(axis, degree) for degree in pins.get(axis, (1,))]
        if all(reasons):
            return f": {reasons[0]}"
    tp, pp = (min(pins.get(axis, (1,))) for axis in ("tp", "pp"))
    if pp > layers:
        return f": pp={pp} needs as many blocks at least, there are {layers}"
    if tp * pp > result.devices:
        return f": tp={tp} times pp={pp} is more than the {result.devices} devices"
    if tp * pp < each and each % (tp * pp):
        return f": instances of tp={tp} times pp={pp} devices do not fill nodes of {each}"
    return ""


def why_not(text: str, result: ServeResult) -> str:
    """Why the plan is not `text` (`tp=8,pp=2`)."""
    pins, costs = parse_pins(text), result.costs
    for axis in ("tp", "ep", "etp"):
        for degree in pins.get(axis, ()):
            if why := result.legal.why_not(axis, degree):
                return f"{text}: {axis}={degree} does not divide: {why}"
    other = search(
        costs.model,
        costs.cluster,
        costs.links,
        result.workload,
        {**result.pins, **pins},
        1,
        result.legal,
        costs.imbalance,
        result.accepts,
    )
    if not other.best:
        return f"{text}: {no_plan(other)}"
    if not result.best:
        return f"{text}: is possible as {other.best[0].describe()}"
    plan, rival = result.best[0], other.best[0]
    if rank(rival, result.workload) <= rank(plan, result.workload):
        return f"{text}: is the plan ({plan.describe()})"
    return f"{text}: as {rival.describe()}: {why_lost(plan, rival, result.workload)}"

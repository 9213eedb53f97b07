"""The fastest layouts to train a model with on a cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.search.bound import Accepts, BranchAndBound, Counted, Known, kind_of
from tersor.ops.plan_parallel.search.pins import check_pins
from tersor.ops.plan_parallel.search.price import Candidate, Pricer, StageCutter
from tersor.ops.plan_parallel.search.space import Degrees, Legality, Space, divisors

AS_FAST = 1.02  # times the best step: a plan on fewer devices that is no slower than this wastes none of them
POOL = 4  # times as many plans as are asked for are kept, one for each way to divide the devices and schedule
ASSUMED_SCALING = 0.9  # of the arithmetic: fewer devices are not tried where the work alone, scaled so, takes too long


@dataclass
class SearchResult:
    """`best`: the fastest plan of each way to divide the devices, best first, with schedules run block by block
    (Pricer.exact). `pareto`: plans that no other beats in both memory and time, fastest first, by closed forms. `nearest`,
    when nothing fits: the plan that lacks the fewest bytes on its fullest device, None when there is no layout at all.
    `fewer`: the plan on the fewest devices that is as fast as the best."""

    devices: int
    space: Space
    pricer: Pricer
    best: list[Candidate] = field(default_factory=list)
    pareto: list[Candidate] = field(default_factory=list)
    counted: Counted = field(default_factory=Counted)
    nearest: Candidate | None = None
    fewer: Candidate | None = None


def space_of(model, cluster, workload, pins: Mapping[str, object] | None = None, tiers=("gpu",)) -> Space:
    """`model` is a PlanModel."""
    from tersor.ops.plan_parallel.transform.legality import legal_ep, legal_etp, legal_tp

    facts = model.facts
    return Space(
        layers=facts.layers,
        experts=facts.experts,
        devices_per_node=cluster.devices_per_node,
        global_batch=workload.global_batch,
        seq_len=workload.seq_len,
        legal=Legality(legal_tp(model), legal_ep(model), legal_etp(model)),
        pins=check_pins(pins or {}),
        tiers=tuple(tiers),
    )


def search(
    model,
    costs,
    cluster,
    workload,
    pins: Mapping[str, object] | None = None,
    top: int = 5,
    tiers=("gpu",),
    accepts: Accepts | None = None,
) -> SearchResult:
    """The `top` plans, for all devices of the cluster or as many as are pinned; of layouts that `accepts` takes.

    Raises TersorError where more devices are pinned than there are. Where nothing fits, or nothing divides, the result
    says so (`best` is empty); `explain.no_plan` has the words.
    """
    start = time.perf_counter()
    space = space_of(model, cluster, workload, pins, tiers)
    pricer = Pricer(costs, cluster.memory_bytes, StageCutter(model, costs))
    asked = space.pins.get("devices", (cluster.devices,))
    if max(asked) > cluster.devices:
        raise TersorError(
            f"{max(asked)} devices are pinned, {cluster.name} has {cluster.devices}",
            "pin fewer, or give a larger cluster",
        )
    results = [search_space(pricer, space, devices, POOL * top, accepts) for devices in asked]
    for result in results:
        result.best = run_schedules(pricer, result.best, top)
    result = min(results, key=lambda found: found.best[0].rank if found.best else (math.inf,))
    if "devices" not in space.pins:
        result.fewer = fewer_devices(pricer, result, accepts)
    result.counted.seconds = time.perf_counter() - start
    return result


def run_schedules(pricer: Pricer, pool: list[Candidate], top: int) -> list[Candidate]:
    """The first `top` of plans that are sorted by their closed forms, one of each way to divide the devices, with their
    schedules run, in the order that this gives them. Those that turn out not to fit are left out."""
    best: dict[Degrees, Candidate] = {}
    for candidate in pool:
        degrees, _, _ = kind_of(candidate.layout)
        if degrees not in best and len(best) < top:
            exact = pricer.exact(candidate)
            if exact.estimate.fits:
                best[degrees] = exact
    return sorted(best.values() or pool[:top], key=lambda plan: plan.rank)


def best_for(result: SearchResult, accepts: Accepts) -> Candidate | None:
    """The fastest plan in the space of `result` that `accepts` takes."""
    walk = BranchAndBound(result.pricer, result.space, accepts)
    found = walk.fastest(result.devices, Known(1, with_front=False)).best()
    return result.pricer.exact(found[0]) if found else None


def search_space(
    pricer: Pricer, space: Space, devices: int, top: int = 5, accepts: Accepts | None = None
) -> SearchResult:
    """By closed forms: `best` has one plan of each way to divide the devices and schedule."""
    walk = BranchAndBound(pricer, space, accepts)
    known = walk.fastest(devices, Known(top))
    result = SearchResult(devices, space, pricer, known.best(), known.pareto(), walk.counted)
    if not result.best:
        result.nearest = walk.nearest(devices)
    return result


def fewer_devices(pricer: Pricer, result: SearchResult, accepts: Accepts | None = None) -> Candidate | None:
    """The plan on the fewest devices that is as fast as the best on all of them: the model, or the batch, is too small
    for the cluster. Where all devices have no plan, the fastest plan on the most devices that have one."""
    space = result.space
    if not result.best:
        for devices in reversed(_smaller_counts(space, result.devices)):
            found = BranchAndBound(pricer, space, accepts).fastest(devices, Known(1, with_front=False)).best()
            if found:
                return pricer.exact(found[0])
        return None
    best = result.best[0].estimate
    cutoff = AS_FAST * best.step_seconds
    for devices in _smaller_counts(space, result.devices):
        if best.parts.get("compute", 0.0) * result.devices / devices * ASSUMED_SCALING > cutoff:
            continue
        found = BranchAndBound(pricer, space, accepts).fastest(devices, Known(1, cutoff, with_front=False)).best()
        if found:
            exact = pricer.exact(found[0])
            if exact.estimate.fits and exact.estimate.step_seconds <= cutoff:
                return exact
    return None


def _smaller_counts(space: Space, devices: int) -> list[int]:
    """Whole nodes, or divisors of one, whose prime factors are those of the batch or the blocks: others waste devices."""
    node = space.devices_per_node
    inside = [count for count in divisors(node) if count < min(node, devices)]
    factors = space.global_batch * space.layers
    return [count for count in (*inside, *range(node, devices, node)) if _covers(factors, count)]


def _covers(factors: int, number: int) -> bool:
    """Whether every prime factor of `number` is one of `factors`."""
    while (common := math.gcd(number, factors)) > 1:
        number //= common
    return number == 1

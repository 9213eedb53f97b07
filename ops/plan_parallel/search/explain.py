"""Why a plan is what it is: what bounds it, why others lost to it, why a layout that a user has in mind is not it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tersor.formats.errors import TersorError
from tersor.formats.units import size
from tersor.ops.plan_parallel.layout import RECOMPUTE, Layout
from tersor.ops.plan_parallel.search.bound import BranchAndBound, Known
from tersor.ops.plan_parallel.search.compare import changes, describe_memory, describe_parts, named, why_slower
from tersor.ops.plan_parallel.search.pins import parse_pins
from tersor.ops.plan_parallel.search.price import Candidate
from tersor.ops.plan_parallel.search.space import Space, divisors


def explain(best: Candidate, others: list[Candidate], limit: float) -> list[str]:
    """Sentences on a plan: what bounds it, what fills its memory, and why the runner-up lost. `others` best first."""
    lines = [f"bound by {best.estimate.bound_by}: {describe_parts(best.estimate)}", describe_memory(best, limit)]
    lines += list(best.estimate.explain)
    if others:
        lines.append(f"runner-up {changes(best.layout, others[0].layout)}: {why_slower(best, others[0])}")
    return lines


def neighbours(result, best: Candidate) -> list[tuple[str, str]]:
    """`result` is the SearchResult. (choice, what it would do) for other values of one choice, all else as in the plan."""
    layout, found = best.layout, []
    for changed in _one_choice(layout):
        other = replace(layout, **changed, stages=())
        if result.space.obstacle(other, layout.world):
            continue
        candidate = result.pricer.exact(result.pricer.price(other))
        name, value = next(iter(changed.items()))
        if not candidate.estimate.fits:
            found.append((f"{name}={value}", f"does not fit, lacks {size(candidate.estimate.short_bytes)}"))
        else:
            found.append((f"{name}={value}", why_slower(best, candidate)))
    return found


def _one_choice(layout: Layout) -> Iterator[dict[str, object]]:
    yield from ({"recompute": value} for value in RECOMPUTE if value != layout.recompute)
    for zero in (0, 1, 2, 3) if layout.dp * layout.cp > 1 else ():
        if zero != layout.zero:
            yield {"zero": zero} | ({} if zero else {"replicate": 1})
    yield {"micro_batch": 2 * layout.micro_batch}
    if layout.micro_batch % 2 == 0:
        yield {"micro_batch": layout.micro_batch // 2}
    if layout.pp > 1:
        schedules = (("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zbv", 2))
        yield from ({"schedule": name, "chunks": chunks} for name, chunks in schedules if name != layout.schedule)


def why_not(text: str, result) -> str:
    """Why the plan is not `text` (`tp=8,pp=2`): what else there is to choose is chosen as well as it can be.

    `result` is the SearchResult of the plan. Raises TersorError where `text` is no choice of a layout.
    """
    asked = parse_pins(text)
    space = replace(result.space, pins={**result.space.pins, **asked})
    devices = asked.get("devices", (result.devices,))[0]
    walk = BranchAndBound(result.pricer, space)
    found = walk.fastest(devices, Known(1, with_front=False)).best()
    if not walk.counted.considered:
        return f"{text}: {why_empty(space, devices)}"
    if not found:
        nearest = walk.nearest(devices)
        short = size(nearest.estimate.short_bytes)
        where = describe_memory(nearest, result.pricer.limit)
        return f"{text} does not fit, nearest is {named(nearest.layout)}: {where}; {short} are lacking"
    if not result.best:
        return f"{text} fits: {named(found[0].layout)}"
    best = result.best[0]
    if devices == result.devices and all(getattr(best.layout, name, devices) in asked[name] for name in asked):
        return f"{text} is part of the plan"
    return f"{text}, at its best {named(found[0].layout)}: {why_slower(best, result.pricer.exact(found[0]))}"


def smaller_cluster(result) -> str:
    """What is to be said where fewer devices do as well, '' otherwise."""
    if result.fewer is None:
        return ""
    devices = result.fewer.layout.world
    if not result.best:
        return f"{result.devices} devices have no plan, {devices} have one: {named(result.fewer.layout)}"
    words = why_slower(result.best[0], result.fewer)
    return f"{devices} of the {result.devices} devices do as well, with {named(result.fewer.layout)}: {words}"


def no_plan(result) -> TersorError:
    """What to tell when a search found nothing."""
    space, devices = result.space, result.devices
    if result.nearest is None:
        hint = smaller_cluster(result) or _other_choices(space)
        return TersorError(f"no layout for {_devices(devices)}: {why_empty(space, devices)}", hint)
    estimate = result.nearest.estimate
    short = f"{size(estimate.short_bytes)} are lacking on one device" if estimate.short_bytes else estimate.explain[-1]
    hint = f"nearest is {named(result.nearest.layout)}: {describe_memory(result.nearest, result.pricer.limit)}"
    ways = ["more devices"]
    if "gpu" in space.tiers and len(space.tiers) == 1 and "offload" not in space.pins:
        ways.append("--tiers gpu,cpu")
    if space.pins:
        ways.append("fewer pinned choices")
    return TersorError(f"no plan fits on {_devices(devices)}: {short}", f"{hint}; try {', '.join(ways)}")


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"


def _other_choices(space: Space) -> str:
    if space.pins:
        return f"pinned are {', '.join(space.pins)}: leave some to the planner"
    return "use another number of devices, or another global batch"


def why_empty(space: Space, devices: int) -> str:
    """Why there is no layout: the first rule that leaves none."""
    pins = space.pins
    options = [pins.get(name, (1,)) for name in ("tp", "pp", "cp", "dp")]
    if all(devices % math.prod(values) for values in product(*options)):
        named = {name: pins[name] for name in ("tp", "pp", "cp", "dp") if name in pins}
        words = " times ".join(f"{name}={' or '.join(map(str, values))}" for name, values in named.items())
        return f"{words} does not divide {devices} devices"
    for axis in ("tp", "ep", "etp"):
        reasons = [space.legal.why_not(axis, degree) for degree in pins.get(axis, (1,))]
        if axis != "tp" and not space.experts and axis in pins and 1 not in pins[axis]:
            return f"{axis} cuts experts, this model has none"
        if all(reasons):
            return reasons[0]
    if "pp" in pins and min(pins["pp"]) > space.layers:
        return f"pp={min(pins['pp'])} needs as many blocks at least, there are {space.layers}"
    if broken := _rules_broken(space, devices):
        return "; ".join(broken.values())
    freed = [
        name for name in pins if _any_layout(replace(space, pins={k: v for k, v in pins.items() if k != name}), devices)
    ]
    if freed:
        return f"no layout has all that is pinned; without {' or without '.join(freed)} there are some"
    return "no degrees divide it"


def _rules_broken(space: Space, devices: int) -> dict[str, str]:
    """An example of each kind of rule that the layouts with the pinned degrees break, none where one breaks no rule."""
    pins, found = space.pins, {}
    for tp, cp, pp in product(
        pins.get("tp", divisors(devices)), pins.get("cp", (1,)), pins.get("pp", divisors(devices))
    ):
        inside = tp * cp * pp
        if devices % inside or ("dp" in pins and devices // inside not in pins["dp"]):
            continue
        if why := space.legal.why_not("tp", tp) or space.cp_obstacle(cp):
            found.setdefault("degrees", why)
            continue
        dp = devices // inside
        for micro_batch in pins.get("micro_batch", (1,)):
            if space.global_batch % (dp * micro_batch):
                found.setdefault("batch", space.batch_obstacle(dp, micro_batch))
                continue
            micro_batches = space.global_batch // (dp * micro_batch)
            for schedule, chunks in space.schedules(pp, micro_batches):
                why = space.schedule_obstacle(schedule, pp, chunks, micro_batches)
                if not why:
                    return {}
                found.setdefault(why.split()[0].split("=")[0], why)
    return found


def _any_layout(space: Space, devices: int) -> bool:
    return next(space.layouts(devices), None) is not None

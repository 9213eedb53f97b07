"""How many requests a second an instance carries within limits, in each of three roles, and how it then feels to a user.

*prefill*: prompts wait in one queue and are read some at a time. *decode*: as many sequences at once as memory and the limit
on the time between tokens allow. *both*: prompts go first, so that every prompt that is read holds up all answers of its
rank by as long as that takes; over an answer of G tokens a sequence meets `batch` prompts, itself counted (after DistServe,
Zhong et al. 2024, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.serve.costs import ServeCosts
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.memory import STEP_TOKENS
from tersor.ops.plan_parallel.serve.queueing import highest_rate, wait


@dataclass(frozen=True)
class Limits:
    """Seconds, infinite where there is no limit. `ttft` is to the first token, `tpot` between tokens on average."""

    ttft: float = inf
    tpot: float = inf

    @classmethod
    def of(cls, workload: Workload) -> Limits:
        return cls(
            inf if workload.ttft_seconds is None else workload.ttft_seconds,
            inf if workload.tpot_seconds is None else workload.tpot_seconds,
        )


@dataclass(frozen=True)
class Operating:
    """A role at work. `requests_per_second` of the instance; `batch` sequences (or prompts) of each of its ranks at once.

    `ttft_seconds` holds for 9 of 10 requests where they wait in line, `tpot_seconds` is a mean. `held_by` says what keeps it
    from more: memory, ttft, tpot, compute (all the time there is), or load (no more is asked).
    """

    role: str
    requests_per_second: float
    batch: int
    prompts: int
    ttft_seconds: float
    tpot_seconds: float
    held_by: str


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which `holds`, which it does not for any above; 0 for none."""
    if most < 1 or not holds(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _prompts_at_once(costs: ServeCosts) -> list[int]:
    found = [1]
    while 2 * found[-1] * costs.prompt <= STEP_TOKENS:
        found.append(2 * found[-1])
    return found


def prefill(costs: ServeCosts, instance: Instance, limits: Limits, rate: float | None = None) -> Operating | None:
    """At `rate` requests a second, or at the most that it carries; None where it cannot keep to the limit."""
    most, _ = costs.room(instance)
    best: Operating | None = None
    for prompts in _prompts_at_once(costs):
        step = costs.read(instance, prompts)
        together = instance.layout.dp * prompts
        service = step.slowest / together
        if most < prompts or step.seconds > limits.ttft:
            break
        if rate is not None:
            ttft = step.seconds + wait(rate / together, step.slowest)
            found = Operating("prefill", rate, prompts, prompts, ttft, 0.0, "load")
            if ttft <= limits.ttft and ttft < inf and (best is None or ttft < best.ttft_seconds):
                best = found
            continue
        carried, held = 1 / service, "compute"
        ttft = step.seconds
        if limits.ttft < inf:
            carried = together * highest_rate(step.slowest, limits.ttft - step.seconds)
            ttft, held = limits.ttft, "ttft"
        if best is None or carried > best.requests_per_second:
            best = Operating("prefill", carried, prompts, prompts, ttft, 0.0, held)
    return best


def decode(
    costs: ServeCosts, instance: Instance, limits: Limits, rate: float | None = None, extra: float = 0.0
) -> Operating | None:
    """`extra` seconds pass once an answer (bringing the cache), and count for its tokens."""
    most, _ = costs.room(instance)
    steps = max(1, costs.generate - 1)

    def between(batch: int) -> float:
        return costs.token_seconds(instance, batch) + extra / steps

    def carried(batch: int) -> float:
        return instance.layout.dp * batch / (costs.token_seconds(instance, batch) * steps)

    return _held("decode", instance, most, limits.tpot, between, carried, lambda _: 0.0, rate)


def both(costs: ServeCosts, instance: Instance, limits: Limits, rate: float | None = None) -> Operating | None:
    """Prompts and answers on the same devices."""
    most, _ = costs.room(instance)
    steps = costs.generate - 1
    best: Operating | None = None
    for prompts in _prompts_at_once(costs):
        step = costs.read(instance, prompts)
        if step.seconds > limits.ttft:
            break
        busy = step.slowest / prompts  # of a rank, for each request
        together = instance.layout.dp * prompts

        def carried(batch: int, busy: float = busy) -> float:
            return instance.layout.dp * batch / (costs.token_seconds(instance, batch) * steps + batch * busy)

        def between(batch: int, busy: float = busy) -> float:
            return costs.token_seconds(instance, batch) + batch * busy / steps if steps else 0.0

        def first(batch: int, step=step, together: int = together, carried=carried) -> float:
            """Behind half a step of those that answer, and the prompts that came before."""
            under = carried(batch) if rate is None else min(rate, carried(batch))
            queue = wait(under / together, step.slowest) if limits.ttft < inf or rate is not None else 0.0
            return step.seconds + queue + (costs.token_seconds(instance, batch) / 2 if steps else 0.0)

        found = _held("both", instance, most, limits.tpot, between, carried, first, rate, limits.ttft, prompts)
        if found is not None and (best is None or _better(found, best, rate)):
            best = found
    return best


def _better(one: Operating, other: Operating, rate: float | None) -> bool:
    if rate is None:
        return one.requests_per_second > other.requests_per_second
    return (one.ttft_seconds, one.tpot_seconds) < (other.ttft_seconds, other.tpot_seconds)


def _held(
    role: str,
    instance: Instance,
    most: int,
    tpot: float,
    between: Callable[[int], float],
    carried: Callable[[int], float],
    first: Callable[[int], float],
    rate: float | None,
    ttft: float = inf,
    prompts: int = 1,
) -> Operating | None:
    """The largest batch within the limits, or for a `rate` the smallest that carries it."""
    batch = _largest(most, lambda batch: between(batch) <= tpot and first(batch) <= ttft and first(batch) < inf)
    if not batch:
        return None
    held = "memory" if batch == most else "tpot" if between(batch + 1) > tpot else "ttft"
    if rate is not None:
        if carried(batch) < rate:
            return None
        batch = 1 + _largest(batch - 1, lambda batch: carried(batch) < rate)
        held = "load"
    return Operating(role, carried(batch) if rate is None else rate, batch, prompts, first(batch), between(batch), held)

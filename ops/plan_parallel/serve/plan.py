"""A plan to serve: groups of equal instances, that read prompts and write answers together or apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.formats.units import latency, number, percent, size
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.serve.costs import ServeCosts
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.rates import Operating
from tersor.ops.plan_parallel.serve.steps import PARTS

TOGETHER, APART = "together", "apart"
HELD_BY = {
    "memory": "memory for the cache",
    "tpot": "the limit on the time between tokens",
    "ttft": "the limit on the time to the first token",
    "compute": "the time that the devices have",
    "load": "what is asked",
    "alone": "one request at a time",
}


@dataclass(frozen=True)
class Group:
    """`replicas` of one instance in one role; `operating` speaks of one of them."""

    instance: Instance
    replicas: int
    operating: Operating

    @property
    def devices(self) -> int:
        return self.replicas * self.instance.devices

    @property
    def requests_per_second(self) -> float:
        return self.replicas * self.operating.requests_per_second

    @property
    def layout(self) -> Layout:
        return self.instance.of_replicas(self.replicas)

    def describe(self) -> str:
        each = self.instance.describe()
        return f"{self.replicas} x ({each})" if self.replicas > 1 else each


@dataclass(frozen=True)
class ServePlan:
    """`groups` are one (role both) or two (prefill, decode). `transfer_seconds` takes the cache of a prompt from one to the
    other; it counts in `tpot_seconds`, spread over an answer."""

    groups: tuple[Group, ...]
    requests_per_second: float
    ttft_seconds: float
    tpot_seconds: float
    generate: int
    transfer_seconds: float = 0.0

    @property
    def kind(self) -> str:
        return TOGETHER if len(self.groups) == 1 else APART

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def tokens_per_second(self) -> float:
        """Generated."""
        return self.requests_per_second * self.generate

    @property
    def answer_seconds(self) -> float:
        """Of one request, from its arrival to its last token."""
        return self.ttft_seconds + (self.generate - 1) * self.tpot_seconds

    def describe(self) -> str:
        if self.kind == TOGETHER:
            return self.groups[0].describe()
        first, second = self.groups
        return f"prefill {first.describe()}, decode {second.describe()}"

    def numbers(self) -> dict:
        """What plan.json holds of it."""
        return {
            "kind": self.kind,
            "devices": self.devices,
            "requests_per_second": self.requests_per_second,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": self.tokens_per_second / self.devices,
            "ttft_seconds": self.ttft_seconds,
            "tpot_seconds": self.tpot_seconds,
            "transfer_seconds": self.transfer_seconds,
            "groups": [
                {
                    "role": group.operating.role,
                    "replicas": group.replicas,
                    "devices": group.devices,
                    "tp": group.instance.layout.tp,
                    "pp": group.instance.layout.pp,
                    "dp": group.instance.layout.dp,
                    "ep": group.instance.layout.ep,
                    "etp": group.instance.layout.etp,
                    "dcp": group.instance.dcp,
                    "stages": list(group.instance.layout.stages),
                    "batch": group.operating.batch,
                    "prompts": group.operating.prompts,
                    "held_by": group.operating.held_by,
                }
                for group in self.groups
            ],
        }


def rank(plan: ServePlan, workload: Workload) -> tuple:
    """Smaller is better. Throughput: most requests, or where a rate is given the fewest devices for it. Latency: the
    soonest answer. Then the other one, then what is simplest."""
    simple = (len(plan.groups), plan.devices, plan.describe())
    if workload.objective == "latency":
        return (round(plan.answer_seconds, 9), *simple)
    if workload.rate is not None:
        return (plan.devices, round(plan.answer_seconds, 9), *simple)
    return (-round(plan.requests_per_second, 9), round(plan.answer_seconds, 9), *simple)


def explain(plan: ServePlan, others: Sequence[ServePlan], costs: ServeCosts, workload: Workload) -> list[str]:
    """Sentences: what bounds it, what fills its memory, why prompts and answers are apart or not, why the next one lost.
    `others` best first."""
    lines = []
    for group in plan.groups:
        lines += _bounds(group, costs)
        lines.append(_memory(group, costs))
    lines.append(_apart_or_not(plan, others, costs, workload))
    rival = next((other for other in others if other.kind == plan.kind), None)
    if rival is not None:
        lines.append(f"runner-up {rival.describe()}: {why_lost(plan, rival, workload)}")
    return lines


def _bounds(group: Group, costs: ServeCosts) -> list[str]:
    lines, operating = [], group.operating
    pp = group.instance.layout.pp
    if operating.role != "decode":
        step = costs.read(group.instance, operating.prompts)
        prompts = f"{operating.prompts} prompts" if operating.prompts > 1 else "a prompt"
        lines.append(f"reading {prompts} takes {latency(step.seconds)}: {_shares(step.parts)}")
    if operating.role != "prefill" and costs.generate > 1:
        step = costs.write(group.instance, -(-operating.batch // pp))
        lines.append(f"a token for {operating.batch} sequences takes {latency(step.seconds)}: {_shares(step.parts)}")
    lines.append(f"{operating.role} is held by {HELD_BY[operating.held_by]}")
    return lines


def _shares(parts: Sequence[float]) -> str:
    total = sum(parts) or 1.0
    shown = sorted(zip(parts, PARTS, strict=True), reverse=True)
    return ", ".join(f"{name} {percent(part / total)}" for part, name in shown if part >= 0.01 * total)


def _memory(group: Group, costs: ServeCosts) -> str:
    fullest = max(costs.memory(group.instance), key=lambda one: one.weights + one.transients)
    most, _ = costs.room(group.instance)
    return (
        f"a device holds {size(fullest.weights)} of weights and {size(fullest.sequence)} of cache for each sequence of "
        f"{number(costs.context)} tokens: room for {number(most)}"
    )


def _apart_or_not(plan: ServePlan, others: Sequence[ServePlan], costs: ServeCosts, workload: Workload) -> str:
    other = next((other for other in others if other.kind != plan.kind), None)
    words = "prompts and answers on devices of their own"
    if plan.kind == TOGETHER:
        if other is None:
            return f"{words}: no such plan fits these devices and keeps to the limits"
        return f"{words} ({other.describe()}): {why_lost(plan, other, workload)}"
    words += f" pays: the cache of a prompt takes {latency(plan.transfer_seconds)} to move"
    if other is None:
        return f"{words}; together no plan keeps to the limits"
    return f"{words}; together ({other.describe()}): {why_lost(plan, other, workload)}"


def why_lost(plan: ServePlan, other: ServePlan, workload: Workload) -> str:
    """In the terms of the objective."""
    if workload.objective == "latency":
        return f"an answer takes {latency(other.answer_seconds)}, here {latency(plan.answer_seconds)}"
    if workload.rate is not None and other.devices != plan.devices:
        return f"takes {other.devices} devices for {number(workload.rate)} requests a second, here {plan.devices}"
    if workload.rate is not None:
        return (
            f"as many devices, but an answer takes {latency(other.answer_seconds)}, here {latency(plan.answer_seconds)}"
        )
    ours, theirs = plan.requests_per_second, other.requests_per_second
    held = HELD_BY[min(other.groups, key=lambda group: group.requests_per_second).operating.held_by]
    return f"{number(theirs)} requests a second, here {number(ours)}; it is held by {held}"

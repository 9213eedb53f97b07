"""Prompts and answers on devices of their own, as many of each as they need of one another (DistServe, Zhong et al. 2024).

Reading prompts is bound by arithmetic and writing answers by memory; on the same devices each prompt holds up all answers
there, and one way to cut the model has to do for both. Apart, each kind has the instance that carries most requests for its
devices, and the cache of a prompt crosses over: that takes time, and wires that must carry it for every request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, inf

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.serve.costs import ServeCosts
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.kv import transfer_seconds
from tersor.ops.plan_parallel.serve.plan import Group, ServePlan
from tersor.ops.plan_parallel.serve.rates import Limits, Operating, decode, prefill

FEWER = 8  # instances of one kind that are tried for a rate, from the fewest on, each time half as many more


def packs(cluster: Cluster, devices: int, groups: Sequence[tuple[int, int]]) -> bool:
    """Whether (devices each, how many) find room without an instance lying over two nodes that it does not fill."""
    each = cluster.devices_per_node
    if sum(size * count for size, count in groups) > devices:
        return False
    free = [each] * (devices // each) + [devices % each] * bool(devices % each)
    for size, count in sorted(groups, reverse=True):
        if size > each:
            whole, wanted = sum(room == each for room in free), count * size // each
            if size % each or whole < wanted:
                return False
            for _ in range(wanted):
                free.remove(each)
            continue
        for index, room in enumerate(free):
            taken = min(count, room // size)
            free[index] -= taken * size
            count -= taken
        if count:
            return False
    return True


class Apart:
    """Plans from the instances that are best at one of the two, for each number of devices."""

    def __init__(self, costs: ServeCosts, cluster: Cluster, workload: Workload, devices: int):
        self.costs, self.cluster, self.workload, self.devices = costs, cluster, workload, devices
        self.limits = Limits.of(workload)
        # Devices of one node reach each other by its links; otherwise what lies between two nodes counts.
        self.gbps = cluster.link_gbps if devices <= cluster.devices_per_node else cluster.network_gbps

    def transfer(self, first: Instance, second: Instance) -> float:
        return transfer_seconds(self.costs.prompt_bytes, first.devices, second.devices, self.gbps)

    def plans(self, candidates: Iterable[Instance]) -> list[ServePlan]:
        """The best plan of every pair of sizes."""
        candidates = [instance for instance in candidates if self.costs.room(instance)[0]]
        if self.costs.generate < 2:
            return []
        readers, writers = self._best("prefill", candidates), self._best("decode", candidates)
        found = (self._pair(reader, writer) for reader in readers for writer in writers)
        return [plan for plan in found if plan is not None]

    def _best(self, role: str, candidates: list[Instance]) -> list[tuple[Instance, Operating]]:
        """Of every size the instance that carries most, or that answers soonest."""
        chosen: dict[int, tuple[tuple, Instance, Operating]] = {}
        for instance in candidates:
            found = (prefill if role == "prefill" else decode)(self.costs, instance, self.limits)
            if found is None:
                continue
            score = (-found.requests_per_second, instance.describe())
            if self.workload.objective == "latency":
                quick = self.costs.read(instance, 1).seconds
                score = (quick if role == "prefill" else self.costs.token_seconds(instance, 1), *score)
            if instance.devices not in chosen or score < chosen[instance.devices][0]:
                chosen[instance.devices] = (score, instance, found)
        return [(instance, found) for _, instance, found in chosen.values()]

    def _pair(self, reader: tuple[Instance, Operating], writer: tuple[Instance, Operating]) -> ServePlan | None:
        (first, reads), (second, _) = reader, writer
        if first.devices + second.devices > self.devices:
            return None
        extra = self.transfer(first, second)
        writes = decode(self.costs, second, self.limits, None, extra)
        if writes is None or not reads.requests_per_second:
            return None
        carried = [one.requests_per_second for one in (reads, writes)]
        carried[0] = min(carried[0], 1 / extra if extra else inf)  # the wires of an instance, all day long
        carried[1] = min(carried[1], 1 / extra if extra else inf)
        if self.workload.rate is not None:
            return self._for_rate(first, second, carried, extra)
        if self.workload.objective == "latency":
            return self._alone(first, second, extra)
        best: tuple[float, int, int, int] | None = None
        for count in range(1, (self.devices - second.devices) // first.devices + 1):
            others = (self.devices - count * first.devices) // second.devices
            rate = min(count * carried[0], others * carried[1])
            others = min(others, ceil(rate / carried[1] - 1e-9))  # no more than keep up
            choice = (rate, -(count * first.devices + others * second.devices), count, others)
            if (best is None or choice > best) and self._packs(first, count, second, others):
                best = choice
        if best is None:
            return None
        rate, _, count, others = best
        return self._plan(Group(first, count, reads), Group(second, others, writes), rate, extra)

    def _packs(self, first: Instance, count: int, second: Instance, others: int) -> bool:
        return packs(self.cluster, self.devices, [(first.devices, count), (second.devices, others)])

    def _for_rate(self, first: Instance, second: Instance, carried: list[float], extra: float) -> ServePlan | None:
        rate = self.workload.rate
        least, others = (ceil(rate / each - 1e-9) for each in carried)
        counts, most = [least], (self.devices - others * second.devices) // first.devices
        if self.workload.objective == "latency":
            while len(counts) < FEWER and counts[-1] < most:
                counts.append(min(most, counts[-1] + max(1, counts[-1] // 2)))
        best: ServePlan | None = None
        for count in counts:
            more = others
            if self.workload.objective == "latency":
                more = (self.devices - count * first.devices) // second.devices
            if more < others or not self._packs(first, count, second, more):
                continue
            reads = prefill(self.costs, first, self.limits, rate / count)
            writes = decode(self.costs, second, self.limits, rate / more, extra)
            if reads is None or writes is None:
                continue
            plan = self._plan(Group(first, count, reads), Group(second, more, writes), rate, extra)
            if best is None or plan.answer_seconds < best.answer_seconds:
                best = plan
        return best

    def _alone(self, first: Instance, second: Instance, extra: float) -> ServePlan | None:
        """One request at a time, in one instance of each."""
        if not self._packs(first, 1, second, 1):
            return None
        reading = self.costs.read(first, 1).seconds
        token = self.costs.token_seconds(second, 1) + extra / (self.costs.generate - 1)
        if reading > self.limits.ttft or token > self.limits.tpot:
            return None
        rate = 1 / (reading + (self.costs.generate - 1) * token)
        reads = Operating("prefill", rate, 1, 1, reading, 0.0, "alone")
        writes = Operating("decode", rate, 1, 1, 0.0, token, "alone")
        return self._plan(Group(first, 1, reads), Group(second, 1, writes), rate, extra)

    def _plan(self, first: Group, second: Group, rate: float, extra: float) -> ServePlan:
        return ServePlan(
            (first, second),
            rate,
            first.operating.ttft_seconds,
            second.operating.tpot_seconds,
            self.costs.generate,
            extra,
        )

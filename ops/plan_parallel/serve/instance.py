"""A serving instance: the devices that hold one copy of a model and run its steps together, and which of them there are.

Ranks count as in `layout.Mesh`. `dp` are the ranks that read requests of their own but share experts, so that they go in
step; a dense model has one, and more copies of it are more instances. Experts lie on all ranks of a stage:
`ep * etp == tp * dp`, as engines have it. `dcp` cuts the cache of a sequence by its tokens over tensor-parallel ranks that
would hold copies of the same keys and values (vLLM's decode context parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.search.pins import Pins
from tersor.ops.plan_parallel.search.space import Legality, divisors

MOST_STAGES = 16  # of a pipeline, unless pinned: a token passes through all of them one after the other


class Instance(NamedTuple):
    """`layout.dp` are the ranks of this instance alone."""

    layout: Layout
    dcp: int = 1

    @property
    def devices(self) -> int:
        return self.layout.world

    def describe(self) -> str:
        return self.layout.describe() + (f",dcp={self.dcp}" if self.dcp > 1 else "")

    def of_replicas(self, replicas: int) -> Layout:
        """All instances as one layout."""
        return replace(self.layout, dp=self.layout.dp * replicas)


def fit_on(cluster: Cluster, devices: int, size: int) -> int:
    """How many instances of `size` devices the first `devices` of the cluster hold: several to a node, or whole nodes each."""
    each = cluster.devices_per_node
    if size <= each:
        return devices // each * (each // size) + devices % each // size
    return devices // each // (size // each) if size % each == 0 else 0


def first_devices(cluster: Cluster, groups: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Where the instances of each group begin, given as (devices of one, how many): larger ones first, and none over two
    nodes that it does not fill."""
    each, taken = cluster.devices_per_node, [0] * cluster.nodes
    found: list[list[int]] = [[] for _ in groups]
    for size, place, count in sorted(
        ((size, place, count) for place, (size, count) in enumerate(groups)), reverse=True
    ):
        wide, inside = max(1, size // each), min(size, each)
        for _ in range(count):
            node = next(
                first
                for first in range(cluster.nodes - wide + 1)
                if all(taken[node] + inside <= each for node in range(first, first + wide))
            )
            found[place].append(node * each + taken[node])
            taken[node : node + wide] = [taken[node] + inside] * wide
    return found


def devices_of(instance: Instance, firsts: Sequence[int]) -> list[int]:
    """The device of each rank, where all instances are one layout (`of_replicas`): its ranks count the first stage of all
    of them before the second."""
    inside = instance.devices // instance.layout.pp
    return [
        first + stage * inside + rank
        for stage in range(instance.layout.pp)
        for first in firsts
        for rank in range(inside)
    ]


def instances(
    model: PlanModel, cluster: Cluster, legal: Legality, pins: Pins | None = None, devices: int | None = None
) -> Iterator[Instance]:
    """Every instance that a node holds evenly, or that takes whole nodes. `pins` allow values by field of Layout; that of
    `dp` counts all instances together and is left to the caller."""
    pins, devices = pins or {}, devices or cluster.devices
    facts = model.facts
    each = cluster.devices_per_node
    for tp in pins.get("tp", divisors(each)):
        if legal.why_not("tp", tp) or tp > devices:
            continue
        for pp in pins.get("pp", range(1, min(MOST_STAGES, facts.layers, devices // tp) + 1)):
            if pp > facts.layers:
                continue
            for ranks in _ranks(facts.experts, devices // (tp * pp)):
                size = tp * pp * ranks
                if not fit_on(cluster, devices, size) or (size < each and each % size):
                    continue
                for ep, etp in _expert_degrees(facts.experts, tp * ranks, tp, legal, pins):
                    layout = Layout(tp=tp, pp=pp, dp=ranks, ep=ep, etp=etp)
                    stages = [
                        cut
                        for cut in pins.get("stages", ((),))
                        if not cut or (len(cut) == pp and sum(cut) == facts.layers)
                    ]
                    for cut in stages:
                        for dcp in _cache_shares(model, tp):
                            yield Instance(replace(layout, stages=tuple(cut)), dcp)


def _ranks(experts: int, most: int) -> list[int]:
    """Data-parallel ranks that share experts: powers of two and what divides the experts."""
    if not experts:
        return [1] if most else []
    return [ranks for ranks in range(1, most + 1) if ranks & (ranks - 1) == 0 or experts % ranks == 0]


def _expert_degrees(experts: int, inside: int, tp: int, legal: Legality, pins: Pins) -> Iterator[tuple[int, int]]:
    if not experts:
        if 1 in pins.get("ep", (1,)) and 1 in pins.get("etp", (1,)):
            yield 1, 1
        return
    for etp in divisors(inside):
        ep = inside // etp
        if etp > tp or ep not in pins.get("ep", (ep,)) or etp not in pins.get("etp", (etp,)):
            continue
        if not legal.why_not("ep", ep) and not legal.why_not("etp", etp):
            yield ep, etp


def _cache_shares(model: PlanModel, tp: int) -> list[int]:
    """Degrees of decode context parallelism: copies of the same keys and values that there are to be cut."""
    heads = {
        1 if attention.latent else attention.kv_heads for attention in model.facts.attends if not attention.recurrent
    }
    copies = tp // max(heads, default=tp) if tp > max(heads, default=tp) else 1
    return [1] if copies == 1 or any(tp % head for head in heads) else [1, copies]

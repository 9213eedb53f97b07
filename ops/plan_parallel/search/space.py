"""Which layouts there are for a model on so many devices, as a tree: degrees, then groups, then whole layouts.

Any whole degree that divides is tried. Rules of two kinds leave layouts out. What cannot run is never tried, and
`obstacle` says why. What is never the better choice is tried only when it is pinned:
  - tensor parallelism over several nodes, and experts cut over several nodes inside one expert;
  - context parallelism that leaves a rank fewer than MIN_CONTEXT tokens of a sequence;
  - more interleaved chunks than bring the bubble down to SMALL_BUBBLE, as every chunk sends once more;
  - GPipe, which has the bubble of 1F1B and keeps all micro-batches;
  - a pipeline schedule other than 1F1B, or chunks, on a pipeline of one rank;
  - ZeRO where there is one rank to cut over, and replicas of shards other than one per node;
  - ZeRO 3 with a zero-bubble schedule, whose split backward pass gathers the weights once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from tersor.ops.plan_parallel.layout import RECOMPUTE, Layout
from tersor.ops.plan_parallel.search.pins import TIERS, Pins

MIN_CONTEXT = 4096  # tokens that a context-parallel rank keeps at least, for its attention to cover the exchange
SMALL_BUBBLE = 0.01  # of a step
ALL_ZERO = (0, 1, 2, 3)
ZERO_BUBBLE = ("zb-h1", "zbv")


class Degrees(NamedTuple):
    """The first level: how the devices are divided."""

    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int


class Group(NamedTuple):
    """The second level: all but what is computed again. `recompute` are the choices, the least first."""

    degrees: Degrees
    replicate: int
    zero: int
    micro_batch: int
    schedule: str
    chunks: int
    stages: tuple[int, ...]
    offload: str
    tier: str
    recompute: tuple[str, ...]

    def layout(self, recompute: str) -> Layout:
        degrees, *rest, offload, tier, _ = self
        return Layout(*degrees, *rest, recompute, offload, tier)


class Legality(NamedTuple):
    """By degree '' or why a model cannot be cut so; degrees that are not listed are not known to be legal."""

    tp: Mapping[int, str]
    ep: Mapping[int, str]
    etp: Mapping[int, str]

    def why_not(self, axis: str, degree: int) -> str:
        if degree == 1:
            return ""
        return getattr(self, axis).get(degree, f"{axis}={degree} is beyond the degrees that are looked at")


@cache
def divisors(number: int) -> tuple[int, ...]:
    small = [factor for factor in range(1, int(number**0.5) + 1) if number % factor == 0]
    return tuple(sorted({*small, *(number // factor for factor in small)}))


@dataclass(frozen=True)
class Space:
    """`pins` are allowed values by field (`check_pins`), `tiers` where states may be kept: gpu, cpu, nvme."""

    layers: int
    experts: int
    devices_per_node: int
    global_batch: int
    seq_len: int
    legal: Legality
    pins: Pins = field(default_factory=dict)
    tiers: tuple[str, ...] = ("gpu",)

    def layouts(self, devices: int) -> Iterator[Layout]:
        """Every layout, in a fixed order."""
        for group in self.groups(devices):
            yield from map(group.layout, group.recompute)

    def groups(self, devices: int) -> Iterator[Group]:
        recompute = tuple(sorted(self._choose("recompute", RECOMPUTE), key=RECOMPUTE.index))
        for degrees in self.degrees(devices):
            for micro_batch, schedule, chunks in self._pipelines(degrees):
                for stages in self.pins.get("stages", ((),)):
                    if stages and (len(stages) != degrees.pp * chunks or sum(stages) != self.layers):
                        continue
                    for zero, replicate in self._shards(degrees):
                        if zero == 3 and schedule in ZERO_BUBBLE and not {"zero", "schedule"} <= self.pins.keys():
                            continue  # and with FSDP2 gradients get lost (torch 2.13)
                        for offload, tier in self._offload():
                            yield Group(
                                degrees,
                                replicate,
                                zero,
                                micro_batch,
                                schedule,
                                chunks,
                                stages,
                                offload,
                                tier,
                                recompute,
                            )

    def degrees(self, devices: int) -> Iterator[Degrees]:
        for tp in self._choose("tp", divisors(devices), lambda tp: tp <= self.devices_per_node):
            if devices % tp or self.legal.why_not("tp", tp):
                continue
            for cp in self._choose("cp", divisors(devices // tp), self._long_enough):
                if devices // tp % cp or self.cp_obstacle(cp):
                    continue
                for pp in self._choose("pp", divisors(devices // tp // cp)):
                    if devices // tp // cp % pp or pp > self.layers:
                        continue
                    dp = devices // (tp * cp * pp)
                    if not self.global_batch % dp and self._allowed("dp", dp):
                        yield from self._with_experts(tp, pp, dp, cp)

    def _with_experts(self, tp: int, pp: int, dp: int, cp: int) -> Iterator[Degrees]:
        if not self.experts:
            if self._allowed("ep", 1) and self._allowed("etp", 1):
                yield Degrees(tp, pp, dp, cp, 1, 1)
            return
        inside = tp * dp * cp
        for etp in self._choose("etp", divisors(inside), lambda etp: etp <= self.devices_per_node):
            if inside % etp or self.legal.why_not("etp", etp):
                continue
            for ep in self._choose("ep", divisors(inside // etp)):
                if inside // etp % ep == 0 and not self.legal.why_not("ep", ep):
                    yield Degrees(tp, pp, dp, cp, ep, etp)

    def _pipelines(self, degrees: Degrees) -> Iterator[tuple[int, str, int]]:
        """(micro-batch, schedule, chunks)"""
        per_rank = self.global_batch // degrees.dp
        for micro_batch in self._choose("micro_batch", divisors(per_rank)):
            if per_rank % micro_batch:
                continue
            micro_batches = per_rank // micro_batch
            for schedule, chunks in self.schedules(degrees.pp, micro_batches):
                if not self.schedule_obstacle(schedule, degrees.pp, chunks, micro_batches):
                    yield micro_batch, schedule, chunks

    def schedules(self, pp: int, micro_batches: int) -> Iterator[tuple[str, int]]:
        for schedule in self._choose("schedule", ("1f1b", "interleaved", "zb-h1", "zbv") if pp > 1 else ("1f1b",)):
            for chunks in self._choose("chunks", self._chunks(schedule, pp, micro_batches)):
                yield schedule, chunks

    def _chunks(self, schedule: str, pp: int, micro_batches: int) -> tuple[int, ...]:
        """Of interleaved: those that cut the blocks of a rank evenly, where ranks have as many of them or one more."""
        if schedule != "interleaved":
            return (2,) if schedule == "zbv" else (1,)
        # with the embedding and the head counted as blocks, stages of their own make many cuts even (126 = 16 * 8 - 2)
        per_rank = {self.layers // pp, -(-self.layers // pp), (self.layers + 2) // pp}
        found = sorted({chunks for blocks in per_rank for chunks in divisors(blocks)} - {1})
        enough = (pp - 1) / (SMALL_BUBBLE * micro_batches)
        return tuple(chunks for place, chunks in enumerate(found) if not place or found[place - 1] < enough)

    def _shards(self, degrees: Degrees) -> Iterator[tuple[int, int]]:
        """(ZeRO stage, replicas of the shards)"""
        ranks = degrees.dp * degrees.cp  # with the same dense weights; fewer or more have the same expert
        cut = ranks > 1 or (self.experts > 0 and ranks * degrees.tp > degrees.ep * degrees.etp)
        for zero in self._choose("zero", ALL_ZERO if cut else (0,)):
            inside = self.devices_per_node // (degrees.tp * degrees.cp)
            local = degrees.dp // inside if zero and inside > 1 and degrees.dp % inside == 0 else 1
            for replicate in self._choose("replicate", dict.fromkeys((1, local))):
                if degrees.dp % replicate == 0:
                    yield zero, replicate

    def _offload(self) -> Iterator[tuple[str, str]]:
        tiers = self.pins.get("tier", tuple(tier for tier in TIERS if tier in self.tiers))
        kinds = self._choose("offload", ("none", "optimizer", "states") if tiers else ("none",))
        if "none" in kinds:
            yield "none", "cpu"
        for offload in ("optimizer", "states"):
            if offload in kinds:
                for tier in tiers or ("cpu",):
                    yield offload, tier

    def _choose(self, name: str, found: Iterable, sensible=None) -> tuple:
        """The pinned values of a field, or those of `found` that are sensible."""
        if name in self.pins:
            return self.pins[name]
        return tuple(value for value in found if sensible is None or sensible(value))

    def _allowed(self, name: str, value: object) -> bool:
        return name not in self.pins or value in self.pins[name]

    def _long_enough(self, cp: int) -> bool:
        return cp == 1 or self.seq_len // cp >= MIN_CONTEXT

    def cp_obstacle(self, cp: int) -> str:
        if cp > 1 and self.seq_len % (2 * cp):
            return (
                f"cp={cp} cuts a sequence into {2 * cp} equal parts (an early and a late one for each rank), "
                f"{self.seq_len} tokens are not a multiple of that"
            )
        return ""

    def schedule_obstacle(self, schedule: str, pp: int, chunks: int, micro_batches: int) -> str:
        most = self.layers + 2 if pp > 1 and chunks > 1 else self.layers  # the first and the last may have no block
        if pp * chunks > most:
            return f"pp={pp} with {chunks} chunks needs {pp * chunks} stages, there are {self.layers} blocks"
        if schedule == "interleaved":
            if pp == 1 or chunks == 1:
                return "schedule=interleaved needs pp of 2 or more, and 2 chunks or more"
            if micro_batches % pp:
                return f"schedule=interleaved needs micro-batches in multiples of pp={pp}, a step has {micro_batches}"
        elif chunks != (2 if schedule == "zbv" else 1):
            return f"schedule={schedule} has {2 if schedule == 'zbv' else 1} chunks per rank, not {chunks}"
        if schedule in ("zb-h1", "zbv"):
            least = pp * chunks
            if pp == 1:
                return f"schedule={schedule} needs a pipeline of 2 ranks or more"
            if micro_batches < least:
                return f"schedule={schedule} needs {least} micro-batches or more, a step has {micro_batches}"
        return ""

    def batch_obstacle(self, dp: int, micro_batch: int) -> str:
        return f"a global batch of {self.global_batch} is not a multiple of dp={dp} times micro_batch={micro_batch}"

    def obstacle(self, layout: Layout, devices: int) -> str:
        """Why `layout` cannot run on `devices` devices, '' if it can. What is only never better is no obstacle."""
        if devices % layout.world:
            return f"tp*pp*dp*cp is {layout.world}, which does not divide {devices} devices"
        if layout.world != devices:
            return f"tp*pp*dp*cp is {layout.world}, there are {devices} devices"
        for axis in ("tp", "ep", "etp"):
            degree = getattr(layout, axis)
            if axis != "tp" and degree > 1 and not self.experts:
                return f"{axis}={degree} cuts experts, this model has none"
            if why := self.legal.why_not(axis, degree):
                return why
        if why := self.cp_obstacle(layout.cp):
            return why
        if self.global_batch % (layout.dp * layout.micro_batch):
            return self.batch_obstacle(layout.dp, layout.micro_batch)
        if layout.stages and sum(layout.stages) != self.layers:
            return f"stages hold {sum(layout.stages)} blocks in all, the model has {self.layers}"
        micro_batches = self.global_batch // (layout.dp * layout.micro_batch)
        return self.schedule_obstacle(layout.schedule, layout.pp, layout.chunks, micro_batches)

"""What a layout costs: memory of every rank and seconds of a training step, with what they are made of.

Pieces of the model that are equal (PlanModel.signatures) are priced once, and each of their terms is remembered by the
choices that it hangs on, so that a search can ask for many thousand layouts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.cost.activations import block_bytes, head_bytes
from tersor.ops.plan_parallel.cost.compute import Device, Seconds, piece_operators, piece_seconds
from tersor.ops.plan_parallel.cost.constants import RUNTIMES, Runtime
from tersor.ops.plan_parallel.cost.conventions import Kept, States, kept
from tersor.ops.plan_parallel.cost.measured import Measured
from tersor.ops.plan_parallel.cost.memory import Memory, even_stages
from tersor.ops.plan_parallel.cost.offload import Offload
from tersor.ops.plan_parallel.cost.shape import block_shape
from tersor.ops.plan_parallel.cost.states import Held, held_by_rank, states_of, tied_table
from tersor.ops.plan_parallel.cost.traffic import DataTraffic, block_traffic
from tersor.ops.plan_parallel.dependencies.collectives import block_collectives
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import BACK, FRONT, PlanModel
from tersor.ops.plan_parallel.request import Workload

PARTS = ("compute", "tp", "cp", "ep", "dp", "pp", "bubble", "optimizer", "offload")


@dataclass(frozen=True)
class StageEstimate:
    """One of the `pp * chunks` stages, in model order. Seconds are of one micro-batch, with the collectives that are not
    hidden. `memory` is that of the pipeline rank `rank` that holds it, all its chunks together."""

    blocks: int
    rank: int
    forward_seconds: float
    backward_seconds: float
    memory: Memory
    backward_input_seconds: float = 0.0
    backward_weight_seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """`parts` are seconds of the step by what they go to, on the pipeline rank that decides; they add up to it.
    `peak_bytes` is the fullest rank's, `short_bytes` what it lacks, 0 where the layout fits. `mfu` counts the model's own
    arithmetic against the bf16 peak."""

    layout: Layout
    fits: bool
    step_seconds: float
    tokens_per_second: float
    mfu: float
    stages: tuple[StageEstimate, ...]
    parts: dict[str, float]
    bound_by: str
    peak_bytes: float
    short_bytes: float
    explain: list[str]
    micro_batches: int = 1
    send_seconds: float = 0.0
    offload: Offload | None = None


class PieceCost(NamedTuple):
    """Of one piece and micro-batch on a rank: seconds of computing, traffic that is not hidden, and bytes."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    forward_traffic: float = 0.0
    backward_traffic: float = 0.0
    kept_bytes: float = 0.0
    working_bytes: float = 0.0
    logit_bytes: float = 0.0
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward_input + self.backward_weight + self.forward_traffic + self.backward_traffic


class StageCost(NamedTuple):
    """Sums over the pieces of a stage; `working` and `largest` (numbers of its largest block) are of one piece."""

    cost: PieceCost
    held: Held
    largest: float
    pieces: int


class Costs:
    """`links` is communication.links.Links or what has its `seconds` and `span`. `collectives` lists those of a block, in
    place of dependencies.collectives. `measured` are the times of `profile --measure` (cost.measured.read_measured)."""

    def __init__(
        self, model: PlanModel, cluster, links, workload: Workload, convention: str = "megatron",
        measured: Measured | None = None,
        runtime: Runtime | None = None, collectives=None,
    ):  # fmt: skip
        self.model, self.cluster, self.links, self.workload, self.convention = (
            model,
            cluster,
            links,
            workload,
            convention,
        )
        if convention not in RUNTIMES:
            kept(convention, workload)  # which raises
        self.runtime = runtime or RUNTIMES[convention]
        if collectives is None:
            collectives = block_collectives
        self.collectives = collectives
        self.device = Device(cluster.hardware, self.runtime, workload.precision, measured)
        self.limit = cluster.hardware.memory_bytes * cluster.usable_memory
        self.kept: tuple[Kept, ...] = tuple(kept(convention, workload, zero) for zero in range(4))
        self.signatures = model.signatures
        self.representative = dict(zip(reversed(self.signatures), reversed(model.pieces), strict=True))
        self.operators = {number: piece_operators(model, piece) for number, piece in self.representative.items()}
        self.shapes = {
            number: block_shape(model, piece) for number, piece in self.representative.items() if piece.kind == "block"
        }
        self.everywhere = Counter(self.signatures)
        self._pieces: dict[tuple, PieceCost] = {}
        self._held: dict[tuple, Held] = {}
        self._stages: dict[tuple, StageCost] = {}
        self._counts: dict[tuple, tuple] = {}
        self._tied: dict[int, Held] = {}
        self._totals: dict[tuple, tuple[float, float]] = {}
        self._states: dict[tuple, States] = {}
        self.data: dict[tuple, DataTraffic] = {}  # kept for assemble.py

    # What single pieces cost

    def piece(self, number: int, layout: Layout) -> PieceCost:
        """Of the pieces with signature `number`."""
        key = (
            number,
            layout.tp,
            layout.cp,
            layout.ep,
            layout.etp,
            layout.dp,
            layout.pp,
            layout.micro_batch,
            layout.recompute,
        )
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._price(number, layout)
        return found

    def _price(self, number: int, layout: Layout) -> PieceCost:
        piece, workload, model = self.representative[number], self.workload, self.model
        tokens = layout.micro_batch * workload.seq_len / layout.cp
        seconds = self._seconds(number, layout)
        if piece.kind == FRONT:
            return PieceCost(seconds.forward, seconds.backward_input, 0.0)
        if piece.kind == BACK:
            norm, logits = head_bytes(
                model.facts.hidden, model.facts.vocab or 0, layout, self.runtime.logit_bytes, tokens
            )
            traffic = self._traffic(piece, layout, tokens, seconds)
            return self._with_traffic(seconds, traffic, norm, 0.0, logits)
        traffic = self._traffic(piece, layout, tokens, seconds)
        kept_bytes, working = block_bytes(self.shapes[number], layout, self.runtime.flavour, tokens)
        return self._with_traffic(seconds, traffic, kept_bytes, working, 0.0, layout.recompute == "full")

    def _seconds(self, number: int, layout: Layout) -> Seconds:
        return piece_seconds(
            self.model, self.representative[number], self.operators[number], self.shapes.get(number), layout,
            layout.micro_batch, self.workload.seq_len, self.device,
        )  # fmt: skip

    def _traffic(self, piece, layout: Layout, tokens: float, seconds: Seconds):
        backward = seconds.backward_input + seconds.backward_weight
        found = self.collectives(self.model, piece, layout, tokens * layout.cp)
        return block_traffic(found, layout, self.links, self.runtime, seconds.forward, backward)

    @staticmethod
    def _with_traffic(
        seconds: Seconds, traffic, kept_bytes: float, working: float, logits: float, again: bool = False
    ) -> PieceCost:
        forward, backward = sum(traffic.forward), sum(traffic.backward)
        tp, cp, ep = (there + back for there, back in zip(traffic.forward, traffic.backward, strict=True))
        if again:  # recomputation makes the forward pass's collectives again
            backward += forward
            tp, cp, ep = (part + there for part, there in zip((tp, cp, ep), traffic.forward, strict=True))
        return PieceCost(
            seconds.forward, seconds.backward_input + seconds.again, seconds.backward_weight, tp, cp, ep, forward, backward,
            kept_bytes, working, logits, seconds.flops,
        )  # fmt: skip

    def held(self, number: int, layout: Layout) -> Held:
        key = (number, layout.tp, layout.ep, layout.etp)
        found = self._held.get(key)
        if found is None:
            piece = self.representative[number]
            found = held_by_rank(self.model, piece, layout.tp, layout.ep, layout.etp, self.workload.optimizer)
            self._held[key] = found
        return found

    # What stages cost

    def blocks(self, layout: Layout) -> tuple[int, ...]:
        """Of every stage. Raises TersorError where the stages do not hold the model's blocks."""
        layers, stages = self.model.facts.layers, layout.pp * layout.chunks
        if not layout.stages:
            if layers < stages:
                raise TersorError(
                    f"{layers} blocks are too few for {stages} stages (pp={layout.pp}, chunks={layout.chunks})",
                    "use less pipeline parallelism",
                )
            return even_stages(layers, stages)
        if sum(layout.stages) != layers:
            raise TersorError(
                f"the stages have {sum(layout.stages)} blocks, the model has {layers}", "give every block once"
            )
        return layout.stages

    def _stage(self, layout: Layout, start: int, blocks: int, first: bool, last: bool) -> StageCost:
        place = (start, blocks, first, last)
        counts = self._counts.get(place)
        if counts is None:
            inside = self.signatures[1 + start - first : 1 + start + blocks + last]
            counts = self._counts[place] = tuple(sorted(Counter(inside).items()))
        tied = last and not first and self.model.facts.tied
        key = (
            counts, tied, layout.tp, layout.cp, layout.ep, layout.etp, layout.dp, layout.pp, layout.micro_batch,
            layout.recompute,
        )  # fmt: skip
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = self._sum(counts, tied, layout)
        return found

    def _sum(self, counts: tuple, tied: bool, layout: Layout) -> StageCost:
        total, held, largest, working = [0.0] * len(PieceCost._fields), Held(), 0.0, 0.0
        for number, count in counts:
            cost, mine = self.piece(number, layout), self.held(number, layout)
            for place, value in enumerate(cost):
                total[place] += count * value
            working = max(working, cost.working_bytes)
            held += mine.times(count)
            if self.representative[number].kind == "block":
                largest = max(largest, mine.numbers)
        if tied:
            if layout.tp not in self._tied:
                self._tied[layout.tp] = tied_table(self.model, layout.tp)
            held += self._tied[layout.tp]
        cost = PieceCost(*total)._replace(working_bytes=working)
        return StageCost(cost, held, largest, sum(count for _, count in counts))

    def stages(self, layout: Layout) -> list[StageCost]:
        blocks = self.blocks(layout)
        found, start = [], 0
        for position, count in enumerate(blocks):
            found.append(self._stage(layout, start, count, position == 0, position == len(blocks) - 1))
            start += count
        return found

    # What layouts cost

    def totals(self, layout: Layout) -> tuple[float, float]:
        """(seconds of one micro-batch through all pieces on one rank each, the model's FLOPs of it on all ranks)"""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, layout.dp, layout.pp, layout.micro_batch, layout.recompute)
        found = self._totals.get(key)
        if found is None:
            costs = [(count, self.piece(number, layout)) for number, count in self.everywhere.items()]
            found = sum(count * cost.seconds for count, cost in costs), sum(count * cost.flops for count, cost in costs)
            self._totals[key] = found
        return found

    def step_flops(self, layout: Layout) -> float:
        """Of a whole step on all ranks, forward and backward, nothing counted twice."""
        return self.totals(layout)[1] * self.workload.global_batch / layout.micro_batch

    def states(self, number: int, layout: Layout, keep: Kept) -> States:
        """Bytes on one rank of the states of a piece."""
        key = (number, layout.tp, layout.ep, layout.etp, layout.zero, layout.shard_ranks, layout.edp, layout.replicate)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = states_of(self.held(number, layout), keep, layout)
        return found

    def lower_bound(self, layout: Layout) -> tuple[float, float]:
        """(seconds, bytes) that `estimate` never falls below, wherever the stages of the layout are cut."""
        from tersor.ops.plan_parallel.cost.bound import lower_bound

        return lower_bound(self, layout)

    def estimate(self, layout: Layout, exact: bool = False) -> Estimate:
        """`exact` runs the schedule block by block in place of closed forms. Raises TersorError where the global batch does
        not divide, or where there are more stages than blocks."""
        from tersor.ops.plan_parallel.cost.assemble import assemble

        return assemble(self, layout, exact)

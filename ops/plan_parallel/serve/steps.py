"""How long an instance takes for one step: every operator of a block as one rank runs it, and what ranks exchange.

An operator takes the longer of its arithmetic and of the bytes that the rank moves for it (roofline, on the efficiencies of
the hardware's description); an exchange what `Links` says. Equal blocks are timed once. Nothing overlaps: in steps of one
token there is little to hide behind.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import NamedTuple

from tersor.formats.cluster import Cluster
from tersor.ops.model.operators import ACTIVATION_BYTES, Attend, Linear, Operator, Pass
from tersor.ops.model.roofline import bounded_seconds
from tersor.ops.model.stored import Stored
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.cost.compute import piece_operators
from tersor.ops.plan_parallel.cost.shares import tensor_share
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import BACK, FRONT, Piece, PlanModel
from tersor.ops.plan_parallel.schedule.stages import balance
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.kv import cache_share

PARTS = ("compute", "weights", "cache", "launch", "tensor parallel", "experts", "pipeline")
COMPUTE, WEIGHTS, CACHE, LAUNCH, TENSOR_PARALLEL, EXPERTS, PIPELINE = range(len(PARTS))


class Step(NamedTuple):
    """`seconds` from the first stage to the last, `slowest` of one stage; `parts` sum up to `seconds`, by PARTS."""

    seconds: float
    slowest: float
    parts: tuple[float, ...]

    def bound_by(self) -> str:
        return PARTS[max(range(len(PARTS)), key=self.parts.__getitem__)]


class Stage(NamedTuple):
    """Its blocks, all its pieces by signature and number, and whether what it sends leaves the node (None for the last)."""

    blocks: range
    pieces: dict[int, int]
    leaves: bool | None


class Steps:
    """`typical` is the step whose time decides where a pipeline is cut. `imbalance` is how many more tokens the busiest
    device of an expert layer gets than a mean one."""

    def __init__(self, model: PlanModel, cluster: Cluster, links: Links, typical: Pass, imbalance: float = 1.0):
        self.model, self.cluster, self.links = model, cluster, links
        self.typical, self.imbalance = typical, imbalance
        self.first: dict[int, Piece] = {}  # piece of each signature
        for piece, signature in zip(model.pieces, model.signatures, strict=True):
            self.first.setdefault(signature, piece)
        self._operators: dict[int, list[Operator]] = {}
        self._times: dict[tuple, tuple[float, ...]] = {}
        self._stages: dict[tuple, tuple[int, ...]] = {}
        self._steps: dict[tuple, Step] = {}
        self._placements: dict[Instance, list[Stage]] = {}

    def step(self, instance: Instance, run: Pass) -> Step:
        """`run` is what each data-parallel rank does."""
        key = (instance, run)
        if key not in self._steps:
            self._steps[key] = self._step(instance, run)
        return self._steps[key]

    def _step(self, instance: Instance, run: Pass) -> Step:
        layout = instance.layout
        total, slowest = [0.0] * len(PARTS), 0.0
        send = self._send_seconds(layout, run) if layout.pp > 1 else (0.0, 0.0)
        for stage in self.placed(instance):
            times = [0.0] * len(PARTS)
            for number, count in stage.pieces.items():
                for part, seconds in enumerate(self._piece(number, instance, run)):
                    times[part] += count * seconds
            if stage.leaves is not None:
                times[PIPELINE] = send[stage.leaves]
            slowest = max(slowest, sum(times))
            total = [one + other for one, other in zip(total, times, strict=True)]
        return Step(sum(total), slowest, tuple(total))

    def stages(self, instance: Instance) -> tuple[int, ...]:
        """Blocks of each stage: as pinned, or so that the slowest stage of a typical step is fastest."""
        layout = instance.layout
        if layout.stages:
            return layout.stages
        if layout.pp == 1:
            return (self.model.facts.layers,)
        key = (layout.tp, layout.pp, layout.dp, layout.ep, layout.etp, instance.dcp)
        if key not in self._stages:
            seconds = [sum(self._piece(number, instance, self.typical)) for number in self.model.signatures]
            self._stages[key] = balance(seconds, [0.0] * len(seconds), layout.pp, least_at_ends=1)
        return self._stages[key]

    def placed(self, instance: Instance) -> list[Stage]:
        if instance not in self._placements:
            numbers, found, first = self.model.signatures, [], 0
            stages, width = self.stages(instance), instance.layout.tp * instance.layout.dp
            each = self.cluster.devices_per_node
            for index, blocks in enumerate(stages):
                pieces = Counter(numbers[1 + first : 1 + first + blocks])
                pieces.update([numbers[0]] * (index == 0) + [numbers[-1]] * (index == len(stages) - 1))
                leaves = None
                if index < len(stages) - 1:  # the rank whose next one is in another node is the slowest
                    ranks = range(index * width, index * width + min(width, each))
                    leaves = any(rank // each != (rank + width) // each for rank in ranks)
                found.append(Stage(range(first, first + blocks), dict(pieces), leaves))
                first += blocks
            self._placements[instance] = found
        return self._placements[instance]

    def _piece(self, number: int, instance: Instance, run: Pass) -> tuple[float, ...]:
        """Seconds by PARTS of the piece with this signature."""
        layout = instance.layout
        key = (number, layout.tp, layout.dp, layout.ep, layout.etp, instance.dcp, run)
        if key in self._times:
            return self._times[key]
        piece, parts, mixture = self.first[number], [0.0] * len(PARTS), False
        if number not in self._operators:
            self._operators[number] = piece_operators(self.model, piece)
        for operator in self._operators[number]:
            mixture = mixture or bool(isinstance(operator, Linear) and operator.experts)
            flops, nbytes = self._share(operator, piece, instance, run)
            seconds, bound = bounded_seconds(flops, nbytes, operator, self.cluster.hardware)
            floor = self.cluster.hardware.kernel_floor_seconds
            where = COMPUTE if bound == "compute" else CACHE if isinstance(operator, Attend) else WEIGHTS
            parts[where] += operator.count * (seconds - floor)
            parts[LAUNCH] += operator.count * floor
        parts[TENSOR_PARALLEL] = self._tensor_parallel(piece, instance, run, mixture)
        parts[EXPERTS] = self._experts(layout, run) if mixture else 0.0
        self._times[key] = tuple(parts)
        return self._times[key]

    def _share(self, operator: Operator, piece: Piece, instance: Instance, run: Pass) -> tuple[float, float]:
        """(FLOPs, bytes moved) of one rank."""
        tp = instance.layout.tp
        if isinstance(operator, Attend):
            spec = operator.attention
            vectors = run.tokens * spec.heads * (spec.key_dim + spec.value_dim) * ACTIVATION_BYTES
            expanded = spec.latent and run.new > 1  # prompts work on keys and values of each head
            share = 1 / tp if expanded else cache_share(spec, tp, instance.dcp)
            return operator.flops(run) / tp, vectors / tp + (operator.bytes(run) - vectors) * share
        if isinstance(operator, Linear) and operator.experts:  # the tokens of all ranks that share the experts
            ranks = instance.layout.ep * instance.layout.etp
            together = Pass(max(1, round(run.batch * ranks / tp)), run.new, run.past)
            return operator.flops(together) / ranks * self.imbalance, operator.bytes(together) / ranks
        share = 1.0
        if isinstance(operator, Linear):
            attention = self.model.facts.attention[piece.index] if piece.kind == "block" else None
            stored = Stored(operator.shape, operator.params, 0, operator.label)
            share = tensor_share(f"{operator.name}.weight", operator.kind, stored, attention, tp)
        return operator.flops(run) * share, operator.bytes(run) * share

    def _tensor_parallel(self, piece: Piece, instance: Instance, run: Pass, mixture: bool) -> float:
        """Sums after attention and after the feed-forward part, logits at the end."""
        layout, facts = instance.layout, self.model.facts
        span = self.links.span(layout, "tp")
        hidden = run.tokens * facts.hidden * ACTIVATION_BYTES
        if piece.kind == BACK:
            return self.links.seconds("all_gather", run.batch * (facts.vocab or 0) * ACTIVATION_BYTES, *span)
        if piece.kind == FRONT:
            return self.links.seconds("all_reduce", hidden, *span)
        attention = facts.attention[piece.index]
        seconds = (1 + (attention is not None)) * self.links.seconds("all_reduce", hidden, *span)
        if mixture and layout.dp > 1:  # tensor-parallel ranks send out a share of the tokens each, between two halves
            seconds = self.links.seconds("reduce_scatter", hidden, *span)
            seconds += self.links.seconds("all_gather", hidden, *span)
        if instance.dcp > 1 and attention is not None and run.new == 1:
            group = (min(instance.dcp, span[0]), 1)
            queries = run.tokens * attention.heads / layout.tp * instance.dcp * ACTIVATION_BYTES
            width = sum(attention.latent) if attention.latent else attention.key_dim
            out = attention.latent[0] if attention.latent else attention.value_dim
            seconds += self.links.seconds("all_gather", queries * width, *group)
            seconds += self.links.seconds("reduce_scatter", queries * out, *group)
        return seconds

    def _experts(self, layout: Layout, run: Pass) -> float:
        """Tokens go to the devices of their experts and back, once for each such device. Inside one tensor-parallel group
        every rank has all tokens already, and the sum that follows brings the results together."""
        if layout.dp == 1 or layout.ep == 1:
            return 0.0
        facts = self.model.facts
        devices = layout.ep * (1 - (1 - 1 / layout.ep) ** facts.experts_per_token)
        nbytes = ceil(run.tokens / layout.tp) * devices * facts.hidden * ACTIVATION_BYTES * self.imbalance
        seconds = 2 * self.links.seconds("all_to_all", nbytes, *self.links.span(layout, "ep"))
        if layout.etp > 1:
            inner = self.links.span(layout, "etp")
            seconds += self.links.seconds("all_gather", nbytes * layout.etp, *inner)
            seconds += self.links.seconds("reduce_scatter", nbytes * layout.etp, *inner)
        return seconds

    def _send_seconds(self, layout: Layout, run: Pass) -> tuple[float, float]:
        """(inside a node, to another): each tensor-parallel rank sends its share of the hidden states, and they are gathered
        behind."""
        nbytes = run.tokens * self.model.facts.hidden * ACTIVATION_BYTES
        gather = self.links.seconds("all_gather", nbytes, *self.links.span(layout, "tp"))
        return (
            gather + self.links.seconds("send", nbytes / layout.tp, 2, 1),
            gather + self.links.seconds("send", nbytes / layout.tp, 1, 2),
        )

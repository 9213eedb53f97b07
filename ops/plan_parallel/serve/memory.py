"""What the devices of a serving instance hold: weights as they are stored, a cache for each sequence, room to work in."""

from __future__ import annotations

from typing import NamedTuple

from tersor.ops.model.operators import ACTIVATION_BYTES
from tersor.ops.plan_parallel.cost.shape import block_shape
from tersor.ops.plan_parallel.cost.shares import tensor_share
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.kv import cache_share, sequence_bytes
from tersor.ops.plan_parallel.serve.steps import Steps

STEP_TOKENS = 8192  # that a step reads at most: longer prompts are read in pieces (chunked prefill)
MOST_SEQUENCES = 1024  # that a rank answers at once, as engines are usually set
LOGIT_BYTES = 4


class Memory(NamedTuple):
    """Bytes of the device of one stage; `sequence` is the cache of one more sequence at its longest, `logits` of its row."""

    weights: float
    transients: float
    sequence: float
    logits: float

    def holding(self, sequences: int) -> float:
        return self.weights + self.transients + sequences * (self.sequence + self.logits)


class Room:
    """`context` are the tokens of a sequence at its end: there is room for all to get there, none is ever put aside."""

    def __init__(self, steps: Steps, context: int):
        self.steps, self.model, self.context = steps, steps.model, context
        self._widest: dict[int, float] = {}
        self._weights: dict[tuple, float] = {}
        self._rooms: dict[Instance, tuple[int, float]] = {}

    def memory(self, instance: Instance) -> tuple[Memory, ...]:
        """By stage. A step reads at most STEP_TOKENS."""
        layout, facts = instance.layout, self.model.facts
        found = []
        for index, stage in enumerate(self.steps.placed(instance)):
            last = stage.leaves is None
            sequence = sum(
                sequence_bytes(attention, self.context, facts.cache_bytes_per_number)
                * cache_share(attention, layout.tp, instance.dcp)
                for attention in facts.attention[stage.blocks.start : stage.blocks.stop]
                if attention is not None
            )
            weights = sum(count * self._weight_bytes(number, layout) for number, count in stage.pieces.items())
            if facts.tied and last and index:
                weights += self._weight_bytes(self.model.signatures[0], layout)  # its own copy of the table
            widest = max(self._widest_of(number, layout) for number in stage.pieces)
            transients = ACTIVATION_BYTES * STEP_TOKENS * (2 * facts.hidden + widest)
            logits = LOGIT_BYTES * (facts.vocab or 0) / layout.tp if last else 0.0
            found.append(Memory(weights, transients, sequence, logits))
        return tuple(found)

    def room(self, instance: Instance) -> tuple[int, float]:
        """(sequences of a rank that fit at their longest, bytes that lack for the first one on the fullest device)"""
        if instance not in self._rooms:
            most, short = MOST_SEQUENCES, 0.0
            limit = self.steps.cluster.memory_bytes
            for memory in self.memory(instance):
                short = max(short, memory.holding(1) - limit)
                each = memory.sequence + memory.logits
                most = min(most, int((limit - memory.holding(0)) // each) if each else most)
            self._rooms[instance] = (0, short) if short > 0 else (most, 0.0)
        return self._rooms[instance]

    def _weight_bytes(self, number: int, layout: Layout) -> float:
        """As stored: codes, scales and all, on one rank. Draft layers are left out."""
        key = (number, layout.tp, layout.ep, layout.etp)
        if key not in self._weights:
            piece, model = self.steps.first[number], self.model
            attention = model.facts.attention[piece.index] if piece.kind == "block" else None
            total = 0.0
            for name in piece.weights:
                weight, kind = model.stored[name], model.kinds[name]
                if kind == "experts":
                    total += weight.nbytes / (layout.ep * layout.etp)
                elif kind != "draft layers":
                    total += weight.nbytes * tensor_share(name, kind, weight, attention, layout.tp)
            self._weights[key] = total
        return self._weights[key]

    def _widest_of(self, number: int, layout: Layout) -> float:
        """Numbers a token has at the widest place of a block, on one rank."""
        piece = self.steps.first[number]
        if piece.kind != "block":
            return 0.0
        if number not in self._widest:
            shape = block_shape(self.model, piece)
            self._widest[number] = max(
                shape.queries + shape.keys + shape.values,
                shape.up + shape.ffn,
                shape.active * (shape.expert_up + shape.expert_ffn),
            )
        return self._widest[number] / layout.tp

"""How many weights a rank holds of each piece, counted from the tensors of the checkpoint, and the bytes of their states.

Training counts numbers, whatever they are stored in, times what the convention keeps for each; serving and frozen weights
count the bytes that are stored, codes and scales included.
"""

from __future__ import annotations

from typing import NamedTuple

from tersor.ops.model.facts import EMBEDDING
from tersor.ops.plan_parallel.cost.conventions import LOW_RANK, Kept, States, state_bytes
from tersor.ops.plan_parallel.cost.shares import rule_shares
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import Piece, PlanModel


class Held(NamedTuple):
    """What one rank holds of a piece, or of several: numbers and stored bytes, of dense tensors and of experts.

    `moments` are the numbers that the optimizer keeps in each of its moments. ZeRO has cut nothing yet.
    """

    dense: float = 0.0
    expert: float = 0.0
    dense_bytes: float = 0.0
    expert_bytes: float = 0.0
    dense_moments: float = 0.0
    expert_moments: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, count: int) -> Held:
        return Held(*(count * value for value in self))

    @property
    def numbers(self) -> float:
        return self.dense + self.expert


def held_by_rank(model: PlanModel, piece: Piece, tp: int, ep: int, etp: int, optimizer: str = "adamw") -> Held:
    """Of a piece on the ranks that hold most of it. Raises TersorError where its tensors cannot be cut so."""
    shares = rule_shares(model, piece, tp)
    rank = LOW_RANK.get(optimizer)
    total = [0.0] * 6
    for name in piece.weights:
        weight, kind = model.stored[name], model.kinds[name]
        if kind == "experts":
            share, place = 1 / (ep * etp), 1
        else:
            share, place = shares[name], 0
        moments = weight.params
        if rank is not None and len(weight.shape) >= 2 and kind not in ("embedding", "head"):
            smaller = min(weight.shape[-2:])
            moments = weight.params * min(1.0, rank / smaller)
        total[place] += weight.params * share
        total[place + 2] += weight.nbytes * share
        total[place + 4] += moments * share
    return Held(*total)


def tied_table(model: PlanModel, tp: int) -> Held:
    """The copy of the embedding that a head without a tensor of its own needs on another pipeline stage: its weights, their
    gradients and states, which an all-reduce between the two stages keeps equal."""
    if not model.facts.tied:
        return Held()
    for name in model.pieces[0].weights:
        weight = model.stored[name]
        if EMBEDDING.search(name) and weight.shape[:1] == (model.facts.vocab,):
            numbers, nbytes = weight.params / tp, weight.nbytes / tp
            return Held(numbers, 0.0, nbytes, 0.0, numbers, 0.0)
    return Held()


def expert_ranks(layout: Layout) -> int:
    """Ranks that ZeRO cuts experts over: those that hold the same experts, of one replica."""
    return layout.edp // layout.replicate if layout.edp % layout.replicate == 0 else layout.edp


def states_of(held: Held, kept: Kept, layout: Layout) -> States:
    """Bytes on one rank of what training keeps of `held`, cut by ZeRO over the ranks of the layout."""
    dense = state_bytes(held.dense, held.dense_moments, kept, layout.zero, layout.shard_ranks)
    if not held.expert:
        return dense
    return dense + state_bytes(held.expert, held.expert_moments, kept, layout.zero, expert_ranks(layout))

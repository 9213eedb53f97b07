"""The model that is placed: what its headers say, cut into the pieces that a pipeline stage is made of. No torch."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.facts import Facts, facts
from tersor.ops.model.operators import kind_of
from tersor.ops.model.stored import Stored, stored_weights

FRONT, BACK = "embedding", "head"


class Piece(NamedTuple):
    """What is never cut over stages: the embedding (with all that comes before the blocks), one block, or the head with
    the last norm. `weights` are dense names; a head that shares the embedding's table has no tensor of its own for it."""

    kind: str  # embedding, block, head
    index: int  # of a block, 0 otherwise
    weights: tuple[str, ...]


class PlanModel:
    """`stored` are the weights by the names they have when dense, `pieces` in model order: embedding, blocks, head."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises TersorError where the config lacks what a plan needs."""
        self.checkpoint = checkpoint
        self.stored: dict[str, Stored] = stored_weights(checkpoint)
        self.facts: Facts = facts(checkpoint, self.stored)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Which part of the model a weight belongs to, one of `ops.model.operators.KINDS`."""
        return {name: kind_of(name, weight, self.facts) for name, weight in self.stored.items()}

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        blocks: list[list[str]] = [[] for _ in range(self.facts.layers)]
        front, back = [], []
        for name, weight in self.stored.items():
            place = weight.place
            if place is not None and place.blocks == self.facts.block_prefix and place.index < self.facts.layers:
                blocks[place.index].append(name)
            elif self.kinds[name] in ("embedding", "image and audio tower"):
                front.append(name)
            else:  # the last norm, the head, draft layers
                back.append(name)
        middle = (Piece("block", index, tuple(names)) for index, names in enumerate(blocks))
        return (Piece(FRONT, 0, tuple(front)), *middle, Piece(BACK, 0, tuple(back)))

    @cached_property
    def signatures(self) -> tuple[int, ...]:
        """A number per piece, equal for pieces that cost the same: same names inside, shapes, storage and attention."""
        seen: dict[tuple, int] = {}
        found = []
        for piece in self.pieces:
            inside = tuple(
                (self.stored[name].place.rest if piece.kind == "block" else name, *self.stored[name][:5])
                for name in piece.weights
            )
            attention = self.facts.attention[piece.index] if piece.kind == "block" else None
            found.append(seen.setdefault((piece.kind, inside, attention), len(seen)))
        return tuple(found)

    def stage_pieces(self, stages: tuple[int, ...]) -> list[tuple[Piece, ...]]:
        """The pieces of each stage of so many blocks: the first has the embedding too, the last the head."""
        found, start = [], 1
        for position, blocks in enumerate(stages):
            pieces = self.pieces[start : start + blocks]
            if position == 0:
                pieces = (self.pieces[0], *pieces)
            if position == len(stages) - 1:
                pieces = (*pieces, self.pieces[-1])
            found.append(pieces)
            start += blocks
        return found

"""Which boxes of which tensors each rank holds: its pipeline stages, its slice of them, and its share of that under ZeRO.

Tensor and expert parallelism are `transform.segments.holds`. On top of it come here

- stages: a rank holds the tensors of its model chunks; a table that embedding and head share is on the stages of both,
- ZeRO 3 (FSDP): the rows of what a rank would hold, cut as `torch.chunk` cuts them, over `Layout.shard_ranks` for dense
  tensors and over the ranks that hold the same slice of the same expert (within a replica) for experts. The last ranks
  may get fewer rows or none. Scalars are not cut. ZeRO 1 and 2 leave weights whole.
- optimizer states (`optimizer.state.exp_avg.NAME` …): as their weight, and cut over ranks from ZeRO 1 on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.model.stored import place_of
from tersor.ops.plan_parallel.cost.memory import even_stages
from tersor.ops.plan_parallel.layout import Coordinates, Layout, Mesh
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards.intersect import Box, volume, whole
from tersor.ops.plan_parallel.transform.parts import parts_of
from tersor.ops.plan_parallel.transform.segments import Rule, holds

OPTIMIZER = "optimizer."
STATE = re.compile(r"optimizer\.state\.[^.]+\.(.+)")


class Local(NamedTuple):
    """What one rank stores of one tensor: `boxes` of it, box i from index `starts[i]` on of a tensor of `shape`.

    `concatenated` is the dimension along which several boxes are joined, None for one box.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    starts: tuple[tuple[int, ...], ...]
    concatenated: int | None = None


def join(name: str, boxes: Sequence[Box]) -> Local:
    """Boxes in the order they are given, joined along the one dimension in which they differ. Raises TersorError."""
    first = boxes[0]
    differing = [d for d in range(len(first)) if any(box[d] != first[d] for box in boxes)]
    extents = [stop - start for start, stop in first]
    if len(boxes) > 1 and len(differing) != 1:
        raise TersorError(
            f"tensor {name!r}: a rank would hold {len(boxes)} boxes that differ in {len(differing)} dimensions",
            "they make no tensor that a runtime can hold: choose other degrees",
        )
    if len(boxes) == 1:
        return Local(tuple(extents), (first,), ((0,) * len(first),))
    along, at, starts = differing[0], 0, []
    for box in boxes:
        starts.append((*[0] * along, at, *[0] * (len(first) - along - 1)))
        at += box[along][1] - box[along][0]
    extents[along] = at
    return Local(tuple(extents), tuple(boxes), tuple(starts), along)


def rows(local: Local, start: int, stop: int) -> Local | None:
    """Rows [start, stop) of a local tensor, None for none of them."""
    boxes, starts = [], []
    for box, at in zip(local.boxes, local.starts, strict=True):
        low, high = max(start, at[0]), min(stop, at[0] + box[0][1] - box[0][0])
        if low < high:
            shift = box[0][0] - at[0]
            boxes.append(((low + shift, high + shift), *box[1:]))
            starts.append((low - start, *at[1:]))
    if not boxes:
        return None
    joined = local.concatenated if len(boxes) > 1 else None
    return Local((stop - start, *local.shape[1:]), tuple(boxes), tuple(starts), joined)


def chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Rows of part `index` as torch.chunk cuts them: all of the same size, the last ones smaller or empty."""
    size = -(-extent // parts)
    return min(index * size, extent), min((index + 1) * size, extent)


class Placement:
    """What each rank of `layout` holds of the tensors of `shapes`: those of the model's file, and optimizer states."""

    def __init__(self, model: PlanModel, layout: Layout, rules: dict[str, Rule], shapes: dict[str, tuple[int, ...]]):
        """`rules` of every stored tensor. Raises TersorError naming a tensor that is not of this model."""
        self.layout, self.mesh, self.shapes = layout, Mesh(layout), shapes
        self._rules = rules
        self._states = {name: found[1] for name in shapes if (found := STATE.fullmatch(name))}
        stages = _stages_of(model, layout, rules)
        self._on: list[list[str]] = [[] for _ in range(layout.pp)]
        for name, shape in shapes.items():
            weight = self._states.get(name, name)
            if weight not in stages and not (name.startswith(OPTIMIZER) and name not in self._states):
                raise TersorError(
                    f"tensor {name!r} belongs to no tensor of {model.checkpoint.path}",
                    "these are shards of another model",
                )
            if shape and weight in rules and shape != rules[weight].shape:
                raise TersorError(
                    f"tensor {name!r} has shape {list(shape)}, {model.checkpoint.path} has {list(rules[weight].shape)}",
                    "these are shards of another model",
                )
            for rank in sorted(stages.get(weight, range(layout.pp))):
                self._on[rank].append(name)

    @cached_property
    def has_experts(self) -> bool:
        return any(rule.is_expert for rule in self._rules.values())

    def signature(self, place: Coordinates) -> tuple:
        """Ranks of the same signature hold the same bytes."""
        cuts_dense, cuts_experts = self._cuts(place)
        dense = (place.tp, *(cuts_dense if self._cuts_any else ()))
        experts = (place.ep, place.etp, *(cuts_experts if self._cuts_any else ())) if self.has_experts else ()
        return (place.pp, dense, experts)

    @cached_property
    def _cuts_any(self) -> bool:
        return self.layout.zero == 3 or bool(self.layout.zero and self._states)

    def _cuts(self, place: Coordinates) -> tuple[tuple[int, int], tuple[int, int]]:
        """(parts, which of them) of ZeRO, for dense tensors and for experts."""
        layout = self.layout
        dense = place.dp % (layout.dp // layout.replicate) * layout.cp + place.cp
        parts = layout.edp // layout.replicate if layout.edp % layout.replicate == 0 else layout.edp
        return (layout.shard_ranks, dense), (parts, place.edp % parts)

    def of_rank(self, place: Coordinates) -> dict[str, Local]:
        """By tensor, in the order of `shapes`. Tensors of which the rank holds nothing are left out."""
        found = {}
        cuts_dense, cuts_experts = self._cuts(place)
        for name in self._on[place.pp]:
            shape = self.shapes[name]
            rule = self._rules.get(self._states.get(name, name))
            if rule is None or (name in self._states and not shape):  # a scalar beside the states: a step
                boxes: tuple[Box, ...] = (whole(shape),)
            else:
                boxes = holds(rule, place, self.layout)
            boxes = tuple(box for box in boxes if volume(box))
            if not boxes:
                continue
            local = join(name, boxes)
            if shape and self.layout.zero >= (1 if name in self._states else 3):
                parts, index = cuts_experts if rule is not None and rule.is_expert else cuts_dense
                if parts > 1:
                    local = rows(local, *chunk(local.shape[0], parts, index))
            if local is not None:
                found[name] = local
        return found

    @cached_property
    def holders(self) -> dict[tuple, list[int]]:
        """The ranks of each signature."""
        found: dict[tuple, list[int]] = {}
        for rank, place in enumerate(self.mesh.all):
            found.setdefault(self.signature(place), []).append(rank)
        return found


def _stages_of(model: PlanModel, layout: Layout, rules: dict[str, Rule]) -> dict[str, set[int]]:
    """The pipeline ranks that hold each stored tensor of the model."""
    stages = layout.stages or even_stages(model.facts.layers, layout.pp * layout.chunks)
    if sum(stages) != model.facts.layers:
        raise TersorError(
            f"the stages have {sum(stages)} blocks, {model.checkpoint.path} has {model.facts.layers}",
            "this is the plan of another checkpoint",
        )
    found: dict[str, set[int]] = {}
    ranks = [layout.rank_of_stage(stage)[0] for stage in range(len(stages))]
    by_block: dict[int, int] = {}
    stored = parts_of(model)
    for stage, pieces in enumerate(model.stage_pieces(stages)):
        for piece in pieces:
            if piece.kind == "block":
                by_block[piece.index] = ranks[stage]
            for weight in piece.weights:
                for name in (part.name for part in stored[weight]):
                    found.setdefault(name, set()).add(ranks[stage])
                    if name in rules and rules[name].tied:
                        found[name].add(ranks[-1])  # the head multiplies with it
    for name in model.checkpoint.tensors:  # scales that no weight claims
        if name not in found:
            place = place_of(name)
            in_block = place is not None and place.blocks == model.facts.block_prefix and place.index in by_block
            found[name] = {by_block[place.index] if in_block else ranks[-1]}
    return found

"""What no cut of a layout's stages can fall below: cheap, for a search to close branches with.

Seconds: pipelines take no less than their closed form with all stages even (`pipeline.least_seconds`); data-parallel traffic,
sends and the optimizer come on top. Bytes: for any weights w_i >= 0 of sum 1, the fullest rank holds at least
sum_i w_i M_i, and M_i is a sum over the blocks that rank i has; whoever has a block, it adds at least its least weighted
share. With w_i proportional to 1 / (mean bytes of a block on rank i) that is exact for even memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tersor.ops.plan_parallel.cost.memory import in_flight
from tersor.ops.plan_parallel.cost.pipeline import least_seconds
from tersor.ops.plan_parallel.layout import Layout

if TYPE_CHECKING:
    from tersor.ops.plan_parallel.cost.step import Costs

ROUNDING = 1 - 1e-9


def lower_bound(costs: Costs, layout: Layout) -> tuple[float, float]:
    micro_batches = layout.micro_batches(costs.workload.global_batch)
    seconds, _ = costs.totals(layout)
    least = least_seconds(layout.schedule, layout.pp, layout.chunks, micro_batches, seconds)
    return least * ROUNDING, _bytes(costs, layout, micro_batches) * ROUNDING


def _bytes(costs: Costs, layout: Layout, micro_batches: int) -> float:
    grow = 1 + costs.runtime.fragmentation
    keep = costs.kept[layout.zero]
    pieces = []  # (count, states, activations of a micro-batch)
    for number, count in costs.everywhere.items():
        states = costs.states(number, layout, keep)
        weights = states.weights + states.gradients if layout.offload != "states" else 0.0
        weights += states.optimizer if layout.offload == "none" else 0.0
        pieces.append((count, weights, grow * costs.piece(number, layout).kept_bytes))
    flying = in_flight(layout.schedule, layout.pp, layout.chunks, micro_batches)
    fixed = costs.runtime.fixed_bytes * grow
    if layout.pp == 1:
        return fixed + sum(count * (weights + flying[0] * kept) for count, weights, kept in pieces)
    total = sum(count for count, _, _ in pieces)
    mean_states = sum(count * weights for count, weights, _ in pieces) / total
    mean_kept = sum(count * kept for count, _, kept in pieces) / total
    shares = [1 / max(mean_states + most * mean_kept, 1.0) for most in flying]
    ends = (min(flying), max(flying))  # between which a ratio of two lines has no other least value
    least = sum(
        count * min((weights + most * kept) / max(mean_states + most * mean_kept, 1.0) for most in ends)
        for count, weights, kept in pieces
    )
    return fixed + least / sum(shares)

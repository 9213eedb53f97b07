"""The estimate of one layout, put together from what its stages cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tersor.formats.units import number
from tersor.ops.plan_parallel.cost.memory import Memory, gathered_buffers, in_flight
from tersor.ops.plan_parallel.cost.offload import Offload, plan_offload
from tersor.ops.plan_parallel.cost.pipeline import send_share, step_seconds
from tersor.ops.plan_parallel.cost.states import Held, expert_ranks, states_of
from tersor.ops.plan_parallel.cost.traffic import data_traffic, exposed_data_seconds, send_seconds
from tersor.ops.plan_parallel.layout import Layout

if TYPE_CHECKING:
    from tersor.ops.plan_parallel.cost.step import Costs, Estimate, StageCost


def assemble(costs: Costs, layout: Layout, exact: bool) -> Estimate:
    from tersor.ops.plan_parallel.cost.step import Estimate, StageEstimate

    micro_batches = layout.micro_batches(costs.workload.global_batch)
    stages = costs.stages(layout)
    ranks = [_Rank(costs, layout, _together(layout, rank, stages), rank) for rank in range(layout.pp)]
    tokens = layout.micro_batch * costs.workload.seq_len / layout.cp
    send = send_seconds(layout, costs.links, costs.model.facts.hidden, tokens)
    flying = in_flight(layout.schedule, layout.pp, layout.chunks, micro_batches)
    core, slowest = step_seconds(
        layout.schedule,
        layout.chunks,
        micro_batches,
        [rank.forward for rank in ranks],
        [rank.backward_input for rank in ranks],
        [rank.backward_weight for rank in ranks],
        _each_stage(stages) if layout.schedule == "interleaved" else None,
    )
    sends = send * send_share(layout.schedule, layout.pp, micro_batches)
    if exact:
        core, flying = _simulate(layout, stages, micro_batches, send)
        sends = 0.0  # is in it
    critical = ranks[slowest]
    working = [sum(rank.cost[:3]) for rank in ranks]
    data = max(rank.data_seconds(micro_batches) for rank in ranks)
    offload = _offload(costs, layout, ranks, tokens, micro_batches, working[slowest])
    optimizer = max(rank.updated for rank in ranks) * _update_bytes(costs, layout) / costs.device.bytes
    if offload is not None:
        optimizer = 0.0  # is made where the states are
    cost = critical.cost
    parts = {
        "compute": micro_batches * working[slowest],
        "tp": micro_batches * cost.tp,
        "cp": micro_batches * cost.cp,
        "ep": micro_batches * cost.ep,
        "dp": data,
        "pp": sends,
        "bubble": max(0.0, core - micro_batches * critical.whole),
        "optimizer": optimizer,
        "offload": 0.0 if offload is None else offload.seconds,
    }
    seconds = sum(parts.values())
    memories = [rank.memory(flying[place]) for place, rank in enumerate(ranks)]
    peak = max(memory.total for memory in memories)
    obstacle = "" if offload is None else offload.first_obstacle
    short = max(0.0, peak - costs.limit)
    flops = costs.step_flops(layout)
    blocks = costs.blocks(layout)
    found = []
    for position, stage in enumerate(stages):
        rank, _ = layout.rank_of_stage(position)
        inputs = stage.cost.backward_input + stage.cost.backward_traffic
        found.append(
            StageEstimate(
                blocks[position], rank, stage.cost.forward + stage.cost.forward_traffic,
                inputs + stage.cost.backward_weight, memories[rank], inputs, stage.cost.backward_weight,
            )
        )  # fmt: skip
    fits = short == 0 and not obstacle
    hardware = costs.cluster.hardware
    return Estimate(
        layout=layout,
        fits=fits,
        step_seconds=seconds,
        tokens_per_second=costs.workload.global_batch * costs.workload.seq_len / seconds,
        mfu=flops / (seconds * layout.world * hardware.peak_flops[hardware.computes_in("bf16")]),
        stages=tuple(found),
        parts=parts,
        bound_by="memory" if not fits else max(parts, key=parts.get),
        peak_bytes=peak,
        short_bytes=short,
        explain=_explain(costs, layout, slowest, flying, micro_batches, offload, obstacle),
        micro_batches=micro_batches,
        send_seconds=send,
        offload=offload,
    )


def _each_stage(stages: list[StageCost]) -> tuple[list[float], list[float]]:
    """Seconds of every stage, forward and backward."""
    costs = [stage.cost for stage in stages]
    forward = [cost.forward + cost.forward_traffic for cost in costs]
    return forward, [cost.backward_input + cost.backward_traffic + cost.backward_weight for cost in costs]


def _together(layout: Layout, rank: int, stages: list[StageCost]) -> list[StageCost]:
    return [stages[layout.stage_of_chunk(rank, chunk)] for chunk in range(layout.chunks)]


class _Rank:
    """One pipeline rank with all its chunks."""

    def __init__(self, costs: Costs, layout: Layout, chunks: list[StageCost], place: int):
        self.costs, self.layout = costs, layout
        if len(chunks) == 1:
            (stage,) = chunks
            self.cost, self.held, self.largest, self.pieces = stage
        else:
            self.cost = chunks[0].cost._make(map(sum, zip(*(stage.cost for stage in chunks), strict=True)))
            self.cost = self.cost._replace(working_bytes=max(stage.cost.working_bytes for stage in chunks))
            self.held = sum((stage.held for stage in chunks), Held())
            self.largest = max(stage.largest for stage in chunks)
            self.pieces = sum(stage.pieces for stage in chunks)
        self.forward = self.cost.forward + self.cost.forward_traffic
        self.backward_input = self.cost.backward_input + self.cost.backward_traffic
        self.backward_weight = self.cost.backward_weight
        self.whole = self.forward + self.backward_input + self.backward_weight

    @property
    def updated(self) -> float:
        """Numbers whose weights this rank updates."""
        if self.layout.zero == 0:
            return self.held.numbers
        return self.held.dense / self.layout.shard_ranks + self.held.expert / expert_ranks(self.layout)

    def data_seconds(self, micro_batches: int) -> float:
        layout, costs = self.layout, self.costs
        key = (
            self.held.dense, self.held.expert, self.pieces, layout.zero, layout.replicate, layout.tp, layout.cp, layout.dp,
            layout.pp, layout.ep, layout.etp,
        )  # fmt: skip
        traffic = costs.data.get(key)
        if traffic is None:
            gradient_bytes = max(2.0, costs.kept[layout.zero].gradients)
            traffic = data_traffic(self.held, layout, costs.links, gradient_bytes, self.pieces)
            costs.data[key] = traffic
        if not any(traffic):
            return 0.0
        computing_back = self.cost.backward_input + self.cost.backward_weight
        return exposed_data_seconds(
            traffic, micro_batches, self.cost.forward, computing_back, self.pieces, costs.runtime.overlap
        )

    def memory(self, flying: float) -> Memory:
        layout, costs, cost = self.layout, self.costs, self.cost
        keep = costs.kept[layout.zero]
        states = states_of(self.held, keep, layout)
        weights, gradients, optimizer = states
        buffers = gathered_buffers(layout, self.largest) + costs.runtime.fixed_bytes
        if costs.convention == "deepspeed" and layout.zero == 3:
            buffers = 4 * self.largest + costs.runtime.fixed_bytes
        if layout.offload != "none":
            optimizer = 0.0
        if layout.offload == "states":
            weights = gradients = 0.0
        activations = cost.kept_bytes * flying
        buffers += max(0.0, cost.working_bytes - cost.logit_bytes)
        margin = costs.runtime.fragmentation * (activations + cost.logit_bytes + buffers)
        return Memory(weights, gradients, optimizer, activations, cost.logit_bytes, buffers, margin)


def _update_bytes(costs: Costs, layout: Layout) -> float:
    """Bytes a number that the optimizer's step reads and writes: states and master twice, the gradient, new weights."""
    keep = costs.kept[layout.zero]
    return 2 * keep.optimizer + max(2.0, keep.gradients) + keep.weights


def _simulate(layout: Layout, stages: list[StageCost], micro_batches: int, send: float) -> tuple[float, list[float]]:
    """(seconds, micro-batches in flight for each rank) of the schedule, block by block."""
    from tersor.ops.plan_parallel.schedule.pipeline import build, simulate

    grid = build(layout.schedule, layout.pp, micro_batches, layout.chunks)
    timeline = simulate(
        grid,
        [stage.cost.forward + stage.cost.forward_traffic for stage in stages],
        [stage.cost.backward_input + stage.cost.backward_traffic for stage in stages],
        [stage.cost.backward_weight for stage in stages],
        send,
    )
    kept = [stage.cost.kept_bytes for stage in stages]
    flying = []
    for rank, most in enumerate(grid.peak(kept)):
        whole = sum(kept[layout.stage_of_chunk(rank, chunk)] for chunk in range(layout.chunks))
        flying.append(most / whole if whole else 0.0)
    return timeline.seconds, flying


def _offload(
    costs: Costs, layout: Layout, ranks: list[_Rank], tokens: float, micro_batches: int, working: float
) -> Offload | None:
    if layout.offload == "none":
        return None
    fullest = max(ranks, key=lambda rank: rank.updated)
    return plan_offload(
        layout, costs.kept[layout.zero], fullest.updated, fullest.held.numbers, costs.cluster, tokens, micro_batches,
        micro_batches * working, costs.device.products,
    )  # fmt: skip


def _explain(costs, layout, slowest, flying, micro_batches, offload, obstacle) -> list[str]:
    lines = []
    if layout.pp > 1:
        lines.append(
            f"{micro_batches} micro-batches over {layout.pp} pipeline ranks; rank {slowest} is the slowest, rank 0 holds "
            f"{number(flying[0])} micro-batches at once"
        )
    per_node = costs.cluster.devices_per_node
    for axis, what in (("tp", "tensor"), ("ep", "expert")):
        if getattr(layout, axis) > 1 and costs.links.span(layout, axis)[1] > 1:
            lines.append(f"{what} parallelism crosses nodes of {per_node} devices")
    if obstacle:
        lines.append(obstacle)
    elif offload is not None:
        for tier in offload.tiers:
            lines.append(
                f"{tier.name}: {tier.gbps:.3g} GB/s a device, {tier.required_gbps:.3g} would leave 90 % of the peak; "
                f"{tier.reached:.0%} by bandwidth alone"
            )
    return lines

"""What communication costs a rank: the collectives inside a block, the sends between stages, and those of data parallelism.

Collectives inside blocks come from dependencies.collectives; here they get a price (communication.links) and what can hide
behind computing is taken off. Data-parallel traffic by ZeRO stage (Rajbhandari et al. 2020, section 7): gradients are
all-reduced once a step (0), or reduce-scattered and the weights gathered (1); gradients are scattered for every micro-batch
where no rank keeps them whole (2), and where no rank keeps whole weights these are gathered twice for each (3).
"""

from __future__ import annotations

from typing import NamedTuple

from tersor.ops.plan_parallel.cost.constants import Runtime
from tersor.ops.plan_parallel.cost.states import Held
from tersor.ops.plan_parallel.layout import Layout

AXIS_PARTS = {"tp": "tp", "cp": "cp", "ep": "ep", "etp": "ep"}
WEIGHT_BYTES = 2  # that are gathered, whatever is kept


class BlockTraffic(NamedTuple):
    """Seconds of one block and micro-batch on a rank that computing does not hide. tp, cp and ep (with etp) apart."""

    forward: tuple[float, float, float] = (0.0, 0.0, 0.0)
    backward: tuple[float, float, float] = (0.0, 0.0, 0.0)


def block_traffic(
    collectives: list, layout: Layout, links, runtime: Runtime, forward: float, backward: float
) -> BlockTraffic:
    """`forward` and `backward` are seconds of computing that overlappable collectives may hide behind."""
    result = []
    for phase, computing in (("forward", forward), ("backward", backward)):
        open_ = {"tp": 0.0, "cp": 0.0, "ep": 0.0}
        hidden = dict(open_)
        for entry in collectives:
            if entry.phase == phase:
                seconds = entry.count * links.seconds(entry.name, entry.nbytes, *links.span(layout, entry.axis))
                (hidden if entry.overlappable else open_)[AXIS_PARTS[entry.axis]] += seconds
        total = sum(hidden.values())
        left = max(0.0, total - runtime.overlap * computing) / total if total else 0.0
        result.append(tuple(open_[part] + left * hidden[part] for part in ("tp", "cp", "ep")))
    return BlockTraffic(*result)


def send_seconds(layout: Layout, links, hidden: int, tokens: float) -> float:
    """Of one micro-batch's hidden states to the next stage, cut by tensor parallelism. The slowest hop decides."""
    if layout.pp == 1:
        return 0.0
    _, nodes = links.span(layout, "pp")
    return links.seconds("send", tokens * hidden * 2 / layout.tp, *((1, 2) if nodes > 1 else (2, 1)))


class DataTraffic(NamedTuple):
    """Seconds of data-parallel collectives: for each micro-batch beside its forward and its backward pass, and once a step
    beside the first forward and the last backward pass."""

    each_forward: float = 0.0
    each_backward: float = 0.0
    once_forward: float = 0.0
    once_backward: float = 0.0


def data_traffic(held: Held, layout: Layout, links, gradient_bytes: float, messages: int) -> DataTraffic:
    """Of the weights that a rank holds, in `messages` pieces (blocks), which pay latency each."""
    total = DataTraffic()
    groups = [(held.dense, "shard", layout.shard_ranks), (held.expert, "edp", layout.edp)]
    for numbers, axis, ranks in groups:
        if not numbers or (ranks == 1 and layout.replicate == 1):
            continue
        span = links.span(layout, axis)

        def timed(collective: str, nbytes: float, over=span) -> float:
            return messages * links.seconds(collective, nbytes / messages, *over)

        gradients, weights = numbers * gradient_bytes, numbers * WEIGHT_BYTES
        between = 0.0
        if layout.replicate > 1 and axis == "shard":
            between = timed("all_reduce", gradients / ranks, links.span(layout, "replicate"))
        if layout.zero == 3:
            gather, scatter = timed("all_gather", weights), timed("reduce_scatter", gradients)
            part = DataTraffic(gather, gather + scatter + between)
        elif layout.zero == 2:  # no rank keeps whole gradients from one micro-batch to the next
            part = DataTraffic(0.0, timed("reduce_scatter", gradients) + between, timed("all_gather", weights))
        elif layout.zero == 1:
            part = DataTraffic(0.0, 0.0, timed("all_gather", weights), timed("reduce_scatter", gradients) + between)
        else:
            part = DataTraffic(0.0, 0.0, 0.0, timed("all_reduce", gradients) + between)
        total = DataTraffic(*(mine + theirs for mine, theirs in zip(total, part, strict=True)))
    return total


def exposed_data_seconds(
    traffic: DataTraffic, micro_batches: int, forward: float, backward: float, messages: int, overlap: float
) -> float:
    """What of it a step waits for: what does not fit beside computing, and the first and last message, which have nothing
    to hide behind."""
    each = max(0.0, traffic.each_forward - overlap * forward) + max(0.0, traffic.each_backward - overlap * backward)
    once = max(0.0, traffic.once_forward - overlap * forward) + max(0.0, traffic.once_backward - overlap * backward)
    ends = (traffic.each_forward + traffic.once_forward + traffic.each_backward + traffic.once_backward) / messages
    return micro_batches * each + once + ends

"""How long a pipeline takes for one step, in closed form. `schedule.pipeline.simulate` does it exactly.

With even stages these are the published bubbles, as shares of the time that is worked: (p-1)/m for GPipe and 1F1B,
(p-1)/(v m) interleaved (Narayanan et al. 2021), (p-1)(f + b - w) for ZB-H1 and (p-1)(f + b - 2w)/2 where positive for ZBV (Qi et
al. 2023; b is the backward pass to the inputs, w to the weights).
"""

from __future__ import annotations

from collections.abc import Sequence


def step_seconds(
    schedule: str,
    chunks: int,
    micro_batches: int,
    forward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    stages: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[float, int]:
    """(seconds, the rank that decides). Times are per pipeline rank, of one micro-batch through all its chunks; `stages` are
    those of every stage, forward and whole backward, which an interleaved schedule with uneven chunks is slowed by."""
    whole = [f + b + w for f, b, w in zip(forward, backward_input, backward_weight, strict=True)]
    slowest = max(range(len(whole)), key=whole.__getitem__)
    worked = micro_batches * whole[slowest]
    if len(whole) == 1:
        return worked, slowest
    if schedule == "interleaved" and stages is not None:
        worked = micro_batches * max(whole[slowest], (whole[slowest] + in_step(len(whole), chunks, *stages)) / 2)
    if schedule in ("zb-h1", "zbv"):
        weights, share = (1, 1.0) if schedule == "zb-h1" else (2, 0.5)
        waits = [
            max(0.0, f + b - weights * w) * share
            for f, b, w in zip(forward, backward_input, backward_weight, strict=True)
        ]
    else:
        share = 1 / chunks if schedule == "interleaved" else 1.0
        waits = [share * seconds for seconds in whole]
    return worked + sum(waits) - waits[slowest], slowest


def in_step(pp: int, chunks: int, forward: Sequence[float], backward: Sequence[float]) -> float:
    """Seconds of a micro-batch if ranks went in step, each slot a forward and a backward pass as slow as the slowest rank's:
    forward passes wander down the ranks a slot at a time and backward passes up. Ranks have some slack, so that the truth
    is between this and the slowest rank's own time; the middle is within 6 % of simulations (test)."""
    period, total = pp * chunks, 0.0
    behind = 2 * (pp - 1) + (chunks - 1) * pp
    for slot in range(period):
        total += max(
            forward[(slot + behind - rank) % period // pp * pp + rank]
            + backward[(chunks - 1 - (slot + rank) % period // pp) * pp + rank]
            for rank in range(pp)
        )
    return total / pp


def least_seconds(schedule: str, pp: int, chunks: int, micro_batches: int, seconds: float) -> float:
    """What `step_seconds` never falls below, however stages that take `seconds` together are cut."""
    if schedule in ("zb-h1", "zbv"):
        return micro_batches * seconds / pp
    share = 1 / chunks if schedule == "interleaved" else 1.0
    return (micro_batches - share) * seconds / pp + share * seconds


def send_share(schedule: str, pp: int, micro_batches: int) -> float:
    """How many sends between neighbours a step waits for, beside those of the stages' own times: to the last rank and back
    once, and in schedules that hold `pp` micro-batches at most the same again for every `pp` of them."""
    if pp == 1:
        return 0.0
    way = 2.0 * (pp - 1) * (2 if schedule == "zbv" else 1)
    if schedule in ("gpipe", "interleaved"):
        return way
    return way * (1 + (micro_batches - 1) / pp)

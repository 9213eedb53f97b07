"""Pipeline schedules: in what order a stage runs the forward and backward passes of its micro-batches.

GPipe (arXiv 1811.06965), 1F1B (PipeDream-flush, arXiv 2006.09503), interleaved 1F1B (Megatron-LM, arXiv 2104.04473). The
most passes in flight at once are `m`, `min(m, p - i)` and `2 (p - i - 1) + (v - 1) p + 1` chunks, for m micro-batches on
stage i of p with v chunks of layers a stage.
"""

from __future__ import annotations

from tersor.formats.errors import TersorError

SCHEDULES = ("gpipe", "1f1b", "interleaved")

Pass = tuple[str, int, int]  # ("forward" or "backward", micro-batch, chunk)


def passes(schedule: str, micro_batches: int, stage: int = 0, stages: int = 1, chunks: int = 1) -> list[Pass]:
    """Raises TersorError for what the schedule cannot run."""
    if schedule not in SCHEDULES:
        raise TersorError(f"schedule {schedule!r} is not known", f"the schedules are {', '.join(SCHEDULES)}")
    if micro_batches < 1 or stages < 1 or chunks < 1 or not 0 <= stage < stages:
        raise TersorError(
            f"no schedule has {micro_batches} micro-batches on stage {stage} of {stages} with {chunks} chunks",
            "micro-batches, stages and chunks are 1 or more, and stages count from 0",
        )
    if schedule != "interleaved":
        if chunks != 1:
            raise TersorError(f"{schedule} runs {chunks} chunks on a stage", "only the interleaved schedule has chunks")
        ahead = micro_batches if schedule == "gpipe" else min(micro_batches, stages - stage - 1)
        forward = [("forward", index, 0) for index in range(micro_batches)]
        backward = [("backward", index, 0) for index in range(micro_batches)]
        return _one_by_one(forward, backward, ahead)
    if micro_batches % stages:
        raise TersorError(
            f"the interleaved schedule runs {micro_batches} micro-batches over {stages} stages",
            f"use a multiple of {stages} micro-batches",
        )
    total = micro_batches * chunks
    places = [
        (index // (stages * chunks) * stages + index % stages, index // stages % chunks) for index in range(total)
    ]
    forward = [("forward", micro_batch, chunk) for micro_batch, chunk in places]
    backward = [("backward", micro_batch, chunks - 1 - chunk) for micro_batch, chunk in places]
    ahead = total if micro_batches == stages else min(total, 2 * (stages - stage - 1) + (chunks - 1) * stages)
    return _one_by_one(forward, backward, ahead)


def _one_by_one(forward: list[Pass], backward: list[Pass], ahead: int) -> list[Pass]:
    """`ahead` forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    order = forward[:ahead]
    for index, one in enumerate(forward[ahead:]):
        order += [one, backward[index]]
    return order + backward[len(forward) - ahead :]

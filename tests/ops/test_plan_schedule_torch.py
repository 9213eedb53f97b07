"""Orders against those of torch.distributed.pipelining, action by action, where both have the schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tersor.ops.plan_parallel.schedule.check import check
from tersor.ops.plan_parallel.schedule.pipeline import Action, Grid, build, simulate

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
KIND = {"F": "F", "I": "B", "W": "W", "B": "BW"}
NAMES = {
    "gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble", "zbv": "ScheduleZBVZeroBubble",
}  # fmt: skip


def theirs(schedule: str, pp: int, micro_batches: int, chunks: int) -> list[tuple[Action, ...]]:
    """The orders of torch, without its idle slots and without actions that are not computation."""

    def stage(index: int) -> SimpleNamespace:
        return SimpleNamespace(
            group=None, group_rank=0, group_size=pp, num_stages=pp * chunks, stage_index=index, submod=None, device="cpu",
            is_first=index == 0, is_last=index == pp * chunks - 1, has_backward=True, stage_index_to_group_rank={},
        )  # fmt: skip

    kind = getattr(schedules, NAMES[schedule])
    if schedule in ("gpipe", "1f1b"):  # schedules of one stage a rank make their order on demand
        if not hasattr(kind, "_get_pipeline_order"):
            pytest.skip("this torch does not tell the order of schedules of one stage a rank")
        made = object.__new__(kind)
        made._num_stages, made._n_microbatches = pp, micro_batches
        order = made._get_pipeline_order()
    else:
        order = kind([stage(rank) for rank in range(0, pp * chunks, pp)], micro_batches, lambda *_: None).pipeline_order
    return [
        tuple(
            Action(KIND[action.computation_type.value], action.microbatch_index, action.stage_index)
            for action in order[rank] if action is not None and action.computation_type.value in KIND
        )
        for rank in range(pp)
    ]  # fmt: skip


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_one_chunk_a_rank(schedule, pp):
    for micro_batches in sorted({pp, pp + 1, 2 * pp, 3 * pp + 2}):
        if schedule == "zb-h1" and micro_batches % max(1, micro_batches // pp):
            continue  # torch asks for whole rounds, though one chunk does not need them
        ours, torch = build(schedule, pp, micro_batches).ranks, theirs(schedule, pp, micro_batches, 1)
        if (
            schedule == "1f1b"
        ):  # torch 2.13 numbers the last rank's forwards from 1 where it prints 1F1B; it runs them from 0
            torch[-1] = tuple(
                action._replace(micro=action.micro - (action.kind == "F" and torch[-1][0].micro))
                for action in torch[-1]
            )
        assert list(ours) == torch


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 5), (4, 10), (4, 16), (4, 15), (8, 24)])
def test_interleaved(pp, micro_batches, chunks):
    """Rounds of more than `pp` micro-batches too, where `pp` does not divide them."""
    assert list(build("interleaved", pp, micro_batches, chunks).ranks) == theirs(
        "interleaved", pp, micro_batches, chunks
    )


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_zbv(pp):
    for micro_batches in (1, pp, 2 * pp - 1, 2 * pp, 5 * pp):
        assert list(build("zbv", pp, micro_batches, 2).ranks) == theirs("zbv", pp, micro_batches, 2)


def test_orders_of_torch_pass_the_check_and_run():
    grid = Grid("zbv", 4, 2, 12, tuple(theirs("zbv", 4, 12, 2)))
    check(grid)
    assert simulate(grid, 1, 1, 1).seconds == simulate(build("zbv", 4, 12, 2), 1, 1, 1).seconds

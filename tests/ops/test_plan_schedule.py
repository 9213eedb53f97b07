"""Pipeline schedules: they can run, and take the time and the memory that their papers publish."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import SCHEDULES, Layout
from tersor.ops.plan_parallel.schedule.builders import BUILDERS, group_size, why_not
from tersor.ops.plan_parallel.schedule.check import check
from tersor.ops.plan_parallel.schedule.pipeline import Action, Grid, build, simulate

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zbv": 2}


def changed(grid: Grid, rank: int, actions: list[Action]) -> Grid:
    ranks = [*grid.ranks[:rank], tuple(actions), *grid.ranks[rank + 1 :]]
    return Grid(grid.schedule, grid.pp, grid.chunks, grid.micro_batches, tuple(ranks))


def test_every_schedule_of_a_layout_is_built():
    assert tuple(BUILDERS) == SCHEDULES


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES), pp=st.integers(1, 9), micro_batches=st.integers(1, 40), chunks=st.integers(1, 5)
)  # fmt: skip
def test_what_is_built_can_run(schedule, pp, micro_batches, chunks):
    if reason := why_not(schedule, pp, micro_batches, chunks):
        with pytest.raises(TersorError, match=reason[:20]):
            build(schedule, pp, micro_batches, chunks)
        return
    grid = build(schedule, pp, micro_batches, chunks)
    check(grid)
    assert sorted(action.stage for actions in grid.ranks for action in actions if action.kind == "F") == sorted(
        list(range(pp * chunks)) * micro_batches
    )


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES), pp=st.integers(1, 6), micro_batches=st.integers(6, 20), data=st.data(),
)  # fmt: skip
def test_nothing_starts_before_what_it_needs(schedule, pp, micro_batches, data):
    grid = build(schedule, pp, micro_batches, CHUNKS[schedule])
    times = st.lists(st.floats(0, 5), min_size=grid.stages, max_size=grid.stages)
    forward, inputs, weights, sends = (data.draw(times) for _ in range(4))
    timeline = simulate(grid, forward, inputs, weights, sends[1:])
    assert len(timeline.blocks) == sum(map(len, grid.ranks))
    ends = {
        ("B" if block.kind == "BW" else block.kind, block.micro, block.stage): block.end for block in timeline.blocks
    }
    last = [0.0] * pp
    for block in sorted(timeline.blocks, key=lambda block: (block.start, block.end)):
        assert block.start >= last[block.rank]  # one thing at a time
        last[block.rank] = block.end
        took = {"F": forward, "B": inputs, "W": weights}
        expected = inputs[block.stage] + weights[block.stage] if block.kind == "BW" else took[block.kind][block.stage]
        assert block.end - block.start == pytest.approx(expected, abs=1e-9)
        if block.kind == "F" and block.stage:
            across = grid.rank_of(block.stage - 1) != block.rank
            assert block.start >= ends["F", block.micro, block.stage - 1] + across * sends[block.stage] - 1e-9
        if block.kind in ("B", "BW"):
            assert block.start >= ends["F", block.micro, block.stage]
            if block.stage + 1 < grid.stages:
                across = grid.rank_of(block.stage + 1) != block.rank
                assert block.start >= ends["B", block.micro, block.stage + 1] + across * sends[block.stage + 1] - 1e-9
        if block.kind == "W":
            assert block.start >= ends["B", block.micro, block.stage]
    assert timeline.seconds == max(last)
    assert sum(timeline.busy) == pytest.approx(micro_batches * (sum(forward) + sum(inputs) + sum(weights)))


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 3), (2, 8), (4, 4), (4, 9), (8, 64)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(schedule, pp, micro_batches):
    """(p-1)/m of the work, (p-1)/(m+p-1) of the step: Narayanan et al. 2021, section 2.2; Huang et al. 2018."""
    timeline = simulate(build(schedule, pp, micro_batches), 1.0, 0.75, 1.25)
    assert timeline.seconds == pytest.approx(3 * (micro_batches + pp - 1))
    assert timeline.bubble_share == pytest.approx([(pp - 1) / (micro_batches + pp - 1)] * pp)
    assert timeline.seconds / timeline.busy[0] - 1 == pytest.approx((pp - 1) / micro_batches)


@pytest.mark.parametrize(("pp", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 4), (8, 32, 3)])
def test_bubble_of_interleaved(pp, micro_batches, chunks):
    """(p-1)/(v m) of the work: Narayanan et al. 2021, section 2.2."""
    timeline = simulate(build("interleaved", pp, micro_batches, chunks), 1 / chunks, 1 / chunks, 1 / chunks)
    assert timeline.seconds / timeline.busy[0] - 1 == pytest.approx((pp - 1) / (chunks * micro_batches))


@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.25, 0.75), (1, 1.5, 0.5)])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 6), (4, 12), (8, 24)])
def test_bubble_of_zb_h1(pp, micro_batches, times):
    """(p-1) (forward + input gradient - weight gradient): Qi et al. 2023, table 2; a third of 1F1B's where they are equal."""
    timeline = simulate(build("zb-h1", pp, micro_batches), *times)
    forward, inputs, weights = times
    assert timeline.seconds == pytest.approx(micro_batches * sum(times) + (pp - 1) * (forward + inputs - weights))
    if len(set(times)) == 1:
        plain = simulate(build("1f1b", pp, micro_batches), *times)
        assert timeline.seconds - timeline.busy[0] == pytest.approx((plain.seconds - plain.busy[0]) / 3)


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 12), (8, 30)])
def test_zbv_has_no_bubble(pp, micro_batches):
    """Between its first and its last action no rank waits where the three times are equal: Qi et al. 2023, section 6."""
    timeline = simulate(build("zbv", pp, micro_batches, 2), 0.5, 0.5, 0.5)
    for rank in range(pp):
        mine = [block for block in timeline.blocks if block.rank == rank]
        assert max(block.end for block in mine) - min(block.start for block in mine) == pytest.approx(3 * micro_batches)
    assert timeline.seconds == pytest.approx(3 * micro_batches + (pp - 1) / 2)  # until the last rank has its first work


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 2), (4, 2), (4, 4), (4, 12), (8, 20)])
def test_micro_batches_in_flight(pp, micro_batches):
    ranks = range(pp)
    assert build("gpipe", pp, micro_batches).in_flight == (micro_batches,) * pp
    assert build("1f1b", pp, micro_batches).in_flight == tuple(min(micro_batches, pp - rank) for rank in ranks)
    assert max(build("zb-h1", pp, micro_batches).in_flight) == min(micro_batches, pp)
    if micro_batches >= pp:
        assert build("zb-h1", pp, micro_batches).in_flight == (pp,) * pp
    if micro_batches >= 2 * pp:  # as much as the first rank of 1F1B, on every rank
        assert build("zbv", pp, micro_batches, 2).in_flight == (pp,) * pp


@pytest.mark.parametrize(("pp", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 32, 4)])
def test_micro_batches_in_flight_when_interleaved(pp, micro_batches, chunks):
    """2 (p-i-1) + (v-1) p + 1 chunks: Megatron-LM's warm-up and the one that then runs."""
    expected = [(2 * (pp - rank - 1) + (chunks - 1) * pp + 1) / chunks for rank in range(pp)]
    assert build("interleaved", pp, micro_batches, chunks).in_flight == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), pp=st.integers(1, 5), micro_batches=st.integers(5, 12), data=st.data())
def test_memory_over_time_has_the_peak_of_the_order(schedule, pp, micro_batches, data):
    grid = build(schedule, pp, micro_batches, CHUNKS[schedule])
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=grid.stages, max_size=grid.stages))
    kept = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    curves = simulate(grid, 1.0, 0.5, 1.5, 0.25).held(sizes, kept)
    assert [max(amount for _, amount in curve) for curve in curves] == pytest.approx(grid.peak(sizes, kept))
    assert all(curve[-1][1] == pytest.approx(0, abs=1e-9) for curve in curves)
    assert all(before[0] < after[0] for curve in curves for before, after in pairwise(curve))


def test_memory_of_one_rank_over_time():
    curves = simulate(build("1f1b", 2, 2), 1, 1, 1).held([10, 10])
    assert curves == [[(0, 10), (1, 20), (6, 10), (9, 0)], [(0, 0), (1, 10), (4, 10), (7, 0), (9, 0)]]
    split = simulate(build("zb-h1", 1, 1), 1, 1, 1).held([10], kept=0.25)
    assert split == [[(0, 10), (2, 2.5), (3, 0)]]


def test_groups_of_an_interleaved_schedule():
    assert [group_size(4, count) for count in (4, 8, 10, 9, 7, 11, 15)] == [4, 4, 5, 5, 7, 6, 5]
    for pp in range(1, 12):
        for count in range(pp, 60):
            size = group_size(pp, count)
            assert size >= pp
            assert count % size == 0 or count % size >= pp


def test_a_slow_stage_sets_the_pace():
    grid = build("1f1b", 4, 32)
    assert simulate(grid, [1, 1, 2, 1], 1, 1).seconds >= 32 * 4
    assert simulate(grid, [1, 1, 2, 1], 1, 1).bubble_share[2] == min(simulate(grid, [1, 1, 2, 1], 1, 1).bubble_share)
    sent = simulate(grid, 1, 1, 1, 0.5)
    assert sent.seconds > simulate(grid, 1, 1, 1).seconds
    assert simulate(build("zbv", 1, 3, 2), 1, 1, 1, 9.0).seconds == 18  # nothing is sent within a rank


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dualpipe", 4, 8, 1), "'dualpipe' is not known"),
        (("interleaved", 4, 3, 2), "as many micro-batches as pp=4 at least, it has 3"),
        (("interleaved", 4, 8, 1), "2 chunks at least"),
        (("zbv", 4, 8, 1), "zbv has 2 chunks on each rank, not 1"),
        (("1f1b", 4, 8, 2), "1f1b has 1 chunk"),
        (("gpipe", 4, 0, 1), "0 micro-batches"),
    ],
)
def test_what_cannot_be_built_is_said(arguments, words):
    assert words in why_not(*arguments)
    with pytest.raises(TersorError, match=words):
        build(*arguments)
    assert why_not("1f1b", 4, 8, 1) == ""


def test_a_deadlock_is_found_and_named():
    grid = build("1f1b", 2, 4)
    first = list(grid.ranks[0])
    first[1], first[2] = first[2], first[1]  # the first rank waits for a backward of what it has not sent
    assert [action.kind for action in first[:3]] == ["F", "BW", "F"]
    check(changed(grid, 0, first))  # one micro-batch at a time runs, if slowly
    first[0], first[1] = first[1], first[0]
    with pytest.raises(TersorError, match="rank 0 waits with the backward of micro-batch 0 in stage 0 for the forward"):
        check(changed(grid, 0, first))
    crossed = [Action("F", 1, 0), Action("BW", 1, 0), *(action for action in grid.ranks[0] if action.micro != 1)]
    with pytest.raises(
        TersorError, match=r"deadlock: rank 0 .* stage 1; rank 1 .* forward of micro-batch 0 in stage 0"
    ):
        check(changed(grid, 0, crossed))
    with pytest.raises(TersorError, match="deadlock"):
        simulate(changed(grid, 0, crossed), 1, 1, 1)


@pytest.mark.parametrize(
    ("schedule", "change", "words"),
    [
        ("1f1b", lambda actions: actions[1:], "the forward of micro-batch 0 in stage 1 is done 0 times"),
        ("1f1b", lambda actions: actions[:-1], "the backward of micro-batch 3 in stage 1 is done 0 times"),
        ("1f1b", lambda actions: [*actions, actions[0]], "the forward of micro-batch 0 in stage 1 is done 2 times"),
        ("1f1b", lambda actions: [*actions, Action("F", 4, 1)], "micro-batch 4 in stage 1, which is no action"),
        ("1f1b", lambda actions: [*actions, Action("send", 0, 1)], "send of micro-batch 0"),
        (
            "1f1b",
            lambda actions: [*actions, Action("F", 0, 0)],
            "rank 1 has the forward .* a stage that it does not hold",
        ),
        ("zb-h1", lambda actions: actions[:-1], "weight gradient of micro-batch 3 in stage 1 is done 0 times"),
        (
            "zb-h1",
            lambda actions: [*actions, Action("BW", 0, 1)],
            "backward of micro-batch 0 in stage 1 is done 2 times",
        ),
    ],
)
def test_missing_and_repeated_actions_are_named(schedule, change, words):
    grid = build(schedule, 2, 4)
    with pytest.raises(TersorError, match=words):
        check(changed(grid, 1, change(list(grid.ranks[1]))))


def test_a_grid_without_all_its_ranks():
    grid = build("1f1b", 2, 4)
    with pytest.raises(TersorError, match="actions of 1 ranks, pp is 2"):
        check(Grid("1f1b", 2, 1, 4, grid.ranks[:1]))


def test_times_that_do_not_match_the_stages():
    with pytest.raises(TersorError, match="forward has 3 times, the schedule needs 4"):
        simulate(build("interleaved", 2, 4, 2), [1, 1, 1], 1, 1)


def test_ranks_hold_the_stages_of_the_layout():
    layout = Layout(pp=3, schedule="zbv", chunks=2)
    grid = build("zbv", 3, 6, 2)
    for rank, actions in enumerate(grid.ranks):
        assert {action.stage for action in actions} == {layout.stage_of_chunk(rank, chunk) for chunk in range(2)}

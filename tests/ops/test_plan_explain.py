"""What is said about plans: why one won, why others lost, why a layout cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_stub import GB, StubCosts
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.search.compare import changes, describe_memory, why_slower
from tersor.ops.plan_parallel.search.explain import (
    explain,
    neighbours,
    no_plan,
    smaller_cluster,
    why_empty,
    why_not,
)
from tersor.ops.plan_parallel.search.pins import check_pins
from tersor.ops.plan_parallel.search.price import Candidate, Pricer
from tersor.ops.plan_parallel.search.space import Legality, Space
from tersor.ops.plan_parallel.search.train import run_schedules, search_space

HEADS = {degree: "" if 12 % degree == 0 else f"12 heads are not a multiple of {degree}" for degree in range(2, 65)}
SPACE = Space(
    layers=12,
    experts=0,
    devices_per_node=4,
    global_batch=64,
    seq_len=4096,
    legal=Legality(HEADS, {}, {}),
)
COSTS = StubCosts(state_gigabytes=300.0)


def pinned(**pins) -> Space:
    return replace(SPACE, pins=check_pins(pins))


@pytest.fixture(scope="module")
def result():
    found = search_space(Pricer(COSTS, COSTS.limit), SPACE, 8, 20)
    found.best = run_schedules(found.pricer, found.best, 5)
    return found


def test_explanation_says_bound_memory_and_runner_up(result):
    lines = explain(result.best[0], result.best[1:], COSTS.limit)
    assert lines[0].startswith("bound by compute: computing ")
    assert "%" in lines[0]
    assert "of 80 GB" in lines[1] and "optimizer" in lines[1]
    assert lines[-1].startswith("runner-up ") and "longer" in lines[-1]
    assert len(explain(result.best[0], [], COSTS.limit)) == len(lines) - 1


def test_slower_names_the_part_that_grew():
    fast, slow = Layout(pp=4, dp=2), Layout(pp=4, dp=2, recompute="full")
    costs = StubCosts(noise=0.0)
    words = why_slower(Candidate(fast, costs.estimate(fast)), Candidate(slow, costs.estimate(slow)))
    assert "longer: computing +" in words and "waiting in the pipeline +" in words and "less memory" in words


def test_as_fast_says_what_memory_it_takes():
    one, other = Layout(dp=8, zero=1), Layout(dp=8, zero=2)
    costs = StubCosts(noise=0.0)
    words = why_slower(Candidate(one, costs.estimate(one)), Candidate(other, costs.estimate(other)))
    assert words.startswith("as fast") and "less memory" in words


def test_a_faster_one_is_not_called_slower():
    """As --why-not may find where it frees what the user has pinned."""
    result = search_space(Pricer(COSTS, COSTS.limit), pinned(recompute="full"), 8)
    words = why_not("recompute=none", result)
    assert "a step takes" in words and "less: computing -" in words


def test_fewer_devices_are_told(result):
    assert smaller_cluster(result) == ""
    layout = Layout(tp=2)
    fewer = Candidate(layout, replace(result.best[0].estimate))
    words = smaller_cluster(replace(result, fewer=fewer))
    assert words.startswith("2 of the 8 devices do as well, with tp=2: as fast")
    assert smaller_cluster(replace(result, best=[], fewer=fewer)) == "8 devices have no plan, 2 have one: tp=2"


def test_changes():
    assert changes(Layout(tp=2), Layout(tp=4, zero=1)) == "tp=4,zero=1"
    assert changes(Layout(pp=2, stages=(1, 2)), Layout(pp=2, stages=(2, 1))) == "stages=2+1"
    assert changes(Layout(), Layout()) == "nothing else"


def test_memory_names_the_fullest_rank():
    layout = Layout(tp=2, pp=2, dp=2)
    estimate = COSTS.estimate(layout)
    first, second = estimate.stages
    turned = replace(estimate, stages=(second, first))
    assert describe_memory(Candidate(layout, estimate), COSTS.limit).startswith("rank 0 (stage 0)")
    assert describe_memory(Candidate(layout, turned), COSTS.limit).startswith("rank 4 (stage 1)")


def test_why_not_the_plan_itself(result):
    best = result.best[0].layout
    assert why_not(f"tp={best.tp}", result) == f"tp={best.tp} is part of the plan"
    assert "part of the plan" in why_not(best.describe(), result)


def test_why_not_a_slower_one(result):
    other = result.best[3].layout
    words = why_not(f"tp={other.tp},pp={other.pp},dp={other.dp}", result)
    assert "at its best" in words and "longer" in words and other.describe() in words


def test_why_not_one_that_does_not_fit(result):
    words = why_not("tp=1,pp=1,zero=0", result)
    assert "does not fit" in words and "rank 0 (stage 0) needs" in words and "are lacking" in words
    assert "recompute=full" in words  # the nearest one


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=3", "tp=3 does not divide 8 devices"),
        ("tp=4,pp=4", "tp=4 times pp=4 does not divide 8 devices"),
        ("tp=8", "12 heads are not a multiple of 8"),
        ("ep=2", "ep cuts experts, this model has none"),
        ("cp=8,dp=1,tp=1", ""),
        ("micro_batch=3", "not a multiple of dp="),
        ("pp=4,schedule=interleaved,chunks=4", "needs 16 stages, there are 12 blocks"),
        ("pp=1,schedule=zbv", "pipeline of 2"),
        ("devices=5", "at its best pp=5"),
    ],
)
def test_why_not_one_that_cannot_be(result, text, words):
    found = why_not(text, result)
    assert found.startswith(text) and words in found


def test_why_not_refuses_what_is_no_layout(result):
    with pytest.raises(TersorError, match="cannot be pinned"):
        why_not("tensor=8", result)


def test_nothing_fits_says_what_is_nearest_and_short():
    costs = StubCosts(state_gigabytes=5000.0)
    result = search_space(Pricer(costs, costs.limit), SPACE, 8)
    error = no_plan(result)
    assert "no plan fits on 8 devices" in str(error) and "are lacking" in str(error)
    assert result.nearest.layout.describe() in error.hint
    assert "more devices" in error.hint and "--tiers gpu,cpu" in error.hint
    nearest = min(costs.estimate(layout).short_bytes for layout in SPACE.layouts(8))
    assert result.nearest.estimate.short_bytes == nearest > 0


def test_nothing_divides_says_which_choice():
    result = search_space(Pricer(COSTS, COSTS.limit), pinned(tp=3), 8)
    error = no_plan(result)
    assert "tp=3 does not divide 8 devices" in str(error) and "pinned are tp" in error.hint


@pytest.mark.parametrize(
    ("space", "devices", "words"),
    [
        (pinned(tp=[3, 5]), 8, "tp=3 or 5 does not divide"),
        (pinned(pp=16), 32, "pp=16 needs as many blocks at least, there are 12"),
        (pinned(dp=3), 12, "a global batch of 64 is not a multiple of dp=3"),
        (pinned(cp=8), 8, ""),
        (pinned(stages=[1, 2, 3]), 9, ""),
        (pinned(stages=[5, 6], pp=2), 8, "without stages"),
        (pinned(schedule="interleaved", chunks=2, micro_batch=64), 8, "multiples of pp="),
        (replace(SPACE, global_batch=1, layers=1), 7, "there are 1 blocks; 12 heads are not a multiple of 7"),
        (replace(SPACE, experts=8), 8, ""),
    ],
)
def test_why_empty_names_a_rule(space, devices, words):
    if next(space.layouts(devices), None) is None:
        assert words in why_empty(space, devices) and why_empty(space, devices)
    else:
        assert not words


def test_neighbours_change_one_choice_each(result):
    best = result.best[0]
    found = neighbours(result, best)
    assert len(found) >= 4 and len({choice for choice, _ in found}) == len(found)
    for choice, words in found:
        name, value = choice.split("=")
        assert str(getattr(best.layout, name)) != value
        assert "memory" in words or "lacks" in words


def test_limits_are_in_the_words():
    layout = Layout(dp=8)
    assert "of 12 GB" in describe_memory(Candidate(layout, COSTS.estimate(layout)), 12 * GB)

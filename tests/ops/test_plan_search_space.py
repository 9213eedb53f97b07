"""The space of layouts: everything that divides and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.search.pins import check_pins
from tersor.ops.plan_parallel.search.space import MIN_CONTEXT, Legality, Space, divisors

EVERY = {degree: "" for degree in range(2, 65)}
SPACE = Space(
    layers=6,
    experts=0,
    devices_per_node=8,
    global_batch=24,
    seq_len=4096,
    legal=Legality(EVERY, {}, {}),
)
MIXTURE = replace(SPACE, experts=6, legal=Legality(EVERY, {2: "", 3: "", 6: ""}, {2: "", 3: "3 does not divide"}))


def test_divisors():
    for number in range(1, 200):
        assert divisors(number) == tuple(factor for factor in range(1, number + 1) if number % factor == 0)


@settings(max_examples=20, deadline=None)
@given(devices=st.integers(1, 48), batch=st.integers(1, 48), layers=st.integers(1, 7), heads=st.integers(1, 12))
def test_degrees_are_all_that_divide(devices, batch, layers, heads):
    legal = {degree: "" if heads % degree == 0 else f"{heads} heads" for degree in range(2, 65)}
    space = replace(SPACE, global_batch=batch, layers=layers, legal=Legality(legal, {}, {}))
    expected = {
        (tp, pp, dp, 1)
        for tp, pp, dp in product(range(1, devices + 1), repeat=3)
        if tp * pp * dp == devices and heads % tp == 0 and tp <= 8 and pp <= layers and batch % dp == 0
    }
    found = [degrees[:4] for degrees in space.degrees(devices)]
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize("space", [SPACE, MIXTURE, replace(SPACE, tiers=("gpu", "cpu", "nvme"), seq_len=16384)])
@pytest.mark.parametrize("devices", [1, 6, 8, 24])
def test_layouts_are_sound_and_different(space, devices):
    layouts = list(space.layouts(devices))
    assert layouts and len(set(layouts)) == len(layouts)
    for layout in layouts:
        assert space.obstacle(layout, devices) == ""


def test_not_only_powers_of_two():
    assert {layout.tp for layout in SPACE.layouts(6)} == {1, 2, 3, 6}
    assert {layout.pp for layout in SPACE.layouts(6)} == {1, 2, 3, 6}
    assert {layout.micro_batch for layout in SPACE.layouts(1)} == set(divisors(24))


def test_experts_are_cut_where_there_are_some():
    assert {(layout.ep, layout.etp) for layout in SPACE.layouts(8)} == {(1, 1)}
    # 3 experts a rank would do, but 3 divides no group of 8 ranks; 4 and 8 do not divide 6 experts
    assert {(layout.ep, layout.etp) for layout in MIXTURE.layouts(8)} == {(1, 1), (2, 1), (1, 2), (2, 2)}
    assert {layout.ep for layout in MIXTURE.layouts(6)} == {1, 2, 3, 6}


def test_long_sequences_may_be_cut():
    assert {layout.cp for layout in SPACE.layouts(8)} == {1}
    long = replace(SPACE, seq_len=4 * MIN_CONTEXT)
    assert {layout.cp for layout in long.layouts(8)} == {1, 2, 4}
    assert {layout.cp for layout in replace(long, seq_len=4 * MIN_CONTEXT + 2).layouts(8)} == {1}


def test_schedules():
    found = {(layout.pp, layout.schedule, layout.chunks) for layout in SPACE.layouts(8)}
    assert {entry for entry in found if entry[0] == 1} == {(1, "1f1b", 1)}
    assert {entry[1:] for entry in found if entry[0] == 2} == {
        ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zb-h1", 1), ("zbv", 2),
    }  # fmt: skip
    for layout in SPACE.layouts(8):
        micro_batches = layout.micro_batches(24)
        if layout.schedule == "interleaved":
            assert micro_batches % layout.pp == 0
        if layout.schedule in ("zb-h1", "zbv"):
            assert micro_batches >= layout.pp * layout.chunks


def test_states_are_cut_where_there_is_something_to_cut_over():
    alone = {(layout.zero, layout.replicate) for layout in SPACE.layouts(8) if layout.dp == 1}
    assert alone == {(0, 1)}
    shared = {(layout.zero, layout.replicate) for layout in SPACE.layouts(24) if (layout.tp, layout.pp) == (1, 1)}
    assert shared == {(0, 1), *((zero, replicate) for zero in (1, 2, 3) for replicate in (1, 3))}


def test_tiers():
    assert {layout.offload for layout in SPACE.layouts(1)} == {"none"}
    tiers = replace(SPACE, tiers=("gpu", "nvme", "cpu"))
    assert {(layout.offload, layout.tier) for layout in tiers.layouts(1)} == {
        ("none", "cpu"), ("optimizer", "cpu"), ("optimizer", "nvme"), ("states", "cpu"), ("states", "nvme"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "pins",
    [
        {"tp": 2},
        {"tp": [2, 4], "pp": 2},
        {"dp": 12},
        {"schedule": "gpipe"},
        {"chunks": 3},
        {"zero": 3, "recompute": "full"},
        {"replicate": 2},
        {"micro_batch": [1, 3]},
        {"offload": "optimizer"},
        {"offload": "states", "tier": "nvme"},
        {"stages": [1, 2, 2, 1]},
        {"tp": 16},
    ],
    ids=str,
)
def test_pinned_choices_are_kept(pins):
    layer_space = replace(SPACE, global_batch=48, pins=check_pins(pins))
    layouts = list(layer_space.layouts(48))
    assert layouts
    for layout in layouts:
        assert all(getattr(layout, name) in values for name, values in layer_space.pins.items())
        assert layer_space.obstacle(layout, 48) == ""


def test_pinning_only_leaves_out():
    """Whatever is free stays as free as it was."""
    free = list(MIXTURE.layouts(24))
    for pins in ({"tp": 2}, {"pp": 3}, {"dp": 4}, {"ep": 2}, {"etp": 1}, {"recompute": "full"}):
        checked = check_pins(pins)
        kept = [layout for layout in free if all(getattr(layout, name) in values for name, values in checked.items())]
        assert list(replace(MIXTURE, pins=checked).layouts(24)) == kept


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "is 3, which does not divide 8"),
        (Layout(tp=4), "is 4, there are 8"),
        (Layout(dp=8, ep=2), "ep=2 cuts experts"),
        (Layout(pp=8), "needs 8 stages, there are 6 blocks"),
        (Layout(dp=8, micro_batch=2), "not a multiple of dp=8 times micro_batch=2"),
        (Layout(tp=4, pp=2, stages=(3, 4)), "hold 7 blocks"),
        (Layout(tp=4, pp=2, chunks=2), "1f1b has 1 chunks"),
        (Layout(tp=4, pp=2, schedule="interleaved", chunks=2, micro_batch=8), "multiples of pp=2"),
        (Layout(tp=4, pp=2, schedule="zbv", chunks=2, micro_batch=12), "needs 4 micro-batches"),
        (Layout(tp=8, schedule="zb-h1"), "pipeline of 2"),
        (Layout(dp=1, cp=8), "multiple of that"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else "",
)
def test_obstacles(layout, words):
    assert words in replace(SPACE, seq_len=4100).obstacle(layout, 8)


def test_a_degree_that_the_model_forbids_is_named():
    space = replace(SPACE, legal=Legality({2: "9 heads are not a multiple of 2"}, {}, {}))
    assert "9 heads" in space.obstacle(Layout(tp=2, dp=4), 8)
    assert "tp=4" in space.obstacle(Layout(tp=4, dp=2), 8)
    assert {layout.tp for layout in space.layouts(8)} == {1}

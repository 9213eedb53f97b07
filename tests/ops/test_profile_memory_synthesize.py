"""Synthesised steps: what is in flight is what the schedules' formulas say, and packings of them come near the bound."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.profile.memory.packing import pack
from tersor.ops.profile.memory.schedules import passes
from tersor.ops.profile.memory.synthesize import Experts, synthetic_trace

SAVED = [8, 4, 8, 8, 8, 21, 21, 21, 21]
UNIT = 100_000


def in_flight(order) -> int:
    now = most = 0
    for kind, *_ in order:
        now += 1 if kind == "forward" else -1
        most = max(most, now)
    return most


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.data())
def test_schedules_run_each_pass_once_and_forward_first(groups, stages, chunks, data):
    stage = data.draw(st.integers(0, stages - 1))
    cases = {
        "gpipe": (groups, 1, groups),
        "1f1b": (groups, 1, min(groups, stages - stage)),
        "interleaved": (groups * stages, chunks, None),
    }
    for schedule, (micro_batches, chunks_of, most) in cases.items():
        order = passes(schedule, micro_batches, stage, stages, chunks_of)
        assert set(Counter(order).values()) == {1}
        assert len(order) == 2 * micro_batches * chunks_of
        for kind, micro_batch, chunk in order:
            if kind == "backward":
                assert order.index(("forward", micro_batch, chunk)) < order.index((kind, micro_batch, chunk))
        if most is None:
            total = micro_batches * chunks_of
            warm = total if groups == 1 else 2 * (stages - stage - 1) + (chunks_of - 1) * stages + 1
            most = min(total, warm)
        assert in_flight(order) == most


def test_interleaved_chunks_follow_megatron():
    """8 micro-batches, 4 stages of 2 chunks, stage 0: 10 passes ahead, chunks in groups of four, the last chunk first back."""
    order = passes("interleaved", 8, 0, 4, 2)
    assert [one[1:] for one in order[:10]] == [
        (0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (4, 0), (5, 0)
    ]  # fmt: skip
    assert order[10:12] == [("forward", 6, 0), ("backward", 0, 1)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("zigzag", 4), "schedule 'zigzag' is not known"),
        (("1f1b", 0), "0 micro-batches"),
        (("1f1b", 4, 4, 4), "stage 4 of 4"),
        (("1f1b", 4, 0, 1, 2), "only the interleaved|2 chunks"),
        (("interleaved", 6, 0, 4, 2), "6 micro-batches over 4 stages"),
    ],
)
def test_impossible_schedules_are_named(arguments, named):
    with pytest.raises(TersorError, match=named):
        passes(*arguments)


def saved_bytes_at_peak(trace) -> int:
    """The most bytes of saved tensors alive at once."""
    change = Counter()
    for block in trace.blocks:
        if re.search(r"layer \d+ activation \d+$", block.label):
            change[block.start] += block.bytes
            change[block.end] -= block.bytes
    now = most = 0
    for event in sorted(change):
        now += change[event]
        most = max(most, now)
    return most


@pytest.mark.parametrize(("stage", "held"), [(0, 4), (1, 3), (3, 1)])
def test_activations_of_1f1b(stage, held):
    trace = synthetic_trace(SAVED, layers=8, micro_batches=6, stage=stage, stages=4)
    assert saved_bytes_at_peak(trace) == held * 2 * sum(SAVED)


def test_gpipe_holds_all_micro_batches():
    trace = synthetic_trace(SAVED, layers=8, micro_batches=6, stages=4, schedule="gpipe")
    assert saved_bytes_at_peak(trace) == 6 * 2 * sum(SAVED)


def test_recompute_keeps_inputs_and_one_block():
    full = synthetic_trace(SAVED, layers=8, recompute="full")
    assert saved_bytes_at_peak(full) == 8 * SAVED[0] + sum(SAVED[1:])
    none, selective = (
        saved_bytes_at_peak(synthetic_trace(SAVED, layers=8, recompute=r)) for r in ("none", "selective")
    )
    assert none == 8 * sum(SAVED)
    assert 0.4 * none < selective < 0.6 * none + sum(SAVED)


def test_only_weights_and_optimizer_states_outlive_the_steps():
    trace = synthetic_trace(SAVED, [3], 4, weights=[50, 60], optimizer=[220], head=[9, 9], micro_batches=3, steps=3)
    left = Counter(
        block.label.partition(" ")[2].lstrip("0123456789 ") for block in trace.blocks if block.end == trace.events
    )
    assert left == {"weight": 8, "optimizer state": 4}
    assert sum("loss" in block.label for block in trace.blocks) == 3 * 3 * 4


def test_weights_outside_of_the_blocks_have_gradients_and_states_too():
    plain = synthetic_trace(SAVED, layers=4, weights=[50], micro_batches=2)
    more = synthetic_trace(SAVED, layers=4, weights=[50], micro_batches=2, rest=[700, 800], rest_optimizer=[9000])
    extra = Counter((b.label, b.bytes) for b in more.blocks) - Counter((b.label, b.bytes) for b in plain.blocks)
    assert extra == {
        ("weight", 700): 1, ("weight", 800): 1, ("optimizer state", 9000): 1, ("weight gradient", 700): 4,
        ("weight gradient", 800): 4, ("update", 700): 2, ("update", 800): 2,
    }  # fmt: skip
    gradients = [b.end - b.start for b in more.blocks if b.label == "weight gradient" and b.bytes == 700]
    assert sorted(gradients)[:2] == [1, 1]  # added and freed at once, in the second micro-batch of each step
    assert min(sorted(gradients)[2:]) > 50


def test_experts_get_sizes_that_change_with_micro_batch_and_seed():
    experts = Experts(4, 1_000_000)
    sizes = [
        [
            b.bytes
            for b in synthetic_trace(SAVED, layers=2, micro_batches=2, experts=experts, seed=seed).blocks
            if b.dynamic
        ]
        for seed in (0, 0, 1)
    ]
    assert sizes[0] == sizes[1] != sizes[2]
    assert len(set(sizes[0])) > 8


@pytest.mark.parametrize("arguments", [([],), ([1, -1],), (SAVED, [], 0), (SAVED, (), 2, 5)])
def test_nonsense_is_refused(arguments):
    more = {"stages": arguments[3]} if len(arguments) > 3 else {}
    with pytest.raises(TersorError):
        synthetic_trace(*arguments[:3], **more)


def test_unknown_recompute_is_named():
    with pytest.raises(TersorError, match="'some' is not known"):
        synthetic_trace(SAVED, recompute="some")


CASES = {
    "one stage": {},
    "full recompute": {"recompute": "full"},
    "selective recompute": {"recompute": "selective", "micro_batches": 4},
    "1f1b": {"micro_batches": 8, "stage": 1, "stages": 4},
    "gpipe": {"micro_batches": 4, "stage": 1, "stages": 2, "schedule": "gpipe", "head": [40 * UNIT, 80 * UNIT]},
    "interleaved": {"micro_batches": 8, "stages": 4, "chunks": 2, "schedule": "interleaved"},
    "experts": {"micro_batches": 4, "experts": Experts(8, 60 * UNIT)},
}


@pytest.mark.parametrize("name", CASES)
def test_plans_are_within_five_percent_of_the_bound(name):
    saved, scratch = [size * UNIT for size in SAVED], [4 * UNIT, 30 * UNIT]
    weights = [16 * UNIT, 16 * UNIT, 43 * UNIT, 43 * UNIT, 43 * UNIT]
    trace = synthetic_trace(saved, scratch, 8, weights=weights, optimizer=[4 * w for w in weights], **CASES[name])
    packing = pack(trace)
    assert packing.lower_bound_bytes <= packing.peak_bytes <= 1.05 * packing.lower_bound_bytes

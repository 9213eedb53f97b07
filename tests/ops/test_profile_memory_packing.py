"""Placements: sound always, never below the bound, the optimum on what can be tried out whole."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tersor.formats.memory_trace import Block, Trace, TraceBuilder
from tersor.ops.profile.memory.packing import (
    ALIGNMENT,
    METHODS,
    Problem,
    align,
    check,
    live_peak,
    pack,
    static_then_dynamic,
)


@st.composite
def traces(draw, most: int = 40, largest: int = 40, streams: int = 1):
    builder, alive = TraceBuilder(), []
    for index in range(draw(st.integers(1, most))):
        if alive and draw(st.integers(0, 2)) == 0:
            builder.free(alive.pop(draw(st.integers(0, len(alive) - 1))))
            continue
        size = draw(st.integers(0, largest)) * ALIGNMENT - draw(st.integers(0, 1))
        phase = f"phase {index // 8}" if draw(st.booleans()) else ""
        builder.alloc(str(index), max(0, size), draw(st.integers(0, streams - 1)), phase=phase)
        alive.append(str(index))
    return builder.finish()


def overlap(one: Block, other: Block, at: int, there: int) -> bool:
    together = one.start < other.end and other.start < one.end
    return together and at < there + other.bytes and there < at + one.bytes


@settings(deadline=None, max_examples=150)
@given(traces(streams=2))
def test_no_two_blocks_share_an_address_and_the_bound_holds(trace):
    packing = pack(trace)
    blocks = list(zip(trace.blocks, packing.offsets, strict=True))
    for index, (one, at) in enumerate(blocks):
        assert at >= 0
        assert at % ALIGNMENT == 0
        assert not one.bytes or at + one.bytes <= packing.peak_bytes
        assert not any(one.bytes and other.bytes and overlap(one, other, at, there) for other, there in blocks[:index])
    assert packing.lower_bound_bytes <= packing.peak_bytes
    assert all(packing.peak_bytes <= peak for peak in packing.tried.values())


def optimum(trace: Trace) -> int:
    """First fit in every order: one of them is that of the best placement's addresses, and no worse than it."""
    best = None
    blocks = [block for block in trace.blocks if block.bytes]
    for order in permutations(blocks):
        placed: list[tuple[Block, int]] = []
        for block in order:
            near = sorted(
                (at, at + align(other.bytes))
                for other, at in placed
                if other.start < block.end and block.start < other.end
            )
            low = 0
            for first, last in near:
                if first - low >= align(block.bytes):
                    break
                low = max(low, last)
            placed.append((block, low))
        peak = max((at + align(block.bytes) for block, at in placed), default=0)
        best = peak if best is None else min(best, peak)
    return best or 0


@settings(deadline=None, max_examples=60)
@given(traces(most=9, largest=6))
def test_never_below_the_optimum_of_all_orders(trace):
    assume(len([block for block in trace.blocks if block.bytes]) <= 6)
    assert pack(trace).peak_bytes >= optimum(trace)


def random_trace(random: np.random.Generator, blocks: int) -> Trace:
    events = random.permutation(2 * blocks)
    pairs = np.sort(events.reshape(-1, 2), axis=1)
    return Trace(
        [Block(str(i), int(random.integers(1, 9)) * 512, int(a), int(b)) for i, (a, b) in enumerate(pairs)], 2 * blocks
    )


def test_the_optimum_of_small_cases_is_found():
    random = np.random.default_rng(0)
    cases = [random_trace(random, 6) for _ in range(60)]
    assert all(pack(case).peak_bytes == optimum(case) for case in cases)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_sound_by_itself(name):
    random = np.random.default_rng(1)
    for blocks in (1, 2, 17, 200):
        trace = random_trace(random, blocks)
        start, end, size = (
            np.array([getattr(b, key) for b in trace.blocks], np.int64) for key in ("start", "end", "bytes")
        )
        problem = Problem(start, end, size, start // 20, end // 20)
        offsets = METHODS[name][0](problem)
        if offsets is None:
            assert name == "groups by phase"
            continue
        check(trace, offsets.tolist())
        assert (offsets + size).max() >= live_peak(start, end, size)


def test_residents_lie_at_the_bottom_and_lanes_are_reused():
    builder = TraceBuilder()
    builder.alloc("weights", 10_000)
    for index in range(50):
        builder.alloc(f"a{index}", 3000)
        builder.alloc(f"b{index}", 700)
        builder.free(f"a{index}")
        builder.free(f"b{index}")
    packing = pack(builder.finish())
    assert packing.offsets[0] == 0
    assert packing.peak_bytes == packing.lower_bound_bytes == align(10_000) + align(3000) + align(700)


def test_where_first_fit_by_size_leaves_a_hole_another_method_is_taken():
    """Chains of growing tensors, as in a concatenation: the winner is named, and all that were tried are listed."""
    builder = TraceBuilder()
    for index in range(30):
        builder.alloc(str(index), 512 * (index + 1))
        if index:
            builder.free(str(index - 1))
    packing = pack(builder.finish())
    assert packing.peak_bytes <= 1.05 * packing.lower_bound_bytes
    assert packing.peak_bytes == min(packing.tried.values())


def test_an_overlap_does_not_pass_the_check():
    blocks = [Block("a", 1024, 0, 4), Block("b", 512, 1, 3), Block("c", 512, 2, 4)]
    trace = Trace(blocks, 4)
    trace.blocks[1].end = 3
    check(trace, [0, 1024, 1536])
    for offsets in ([0, 512, 1536], [512, 0, 0], [0, 1024, 1024], [0, 1025, 2048], [0, -512, 1024]):
        with pytest.raises(RuntimeError, match="has no room"):
            check(trace, offsets)


def test_what_is_freed_before_the_next_allocation_may_share_its_address():
    trace = Trace([Block("a", 512, 0, 1), Block("b", 512, 2, 3)], 4)
    check(trace, [0, 0])
    assert pack(trace).peak_bytes == 512


@settings(deadline=None, max_examples=60)
@given(traces(streams=2), st.lists(st.booleans(), min_size=40, max_size=40))
def test_dynamic_blocks_find_their_place_in_what_the_plan_leaves_free(trace, dynamic):
    for block, moves in zip(trace.blocks, dynamic, strict=False):
        block.dynamic = moves
    peak = static_then_dynamic(trace)
    assert (peak is None) is not any(block.dynamic for block in trace.blocks)
    assert peak is None or peak >= pack(trace).lower_bound_bytes


def test_a_dynamic_block_goes_below_the_top_where_there_is_room():
    builder = TraceBuilder()
    builder.alloc("early", 10_240)
    builder.free("early")
    builder.alloc("routed", 5_120, dynamic=True)
    builder.free("routed")
    builder.alloc("late", 10_240)
    trace = builder.finish()
    assert static_then_dynamic(trace) == 10_240
    trace.blocks[1].end = trace.events  # now it meets `late`
    assert static_then_dynamic(trace) == 15_360


def test_the_same_trace_gives_the_same_plan():
    trace = random_trace(np.random.default_rng(2), 300)
    assert pack(trace) == pack(trace)

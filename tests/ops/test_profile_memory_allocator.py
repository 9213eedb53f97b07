"""The simulated caching allocator against sequences worked out by hand from CUDACachingAllocator.cpp."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.memory_trace import TraceBuilder
from tersor.ops.profile.memory.caching_allocator import CachingAllocator, rounded, simulate

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        (0, 0),
        (1, 2),
        (MIB, 2),
        (MIB + 1, 20),
        (10 * MIB - 1, 10),
        (9 * MIB, 20),
        (10 * MIB, 10),
        (10 * MIB + 1, 12),
        (33 * MIB, 34),
    ],
)
def test_segments_of_a_first_allocation(nbytes, reserved):
    """2 MiB for what is small, 20 MiB up to 10 MiB, else whole pairs of MiB. Sizes are rounded to 512 B first."""
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert allocator.reserved == reserved * MIB


def test_rounding():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_small_blocks_share_a_segment():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(512) for _ in range(4096)]
    assert allocator.reserved == 2 * MIB
    allocator.malloc(512)
    assert allocator.reserved == 4 * MIB
    assert len({block.address for block in blocks}) == 4096


def test_large_blocks_are_split_only_above_one_mib():
    """12 MiB freed: 11 MiB takes it whole, as 1 MiB is not more than 1 MiB; then another 1.5 MiB needs a segment."""
    allocator = CachingAllocator()
    first = allocator.malloc(12 * MIB)
    allocator.free(first)
    assert allocator.malloc(11 * MIB) is first
    assert first.size == 12 * MIB
    allocator.malloc(3 * MIB // 2)
    assert allocator.reserved == 32 * MIB


def test_best_fit_and_merging():
    allocator = CachingAllocator()
    a, b, c = (allocator.malloc(6 * MIB) for _ in range(3))  # 6 + 6 + 6 of 20 MiB, 2 MiB left
    d = allocator.malloc(30 * MIB)
    allocator.free(d)
    allocator.free(b)
    again = allocator.malloc(5 * MIB)  # the hole of 6 fits better than that of 30; what is left, 1 MiB, stays with it
    assert (again.address, again.size) == (b.address, 6 * MIB)
    for block in (a, again, c):
        allocator.free(block)
    assert allocator.malloc(20 * MIB).address == a.address  # the four parts are one again
    assert allocator.reserved == 50 * MIB


def test_streams_share_nothing():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB, 0))
    allocator.malloc(30 * MIB, 1)
    assert allocator.reserved == 60 * MIB


def test_a_full_device_gets_its_free_segments_back_and_the_run_ends_when_that_is_too_little():
    builder = TraceBuilder()
    builder.alloc("a", 30 * MIB)
    builder.free("a")
    builder.alloc("b", 40 * MIB)
    builder.alloc("c", 30 * MIB)
    trace = builder.finish()
    result = simulate(trace, capacity_bytes=60 * MIB)
    assert (result.retries, result.out_of_memory_event) == (2, 3)
    assert result.reserved == [30 * MIB, 30 * MIB, 40 * MIB]
    assert simulate(trace).reserved_peak_bytes == 70 * MIB
    assert simulate(trace).fragmentation == 0  # all of it is in use at the end


def test_expandable_segments_grow_by_pages():
    allocator = CachingAllocator(expandable=True)
    a = allocator.malloc(15 * MIB)
    assert allocator.reserved == 20 * MIB
    b = allocator.malloc(15 * MIB)  # behind a, over the end of the first page
    assert (b.address - a.address, allocator.reserved) == (15 * MIB, 40 * MIB)
    allocator.malloc(1)  # the small pool has pages of 2 MiB
    assert allocator.reserved == 42 * MIB


def test_expandable_segments_avoid_what_fragments_the_cache():
    """Sizes that grow by a little each time: a segment each, or one that grows."""
    builder = TraceBuilder()
    for index in range(8):
        builder.alloc(str(index), (20 + 2 * index) * MIB)
        builder.free(str(index))
    trace = builder.finish()
    assert simulate(trace).reserved_peak_bytes == sum(20 + 2 * index for index in range(8)) * MIB
    assert simulate(trace, expandable=True).reserved_peak_bytes == 40 * MIB


def test_expandable_best_fit_saves_the_end_that_can_grow():
    """A hole in the middle is taken although the end, free and smaller, would be the best fit by size alone."""
    allocator = CachingAllocator(expandable=True)
    a, b, c = allocator.malloc(30 * MIB), allocator.malloc(20 * MIB), allocator.malloc(2 * MIB)
    allocator.free(a)
    allocator.free(c)  # with the rest of its page 10 MiB at the end: 60 - 50
    taken = allocator.malloc(8 * MIB)
    assert taken.address == a.address
    assert b.address == a.address + 30 * MIB


def test_expandable_segments_give_pages_back():
    builder = TraceBuilder()
    builder.alloc("a", 50 * MIB)
    builder.alloc("b", 10 * MIB)
    builder.free("a")  # 40 of its 50 MiB are whole pages
    builder.alloc("c", 60 * MIB, stream=1)
    result = simulate(builder.finish(), expandable=True, capacity_bytes=80 * MIB)
    assert (result.retries, result.out_of_memory_event, result.reserved[-1]) == (1, None, 80 * MIB)


def overlap(blocks) -> bool:
    taken = sorted((block.address, block.address + block.size) for block in blocks)
    return any(before[1] > after[0] for before, after in pairwise(taken))


@settings(deadline=None, max_examples=80)
@given(st.booleans(), st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 7)), min_size=1, max_size=60))
def test_blocks_never_overlap_and_memory_is_accounted_for(expandable, events):
    allocator, alive = CachingAllocator(expandable, 400 * MIB), []
    for nbytes, choice in events:
        if choice < 3 and alive:
            allocator.free(alive.pop(choice % len(alive)))
        else:
            try:
                alive.append(allocator.malloc(nbytes, choice % 2))
            except MemoryError:
                continue
        assert not overlap(alive)
        free = [block for pool in allocator._pools.values() for block in pool.free_blocks()]
        assert sum(block.size for block in alive + free) == allocator.reserved <= 400 * MIB
        assert not overlap(alive + free)
    for block in alive:
        allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved == 0

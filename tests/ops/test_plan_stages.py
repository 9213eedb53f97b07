"""Cuts of a model over pipeline stages: as good as the best of all cuts, within memory, errors with numbers."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.schedule.stages import balance


def slowest(seconds: list[float], cut: tuple[int, ...]) -> float:
    return max(totals(seconds, cut))


def totals(numbers: list[float], cut: tuple[int, ...]) -> list[float]:
    """Of each stage: the first has the embedding, the last the head."""
    found, start = [], 1
    for stage, blocks in enumerate(cut):
        found.append(sum(numbers[start : start + blocks]) + (numbers[0] if stage == 0 else 0))
        found[-1] += numbers[-1] if stage == len(cut) - 1 else 0
        start += blocks
    return found


def all_cuts(blocks: int, stages: int, least: int, least_at_ends: int) -> list[tuple[int, ...]]:
    found = []
    for inner in combinations_with_replacement(range(blocks + 1), stages - 1):
        cut = tuple(after - before for before, after in pairwise((0, *inner, blocks)))
        if all(count >= (least_at_ends if at in (0, stages - 1) else least) for at, count in enumerate(cut)):
            found.append(cut)
    return found


@settings(max_examples=200, deadline=None)
@given(
    blocks=st.integers(0, 8), stages=st.integers(1, 5), least_at_ends=st.integers(0, 1), limited=st.booleans(), data=st.data()
)  # fmt: skip
def test_equals_brute_force(blocks, stages, least_at_ends, limited, data):
    numbers = st.lists(st.integers(0, 6), min_size=blocks + 2, max_size=blocks + 2)
    seconds, fixed, moving = (data.draw(numbers) for _ in range(3))
    limits = data.draw(st.lists(st.integers(4, 40), min_size=stages, max_size=stages)) if limited else None
    in_flight = list(range(stages, 0, -1))
    sizes = list(zip(map(float, fixed), map(float, moving), strict=True))
    possible = [
        cut for cut in all_cuts(blocks, stages, 1, least_at_ends)
        if limits is None or all(
            kept + count * each <= limit
            for kept, each, count, limit in zip(totals(fixed, cut), totals(moving, cut), in_flight, limits, strict=True)
        )
    ]  # fmt: skip
    if not possible:
        with pytest.raises(TersorError):
            balance(seconds, sizes, stages, limits, in_flight, least_at_ends=least_at_ends)
        return
    found = balance(seconds, sizes, stages, limits, in_flight, least_at_ends=least_at_ends)
    best = min(slowest(seconds, cut) for cut in possible)
    assert found in possible
    assert slowest(seconds, found) == best

    def uneven(cut: tuple[int, ...]) -> float:
        return sum(total**2 for total in totals(seconds, cut))

    assert uneven(found) == min(uneven(cut) for cut in possible if slowest(seconds, cut) == best)


@pytest.mark.parametrize(
    ("head", "blocks", "stages", "expected"),
    [
        (0.0, 8, 4, (2, 2, 2, 2)),
        (0.0, 10, 4, (2, 2, 3, 3)),  # the front holds more micro-batches, so it has fewer blocks
        (1.5, 32, 8, (4, 4, 4, 4, 4, 4, 5, 3)),
        (2.5, 126, 16, (8,) * 15 + (6,)),
        (1.0, 126, 128, (0, *(1,) * 126, 0)),  # Llama 3 405B: embedding and head are stages of their own
        (0.0, 3, 1, (3,)),
        (9.0, 6, 2, (6, 0)),
    ],
)
def test_even_blocks_and_a_head(head, blocks, stages, expected):
    assert balance([0.1, *[1.0] * blocks, head], [1] * (blocks + 2), stages) == expected


def test_every_stage_has_a_block_where_a_runtime_asks_for_it():
    assert balance([0, *[1.0] * 6, 9.0], [1] * 8, 2, least_at_ends=1) == (5, 1)
    assert balance([9.0, *[1.0] * 6, 9.0], [1] * 8, 3, least=0, least_at_ends=0) == (0, 6, 0)


def test_memory_moves_blocks_back():
    """1F1B holds most micro-batches in front: what fits there is less, though all blocks take the same time."""
    sizes = [(0.0, 0.0), *[(1.0, 1.0)] * 32, (0.0, 0.0)]
    found = balance([0, *[1.0] * 32, 0], sizes, 8, 28.0, [8, 7, 6, 5, 4, 3, 2, 1])
    assert all(blocks * (1 + count) <= 28 for blocks, count in zip(found, range(8, 0, -1), strict=True))
    assert found[0] == 3
    assert max(found) == 5


def test_what_does_not_fit_is_said():
    with pytest.raises(TersorError, match="stage 1 needs 5 bytes for the least it must hold, and has 4"):
        balance([0, 1, 1, 1, 0], [0, 5, 5, 5, 0], 3, [20, 4, 20])
    with pytest.raises(TersorError, match=r"no cut of 3 blocks over 3 stages fits .* together have too little room"):
        balance([0, 1, 1, 1, 0], [0, 5, 5, 5, 0], 3, [4, 5, 4])
    with pytest.raises(TersorError, match="no cut of 2 blocks over 1 stages fits"):
        balance([0, 1, 0, 0], [0, 1, 5, 0], 1, 4)  # nor do blocks that take no time
    with pytest.raises(TersorError, match="2 blocks are too few for 5 stages"):
        balance([0, 1, 1, 0], [0, 5, 5, 0], 5)


def test_sizes_that_do_not_match():
    with pytest.raises(ValueError, match="4 times and 3 sizes"):
        balance([0, 1, 1, 0], [1, 1, 1], 2)
    with pytest.raises(ValueError, match="one number for each of 2 stages"):
        balance([0, 1, 1, 0], [1, 1, 1, 1], 2, [1.0])
    with pytest.raises(ValueError, match="negative"):
        balance([0, -1, 2, 0], [1, 1, 1, 1], 2)

"""Orders of channels: the optimum of small cases, never less than now, the loops against their definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.ops.model.patterns import keep_mask, parse_pattern
from tersor.ops.sparsify.permutation.search import Face, best_order, face, kept, kept_by, search
from tersor.ops.sparsify.permutation.swaps import n_of_m_gains, tile_gains


def importance(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def kept_of(readers, writers, order, pattern, sparsity) -> float:
    """By the mask itself: the scores that stay, squared where tiles are chosen by their energy."""
    total = 0.0
    for scores in [item[:, order] for item in readers] + [item[order] for item in writers]:
        stays = scores[keep_mask(scores, pattern, sparsity)].double()
        total += float((stays.square() if pattern.kind == "tile" else stays).sum())
    return total


def orders_that_differ(count: int, width: int):
    """All ways to put `count` channels into groups of `width`."""

    def split(left):
        if not left:
            yield ()
            return
        for rest in itertools.combinations(left[1:], width - 1):
            group = (left[0], *rest)
            for others in split(tuple(item for item in left if item not in group)):
                yield group + others

    return (torch.tensor(order) for order in split(tuple(range(count))))


@pytest.mark.parametrize(
    ("text", "sparsity", "width"),
    [("2:4", 0.5, 4), ("1:4", 0.75, 4), ("3:4", 0.25, 4), ("1:2", 0.5, 2), ("vector:1x4", 0.5, 4),
     ("vector:4x1", 0.5, 4), ("block:4x4", 0.5, 4), ("block:2x2", 0.75, 2)],
)  # fmt: skip
def test_small_cases_reach_the_optimum(text, sparsity, width):
    pattern, reached, gained = parse_pattern(text), 0, 0
    for seed in range(6):
        readers, writers = [importance(12, 8, seed)], [importance(8, 12, seed + 100)]
        order = search(readers, writers, pattern, sparsity, seed)
        found = kept_of(readers, writers, order, pattern, sparsity)
        now = kept_of(readers, writers, torch.arange(8), pattern, sparsity)
        best = max(
            kept_of(readers, writers, other, pattern, sparsity)
            for other in itertools.chain([torch.arange(8)], orders_that_differ(8, width))
        )
        assert sorted(order.tolist()) == list(range(8))
        assert now - 1e-6 <= found <= best + 1e-4
        reached += found > best - 1e-4
        gained += found > now
    assert reached >= 5 and gained >= 4


@given(
    st.sampled_from(["2:4", "1:2", "5:8", "vector:1x8", "vector:8x1", "block:4x4", "block:8x2"]),
    st.integers(1, 6), st.integers(0, 3), st.integers(0, 2), st.floats(0.1, 0.9), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_never_less_than_now_and_always_the_same(text, stripes, readers, writers, sparsity, seed):
    pattern, count = parse_pattern(text), 8 * stripes
    reading = [importance(8, count, seed + k) ** 3 for k in range(readers)]
    writing = [importance(count, 8, seed + 50 + k) ** 3 for k in range(writers)]
    if not reading and not writing:
        return
    order = search(reading, writing, pattern, sparsity)
    assert sorted(order.tolist()) == list(range(count))
    before = kept_of(reading, writing, torch.arange(count), pattern, sparsity)
    assert kept_of(reading, writing, order, pattern, sparsity) >= before * (1 - 1e-6)
    assert torch.equal(order, search(reading, writing, pattern, sparsity))


def test_what_is_kept_is_what_the_mask_keeps():
    index = torch.arange(16)[:, None]
    for text in ("2:4", "3:8", "vector:4x1", "vector:1x8", "block:4x8"):
        pattern, scores = parse_pattern(text), importance(8, 16, 3)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        expected = kept_of([scores], [], order, pattern, 0.4)
        assert kept_by(scores[:, order], pattern, 0.4) == pytest.approx(expected, rel=1e-5)
        if found := face(scores, 1, index, pattern):
            assert kept([found], order, pattern, 0.4) == pytest.approx(expected, rel=1e-5)
    assert face(scores, 0, torch.arange(8)[:, None], parse_pattern("2:4")) is None
    assert face(scores, 1, index, parse_pattern("vector:4x1")) is None
    assert face(scores, 1, index, parse_pattern("1:3")) is None


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_gains_of_swaps_are_exact(n, m):
    """Also in ties, over more rows than a chunk has."""
    values = (importance(4 * m, 700, 1) * 8).round().numpy()
    stripes = np.random.default_rng(0).permutation(4 * m).reshape(4, m)
    pairs = np.array([[0, 2], [3, 1]])
    gains = np.empty((2, m, m))
    n_of_m_gains(values, stripes, pairs, n, gains, 0, 2)

    def total(stripes):
        return np.sort(values[stripes], axis=1)[:, -n:].sum()

    for pair, a, b in itertools.product(range(2), range(m), range(m)):
        swapped = stripes.copy()
        left, right = pairs[pair]
        swapped[left, a], swapped[right, b] = stripes[right, b], stripes[left, a]
        assert gains[pair, a, b] == total(swapped) - total(stripes)


def test_gains_of_tiles_are_exact():
    values, limit = importance(8, 600, 2).numpy(), np.float32(2)
    stripes, tiles = np.arange(8).reshape(2, 4), np.array([0, 1])
    sums = values[stripes].sum(1)
    gains = np.zeros((1, 4, 4))
    tile_gains(values, stripes, tiles, sums, limit, np.array([[0, 1]]), gains, 0, 1)

    def worth(stripes):
        return np.maximum(values[stripes].sum(1) - limit, 0).sum()

    for a, b in itertools.product(range(4), range(4)):
        swapped = stripes.copy()
        swapped[0, a], swapped[1, b] = stripes[1, b], stripes[0, a]
        assert gains[0, a, b] == pytest.approx(worth(swapped) - worth(stripes), abs=1e-2)


def test_planted_structure_is_found():
    """Columns of one kind were scattered: 2:4 wants them apart, blocks want them together."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randperm(64, generator=generator) % 8
    strong = (torch.arange(64)[:, None] // 8 == kind[None]).float() + 0.01 * importance(64, 64, 1)
    pattern = parse_pattern("block:8x8")
    order = search([strong], [], pattern, 7 / 8)
    assert kept_by(strong[:, order], pattern, 7 / 8) > 0.99 * float(strong.square().sum())
    assert kept_by(strong, pattern, 7 / 8) < 0.5 * float(strong.square().sum())
    pattern, half = parse_pattern("2:4"), (torch.arange(64) < 32).float() + 0.01 * importance(32, 64, 1)
    order = search([half], [], pattern)
    assert kept_by(half[:, order], pattern, 0.5) > 0.98 * float(half.sum())


@pytest.mark.parametrize("text", ["2:4", "block:4x4", "vector:1x4", "vector:4x1"])
def test_classes_and_places_of_grouped_heads(text):
    """Two KV heads of 8 channels, three query heads each: channels stay within their head, in every query head alike."""
    pattern, scores = parse_pattern(text), importance(16, 48, 5) ** 3
    channel = torch.arange(16)
    index = (channel // 8 * 24 + channel % 8)[:, None] + torch.arange(3) * 8
    rows = importance(16, 16, 6) ** 3
    faces = [face(scores, 1, index, pattern), face(rows, 0, channel[:, None], pattern)]
    faces = [item for item in faces if item is not None]
    order = best_order(faces, pattern, 0.5, channel // 8)
    assert torch.equal(order // 8, channel // 8)
    assert kept(faces, order, pattern, 0.5) > kept(faces, channel, pattern, 0.5)


def test_groups_that_cross_heads_stay():
    """Heads of 6 columns under 2:4: one group of four lies in each, the third belongs to both and cannot be moved."""
    scores, index = importance(16, 12, 5), torch.arange(12)[:, None]
    order = best_order([Face(scores, index, 4)], parse_pattern("2:4"), 0.5, torch.arange(12) // 6)
    assert torch.equal(order // 6, torch.arange(12) // 6)
    assert torch.equal(best_order([], parse_pattern("2:4"), 0.5, torch.zeros(5)), torch.arange(5))

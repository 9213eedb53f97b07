"""Masks: exactly as many zeros as asked, the least scores, under the rule of the pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.model.patterns import Pattern, keep_mask, parse_pattern, removed


def lowest(scores: list[float], drop: int) -> list[bool]:
    """By definition: a stable sort, the first `drop` go."""
    gone = set(sorted(range(len(scores)), key=lambda index: scores[index])[:drop])
    return [index not in gone for index in range(len(scores))]


def matrices(rows, columns):
    values = st.integers(0, 6).map(float)  # many equal scores
    return st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), columns=st.integers(1, 24), sparsity=st.floats(0, 0.99))
def test_unstructured_is_a_stable_sort(data, rows, columns, sparsity):
    scores = torch.tensor(data.draw(matrices(rows, columns)))
    whole = keep_mask(scores, Pattern(), sparsity)
    assert whole.flatten().tolist() == lowest(scores.flatten().tolist(), removed(rows * columns, sparsity))
    each = keep_mask(scores, Pattern(), sparsity, per_row=True)
    assert each.tolist() == [lowest(row, removed(columns, sparsity)) for row in scores.tolist()]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), groups=st.integers(1, 4), m=st.integers(2, 16))
def test_n_of_m(data, rows, groups, m):
    n = data.draw(st.integers(1, m - 1))
    scores = torch.tensor(data.draw(matrices(rows, groups * m)))
    keep = keep_mask(scores, parse_pattern(f"{n}:{m}"), 1 - n / m)
    for found, wanted in zip(keep.reshape(-1, m).tolist(), scores.reshape(-1, m).tolist(), strict=True):
        assert found == lowest(wanted, m - n)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 4), high=st.integers(1, 3), wide=st.integers(1, 4),
    sparsity=st.floats(0, 0.99), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_go_as_a_whole(rows, columns, high, wide, sparsity, seed):
    scores = torch.rand(rows * high, columns * wide, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(scores, Pattern("tile", rows=high, columns=wide), sparsity)
    tiles = keep.reshape(rows, high, columns, wide)
    assert torch.equal(tiles.amax((1, 3)), tiles.amin((1, 3)))
    energy = scores.square().reshape(rows, high, columns, wide).sum((1, 3))
    assert tiles[:, 0, :, 0].flatten().tolist() == lowest(energy.flatten().tolist(), removed(rows * columns, sparsity))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Pattern()),
        ("2:4", Pattern("n:m", 2, 4)),
        ("block:16x16", Pattern("tile", rows=16, columns=16)),
        ("vector:32x1", Pattern("tile", rows=32, columns=1)),
        ("vector:1x64", Pattern("tile", rows=1, columns=64)),
    ],
)
def test_names(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "4:4", "0:4", "5:4", "2:4:8", "block:0x4", "block:1x1", "vector:2x2", "2/4"])
def test_bad_names(text):
    with pytest.raises(TersorError, match="--pattern"):
        parse_pattern(text)


def test_widths_that_do_not_fit():
    assert parse_pattern("2:4").misfit((3, 10)) == "10 inputs are not divisible by 4"
    assert parse_pattern("2:4").misfit((3, 12)) is None
    assert "tiles of 16x16" in parse_pattern("block:16x16").misfit((32, 40))
    assert parse_pattern("unstructured").misfit((3, 7)) is None


def test_share_is_not_lost_to_binary_fractions():
    assert [removed(10, share) for share in (0.7, 0.3, 0.29, 0.0)] == [7, 3, 2, 0]

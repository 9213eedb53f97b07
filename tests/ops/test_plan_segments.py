"""Boxes of the ranks: together they are the tensor, nothing is cut that belongs together, and what cannot be is refused."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import Layout, Mesh
from tersor.ops.plan_parallel.transform.segments import (
    Rule,
    Segment,
    boxes,
    divides,
    holds,
    local_shape,
    max_split,
    numbers,
    padded,
)


def owners(rule: Rule, n: int) -> list[set[int]]:
    """By place along the dimension that is cut: the ranks that hold it."""
    found = [set() for _ in range(rule.shape[rule.dim])]
    for rank in range(n):
        for box in boxes(rule, n, rank):
            for place in range(*box[rule.dim]):
                found[place].add(rank)
    return found


def columns(*segments: Segment, dim: int = 0, rows: int | None = None) -> Rule:
    extent = segments[-1].stop
    return Rule("w", (extent, 7) if dim == 0 else (7, extent), "column" if dim == 0 else "row", dim, segments)


def test_plain_split_is_runs():
    rule = columns(Segment(0, 12, 2), dim=1)
    assert boxes(rule, 3, 1) == (((0, 7), (4, 8)),)
    assert boxes(rule, 1, 0) == (((0, 7), (0, 12)),)
    assert max_split(rule) == 6


def test_gate_and_up_are_split_each():
    rule = columns(Segment(0, 8), Segment(8, 16))
    assert boxes(rule, 4, 1) == (((2, 4), (0, 7)), ((10, 12), (0, 7)))
    assert boxes(rule, 1, 0) == (((0, 16), (0, 7)),)
    assert local_shape(rule, boxes(rule, 4, 1)) == (4, 7)


def test_heads_of_keys_are_copied_beyond_their_number():
    rule = columns(Segment(0, 16, 4), Segment(16, 24, 4, groups=2), Segment(24, 32, 4, groups=2))
    assert divides(rule, 8) == "16 does not make 8 equal parts of whole runs of 4, which are stored together"
    for rank in range(4):
        q, k, v = (run for (run, _) in boxes(rule, 4, rank))
        assert q == (4 * rank, 4 * rank + 4)
        assert k == (16 + rank // 2 * 4, 20 + rank // 2 * 4)
        assert v == (24 + rank // 2 * 4, 28 + rank // 2 * 4)
    assert [boxes(rule, 4, 0)[1:], boxes(rule, 4, 2)[1:]] == [boxes(rule, 4, 1)[1:], boxes(rule, 4, 3)[1:]]


def test_groups_of_queries_keys_and_values():
    """Two groups [4 heads of queries | key | value] of 8 numbers each, as Falcon-40B has them."""
    rule = columns(Segment(0, 96, 48, 2, ((32, 8), (16, 0))))
    assert boxes(rule, 2, 1) == (((48, 96), (0, 7)),)
    assert boxes(rule, 4, 3) == (((64, 96), (0, 7)),)  # the last half of the queries touches the keys
    assert boxes(rule, 8, 4) == (((48, 56), (0, 7)), ((80, 96), (0, 7)))
    assert divides(rule, 16) == "4 heads of queries in a group are not a multiple of 8"
    assert divides(rule, 3) and not divides(rule, 8)
    assert max_split(rule) == 8


@pytest.mark.parametrize(("kv", "n", "fits"), [(2, 4, True), (4, 2, True), (3, 2, False), (2, 3, False), (6, 4, False)])
def test_more_or_fewer_ranks_than_heads_of_keys(kv, n, fits):
    rule = columns(Segment(0, 4 * kv, 4, groups=kv))
    assert (divides(rule, n) == "") is fits


def test_vocabulary_is_padded_and_padding_is_no_data():
    rule = Rule("wte", (50257, 64), "vocab", 0, pad=128)
    assert padded(rule, 8) == 51200 and padded(rule, 1) == 50304
    share = 51200 // 8
    assert boxes(rule, 8, 7) == (((7 * share, 50257), (0, 64)),)
    assert sum(numbers(boxes(rule, 8, rank)) for rank in range(8)) == 50257 * 64
    tiny = Rule("wte", (130, 4), "vocab", 0, pad=128)
    assert boxes(tiny, 4, 0) == (((0, 128), (0, 4)),) and boxes(tiny, 4, 3) == ()


def test_experts_are_dealt_out_then_cut():
    rules = [Rule(f"e{e}", (8, 4), "column", 0, (Segment(0, 8),), expert=e, experts=4) for e in range(4)]
    layout = Layout(tp=2, dp=2, ep=2, etp=2)
    for place in Mesh(layout).all:
        held = [rule.expert for rule in rules if holds(rule, place, layout)]
        assert held == [2 * place.ep, 2 * place.ep + 1]
        assert holds(rules[held[0]], place, layout) == (((4 * place.etp, 4 * place.etp + 4), (0, 4)),)


def test_fused_experts():
    rule = Rule("w", (4, 6, 12), "column", 2, (Segment(0, 12, 2),), experts=4)
    assert boxes(rule, 1, 0, 2, 1) == (((2, 4), (0, 6), (0, 12)),)
    assert boxes(rule, 3, 1, 2, 1) == (((2, 4), (0, 6), (4, 8)),)
    assert local_shape(rule, boxes(rule, 3, 1, 2, 1)) == (2, 6, 4)


def test_fused_experts_in_one_dimension():
    """DBRX: [experts * neurons, hidden]."""
    rule = Rule("w", (12, 5), "column", 0, (Segment(0, 3),), experts=4, expert_rows=3)
    assert boxes(rule, 1, 0, 2, 1) == (((6, 12), (0, 5)),)
    assert boxes(rule, 3, 1, 2, 0) == (((1, 2), (0, 5)), ((4, 5), (0, 5)))


@pytest.mark.parametrize(
    ("rule", "tp", "ep", "message"),
    [
        (columns(Segment(0, 9, 1, what="heads")), 2, 1, "tensor 'w' [9, 7] cannot be cut with tp=2: 9 heads are not"),
        (Rule("e", (8, 4), expert=0, experts=6), 1, 4, "cannot be cut with ep=4: 6 experts are not a multiple of 4"),
        (Rule("e", (8, 4), "row", 1, (Segment(0, 4),), 0, 6), 3, 1, "cannot be cut with etp=3: 4 numbers are not"),
        (Rule("q", (8, 4), blocked="a group of 128"), 2, 1, "a group of 128"),
    ],
)
def test_what_cannot_be_cut_is_named(rule, tp, ep, message):
    with pytest.raises(TersorError) as caught:
        boxes(rule, tp, 0, ep, 0)
    assert message in str(caught.value)


@st.composite
def fused(draw):
    unit, queries, per = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from([1, 2, 3]))
    kind = draw(st.sampled_from(["plain", "blocks", "groups"]))
    if kind == "plain":
        return columns(Segment(0, unit * queries * 4, unit), dim=draw(st.integers(0, 1)))
    heads = queries * per
    if kind == "groups":
        group = (per + 2) * unit
        return columns(Segment(0, queries * group, group, queries, ((per * unit, unit), (2 * unit, 0))))
    q, kv = heads * unit, queries * unit
    return columns(Segment(0, q, unit), Segment(q, q + kv, unit, queries), Segment(q + kv, q + 2 * kv, unit, queries))


@given(fused(), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_ranks_cover_everything_and_units_stay_whole(rule, n):
    if divides(rule, n):
        with pytest.raises(TersorError):
            boxes(rule, n, 0)
        return
    held = owners(rule, n)
    assert all(held)
    copies = {len(ranks) for ranks in held}
    assert copies <= ({1} if all(segment.groups is None for segment in rule.segments) else {1, max(copies)})
    sizes = {numbers(boxes(rule, n, rank)) for rank in range(n)}
    assert len(sizes) == 1
    for segment in rule.segments:
        unit = segment.inside[0][1] if segment.inside else segment.unit
        for start in range(segment.start, segment.stop, unit):
            assert len({frozenset(held[place]) for place in range(start, min(start + unit, segment.stop))}) == 1


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_experts_over_all_ranks_are_the_tensor(ep, etp, per, fuse):
    experts = ep * per
    shape = (experts, 3, 4 * etp) if fuse else (3, 4 * etp)
    dim = len(shape) - 1
    found = [
        Rule(f"e{expert}", shape, "row", dim, (Segment(0, 4 * etp, 2),), None if fuse else expert, experts)
        for expert in (range(1) if fuse else range(experts))
    ]
    total = sum(numbers(boxes(rule, etp, t, ep, e)) for rule, t, e in product(found, range(etp), range(ep)))
    assert total == sum(prod(rule.shape) for rule in found)

"""Ranks on nodes with uneven links: slow ones are avoided, and the result is as good as trying every order."""

import random
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.cluster import load_cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.communication.mapping import MOVES, map_ranks, step_cost
from tersor.ops.plan_parallel.layout import Layout

MESSAGES = {"pp": 1e9, "dp": 2e9, "ep": 1e9}


def cluster(matrix, each=8):
    return replace(load_cluster(f"{len(matrix)}x{each}xh100"), bandwidth=tuple(map(tuple, matrix)))


def uneven(nodes, seed):
    rng = random.Random(seed)
    return [[50.0 if rng.random() < 0.6 else rng.uniform(5, 50) for _ in range(nodes)] for _ in range(nodes)]


def one_slow_link(nodes, a, b, speed=1.0):
    matrix = [[50.0] * nodes for _ in range(nodes)]
    matrix[a][b] = speed
    return matrix


@pytest.mark.parametrize("axis", ["pp", "dp"])
@pytest.mark.parametrize("link", [(2, 3), (3, 2), (0, 1)])
def test_one_slow_link_is_avoided(axis, link):
    layout = Layout(tp=8, **{axis: 8})
    ours = cluster(one_slow_link(8, *link))
    even = cluster(one_slow_link(8, 0, 1, speed=50.0))
    found = map_ranks(layout, ours, MESSAGES, seed=3, iterations=4000)
    places = [found.order.index(node) for node in link]
    distance = abs(places[0] - places[1])
    assert distance not in ((1, 7) if axis == "dp" else (1,))
    assert found.after_seconds == pytest.approx(map_ranks(layout, even, MESSAGES).before_seconds)
    assert found.before_seconds > 2 * found.after_seconds


def test_slow_links_between_racks_are_left_to_what_sends_least():
    """Two racks of four: data-parallel rings stay inside, pipelines cross once."""
    matrix = [[50.0 if (i < 4) == (j < 4) else 5.0 for j in range(8)] for i in range(8)]
    mixed = [0, 4, 1, 5, 2, 6, 3, 7]
    shuffled = [[matrix[i][j] for j in mixed] for i in mixed]
    layout = Layout(tp=8, pp=2, dp=4)
    found = map_ranks(layout, cluster(shuffled), {"pp": 1e8, "dp": 4e9}, iterations=6000)
    racks = [mixed[node] < 4 for node in found.order]
    assert len(set(racks[:4])) == len(set(racks[4:])) == 1
    best = map_ranks(layout, cluster(matrix), {"pp": 1e8, "dp": 4e9}).before_seconds
    assert found.after_seconds == pytest.approx(best)


LAYOUTS = [
    Layout(tp=8, pp=5),
    Layout(tp=8, dp=5, zero=1),
    Layout(tp=4, dp=2, pp=5),
    Layout(tp=4, dp=10, ep=20, etp=2),
    Layout(tp=1, dp=40, ep=8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_as_good_as_every_order(layout):
    for seed in range(2):
        ours = cluster(uneven(5, seed))
        cost = step_cost(layout, ours, MESSAGES)
        best = min(cost(np.array(order)) for order in permutations(range(5)))
        found = map_ranks(layout, ours, MESSAGES, seed=seed, iterations=2500)
        assert found.after_seconds == pytest.approx(best)
        assert cost(np.array(found.order)) == found.after_seconds
        assert cost(np.arange(5)) == found.before_seconds


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6), st.integers(0, 60))
def test_never_worse_than_the_order_of_the_cluster(nodes, seed, iterations):
    layout = Layout(tp=8, pp=nodes) if seed % 2 else Layout(tp=4, dp=2 * nodes)
    ours = cluster(uneven(nodes, seed))
    found = map_ranks(layout, ours, MESSAGES, seed=seed, iterations=iterations)
    assert sorted(found.order) == list(range(nodes))
    assert found.after_seconds <= found.before_seconds
    assert found == map_ranks(layout, ours, MESSAGES, seed=seed, iterations=iterations)
    if found.order == tuple(range(nodes)):
        assert found.after_seconds == found.before_seconds


def test_a_time_limit_ends_the_search():
    found = map_ranks(Layout(tp=8, dp=6), cluster(uneven(6, 1)), MESSAGES, seconds=0.05)
    assert sorted(found.order) == list(range(6)) and found.after_seconds <= found.before_seconds


def test_devices_follow_their_nodes():
    found = map_ranks(Layout(tp=2, pp=3), cluster(one_slow_link(3, 0, 1), each=2), MESSAGES, iterations=200)
    assert found.devices(2) == tuple(2 * node + device for node in found.order for device in (0, 1))


def test_equal_links_and_single_nodes_stay_as_they_are():
    even = load_cluster("4x8xh100")
    assert map_ranks(Layout(tp=8, dp=4), even, MESSAGES).order == (0, 1, 2, 3)
    single = map_ranks(Layout(tp=8), load_cluster("8xh100"), MESSAGES)
    assert (single.order, single.before_seconds, single.after_seconds) == ((0,), 0.0, 0.0)
    inside = map_ranks(Layout(tp=8), cluster(uneven(3, 0)), MESSAGES)  # nothing crosses
    assert inside.order == (0, 1, 2) and inside.after_seconds == 0.0


def test_nodes_that_the_layout_leaves_free():
    """A slow node can be left out."""
    matrix = [[50.0] * 4 for _ in range(4)]
    matrix[1] = [2.0] * 4
    found = map_ranks(Layout(tp=8, dp=3), cluster(matrix), MESSAGES, iterations=2000)
    assert found.order[3] == 1


def test_what_is_wrong():
    with pytest.raises(TersorError, match="16 ranks"):
        map_ranks(Layout(tp=8, dp=2), load_cluster("8xh100"), MESSAGES)
    with pytest.raises(ValueError, match="sp"):
        map_ranks(Layout(tp=8, dp=2), cluster(uneven(2, 0)), {"sp": 1.0})


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_moves_keep_every_node(nodes, seed):
    rng, order = random.Random(seed), np.arange(nodes)
    for move in MOVES:
        changed = move(order, rng)
        assert sorted(changed) == list(range(nodes))
        assert list(order) == list(range(nodes))


def test_moves_reach_other_orders():
    rng, order = random.Random(0), np.arange(6)
    for move in MOVES:
        assert len({tuple(move(order, rng)) for _ in range(200)}) > 10

"""Placing experts: assignments against all permutations, placements against all placements, gains where there are any."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.routing import Routing, from_trace
from tersor.ops.plan_parallel.experts import placement as placing
from tersor.ops.plan_parallel.experts.assignment import _transport, assign, assign_in_groups
from tersor.ops.plan_parallel.experts.crossings import crossings, judge
from tersor.ops.plan_parallel.experts.permute import check_order
from tersor.ops.plan_parallel.experts.placement import linear, place, step_cost, weights


def random_routing(seed: int, layers: int, experts: int) -> Routing:
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, 20, (layers - 1, experts, experts)).astype(float)
    return Routing(experts, np.ones((layers, experts)), steps)


def themed(tokens: int, layers: int, experts: int, themes: int, k: int, seed: int = 0, groups: int = 1) -> np.ndarray:
    """A trace whose tokens have a theme; each theme has its experts in every layer, at random places (of one group)."""
    generator = np.random.default_rng(seed)
    theme = generator.integers(themes, size=tokens)
    trace = np.empty((tokens, layers, k), np.int64)
    size = experts // groups
    for layer in range(layers):
        if groups == 1:
            owner = generator.permutation(np.arange(experts) % themes)
        else:  # several themes to a group
            inside = [generator.permutation(np.arange(size) % (themes // groups)) for _ in range(groups)]
            order = generator.permutation(groups)
            owner = np.concatenate([order[one] * (themes // groups) + inside[one] for one in range(groups)])
        score = generator.random((tokens, experts)) + (owner == theme[:, None])
        trace[:, layer] = np.argsort(-score, 1)[:, :k]
    return trace


@given(st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_assignment_is_the_best_permutation(size, seed):
    cost = np.random.default_rng(seed).integers(-9, 9, (size, size)).astype(float)
    found = assign(cost)
    assert sorted(found) == list(range(size))
    least = min(sum(cost[row, column] for row, column in enumerate(order)) for order in permutations(range(size)))
    assert cost[np.arange(size), found].sum() == least


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_shared_columns_are_filled_at_prices_that_prove_it(columns, capacity, seed):
    """Linear programming duality: prices under which no row would rather go elsewhere show that the cost is least."""
    rows = columns * capacity
    cost = np.random.default_rng(seed).normal(size=(rows, columns))
    found, row_price, column_price = _transport(cost, capacity)
    assert (np.bincount(found, minlength=columns) == capacity).all()
    slack = cost - row_price[:, None] - column_price
    assert slack.min() > -1e-9 and abs(slack[np.arange(rows), found]).max() < 1e-9


@pytest.mark.parametrize(("size", "capacity"), [(2, 1), (2, 2), (4, 2), (4, 1), (2, 4)])
def test_groups_stay_together(size, capacity):
    experts = 8
    devices = experts // capacity
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(experts, devices))
        found = assign_in_groups(cost, size, capacity)
        assert (np.bincount(found, minlength=devices) == capacity).all()
        best = min(_grouped_costs(cost, size, capacity))
        assert cost[np.arange(experts), found].sum() == pytest.approx(best)


def _grouped_costs(cost: np.ndarray, size: int, capacity: int):
    """Of every order of the groups, and of the members inside."""
    experts = len(cost)
    for groups in permutations(range(experts // size)):
        inner = (
            product(*(permutations(range(group * size, (group + 1) * size)) for group in groups)) if size <= 2 else None
        )
        if inner is None:
            total = 0.0
            for slot, group in enumerate(groups):
                members = range(group * size, (group + 1) * size)
                total += min(
                    sum(cost[expert, (slot * size + place) // capacity] for place, expert in enumerate(order))
                    for order in permutations(members)
                )
            yield total
        else:
            for orders in inner:
                order = [expert for part in orders for expert in part]
                yield sum(cost[expert, place // capacity] for place, expert in enumerate(order))


def all_cuts(experts: int, devices: int):
    return {order for order in permutations(np.repeat(np.arange(devices), experts // devices).tolist())}


@pytest.mark.parametrize(("experts", "devices", "nodes"), [(4, 2, 1), (4, 4, 2), (6, 3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_few_experts_are_placed_exactly(experts, devices, nodes, seed):
    routing, weight = random_routing(seed, 3, experts), weights(devices, nodes)
    found = place(routing, devices, nodes)
    cuts = sorted(all_cuts(experts, devices))
    first, second = (
        {(a, b): (one * weight[np.ix_(a, b)]).sum() for a in cuts for b in cuts} for one in routing.transitions
    )
    best = min(min(first[a, b] for a in cuts) + min(second[b, c] for c in cuts) for b in cuts)
    assert found.exact and found.cost * routing.transitions.sum() == pytest.approx(best)
    assert step_cost(routing.transitions, found.device, weight) == pytest.approx(best)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_for_many_comes_close_to_exact(monkeypatch, seed, nodes):
    routing = from_trace(themed(400, 6, 8, 4, 2, seed), 8)
    exact = place(routing, 4, nodes)
    monkeypatch.setattr(placing, "EXACT_STATES", 0)
    found = place(routing, 4, nodes, seed=seed)
    assert not found.exact and exact.cost - 1e-12 <= found.cost <= exact.cost * 1.02 + 1e-9


@given(st.integers(0, 999), st.sampled_from([(8, 2, 1, 1), (8, 4, 2, 2), (12, 6, 3, 1), (12, 3, 1, 6), (16, 8, 2, 2)]))
@settings(max_examples=25, deadline=None)
def test_never_worse_than_the_order_of_the_checkpoint(seed, shape):
    experts, devices, nodes, groups = shape
    routing = random_routing(seed, 4, experts)
    found = place(routing, devices, nodes, groups)
    assert found.cost <= found.linear_cost
    assert all((np.bincount(layer, minlength=devices) == experts // devices).all() for layer in found.device)
    for device, order in zip(found.device, found.orders(), strict=True):
        check_order("x", order, experts, groups)
        assert (device[order] == np.arange(experts) // (experts // devices)).all()


@pytest.mark.parametrize(
    ("experts", "devices", "nodes", "groups"), [(32, 4, 1, 1), (32, 8, 2, 1), (32, 8, 1, 4), (32, 4, 2, 4)]
)
def test_themes_find_their_devices(experts, devices, nodes, groups):
    """Experts of a theme follow each other; placed on one device, their tokens stay there, also tokens not seen before."""
    trace = themed(3000, 8, experts, devices, experts // devices, seed=3, groups=groups)
    found, numbers = judge(from_trace(trace, experts), devices, nodes, groups, control=False)
    assert found.cost < 0.02
    assert numbers["held_out"] and numbers["after"]["cost"] < 0.02 < numbers["before"]["cost"]
    assert numbers["after"]["devices"] < 1.05 and numbers["after"]["devices"] <= numbers["before"]["devices"]
    assert numbers["saved_share"] > 0.98


def test_routing_at_random_gains_nothing():
    generator = np.random.default_rng(0)
    trace = np.stack([np.argsort(generator.random((6000, 16)), 1)[:, :2] for _ in range(6)], 1)
    _, numbers = judge(from_trace(trace, 16), 4)
    assert abs(numbers["saved_share"]) < 0.02
    assert abs(numbers["control"]["saved_share"]) < 0.02


def test_the_control_of_themes_gains_nothing_either():
    _, numbers = judge(from_trace(themed(4000, 6, 16, 4, 2), 16), 4)
    assert numbers["saved_share"] > 0.9 and abs(numbers["control"]["saved_share"]) < 0.03


def test_crossings_by_hand():
    trace = np.array([[[0, 1], [2, 3]], [[0, 2], [0, 1]]])  # two tokens, two layers, experts 0 1 | 2 3
    found = crossings(from_trace(trace, 4), linear(2, 4, 2), 2, 1)
    # pairs: 0-2 0-3 1-2 1-3 cross; 0-0 0-1 stay, 2-0 2-1 cross
    assert found.within_node == 6 / 8 and found.across_nodes == 0 and found.cost == 6 / 8
    assert found.devices == (1 + 1 + 2 + 1) / 4
    far = crossings(from_trace(trace, 4), linear(2, 4, 2), 2, 2)
    assert far.across_nodes == 6 / 8 and far.cost == 12 / 8 and far.crossings == 6 / 8


def test_counts_alone_judge_themselves_and_say_so():
    routing = from_trace(themed(500, 4, 8, 2, 2), 8)
    found, numbers = judge(Routing(8, routing.counts, routing.transitions), 2)
    assert not numbers["held_out"] and "control" not in numbers
    assert numbers["after"]["cost"] == pytest.approx(found.cost) and numbers["after"]["devices"] is None


def test_the_busiest_device():
    routing = random_routing(0, 2, 4)
    found = place(routing, 2)
    assert found.load(np.ones((2, 4))) == 1.0
    counts = np.zeros((2, 4))
    counts[0, found.device[0] == 1] = 1
    assert found.load(counts) == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_devices_that_speak_to_each_other_come_to_one_node(seed):
    """No pair can change places for the better, and the pairs that were hidden are found."""
    generator, weight = np.random.default_rng(seed), weights(6, 3)
    partner = generator.permutation(6)
    counts = generator.random((1, 6, 6)) * 0.1
    for one, other in partner.reshape(3, 2):
        counts[0, one, other] += 5
    device = np.tile(np.arange(6), (2, 1))
    found = placing._regroup(counts, device, weight)[device]
    cost = step_cost(counts, found, weight)
    assert {frozenset(pair) for pair in partner.reshape(3, 2).tolist()} == {
        frozenset(np.flatnonzero(found[0] // 2 == node).tolist()) for node in range(3)
    }
    for order in permutations(range(6)):
        assert cost <= step_cost(counts, np.array(order)[device], weight) + 1e-9


def test_weights_of_two_levels():
    assert weights(4, 2).tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]


@pytest.mark.parametrize(
    ("devices", "nodes", "groups", "words"),
    [(3, 1, 1, "8 experts cannot be shared evenly by 3"), (4, 3, 1, "spread evenly over 3"), (2, 1, 3, "3 groups"), (0, 1, 1, "0 devices")],
)  # fmt: skip
def test_what_cannot_be_shared_is_named(devices, nodes, groups, words):
    with pytest.raises(TersorError, match=words):
        place(random_routing(0, 2, 8), devices, nodes, groups)


def test_one_layer_or_one_device_stays_as_it_is():
    single = Routing(8, np.ones((1, 8)), np.zeros((0, 8, 8)))
    assert (place(single, 4).device == linear(1, 8, 4)).all()
    assert place(random_routing(0, 3, 8), 1).cost == 0

"""How much each layer gives up: rules, and the search over measured distortions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.ops.model.allocation import erk, outlier_ratio, owl, uniform
from tersor.ops.model.rate_distortion import Curve, Options, allocate_rd

BITS = (2, 3, 4, 6, 8)


def removed(shares: dict[str, float], sizes: dict[str, int]) -> float:
    return math.fsum(shares[name] * sizes[name] for name in sizes) / max(sum(sizes.values()), 1)


def brute_force(options: dict[str, Options], budget: int, at_least: dict[str, int] | None = None) -> float:
    """The least total distortion within the budget; infinite if there is none."""
    first = at_least or {}
    ranges = [range(first.get(name, 0), len(of.costs)) for name, of in options.items()]
    best = math.inf
    for pick in itertools.product(*ranges):
        chosen = list(zip(options.values(), pick, strict=True))
        if sum(of.costs[index] for of, index in chosen) <= budget:
            best = min(best, math.fsum(of.distortions[index] for of, index in chosen))
    return best


# --- rules ---------------------------------------------------------------------------------------------------------


def test_uniform():
    assert uniform({"a": 10, "b": 0}, 0.3) == {"a": 0.3, "b": 0.3}


def test_erk_by_hand():
    """(10, 10) and (10, 40), 40 % removed: 300 of 500 stay, in proportion to 20 and 50 rows and columns."""
    shares = erk({"a": (10, 10), "b": (10, 40)}, 0.4)
    assert shares == pytest.approx({"a": 1 - 300 * 20 / 70 / 100, "b": 1 - 300 * 50 / 70 / 400})


def test_erk_keeps_whole_what_would_be_denser_than_dense():
    """20 % removed: the rule would keep 114 of the 100 weights of a, so b alone loses the 100."""
    assert erk({"a": (10, 10), "b": (10, 40)}, 0.2) == pytest.approx({"a": 0.0, "b": 0.25})


def test_erk_solves_again_until_no_layer_is_too_dense():
    """1105 of 10101 stay. b would keep 1105 * 20 / 222 = 99.5 of its 100, but once a is whole 1104 * 20 / 220 = 100.4."""
    shares = erk({"a": (1, 1), "b": (10, 10), "c": (100, 100)}, 1 - 1105 / 10101)
    assert shares == pytest.approx({"a": 0.0, "b": 0.0, "c": 1 - 1004 / 10000})


shapes_of_layers = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8)


@given(shapes_of_layers, st.floats(0, 0.999))
@settings(deadline=None, max_examples=150)
def test_erk_total_is_exact_and_dense_is_the_most(layers, sparsity):
    shapes = {str(number): shape for number, shape in enumerate(layers)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    shares = erk(shapes, sparsity)
    assert list(shares) == list(shapes) and all(0 <= share < 1 for share in shares.values())
    if sum(sizes.values()):
        assert removed(shares, sizes) == pytest.approx(sparsity, abs=1e-12)
    # what is not whole follows the rule: density * size / (out + in) is the same for all
    scales = [
        (1 - shares[name]) * size / sum(shapes[name]) for name, size in sizes.items() if size and shares[name] > 0
    ]
    assert scales == pytest.approx([scales[0]] * len(scales) if scales else [], rel=1e-9)


def published_owl(ratios: list[float], sparsity: float, spread: float) -> list[float]:
    """Sparsities as the authors' code has them, for blocks of equal size."""
    ratios = np.array(ratios)
    kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    return (1 - (kept - np.mean(kept) + (1 - sparsity))).tolist()


def test_owl_is_the_published_normalisation():
    ratios = [7.1, 3.3, 2.0, 2.9, 0.4]
    shares = owl(dict(zip("abcde", ratios, strict=True)), dict.fromkeys("abcde", 64), 0.7)
    assert list(shares.values()) == pytest.approx(published_owl(ratios, 0.7, 0.08), abs=1e-12)
    percent = owl(
        {name: 100 * ratio for name, ratio in zip("abcde", ratios, strict=True)}, dict.fromkeys("abcde", 64), 0.7
    )
    assert percent == pytest.approx(shares)


ratios_and_sizes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**9)), min_size=1, max_size=10)


@given(ratios_and_sizes, st.floats(0, 0.99), st.floats(0, 0.4))
@settings(deadline=None, max_examples=200)
def test_owl_bounds_mean_and_order(layers, sparsity, spread):
    ratios = {str(number): ratio for number, (ratio, _) in enumerate(layers)}
    sizes = {str(number): size for number, (_, size) in enumerate(layers)}
    shares = owl(ratios, sizes, sparsity, spread)
    assert list(shares) == list(sizes)
    assert all(0 <= share <= (1 + sparsity) / 2 + 1e-12 for share in shares.values())
    assert max(shares.values()) - min(shares.values()) <= 2 * spread + 1e-12
    if sum(sizes.values()):
        assert removed(shares, sizes) == pytest.approx(sparsity, abs=1e-9)
    counted = sorted((name for name in sizes if sizes[name]), key=ratios.get)
    assert all(shares[low] >= shares[high] - 1e-12 for low, high in itertools.pairwise(counted))


def test_owl_near_the_ends_keeps_every_block_alive():
    ratios, sizes = {"a": 0.9, "b": 0.1, "c": 0.2}, dict.fromkeys("abc", 10)
    shares = owl(ratios, sizes, 0.95)
    assert max(shares.values()) == pytest.approx(0.975) and removed(shares, sizes) == pytest.approx(0.95)
    assert shares["b"] > shares["c"] > shares["a"]
    assert min(owl(ratios, sizes, 0.02).values()) == pytest.approx(0, abs=1e-15)
    assert owl(ratios, sizes, 0.0) == dict.fromkeys("abc", 0.0)


def test_owl_without_differences_is_uniform():
    assert owl({"a": 0.2, "b": 0.2}, {"a": 3, "b": 5}, 0.6) == {"a": 0.6, "b": 0.6}
    assert owl({"a": 0.2}, {"a": 3}, 0.6) == {"a": 0.6}
    assert owl({"a": 0.2, "b": 0.9}, {"a": 0, "b": 0}, 0.6) == {"a": 0.6, "b": 0.6}
    assert owl({}, {}, 0.6) == {}


def test_outlier_ratio_counts_above_the_pooled_mean():
    scores = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 1, 31]])
    assert outlier_ratio(scores) == 0.1  # mean 4, so above 20
    assert outlier_ratio(scores, threshold=8.0) == 0.0  # 32 is not exceeded
    assert outlier_ratio([scores[0], scores[1]]) == 0.1
    assert outlier_ratio([scores[1]], threshold=4.0) == 0.2
    assert outlier_ratio(torch.zeros(4)) == 0.0 and outlier_ratio(torch.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="nan"):
        outlier_ratio(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_sparsity_outside_its_range(sparsity):
    for rule in (
        lambda: uniform({"a": 4}, sparsity),
        lambda: erk({"a": (2, 2)}, sparsity),
        lambda: owl({"a": 0.1}, {"a": 4}, sparsity),
    ):
        with pytest.raises(ValueError, match="outside"):
            rule()


def test_owl_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="b"):
        owl({"a": 0.1}, {"a": 4, "b": 4}, 0.5)
    with pytest.raises(ValueError, match="a: outlier ratio nan"):
        owl({"a": math.nan}, {"a": 4}, 0.5)
    with pytest.raises(ValueError, match="spread"):
        owl({"a": 0.1}, {"a": 4}, 0.5, spread=-0.1)


# --- rate and distortion -------------------------------------------------------------------------------------------

losses = st.integers(-5_000_000, 50_000_000).map(lambda n: n / 1e6)  # no differences that a sum swallows
option = st.tuples(st.integers(0, 60), losses | st.sampled_from([0.0, 1.0, 2.0]))
instances = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5).map(
    lambda layers: {
        f"layer{number}": Options([cost for cost, _ in layer], [loss for _, loss in layer])
        for number, layer in enumerate(layers)
    }
)


def check(choice, options, budget) -> None:
    assert list(choice.index) == list(options)
    chosen = [(of, choice.index[name]) for name, of in options.items()]
    assert choice.cost == sum(of.costs[index] for of, index in chosen) <= budget
    assert choice.predicted == pytest.approx(math.fsum(of.distortions[index] for of, index in chosen))


@given(instances, st.integers(0, 250))
@settings(deadline=None, max_examples=300)
def test_is_brute_force_with_a_cell_for_every_unit(options, budget):
    """Curves of any shape, dominated options and ties among them."""
    least = brute_force(options, budget)
    if least == math.inf:
        with pytest.raises(ValueError, match=f"the budget is {budget}"):
            allocate_rd(options, budget)
        return
    choice = allocate_rd(options, budget, cells=max(budget, 1))
    check(choice, options, budget)
    assert choice.predicted == pytest.approx(least, abs=1e-9)
    assert choice == allocate_rd(options, budget, cells=max(budget, 1))


@given(instances, st.integers(0, 250), st.integers(1, 12))
@settings(deadline=None, max_examples=300)
def test_fewer_cells_stay_within_the_budget_and_the_bound(options, budget, cells):
    cheapest = sum(min(of.costs) for of in options.values())
    if cheapest > budget:
        return
    choice = allocate_rd(options, budget, cells=cells)
    check(choice, options, budget)
    smaller = budget - math.ceil(len(options) * (budget - cheapest) / cells)
    assert choice.predicted <= brute_force(options, smaller) + 1e-9
    # nothing that still fits is left lying
    for name, of in options.items():
        now = choice.index[name]
        for cost, loss in zip(of.costs, of.distortions, strict=True):
            assert loss >= of.distortions[now] or cost - of.costs[now] > budget - choice.cost


@given(instances, st.integers(0, 250), st.data())
@settings(deadline=None, max_examples=150)
def test_amounts_only_grow(options, budget, data):
    first = {
        name: data.draw(st.integers(0, len(of.costs) - 1)) for name, of in options.items() if data.draw(st.booleans())
    }
    least = brute_force(options, budget, first)
    if least == math.inf:
        with pytest.raises(ValueError, match="cheapest"):
            allocate_rd(options, budget, at_least=first)
        return
    choice = allocate_rd(options, budget, at_least=first)
    check(choice, options, budget)
    assert all(choice.index[name] >= start for name, start in first.items())
    assert choice.predicted == pytest.approx(least, abs=1e-9)


def test_large_costs_share_a_unit():
    """Costs in the millions, multiples of one number: as exact as small ones."""
    unit = 589_824
    options = {
        "a": Options([3 * unit, 2 * unit, 0], [0.0, 1.0, 9.0]),
        "b": Options([4 * unit, unit, 0], [0.0, 4.0, 4.5]),
    }
    choice = allocate_rd(options, 4 * unit + 17, cells=5)
    assert choice.index == {"a": 0, "b": 1} and choice.cost == 4 * unit and choice.predicted == 4.0
    assert choice.predicted == brute_force(options, 4 * unit + 17)


def convex(seed: int, layers: int) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[float, float]]]:
    """Shapes of layers, and (factor, power) of their distortion."""
    random = np.random.default_rng(seed)
    widths = [64, 96, 192, 576, 1536]
    shapes = {str(layer): tuple(int(width) for width in random.choice(widths, 2)) for layer in range(layers)}
    laws = {name: (float(np.exp(random.normal(0, 1))), float(random.uniform(1.5, 4))) for name in shapes}
    return shapes, laws


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layers", [3, 30, 100])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_convex_curves_lose_less_than_under_the_rules(seed, layers, sparsity):
    """Distortion factor * amount^power, measured in steps of 2.5 %.

    A rule need not keep to the steps, which matters when the layers are few: there it is rounded up to a step, so that it
    keeps the budget.
    """
    shapes, laws = convex(seed, layers)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    amounts = [step / 40 for step in range(40)]
    options = {
        name: Curve(sizes[name], amounts, [factor * amount**power for amount in amounts]).options()
        for name, (factor, power) in laws.items()
    }
    budget = math.floor((1 - sparsity) * sum(sizes.values()) + 1e-6)
    choice = allocate_rd(options, budget)
    check(choice, options, budget)
    assert choice.cost > 0.97 * budget
    for rule in (uniform(sizes, sparsity), erk(shapes, sparsity)):
        if layers < 30:
            rule = {name: math.ceil(share * 40 - 1e-9) / 40 for name, share in rule.items()}
        assert choice.predicted <= math.fsum(factor * rule[name] ** power for name, (factor, power) in laws.items())


@pytest.mark.parametrize("cells", [1, 50, 2000])
def test_equal_convex_curves_are_pruned_alike(cells):
    amounts = [step / 20 for step in range(20)]
    options = {str(n): Curve(576 * 1536, amounts, [a**2 for a in amounts]).options() for n in range(60)}
    choice = allocate_rd(options, sum(of.costs[10] for of in options.values()), cells=cells)
    assert set(choice.index.values()) == {10}


def test_many_layers_come_close_to_the_bound():
    """No choice is better than the Lagrangian bound, at any price of a weight."""
    shapes, laws = convex(7, 200)
    amounts = [step / 20 for step in range(20)]
    noise = np.random.default_rng(8).normal(0, 0.1, (200, 20))
    options = {
        name: Curve(
            shapes[name][0] * shapes[name][1],
            amounts,
            [f * a**p * math.exp(z) for a, z in zip(amounts, row, strict=True)],
        ).options()
        for (name, (f, p)), row in zip(laws.items(), noise, strict=True)
    }
    budget = sum(of.costs[0] for of in options.values()) // 2
    costs = np.array([of.costs for of in options.values()])
    distortions = np.array([of.distortions for of in options.values()])
    bound = max(
        (distortions + price * costs).min(axis=1).sum() - price * budget for price in np.geomspace(1e-9, 1e-3, 400)
    )
    choice = allocate_rd(options, budget)
    check(choice, options, budget)
    assert bound <= choice.predicted <= 1.005 * bound


def test_bits_instead_of_weights():
    """Bytes as costs; the layer that suffers most gets the most bits."""
    sizes, factors = {"a": 1000, "b": 1000, "c": 4000}, {"a": 1.0, "b": 50.0, "c": 1.0}
    options = {n: Options([sizes[n] * b // 8 for b in BITS], [factors[n] * 4.0**-b for b in BITS]) for n in sizes}
    budget = sum(sizes.values()) // 2
    choice = allocate_rd(options, budget)
    check(choice, options, budget)
    assert choice.index["b"] > choice.index["a"] >= choice.index["c"]
    assert choice.predicted == pytest.approx(brute_force(options, budget))


def test_curves_are_used_as_measured():
    """Removing 40 % of a hurts less than 20 %, and even less than nothing."""
    a = Curve(100, [0, 0.2, 0.4, 0.6], [1.0, 5.0, 0.5, 6.0]).options()
    b = Curve(100, [0, 0.2, 0.4, 0.6], [0.0, 1.0, 2.0, 3.0]).options()
    choice = allocate_rd({"a": a, "b": b}, 200)
    assert choice.index == {"a": 2, "b": 0} and choice.cost == 160 and choice.predicted == 0.5
    assert allocate_rd({"a": a, "b": b}, 140).index == {"a": 2, "b": 1}
    assert allocate_rd({"a": a, "b": b}, 200, at_least={"a": 3}).index == {"a": 3, "b": 0}


def test_survivors_of_a_curve():
    assert Curve(100, [0, 0.29, 0.999, 1], [0, 1, 2, 3]).options().costs == [100, 71, 1, 0]
    assert Curve(3, [0, 0.5], [0, 1]).options().costs == [3, 2]
    assert Curve(0, [0, 0.5], [0, 0]).options().costs == [0, 0]


def test_degenerate_inputs():
    one = {"a": Curve(10, [0, 0.5, 0.9], [0.0, 1.0, 2.0]).options()}
    assert allocate_rd(one, 10).index == {"a": 0}  # sparsity 0
    assert allocate_rd(one, 9).index == {"a": 1}
    assert allocate_rd(one, 1, cells=1).index == {"a": 2}
    empty = {"e": Curve(0, [0, 0.5], [0.0, 0.0]).options()}
    assert allocate_rd({**one, **empty}, 5).predicted == 1.0
    assert allocate_rd(empty, 0).cost == 0
    assert allocate_rd({}, 0).index == {} and allocate_rd({}, 0).predicted == 0.0
    assert allocate_rd({"a": Options([5], [3.0])}, 5).predicted == 3.0
    flat = {name: Curve(10, [0, 0.5], [0.0, 0.0]).options() for name in "ab"}
    assert allocate_rd(flat, 15).predicted == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_distortion_that_is_no_number_names_its_layer(bad):
    options = {"fine": Options([4, 2], [0.0, 1.0]), "model.layers.3.mlp": Options([4, 2], [0.0, bad])}
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp: the distortion of option 1"):
        allocate_rd(options, 100)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"a": Options([8, 6], [0.0, 1.0])}, {}, "cost 6 together, the budget is 5"),
        ({"a": Options([8, 2], [0.0])}, {}, "a: 2 costs and 1 distortions"),
        ({"a": Options([], [])}, {}, "a: 0 costs"),
        ({"a": Options([2.5], [0.0])}, {}, "a: the cost of option 0 is 2.5"),
        ({"a": Options([2, -1], [0.0, 1.0])}, {}, "a: the cost of option 1 is -1"),
        ({"a": Options([2], [0.0])}, {"at_least": {"a": 1}}, "a: at_least is 1"),
        ({"a": Options([2], [0.0])}, {"at_least": {"b": 0}}, "without options: .*b"),
        ({"a": Options([2], [0.0])}, {"cells": 0}, "cells is 0"),
    ],
)
def test_what_cannot_be_allocated(options, settings, message):
    with pytest.raises(ValueError, match=message):
        allocate_rd(options, 5, **settings)


@pytest.mark.parametrize("amounts", [[], [0.1, 0.5], [0, 0.5, 0.5], [0, 1.2], [0, math.nan]])
def test_amounts_ascend_from_nothing(amounts):
    with pytest.raises(ValueError, match="ascend"):
        Curve(10, amounts, [0.0] * len(amounts))

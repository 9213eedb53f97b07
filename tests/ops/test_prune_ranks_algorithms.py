"""`prune --remove ranks`: the factorisations against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import low_rank
from tersor.ops.model.linears import KroneckerLinear, LowRankLinear
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.prune.ranks.kronecker import kronecker, rearranged
from tersor.ops.prune.ranks.plan import budgeted, grid_of
from tersor.ops.prune.ranks.svd import svd, truncated_svd
from tersor.ops.prune.ranks.whitened import whitened, whitening


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(inputs: torch.Tensor) -> InputStatistics:
    found = InputStatistics({"hessian"})
    found.add(inputs)
    return found


@st.composite
def matrix_and_rank(draw) -> tuple[torch.Tensor, int]:
    shape = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    return random(*shape, seed=draw(st.integers(0, 99))), draw(st.integers(1, min(shape)))


@given(matrix_and_rank())
@settings(max_examples=60, deadline=None)
def test_svd_error_is_what_was_discarded(case):
    weight, rank = case
    singular = torch.linalg.svdvals(weight)
    first, second, energy = svd(weight, rank)
    assert first.shape == (weight.shape[0], rank)
    assert second.shape == (rank, weight.shape[1])
    error = torch.linalg.vector_norm(weight - first @ second)
    torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), rtol=1e-7, atol=1e-6)
    assert energy == pytest.approx(float(singular[:rank].square().sum() / singular.square().sum()), abs=1e-9)
    # Both take the root of the singular values.
    torch.testing.assert_close(torch.linalg.vector_norm(first, dim=0), singular[:rank].sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.linalg.vector_norm(second, dim=1), singular[:rank].sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_svd_of_less_than_full_rank(shape):
    weight = random(shape[0], 2) @ random(2, shape[1], seed=1)
    left, singular, right, energy = truncated_svd(weight, 4)
    torch.testing.assert_close(left * singular @ right, weight)
    assert energy == pytest.approx(1.0)
    first, second, energy = svd(torch.zeros(shape), 2)
    assert energy == 1.0
    assert not bool((first @ second).any())  # zeros, not NaN


@pytest.mark.parametrize("shape", [(24, 16), (12, 20)])
def test_whitened_is_the_best_for_the_output(shape):
    weight, rank = random(*shape), 5
    inputs = random(200, shape[1], seed=1) @ random(shape[1], shape[1], seed=2).float().double()  # correlated
    found = statistics(inputs)
    first, second, energy = whitened(weight, rank, found, 0.0)
    error = torch.linalg.vector_norm((weight - first @ second) @ inputs.T)
    singular = torch.linalg.svdvals(weight @ inputs.T)
    torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), rtol=1e-4, atol=0.0)
    assert energy == pytest.approx(float(singular[:rank].square().sum() / singular.square().sum()), rel=1e-4)
    plain = svd(weight, rank)
    assert error < 0.98 * torch.linalg.vector_norm((weight - plain.first @ plain.second) @ inputs.T)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_whitened_is_plain_where_inputs_are_white(damping):
    weight, rank = random(12, 8), 3
    white = torch.linalg.qr(random(50, 8, seed=1))[0] * 50**0.5  # X^T X / tokens = I
    first, second, _ = whitened(weight, rank, statistics(white), damping)
    plain = svd(weight, rank)
    torch.testing.assert_close(first @ second, plain.first @ plain.second, rtol=1e-4, atol=1e-4)


def test_whitening_grows_its_damping():
    few = statistics(random(3, 16)).hessian
    lower = whitening(few, 0.0)
    assert bool(torch.isfinite(torch.linalg.inv(lower)).all())
    torch.testing.assert_close(lower @ lower.T, few.double(), rtol=0.0, atol=1e-4)
    exact = whitening(few, 0.1)
    damped = few.double() + 0.1 * few.diagonal().double().mean() * torch.eye(16)
    torch.testing.assert_close(exact @ exact.T, damped)
    assert torch.equal(whitening(torch.zeros(4, 4), 0.01), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive definite"):
        whitening(torch.full((4, 4), torch.nan), 0.01)


def test_layers_with_one_input_share_the_whitening():
    found = statistics(random(40, 8))
    whitened(random(6, 8), 2, found, 0.01)
    shared = found.prepared["whitening"]
    whitened(random(5, 8), 2, found, 0.01)
    assert found.prepared["whitening"] is shared


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_kronecker_product_is_one_term(m1, n1, m2, n2, seed):
    b, c = random(1, m1, n1, seed=seed), random(1, m2, n2, seed=seed + 1)
    weight = torch.kron(b[0], c[0])
    first, second, energy = kronecker(weight, 1, (m1, n1))
    assert (first.shape, second.shape) == (b.shape, c.shape)
    torch.testing.assert_close(low_rank.kronecker_sum(first, second), weight, rtol=1e-6, atol=1e-6)
    assert energy == pytest.approx(1.0)


def test_kronecker_error_is_what_was_discarded():
    weight = random(12, 20)
    singular = torch.linalg.svdvals(rearranged(weight, (3, 4)))
    assert rearranged(weight, (3, 4)).shape == (12, 20)
    torch.testing.assert_close(rearranged(weight, (3, 4))[6], weight[4:8, 10:15].flatten())  # block (1, 2)
    for terms in (1, 4):
        first, second, energy = kronecker(weight, terms, (3, 4))
        error = torch.linalg.vector_norm(weight - low_rank.kronecker_sum(first, second))
        torch.testing.assert_close(error, singular[terms:].square().sum().sqrt())
        assert energy == pytest.approx(float(singular[:terms].square().sum() / singular.square().sum()))


def test_low_rank_is_a_kronecker_sum_of_columns_and_rows():
    weight = random(7, 5)
    first, second, _ = kronecker(weight, 2, (7, 1))
    plain = svd(weight, 2)
    torch.testing.assert_close(low_rank.kronecker_sum(first, second), plain.first @ plain.second)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((64, 64), (8, 8)), ((1536, 576), (48, 18)), ((61, 67), (61, 1)), ((48, 16), (6, 4)), ((17, 16), (17, 1))],
)
def test_grid_is_the_cheapest_and_divides(shape, grid):
    found = grid_of(shape)
    costs = {
        (rows, columns): rows * columns + shape[0] * shape[1] // (rows * columns)
        for rows in range(1, shape[0] + 1)
        for columns in range(1, shape[1] + 1)
        if shape[0] % rows == 0 and shape[1] % columns == 0
    }
    assert costs[found] == min(costs.values())
    assert costs[found] == costs[grid]


def test_budget_counts_in_decimals():
    assert budgeted(0.9, 20 * 20, 40) == 1  # (1 - 0.9) * 10 is 0.99999… in binary
    assert budgeted(0.5, 64 * 64, 128) == 16
    assert budgeted(0.2, 576 * 1536, 576 + 1536) == 335


@pytest.mark.parametrize("shape", [(5, 7), (16, 12), (1, 1)])
def test_modules_are_their_matrices(shape):
    x, bias = random(2, 3, shape[1]), random(shape[0], seed=5)
    a, b = random(shape[0], 2), random(2, shape[1], seed=1)
    layer = LowRankLinear(a, b, bias)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, a @ b, bias))
    torch.testing.assert_close(layer.weight.detach(), a @ b)
    assert (layer.out_features, layer.in_features) == shape
    assert {name for name, _ in layer.named_parameters()} == {"lr_a", "lr_b", "bias"}
    first, second = random(3, 2, 4, seed=2), random(3, *shape, seed=3)
    layer, bias = KroneckerLinear(first, second, None), random(2 * shape[0], seed=6)
    x = random(2, 3, 4 * shape[1], seed=4)
    torch.testing.assert_close(layer(x), x @ low_rank.kronecker_sum(first, second).T)
    torch.testing.assert_close(KroneckerLinear(first, second, bias)(x), layer(x) + bias)
    assert (layer.out_features, layer.in_features) == (2 * shape[0], 4 * shape[1])
    assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)

"""Scales fitted to known codes: never a loss, exact where an exact answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.scheme import Scheme
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.quantize.refit_scale import DAMPING, refit_scale


def problem(out: int, columns: int, tokens: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(out, columns, generator=generator), inputs.T @ inputs / tokens


def row_errors(weight, quantized: QuantizedWeight, scheme, hessian) -> torch.Tensor:
    """tr((W - W') H (W - W')^T) with the damped Hessian, for each row, in float64."""
    damped = hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    difference = (weight - dequantize(quantized, scheme)).double()
    return (difference @ damped * difference).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    size=st.sampled_from([8, 16, 48]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tokens=st.sampled_from([3, 40, 200]),
    seed=st.integers(0, 99),
)
def test_error_of_no_row_grows(bits, symmetric, size, dtype, tokens, seed):
    weight, hessian = problem(8, 48, tokens, seed)
    scheme = Scheme(bits, group_size=size, symmetric=symmetric)
    before = round_to_nearest(weight, scheme, dtype)
    after = before._replace(scale=refit_scale(weight, *before[:3], hessian))
    assert after.scale.dtype == dtype and after.scale.shape == before.scale.shape and (after.scale > 0).all()
    old, new = row_errors(weight, before, scheme, hessian), row_errors(weight, after, scheme, hessian)
    assert (new <= old * (1 + 1e-4) + 1e-7).all()
    if dtype == torch.float32:  # in two bytes there may be no better scale
        assert new.sum() < old.sum()


def test_one_group_is_least_squares():
    weight, hessian = problem(16, 32, 100, 0)
    scheme = Scheme(3, strategy="channel")
    before = round_to_nearest(weight, scheme, torch.float32)
    scale = refit_scale(weight, *before[:3], hessian)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(32)
    codes = before.codes.float()
    expected = (codes @ damped * weight).sum(1) / (codes @ damped * codes).sum(1)
    torch.testing.assert_close(scale[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_true_scales_are_found_again():
    """A weight that lies on a grid, codes at hand, scales off by up to 20 %: two sweeps come close to the truth."""
    codes = torch.randint(-8, 8, (12, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    _, hessian = problem(1, 64, 400, 2)
    truth = torch.rand(12, 4, generator=torch.Generator().manual_seed(3)) + 0.5
    weight = codes * truth.repeat_interleave(16, 1)
    start = truth * (0.8 + 0.4 * torch.rand(12, 4, generator=torch.Generator().manual_seed(4)))
    found = refit_scale(weight, codes, start, None, hessian)
    assert (found / truth - 1).abs().max() < 0.1 * (start / truth - 1).abs().max()


@pytest.mark.parametrize("hessian", [torch.zeros(16, 16), torch.diag(torch.tensor([1.0] * 8 + [0.0] * 8))])
def test_inputs_never_seen_and_groups_of_zeros_keep_their_scale(hessian):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[:, :8] = 0
    before = round_to_nearest(weight, Scheme(4, group_size=8), torch.float32)
    scale = refit_scale(weight, *before[:3], hessian)
    assert torch.isfinite(scale).all() and torch.equal(scale[:, 0], before.scale[:, 0])
    if not hessian.any():
        assert torch.equal(scale, before.scale)

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.error_compensation import compensate, compensate_block, reference_compensate_block


def problem(rows, columns, seed=0):
    """Weight, inputs `[samples, columns]` with correlated columns, Hessian and inverse factor in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mix = torch.eye(columns) + 0.8 / columns**0.5 * torch.randn(columns, columns, generator=generator)
    inputs = (torch.randn(4 * columns, columns, generator=generator) @ mix).double()
    hessian = inputs.t() @ inputs
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight, inputs, hessian, factor


def grid(weight, groups, asymmetric, seed=0):
    grouped = weight.unflatten(1, (groups, -1))
    scale = grouped.abs().amax(2) / 6.3
    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.randint(-3, 4, scale.shape, generator=generator).to(torch.int8)
    return scale, zero_point if asymmetric else None


def optimal_brain_quantizer(weight, hessian, quantize):
    """OBQ as published, one column at a time on the explicit inverse Hessian, which loses the column's row each
    time."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    result = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        result[:, j] = quantize(weight[:, j], j)
        error = (weight[:, j] - result[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return result


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_agrees_with_obq_in_float64(asymmetric, activation_order):
    weight, _, hessian, factor = problem(40, 160)
    scale, zero_point = grid(weight, 5, asymmetric)
    group = torch.arange(160) // 32
    if activation_order:
        group = group[torch.randperm(160, generator=torch.Generator().manual_seed(1))]

    def quantize(w, j):
        s, z = scale[:, group[j]].double(), 0 if zero_point is None else zero_point[:, group[j]].double()
        return ((w / s + z).round().clamp(-8, 7) - z) * s

    expected = optimal_brain_quantizer(weight, hessian, quantize)
    found = compensate(weight, factor, scale, zero_point, group)
    # A value within float32's error of a tie may round the other way and change the rest of its row.
    same = (found.weight - expected).abs().amax(1) < 1e-6
    assert same.float().mean() >= 0.95
    difference = weight.double() - expected
    assert found.loss == pytest.approx(((difference @ hessian) * difference).sum().item(), rel=1e-2)


def test_sparsegpt_agrees_with_obs_in_float64():
    weight, _, hessian, factor = problem(30, 140)
    keep = torch.rand(30, 140, generator=torch.Generator().manual_seed(2)) > 0.5
    expected = optimal_brain_quantizer(weight, hessian, lambda w, j: w * keep[:, j])
    found = compensate(weight, factor, keep=keep)
    assert found.codes is None
    assert (found.weight[~keep] == 0).all()
    torch.testing.assert_close(found.weight.double(), expected, rtol=0, atol=1e-5)


def test_loss_is_the_squared_output_error():
    weight, inputs, _, factor = problem(16, 96)
    scale, _ = grid(weight, 3, False)
    found = compensate(weight, factor, scale)
    error = ((weight - found.weight).double() @ inputs.t()).square().sum()
    assert found.loss.item() == pytest.approx(error.item(), rel=1e-3)
    nearest = ((weight / scale.repeat_interleave(32, 1)).round().clamp(-8, 7)) * scale.repeat_interleave(32, 1)
    assert found.loss < ((weight - nearest).double() @ inputs.t()).square().sum()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 50),
    quantized=st.booleans(),
    asymmetric=st.booleans(),
    masked=st.booleans(),
    one_group=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 9),
)
def test_cpu_block_agrees_with_the_reference(rows, columns, quantized, asymmetric, masked, one_group, bits, seed):
    weight, _, _, factor = problem(rows, columns, seed)
    scale = zero_point = None
    if quantized:
        scale, zero_point = grid(weight, 1 if one_group else columns, asymmetric, seed)
        scale = scale * 2 ** (4 - bits) if bits < 8 else scale
        if one_group:
            scale = scale.expand(rows, columns)
            zero_point = zero_point.expand(rows, columns) if asymmetric else None
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    agree(
        compensate_block(weight, factor.float(), scale, zero_point, bits, keep),
        weight,
        factor,
        scale,
        zero_point,
        bits,
        keep,
    )


def agree(found, weight, factor, scale, zero_point, bits, keep):
    """Compare one block with the float64 reference, row by row: a near tie may send a row another way."""
    codes, quantized, error = reference_compensate_block(weight.double(), factor, scale, zero_point, bits, keep)
    close = (found[1] - quantized).abs().amax(1) < 1e-5
    assert (~close).sum() <= 1 + len(close) // 20
    torch.testing.assert_close(found[2][close].double(), error[close], rtol=1e-3, atol=1e-4 * error.abs().max().item())
    if scale is not None:
        assert torch.equal(found[0][close], codes[close])
        zeros = 0 if zero_point is None else zero_point.float()
        torch.testing.assert_close(found[1], (found[0].float() - zeros) * scale, rtol=1e-5, atol=1e-8)
    if keep is not None:
        assert (found[1][~keep] == 0).all()


def in_runs_of_17(work, rows, _):
    for first in range(0, rows, 17):
        work(first, min(first + 17, rows))


def test_row_chunks_change_nothing(monkeypatch):
    weight, _, _, factor = problem(70, 64)
    scale, zero_point = grid(weight, 2, True)
    whole = compensate(weight, factor, scale, zero_point)
    monkeypatch.setattr("tersor.kernels.error_compensation_cpu.over_rows", in_runs_of_17)
    chunked = compensate(weight, factor, scale, zero_point)
    assert torch.equal(whole.codes, chunked.codes)
    torch.testing.assert_close(whole.weight, chunked.weight)


def test_block_size_changes_nothing_but_rounding():
    weight, _, _, factor = problem(20, 200)
    keep = torch.rand(20, 200, generator=torch.Generator().manual_seed(0)) > 0.5
    whole = compensate(weight, factor, keep=keep)
    for size in (1, 7, 16, 100):
        torch.testing.assert_close(compensate(weight, factor, keep=keep, block_size=size).weight, whole.weight)


def test_reference_can_be_forced():
    weight, _, _, factor = problem(10, 150)
    scale, _ = grid(weight, 5, False)
    fast = compensate(weight, factor, scale)
    with mock.patch.dict(os.environ, TERSOR_KERNELS="reference"):
        slow = compensate(weight, factor, scale)
    assert (fast.codes != slow.codes).any(1).sum() <= 1
    assert fast.loss.item() == pytest.approx(slow.loss.item(), rel=1e-2)


def test_prepare_chooses_masks_from_compensated_weights():
    weight, _, hessian, factor = problem(12, 140)

    def two_of_four(view, start, stop):
        assert (start % 4, stop - start) == (0, 4)
        order = view.abs().argsort(1, descending=True)
        return torch.zeros_like(view, dtype=torch.bool).scatter_(1, order[:, :2], True)

    found = compensate(weight, factor, prepare=two_of_four, prepare_every=4)
    assert ((found.weight.view(12, -1, 4) != 0).sum(2) == 2).all()
    kept = found.weight != 0
    expected = optimal_brain_quantizer(weight, hessian, lambda w, j: w * kept[:, j])
    torch.testing.assert_close(found.weight.double(), expected, rtol=0, atol=1e-5)


def test_prepare_may_set_scales_and_only_narrows_keep():
    weight, _, _, factor = problem(8, 192)
    scale = torch.zeros(8, 3)
    keep = torch.rand(8, 192, generator=torch.Generator().manual_seed(3)) > 0.2
    seen = []

    def fit(view, start, stop):
        seen.append((start, stop))
        scale[:, start // 64] = view.abs().amax(1) / 7
        return torch.ones_like(view, dtype=torch.bool)

    found = compensate(weight, factor, scale, keep=keep, prepare=fit, prepare_every=64)
    assert seen == [(0, 64), (64, 128), (128, 192)]
    assert (found.weight[~keep] == 0).all()
    torch.testing.assert_close(found.weight, found.codes.float() * scale.repeat_interleave(64, 1))
    assert not torch.equal(scale[:, 1], weight[:, 64:128].abs().amax(1) / 7)


@pytest.mark.parametrize(
    "change",
    [
        {"factor": torch.eye(3)},
        {"scale": torch.ones(5, 1)},
        {"scale": torch.ones(4, 3)},
        {"keep": torch.ones(4, 7, dtype=torch.bool)},
        {"group_index": torch.zeros(3, dtype=torch.long)},
        {"block_size": 129},
    ],
)
def test_wrong_shapes_are_refused(change):
    arguments = {"factor": torch.eye(8), "scale": torch.ones(4, 2)} | change
    with pytest.raises(ValueError, match=r"factor|scale|divisible|shape|group_index|block_size"):
        compensate(torch.ones(4, 8), **arguments)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    quantized=st.booleans(),
    asymmetric=st.booleans(),
    masked=st.booleans(),
    bits=st.sampled_from([3, 4, 8]),
    seed=st.integers(0, 9),
)
def test_triton_block_agrees_with_the_reference(on_triton, rows, columns, quantized, asymmetric, masked, bits, seed):
    weight, _, _, factor = problem(rows, columns, seed)
    scale, zero_point = grid(weight, columns, asymmetric, seed) if quantized else (None, None)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    found = on_triton(compensate_block, weight, factor.float(), scale, zero_point, bits, keep)
    agree(found, weight, factor, scale, zero_point, bits, keep)


@pytest.mark.triton
def test_triton_runs_whole_matrices(on_triton):
    weight, _, _, factor = problem(20, 160)
    scale, zero_point = grid(weight, 5, True)
    group = (torch.arange(160) // 32)[torch.randperm(160, generator=torch.Generator().manual_seed(1))]
    keep = torch.rand(20, 160, generator=torch.Generator().manual_seed(4)) > 0.3
    expected = compensate(weight, factor, scale, zero_point, group, keep=keep)
    found = on_triton(compensate, weight, factor, scale, zero_point, group, keep=keep)
    assert (found[0] != expected.codes).any(1).sum() <= 1
    assert found[2].item() == pytest.approx(expected.loss.item(), rel=1e-2)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.group_quantize import (
    group_quantize,
    quantize_and_pack,
    reference_group_quantize,
    reference_quantize_and_pack,
)
from tersor.kernels.group_range import minmax_scale

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_weight(rows, columns, dtype, seed):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def test_codes_by_hand():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0, 0.0]])
    codes = group_quantize(weight, torch.ones(1, 1))
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, -8, 0]]  # ties to even, then clamped
    shifted = group_quantize(weight, torch.ones(1, 1), torch.full((1, 1), -3, dtype=torch.int8))
    assert shifted.tolist() == [[-2, -2, 0, -4, -4, 7, -8, -3]]


def test_packing_golden_words():
    ramp = torch.arange(-8.0, 8.0).view(1, 16) * 15 / 16  # min-max scale 1, codes -8..7
    packed, scale, zero_point = quantize_and_pack(ramp, 4, 16, True, torch.float32)
    assert scale.tolist() == [[1.0]] and zero_point is None
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == [0x76543210, 0xFEDCBA98]


def test_agrees_with_compressed_tensors():
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    )
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = random_weight(16, 128, torch.float32, 0)
    for dtype in (torch.float32, torch.bfloat16):
        scale, _ = minmax_scale(weight, 4, 32, True, dtype)
        expected = quantize(
            weight, scale.float(), torch.zeros_like(scale, dtype=torch.int8), arguments, dtype=torch.int8
        )
        assert torch.equal(group_quantize(weight, scale, None, 4, 32), expected)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 7, 32, 96]),
    bits=st.integers(1, 8),
    asymmetric=st.booleans(),
    dtype=DTYPES,
    scale_dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_cpu_codes_equal_the_reference(rows, groups, size, bits, asymmetric, dtype, scale_dtype, seed):
    weight = random_weight(rows, groups * size, dtype, seed)
    scale, zero_point = minmax_scale(weight, bits, size, not asymmetric, scale_dtype)
    out = torch.empty(weight.shape, dtype=torch.int8)
    assert group_quantize(weight, scale, zero_point, bits, size, out=out) is out
    assert torch.equal(out, reference_group_quantize(weight, scale, zero_point, bits, size))


def test_chunks_of_rows_and_broadcast_scales():
    weight = random_weight(300, 512, torch.bfloat16, 0)  # more than one chunk
    scale = torch.full((1,), 0.02)
    assert torch.equal(group_quantize(weight, scale), reference_group_quantize(weight, scale))
    per_row = torch.rand(300, 1) * 0.02 + 0.01
    transposed = weight.t().contiguous().t()
    assert torch.equal(group_quantize(transposed, per_row, bits=8), reference_group_quantize(weight, per_row, bits=8))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 4),
    size=st.sampled_from([5, 32, 48]),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    scale_dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_cpu_packing_equals_the_reference(rows, groups, size, bits, symmetric, scale_dtype, seed):
    weight = random_weight(rows, groups * size, torch.bfloat16, seed)
    weight[0] = 0
    found = quantize_and_pack(weight, bits, size, symmetric, scale_dtype)
    expected = reference_quantize_and_pack(weight, bits, size, symmetric, scale_dtype)
    assert found[0].shape == (rows, -(-groups * size * bits // 32))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[2] is None) == symmetric
    assert (found[1] > 0).all() and found[1].dtype == scale_dtype


def test_no_rows():
    weight = torch.ones(0, 32)
    packed, scale, zero_point = quantize_and_pack(weight, 4, 16, False, torch.float32)
    assert packed.shape == (0, 4) and scale.shape == zero_point.shape == (0, 2)
    assert group_quantize(weight, scale, zero_point, 4, 16).shape == (0, 32)


def test_wrong_arguments_are_refused():
    weight = torch.ones(4, 10)
    with pytest.raises(ValueError, match="divisible"):
        group_quantize(weight, torch.ones(4, 1), group_size=3)
    with pytest.raises(ValueError, match="does not fit"):
        group_quantize(weight, torch.ones(4, 3), group_size=5)
    with pytest.raises(ValueError, match="zero_point"):
        group_quantize(weight, torch.ones(4, 2), torch.ones(4, 3), group_size=5)
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        quantize_and_pack(weight, 3, 5, True, torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        group_quantize(weight, torch.ones(4, 1), out=torch.empty(4, 9, dtype=torch.int8))


@pytest.mark.triton
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 8),
    groups=st.integers(1, 3),
    size=st.sampled_from([7, 32, 96]),
    bits=st.integers(1, 8),
    asymmetric=st.booleans(),
    dtype=DTYPES,
    scale_dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_triton_codes_equal_the_reference(on_triton, rows, groups, size, bits, asymmetric, dtype, scale_dtype, seed):
    weight = random_weight(rows, groups * size, dtype, seed)
    scale, zero_point = minmax_scale(weight, bits, size, not asymmetric, scale_dtype)
    found = on_triton(group_quantize, weight, scale, zero_point, bits, size)
    assert torch.equal(found, reference_group_quantize(weight, scale, zero_point, bits, size))


@pytest.mark.triton
def test_triton_takes_broadcast_scales_and_strided_weights(on_triton):
    weight = random_weight(6, 40, torch.float32, 0).t()
    scale = torch.full((1,), 0.02)
    assert torch.equal(on_triton(group_quantize, weight, scale), reference_group_quantize(weight, scale))


@pytest.mark.triton
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    size=st.sampled_from([20, 32, 48, 128]),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    dtype=DTYPES,
    scale_dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_triton_packing_equals_the_reference(on_triton, rows, groups, size, bits, symmetric, dtype, scale_dtype, seed):
    weight = random_weight(rows, groups * size, dtype, seed)
    weight[0] = 0
    found = on_triton(quantize_and_pack, weight, bits, size, symmetric, scale_dtype)
    expected = reference_quantize_and_pack(weight, bits, size, symmetric, scale_dtype)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert symmetric or torch.equal(found[2], expected[2])


@pytest.mark.triton
def test_triton_packs_wide_groups_step_by_step(on_triton, monkeypatch):
    monkeypatch.setattr("tersor.kernels.group_quantize.WIDEST", 32)
    weight = random_weight(3, 128, torch.float32, 0)
    found = on_triton(quantize_and_pack, weight, 4, 64, False, torch.bfloat16)
    expected = reference_quantize_and_pack(weight, 4, 64, False, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

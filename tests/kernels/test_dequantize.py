import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.dequantize import dequantize, dequantize_packed, reference_dequantize, reference_unpack
from tersor.kernels.group_quantize import group_quantize, quantize_and_pack
from tersor.kernels.group_range import minmax_scale

CASES = {
    "rows": st.integers(1, 12),
    "groups": st.integers(1, 3),
    "size": st.sampled_from([3, 32, 80]),
    "bits": st.sampled_from([2, 4, 8]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 9),
}


def quantized(rows, groups, size, bits, symmetric, seed):
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    packed, scale, zero_point = quantize_and_pack(weight, bits, size, symmetric, torch.bfloat16)
    return weight, group_quantize(weight, scale, zero_point, bits, size), packed, scale, zero_point


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_cpu_equals_the_reference(rows, groups, size, bits, symmetric, dtype, seed):
    weight, codes, packed, scale, zero_point = quantized(rows, groups, size, bits, symmetric, seed)
    assert torch.equal(reference_unpack(packed, bits, weight.shape[1]), codes)
    expected = reference_dequantize(codes, scale, zero_point, size, dtype)
    assert torch.equal(dequantize(codes, scale, zero_point, size, dtype), expected)
    assert torch.equal(dequantize_packed(packed, scale, zero_point, bits, size, weight.shape, dtype), expected)


def test_error_is_at_most_half_a_step():
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) - 0.3
    scale, zero_point = minmax_scale(weight, 8, 16, False, torch.float32)
    back = dequantize(group_quantize(weight, scale, zero_point, 8, 16), scale, zero_point, 16, torch.float32)
    assert ((weight - back).abs() <= scale.repeat_interleave(16, 1) * 1.01).all()


def test_chunks_and_a_single_scale():
    codes = torch.randint(-8, 8, (300, 512), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.full((1,), 0.5)
    assert torch.equal(dequantize(codes, scale, None, None, torch.float32), codes * 0.5)


def test_no_rows():
    codes, scale = torch.ones(0, 32, dtype=torch.int8), torch.ones(0, 2)
    assert dequantize(codes, scale, None, 16, torch.bfloat16).shape == (0, 32)
    packed = torch.ones(0, 4, dtype=torch.int32)
    assert dequantize_packed(packed, scale, None, 4, 16, (0, 32), torch.bfloat16).shape == (0, 32)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        dequantize(torch.ones(2, 10, dtype=torch.int8), torch.ones(2, 3), None, 3, torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        dequantize(torch.ones(2, 10, dtype=torch.int8), torch.ones(2, 3), None, 5, torch.float32)
    with pytest.raises(ValueError, match="zero_point"):
        dequantize(torch.ones(2, 10, dtype=torch.int8), torch.ones(2, 2), torch.ones(2, 3), 5, torch.float32)
    with pytest.raises(ValueError, match="does not hold"):
        dequantize_packed(torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 1), None, 4, None, (2, 17), torch.float32)
    with pytest.raises(ValueError, match="2, 4 or 8"):
        dequantize_packed(torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 1), None, 3, None, (2, 32), torch.float32)


@pytest.mark.triton
@settings(max_examples=15, deadline=None)
@given(**CASES)
def test_triton_equals_the_reference(on_triton, rows, groups, size, bits, symmetric, dtype, seed):
    weight, codes, packed, scale, zero_point = quantized(rows, groups, size, bits, symmetric, seed)
    expected = reference_dequantize(codes, scale, zero_point, size, dtype)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 0, "atol": 0}  # the interpreter truncates bfloat16
    torch.testing.assert_close(on_triton(dequantize, codes, scale, zero_point, size, dtype), expected, **tolerance)
    found = on_triton(dequantize_packed, packed, scale, zero_point, bits, size, tuple(weight.shape), dtype)
    torch.testing.assert_close(found, expected, **tolerance)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.quantization_error import quantization_error, reference_quantization_error


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 8, 96]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_agrees_with_the_definition(rows, groups, size, asymmetric, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator).to(dtype)
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0
    codes = torch.randint(-8, 8, weight.shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator).to(dtype)
    zero_point = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8) if asymmetric else None
    found = quantization_error(weight, codes, scale, zero_point)
    expected = reference_quantization_error(weight, codes, scale, zero_point)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert found[2] == expected[2]


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        quantization_error(torch.ones(4, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(3, 2))

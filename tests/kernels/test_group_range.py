import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import group_range
from tersor.kernels.group_range import minmax_scale, reference_minmax_scale

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CASES = {
    "rows": st.integers(1, 20),
    "groups": st.integers(1, 4),
    "size": st.sampled_from([1, 7, 32, 96]),
    "bits": st.integers(1, 8),
    "symmetric": st.booleans(),
    "dtype": DTYPES,
    "scale_dtype": DTYPES,
    "seed": st.integers(0, 9),
}


def random_weight(rows, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator)) * 0.1
    weight[0] = 0
    return weight.to(dtype)


def same(found, expected):
    assert found[0].dtype == expected[0].dtype and torch.equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    assert found[1] is None or torch.equal(found[1], expected[1])


def test_min_max_scales_by_hand():
    weight = torch.tensor([[-1.0, 0.5, 0.25, 3.0], [0.0, 0.0, 1.0, 2.0]])
    scale, _ = minmax_scale(weight, 4, 2, True, torch.float32)
    torch.testing.assert_close(scale, torch.tensor([[2 / 15, 6 / 15], [torch.finfo(torch.float32).eps, 4 / 15]]))
    scale, zero_point = minmax_scale(weight, 4, 2, False, torch.float32)
    assert zero_point[0].tolist() == [2, -8]  # -8 + 10; values from 0 upwards start at the lowest code
    torch.testing.assert_close(scale[0], torch.tensor([1.5 / 15, 3 / 15]))


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_cpu_equals_the_reference(rows, groups, size, bits, symmetric, dtype, scale_dtype, seed):
    arguments = (random_weight(rows, groups * size, dtype, seed), bits, size, symmetric, scale_dtype)
    same(minmax_scale(*arguments), reference_minmax_scale(*arguments))


def test_chunks_of_rows_and_whole_rows():
    weight = random_weight(300, 512, torch.bfloat16, 0)  # more than one chunk
    same(
        minmax_scale(weight, 4, 64, False, torch.bfloat16), reference_minmax_scale(weight, 4, 64, False, torch.bfloat16)
    )
    same(
        minmax_scale(weight, 8, None, True, torch.float32), reference_minmax_scale(weight, 8, 512, True, torch.float32)
    )


def test_no_rows():
    scale, zero_point = minmax_scale(torch.ones(0, 32), 4, 16, False, torch.float32)
    assert scale.shape == zero_point.shape == (0, 2)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        minmax_scale(torch.ones(2, 10), 4, 3, True, torch.float32)
    with pytest.raises(ValueError, match="divisible"):
        minmax_scale(torch.ones(2, 0), 4, None, True, torch.float32)
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        minmax_scale(torch.ones(10), 4, 5, True, torch.float32)
    with pytest.raises(ValueError, match="bits"):
        minmax_scale(torch.ones(2, 10), 9, 5, True, torch.float32)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(**CASES)
def test_triton_equals_the_reference(on_triton, rows, groups, size, bits, symmetric, dtype, scale_dtype, seed):
    arguments = (random_weight(rows, groups * size, dtype, seed), bits, size, symmetric, scale_dtype)
    same(on_triton(minmax_scale, *arguments), reference_minmax_scale(*arguments))


@pytest.mark.triton
def test_triton_walks_over_wide_groups_and_takes_strided_weights(on_triton, monkeypatch):
    monkeypatch.setattr(group_range, "TILE", 16)
    weight = random_weight(5, 150, torch.float32, 0)
    for view in (weight[:, 10:], weight[:, 10:].t().contiguous().t()):
        same(
            on_triton(minmax_scale, view, 4, 70, False, torch.bfloat16),
            reference_minmax_scale(view, 4, 70, False, torch.bfloat16),
        )


@pytest.mark.triton
def test_triton_refuses_what_cannot_be_stored(on_triton):
    with pytest.raises(ValueError, match="cannot be stored"):
        on_triton(minmax_scale, torch.ones(2, 10), 4, 5, True, torch.float64)

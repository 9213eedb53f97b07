import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import int4_matmul as module
from tersor.kernels.group_quantize import quantize_and_pack
from tersor.kernels.int4_matmul import int4_matmul, reference_int4_matmul

CASES = {
    "tokens": st.sampled_from([1, 5, 16, 33]),
    "rows": st.sampled_from([1, 17, 70]),
    "columns": st.sampled_from([(13, 13), (64, 32), (192, 64), (96, 96), (512, 128), (520, 520)]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 9),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(tokens, rows, columns, symmetric, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    columns, size = columns
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return x, *quantize_and_pack(weight, 4, size, symmetric, torch.bfloat16)


def close(found, expected):
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_by_hand():
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)  # codes -8..-1
    x = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1.0]])
    assert int4_matmul(x, packed, torch.tensor([[0.5]])).tolist() == [[-4.0], [-0.5]]
    shifted = int4_matmul(x, packed, torch.tensor([[0.5]]), torch.tensor([[-8]], dtype=torch.int8))
    assert shifted.tolist() == [[0.0], [3.5]]


@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(tokens, rows, columns, symmetric, dtype, seed):
    arguments = layer(tokens, rows, columns, symmetric, dtype, seed)
    close(int4_matmul(*arguments), reference_int4_matmul(*arguments))


@pytest.mark.parametrize(
    "change", [{"packed": torch.ones(4, 9)}, {"scale": torch.ones(4, 3)}, {"scale": torch.ones(4, 4)}]
)
def test_wrong_arguments_are_refused(change):
    arguments = {"packed": torch.ones(4, 8, dtype=torch.int32), "scale": torch.ones(4, 2)} | change
    with pytest.raises(ValueError, match=r"packed|groups"):
        int4_matmul(torch.ones(2, 64), **arguments)


def test_nothing_to_multiply():
    packed, scale = torch.ones(4, 8, dtype=torch.int32), torch.ones(4, 2)
    assert int4_matmul(torch.ones(0, 64), packed, scale).shape == (0, 4)
    assert int4_matmul(torch.ones(2, 64), packed[:0], scale[:0]).shape == (2, 0)
    with pytest.raises(ValueError, match="no columns"):
        int4_matmul(torch.ones(2, 0), packed[:, :0], scale[:, :1])


def test_columns_must_match():
    with pytest.raises(ValueError, match="does not hold"):
        int4_matmul(torch.ones(2, 72), torch.ones(4, 8, dtype=torch.int32), torch.ones(4, 1))


@pytest.mark.triton
@settings(max_examples=20, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, tokens, rows, columns, symmetric, dtype, seed):
    arguments = layer(tokens, rows, columns, symmetric, dtype, seed)
    close(on_triton(int4_matmul, *arguments), reference_int4_matmul(*arguments))


@pytest.mark.triton
def test_triton_splits_k_and_repeats_itself(on_triton, monkeypatch):
    splits = []
    choose = module.split_k
    monkeypatch.setattr(module, "split_k", lambda *a: splits.append(choose(*a)) or splits[-1])
    arguments = layer(3, 40, (1536, 128), False, torch.float16, 0)
    first = on_triton(int4_matmul, *arguments)
    close(first, reference_int4_matmul(*arguments))
    assert torch.equal(first, on_triton(int4_matmul, *arguments))
    assert splits[0] > 1


@pytest.mark.triton
def test_triton_has_nothing_to_multiply(on_triton):
    packed, scale = torch.ones(4, 8, dtype=torch.int32), torch.ones(4, 2)
    assert on_triton(int4_matmul, torch.ones(0, 64), packed, scale).shape == (0, 4)
    assert on_triton(int4_matmul, torch.ones(2, 64), packed[:0], scale[:0]).shape == (2, 0)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import int8_matmul as module
from tersor.kernels.int8_matmul import int8_matmul, quantize_tokens, reference_int8_matmul, reference_quantize_tokens

SHAPES = {
    "tokens": st.sampled_from([1, 16, 37]),
    "rows": st.sampled_from([1, 19, 65]),
    "columns": st.sampled_from([1, 30, 128, 201]),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 9),
}


def operands(tokens, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(tokens, 1, generator=generator), torch.rand(rows, 1, generator=generator).bfloat16()
    return x, weight, *scales


@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_cpu_equals_the_reference(tokens, rows, columns, dtype, seed):
    arguments = operands(tokens, rows, columns, seed)
    assert torch.equal(int8_matmul(*arguments, dtype), reference_int8_matmul(*arguments, dtype))


@pytest.mark.parametrize("has_exact_int_mm", [False, True])
def test_cpu_is_exact_on_long_extreme_rows(monkeypatch, has_exact_int_mm):
    if not has_exact_int_mm:
        monkeypatch.setattr(module, "int_mm_is_exact", lambda: False)
    x = torch.full((2, 5000), -128, dtype=torch.int8)
    weight = torch.full((3, 5000), -128, dtype=torch.int8)
    weight[0, 0] = 127
    one = torch.ones(2, 1), torch.ones(3, 1)
    expected = torch.tensor([5000 * 128 * 128 - 128 * 255, 5000 * 128 * 128, 5000 * 128 * 128])
    assert torch.equal(int8_matmul(x, weight, *one, torch.float32), expected.float().expand(2, 3))


def test_nothing_to_multiply():
    x, weight = torch.ones(0, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
    assert int8_matmul(x, weight, torch.ones(0, 1), torch.ones(3, 1)).shape == (0, 3)
    assert int8_matmul(weight, x, torch.ones(3, 1), torch.ones(0, 1)).shape == (3, 0)
    codes, scale = quantize_tokens(torch.ones(0, 8))
    assert codes.shape == (0, 8) and scale.shape == (0, 1)


def test_tokens_by_hand():
    codes, scale = quantize_tokens(torch.tensor([[1.0, 2.0, -0.5], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(scale, torch.tensor([[4 / 255], [1e-7]]))
    assert codes.tolist() == [[64, 127, -32], [0, 0, 0]]


def test_wrong_arguments_are_refused():
    x, weight, x_scale, weight_scale = operands(2, 3, 8, 0)
    with pytest.raises(ValueError, match="must be int8"):
        int8_matmul(x.float(), weight, x_scale, weight_scale)
    with pytest.raises(ValueError, match="do not multiply"):
        int8_matmul(x[:, :7], weight, x_scale, weight_scale)
    with pytest.raises(ValueError, match="overflow"):
        long = torch.ones(1, module.LONGEST, dtype=torch.int8)
        int8_matmul(long, long, torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="with columns"):
        quantize_tokens(torch.ones(2, 0))
    with pytest.raises(ValueError, match="x_scale"):
        int8_matmul(x, weight, x_scale[:1], weight_scale)
    with pytest.raises(ValueError, match="weight_scale"):
        int8_matmul(x, weight, x_scale, weight_scale.t())


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(**SHAPES)
def test_triton_agrees_with_the_reference(on_triton, tokens, rows, columns, dtype, seed):
    arguments = operands(tokens, rows, columns, seed)
    found, expected = on_triton(int8_matmul, *arguments, dtype), reference_int8_matmul(*arguments, dtype)
    rounding = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=0)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(**SHAPES)
def test_triton_tokens_equal_the_reference(on_triton, tokens, rows, columns, dtype, seed):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0] = 0
    found, expected = on_triton(quantize_tokens, x), reference_quantize_tokens(x)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])

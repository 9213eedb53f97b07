import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import fp8_matmul as module
from tersor.kernels.fp8_matmul import fp8_matmul, quantize_fp8, reference_fp8_matmul, reference_quantize_fp8

CASES = {
    "tokens": st.sampled_from([1, 18]),
    "rows": st.sampled_from([1, 70, 130, 260]),
    "columns": st.sampled_from([31, 128, 300]),
    "scales": st.sampled_from(["channel", "tensor", "block"]),
    "seed": st.integers(0, 9),
}


def operands(tokens, rows, columns, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    x, x_scale = quantize_fp8(torch.randn(tokens, columns, generator=generator), 128 if scales == "block" else None)
    weight = (torch.randn(rows, columns, generator=generator) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = {"channel": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}[scales]
    return x, weight, x_scale, torch.rand(shape, generator=generator).bfloat16() / 50


def close(found, expected):
    largest = expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=1e-3 * largest)


def test_block_scales_by_hand():
    x, weight = torch.ones(1, 256).to(torch.float8_e4m3fn), torch.ones(130, 256).to(torch.float8_e4m3fn)
    weight_scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = fp8_matmul(x, weight, torch.tensor([[1.0, 0.5]]), weight_scale, torch.float32)
    assert found[0, 0] == 128 + 128 and found[0, 129] == 3 * 128 + 2 * 128


def test_quantizers_by_hand():
    codes, scale = quantize_fp8(torch.tensor([[448.0, -224.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert scale[0, 0] == 1 and scale[1, 0] > 0
    assert codes.float().tolist() == [[448.0, -224.0, 1.0, 0.0], [0.0] * 4]
    _, scale = quantize_fp8(torch.ones(2, 300), 128)
    assert scale.shape == (2, 3)


def test_nothing_to_multiply():
    x, x_scale = quantize_fp8(torch.ones(0, 300), 128)
    assert x.shape == (0, 300) and x_scale.shape == (0, 3)
    weight = torch.ones(5, 300).to(torch.float8_e4m3fn)
    assert fp8_matmul(x, weight, x_scale, torch.ones(1, 3)).shape == (0, 5)
    with pytest.raises(ValueError, match="with columns"):
        quantize_fp8(torch.ones(2, 0))
    with pytest.raises(ValueError, match="positive"):
        quantize_fp8(torch.ones(2, 8), 0)


def test_wrong_arguments_are_refused():
    x, weight, x_scale, weight_scale = operands(2, 130, 300, "block", 0)
    with pytest.raises(ValueError, match="E4M3FN"):
        fp8_matmul(x.float(), weight, x_scale, weight_scale)
    with pytest.raises(ValueError, match="do not multiply"):
        fp8_matmul(x[:, :128], weight, x_scale, weight_scale)
    with pytest.raises(ValueError, match="scales"):
        fp8_matmul(x, weight, x_scale[:, :1], weight_scale)


@pytest.mark.triton
@pytest.mark.parametrize("native", [False, True])
@settings(max_examples=8, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, native, tokens, rows, columns, scales, seed):
    if native and torch.cuda.is_available() and not module.native_e4m3(torch.device("cuda")):
        pytest.skip("this GPU has no E4M3FN")
    arguments = operands(tokens, rows, columns, scales, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "native_e4m3", lambda device: native)
        close(on_triton(fp8_matmul, *arguments), reference_fp8_matmul(*arguments))


@pytest.mark.triton
def test_every_byte_decodes(on_triton):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(256, 1)
    one, scale = torch.ones(1, 1).to(torch.float8_e4m3fn), torch.ones(256, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "native_e4m3", lambda device: False)
        found = on_triton(fp8_matmul, every, one, scale, torch.ones(1, 1), torch.float32)
    torch.testing.assert_close(found, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.triton
@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 4),
    columns=st.sampled_from([1, 100, 300]),
    blocks=st.booleans(),
    spread=st.sampled_from([1, 3, 9]),
    seed=st.integers(0, 9),
)
def test_triton_quantizer_equals_the_reference(on_triton, tokens, columns, blocks, spread, seed):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) ** spread  # down to subnormals
    found, expected = (
        on_triton(quantize_fp8, x, 128 if blocks else None),
        reference_quantize_fp8(x, 128 if blocks else None),
    )
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))


@pytest.mark.triton
def test_encoder_rounds_ties_to_even(on_triton):
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (exact[1:] + exact[:-1]) / 2
    x = torch.cat((exact, between, -exact, -between)).view(1, -1)  # the largest is 448, so the scale is 1
    codes, scale = on_triton(quantize_fp8, x)
    assert scale.item() == 1
    assert torch.equal(codes.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))

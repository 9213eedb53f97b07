import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.adam8bit import (
    adam8bit_step,
    dequantize_blocks,
    dynamic_map,
    quantize_blocks,
    reference_adam8bit_step,
    zero_state,
)

BETAS, EPS = (0.9, 0.999), 1e-8
COUNTS = st.sampled_from([0, 1, 255, 256, 257, 1500])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDE = st.sampled_from([0.0, 1.0, 3.0])  # decades over which gradients scatter


def test_the_map_is_the_published_one():
    """Oracles of bitsandbytes' create_dynamic_map."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    for entries in (signed, unsigned):
        assert entries.unique().numel() == len(entries) == 256
        assert torch.equal(entries, entries.sort().values)
        assert entries[-1] == 1
    assert signed[0].item() == pytest.approx(-0.99296875, abs=1e-7)
    assert signed[127] == 0
    assert unsigned[0] == 0
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert signed[128].item() == pytest.approx(0.55e-6)
    assert unsigned[1:3].tolist() == pytest.approx([0.325e-6, 0.775e-6])


def sqnr(values, decoded):
    return 10 * math.log10(values.square().sum() / (values - decoded).square().sum())


@pytest.mark.parametrize(
    ("heavy", "block", "dynamic", "int8", "tolerance"),
    [
        (False, 256, 39.3, 43.2, 0.1),
        (False, 2048, 38.1, 41.7, 0.1),
        (True, 256, 36.6, 34.9, 1),
        (True, 2048, 34.5, 28.7, 1),
    ],
)
def test_noise_of_the_code_beside_int8(heavy, block, dynamic, int8, tolerance):
    """Measured in dB, Gaussian and Student-t(3); the latter's few largest numbers decide, hence the tolerance."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 20, generator=generator)
    if heavy:
        values = values / torch.randn(3, 1 << 20, generator=generator).square().mean(0).sqrt()
    decoded = dequantize_blocks(*quantize_blocks(values, True, block), True, block)
    assert sqnr(values, decoded) == pytest.approx(dynamic, abs=tolerance)
    scale = values.view(-1, block).abs().amax(1, keepdim=True) / 127
    assert sqnr(values, ((values.view(-1, block) / scale).round() * scale).view(-1)) == pytest.approx(
        int8, abs=tolerance
    )


@settings(max_examples=30, deadline=None)
@given(count=COUNTS, signed=st.booleans(), wide=WIDE, seed=st.integers(0, 9))
def test_codes_are_of_the_nearest_entry(count, signed, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10 ** (wide * torch.randn(count, generator=generator))
    values = values if signed else values.abs()
    codes, absmax = quantize_blocks(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape and len(absmax) == -(-count // 256)
    decoded = dequantize_blocks(codes, absmax, signed)
    largest = absmax.repeat_interleave(256)[:count]
    best = (values[:, None] - largest[:, None] * dynamic_map(signed)).abs().amin(1)
    assert ((values - decoded).abs() <= best + 1e-6 * largest).all()


def test_there_is_no_minus_one():
    """Decoding and encoding keeps the codes, and shrinks by 0.7 % where the largest magnitude is negative."""
    values = torch.cat([torch.linspace(-1, 0.5, 256), torch.linspace(-0.5, 1, 256)])
    codes, absmax = quantize_blocks(values, True)
    again, smaller = quantize_blocks(dequantize_blocks(codes, absmax, True), True)
    assert torch.equal(again, codes)
    assert (smaller / absmax).tolist() == pytest.approx([0.99296875, 1])


def test_blocks_of_zeros():
    codes, absmax = quantize_blocks(torch.zeros(300), True)
    assert codes.unique().tolist() == [127] and absmax.tolist() == [0, 0]
    assert not dequantize_blocks(codes, absmax, True).any()


def gradients(count, wide, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (wide * torch.randn(count, generator=generator))
    return [torch.randn(count, generator=generator) * size for _ in range(steps)]


def run(function, weight, slopes, lr=1e-2, decay=0.1):
    state = zero_state(weight)
    for step, gradient in enumerate(slopes, 1):
        function(weight, gradient, *state, lr, BETAS, EPS, decay, step)
    return weight, state


def check_close(found, expected, dtype, roundings=1):
    """Weights to rounding; where a moment lies between two entries, one may have the other."""
    (weight, state), (other, other_state) = found, expected
    rounding = 1e-5 if dtype == torch.float32 else 2**-7 * roundings
    torch.testing.assert_close(weight, other, rtol=rounding, atol=rounding * 0.1)
    for signed in (True, False):
        (codes, absmax), (other_codes, other_absmax) = (s[:2] if signed else s[2:] for s in (state, other_state))
        torch.testing.assert_close(absmax, other_absmax, rtol=1e-4, atol=0)
        assert (codes != other_codes).sum() <= 0.02 * codes.numel() + 1
        moments = (dequantize_blocks(c, a, signed) for c, a in ((codes, absmax), (other_codes, other_absmax)))
        largest = absmax.repeat_interleave(256)[: codes.numel()]
        assert ((next(moments) - next(moments)).abs() <= 0.015 * largest).all()


@settings(max_examples=25, deadline=None)
@given(count=COUNTS, dtype=DTYPES, wide=WIDE, seed=st.integers(0, 9), steps=st.integers(1, 3))
def test_cpu_agrees_with_the_reference(count, dtype, wide, seed, steps):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    slopes = [g.to(dtype) for g in gradients(count, wide, seed, steps)]
    expected = run(reference_adam8bit_step, weight.clone(), slopes)
    check_close(run(adam8bit_step, weight.clone(), slopes), expected, dtype)


def test_every_code_survives_the_cpu_s_arithmetic():
    """Betas of 1 leave moments as they are: each of the 256 codes must come back."""
    weight, codes = torch.zeros(256), torch.arange(256, dtype=torch.uint8)
    state = codes.clone(), torch.tensor([3.0]), codes.clone(), torch.tensor([0.2])
    adam8bit_step(weight, torch.zeros(256), *state, 0.0, (1 - 1e-12, 1 - 1e-12), EPS, 0.0, 1)
    assert torch.equal(state[0], codes)
    assert torch.equal(state[2], codes)
    assert state[1].item() == 3 and state[3].item() == pytest.approx(0.2)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_first_step_is_torch_s(decay):
    weight, (gradient,) = torch.randn(700), gradients(700, 1.0, 0, 1)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    torch.optim.AdamW([parameter], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=decay).step()
    torch.testing.assert_close(run(adam8bit_step, weight, [gradient], decay=decay)[0], parameter.detach())


def test_training_follows_torch_s():
    """Least squares, 40 steps: the loss falls as with float32 moments, to 5 %."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 512, generator=generator), torch.randn(64, 1, generator=generator)
    losses = []
    for eight in (True, False):
        weight = torch.nn.Parameter(torch.zeros(512, 1))
        optimizer, state = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0), zero_state(weight)
        for step in range(1, 41):
            loss = (x @ weight - y).square().mean()
            (weight.grad,) = torch.autograd.grad(loss, weight)
            if eight:
                adam8bit_step(weight, weight.grad, *state, 1e-3, BETAS, EPS, 0.0, step)
            else:
                optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.3
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_small_gradients_beside_large_ones_do_not_run_away():
    """Their second moment would round to 0 while the first does not: 31 times too far. The smallest entry above 0 stands for
    moments up to 1.7 times as large, hence a factor of 1.3 and, where rounding pushes the same way, a bit more."""
    gradient = 10.0 ** -torch.arange(0, 8, 8 / 256)
    weight, _ = run(adam8bit_step, torch.zeros(256), [gradient] * 300, lr=1e-3, decay=0.0)
    assert weight.abs().max() <= 300 * 1e-3 * 1.5
    assert (weight[:64] < -300 * 1e-3 * 0.9).all()


def test_bytes_of_state():
    weight = torch.zeros(512, 96)
    state = zero_state(weight)
    assert sum(tensor.nbytes for tensor in state) / weight.numel() == 2 + 8 / 256 <= 2.1
    assert not dequantize_blocks(*state[:2], True).any() and not dequantize_blocks(*state[2:], False).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(9)}, "gradient"),
        ({"m_codes": torch.zeros(300)}, "codes"),
        ({"v_absmax": torch.zeros(1)}, "absmax"),
        ({"weight": torch.zeros(300, 2)[:, 0]}, "contiguous"),
        ({"step": 0}, "step"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    names = ("m_codes", "m_absmax", "v_codes", "v_absmax")
    arguments = dict(zip(names, zero_state(torch.zeros(300)), strict=True))
    arguments |= {"weight": torch.zeros(300), "gradient": torch.zeros(300), "lr": 1.0, "betas": BETAS, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        adam8bit_step(**(arguments | {"weight_decay": 0.0, "step": 1} | change))


@pytest.mark.triton
@settings(max_examples=6, deadline=None)
@given(count=st.sampled_from([0, 1, 257, 600]), dtype=DTYPES, wide=WIDE, seed=st.integers(0, 9))
def test_triton_agrees_with_the_reference(on_triton, count, dtype, wide, seed):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    slopes = [g.to(dtype) for g in gradients(count, wide, seed, 2)]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def two_steps():
        found, state = run(adam8bit_step, weight.clone().to(device), [slope.to(device) for slope in slopes])
        return (found, *state)

    found, *state = on_triton(two_steps)
    expected = run(reference_adam8bit_step, weight.clone(), slopes)
    check_close((found, state), expected, dtype, roundings=2)  # the interpreter truncates bfloat16, in each step

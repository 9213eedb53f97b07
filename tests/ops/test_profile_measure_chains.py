"""Element-wise chains: the bytes that are named are those that real implementations keep."""

from __future__ import annotations

import pytest
import torch
from tersor.ops.profile.measure.chains import find_chains
from torch import nn
from torch.nn import functional

TOKENS, HIDDEN, FFN = 8, 64, 96
BF16 = torch.bfloat16


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 0.1).to(BF16))


def storages(*tensors: torch.Tensor) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def chains(function, *parameters: nn.Parameter) -> list[dict]:
    """Found in `function(x, *parameters)`, in units of FFN bytes per token."""
    x = torch.randn(1, TOKENS, HIDDEN, dtype=BF16, requires_grad=True)
    found = find_chains(function(x, *parameters), TOKENS, storages(*parameters))
    return [
        {key: value / FFN if key.endswith("_bytes") and value is not None else value for key, value in entry.items()}
        for entry in found
    ]


def kept_by(function, inputs: list[torch.Tensor], down: nn.Parameter) -> float:
    """Bytes per token, in units of FFN, that autograd holds of `function` and the linear layer after it."""
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in storages(down):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = functional.linear(function(*inputs), down)
    total = sum(storage.nbytes() for storage in kept.values()) / TOKENS / FFN
    output.float().sum().backward()
    return total


class NestedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        sigmoid = torch.sigmoid(gate.float())
        silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
        ctx.save_for_backward((slope * up).to(gate.dtype), silu.to(gate.dtype))
        return (silu * up).to(gate.dtype)

    @staticmethod
    def backward(ctx, gradient):
        by_gate, by_up = ctx.saved_tensors
        return gradient * by_gate, gradient * by_up


class RecomputedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            gate, up = (tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors)
            return torch.autograd.grad(functional.silu(gate) * up, (gate, up), gradient)


class NestedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        wide = x.float()
        below = torch.special.ndtr(wide)
        slope = below + wide * torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
        ctx.save_for_backward(slope.to(x.dtype))
        return (wide * below).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class RecomputedGELULinear(torch.autograd.Function):
    """The linear layer does not keep its input either."""

    @staticmethod
    def forward(ctx, x, down):
        ctx.save_for_backward(x, down)
        return functional.linear(functional.gelu(x), down)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x, down = (tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors)
            return torch.autograd.grad(functional.linear(functional.gelu(x), down), (x, down), gradient)


def swiglu(x, gate, up, down):
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def test_swiglu():
    (found,) = chains(swiglu, parameter(FFN, HIDDEN), parameter(FFN, HIDDEN), parameter(HIDDEN, FFN))
    assert found["chain"] == "silu → ×"
    assert (found["width"], found["count"]) == (FFN, 1)
    assert found["kept_bytes"] == 8
    assert found["nested_bytes"] == 6
    assert found["recompute_bytes"] == 6
    assert found["recompute_output_bytes"] == 4
    assert found["invert_bytes"] == 6.125  # silu(gate) stays, gate shrinks to a bit


def test_swiglu_as_it_is_really_kept():
    down = parameter(HIDDEN, FFN)

    def run(function):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, TOKENS, FFN, generator=generator).to(BF16).requires_grad_(True) for _ in range(2)]
        return kept_by(function, inputs, down), [tensor.grad.float() for tensor in inputs]

    plain, gradients = run(lambda gate, up: functional.silu(gate) * up)
    nested, by_nested = run(NestedSwiGLU.apply)
    recomputed, by_recomputed = run(RecomputedSwiGLU.apply)
    assert (plain, nested, recomputed) == (8, 6, 6)
    for expected, *others in zip(gradients, by_nested, by_recomputed, strict=True):
        for other in others:
            assert torch.allclose(expected, other, rtol=0.03, atol=0.01)


def test_gelu_with_bias():
    def mlp(x, up, bias, down):
        return functional.linear(functional.gelu(functional.linear(x, up) + bias), down)

    (found,) = chains(mlp, parameter(FFN, HIDDEN), parameter(FFN), parameter(HIDDEN, FFN))
    assert found["chain"] == "+ → gelu"
    assert found["kept_bytes"] == 4
    assert found["nested_bytes"] == 4  # a derivative in the place of an input
    assert found["recompute_output_bytes"] == 2
    assert found["invert_bytes"] == 2.125


def test_gelu_as_it_is_really_kept():
    down = parameter(HIDDEN, FFN)
    x = torch.randn(1, TOKENS, FFN).to(BF16).requires_grad_(True)
    again = x.detach().clone().requires_grad_(True)
    assert kept_by(functional.gelu, [x], down) == 4
    assert kept_by(NestedGELU.apply, [again], down) == 4
    assert torch.allclose(x.grad.float(), again.grad.float(), rtol=0.03, atol=0.01)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        RecomputedGELULinear.apply(x, down)
    assert sum(tensor.nbytes for tensor in kept if tensor is not down) == 2 * FFN * TOKENS


def test_longer_chains_gain_most():
    def mlp(x, up, down):
        hidden = functional.linear(x, up)
        hidden = 0.5 * hidden * (1 + torch.tanh(0.7979 * (hidden + 0.044715 * torch.pow(hidden, 3.0))))
        return functional.linear(hidden, down)

    (found,) = chains(mlp, parameter(FFN, HIDDEN), parameter(HIDDEN, FFN))
    assert "tanh" in found["chain"]
    assert (found["kept_bytes"], found["nested_bytes"], found["recompute_bytes"]) == (10, 4, 4)


def test_dropout_joins_the_chain():
    def mlp(x, up, down):
        hidden = torch.native_dropout(functional.gelu(functional.linear(x, up)), 0.5, True)[0]
        return functional.linear(hidden, down)

    (found,) = chains(mlp, parameter(FFN, HIDDEN), parameter(HIDDEN, FFN))
    assert found["chain"] == "gelu → dropout"
    assert (found["kept_bytes"], found["nested_bytes"]) == (5, 4)  # the mask is a byte


def test_norms_cannot_be_nested():
    def norm(x, before, gain, after):
        x = functional.linear(x, before)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return functional.linear(gain * wide.to(x.dtype), after)

    (found,) = chains(norm, parameter(FFN, HIDDEN), parameter(FFN), parameter(HIDDEN, FFN))
    small = 4 / FFN  # one float32 per token
    assert found["nested_bytes"] is None
    assert found["kept_bytes"] == pytest.approx(8 + small)  # float32, normalised, output
    assert found["recompute_bytes"] == pytest.approx(4 + small)


def test_residual_sums_bound_chains():
    def block(x, one, two):
        x = x + torch.native_dropout(functional.linear(x, one), 0.1, True)[0]
        return x + torch.native_dropout(functional.linear(x, two), 0.1, True)[0]

    (found,) = chains(block, parameter(HIDDEN, HIDDEN), parameter(HIDDEN, HIDDEN))
    assert (found["chain"], found["count"]) == ("dropout", 2)


def test_what_keeps_nothing_is_no_chain():
    assert chains(lambda x, one: functional.linear(x, one) * 2.0 + 1.0, parameter(FFN, HIDDEN)) == []

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import gated_activation as module
from tersor.kernels.gated_activation import (
    activation,
    activation_linear,
    gated,
    gated_linear,
    reference_activation,
    reference_gated,
)
from torch.nn import functional

KIND = st.sampled_from(["silu", "gelu", "gelu_tanh"])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16])
SHAPE = st.sampled_from([(1,), (7, 5), (2, 3, 33), (0, 4), (300, 130)])
# Of the largest value: float32 rounds at 2^-24 a few times; bfloat16 stores the derivative and the gradient, 2^-9 each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def normal(*shape, seed=0, dtype=torch.float32, scale=2.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def gradients(function, tensors, *arguments, outer=None):
    """Output and gradients of `tensors` under an outer gradient."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors, *arguments)
    outer = normal(*out.shape, seed=9, scale=1.0) if outer is None else outer
    return [out.detach(), *torch.autograd.grad(out, tensors, outer.to(out.dtype))]


def check_close(found, expected, dtype, factor=1.0):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        if a.numel():
            assert (a.double() - b).abs().max() <= factor * TOLERANCE[dtype] * max(1, b.abs().max())


def wide(tensors):
    return [tensor.double() for tensor in tensors]


@settings(max_examples=40, deadline=None)
@given(shape=SHAPE, kind=KIND, dtype=DTYPE, seed=st.integers(0, 9))
def test_gated_equals_float64_autograd(shape, kind, dtype, seed):
    tensors = [normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)]
    outer = normal(*shape, seed=9, dtype=dtype, scale=1.0)
    found = gradients(gated, tensors, kind, outer=outer)
    check_close(found, gradients(reference_gated, wide(tensors), kind, outer=outer), dtype)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPE, kind=KIND, dtype=DTYPE, dropout=st.booleans(), seed=st.integers(0, 9))
def test_a_chain_equals_float64_autograd(shape, kind, dtype, dropout, seed):
    tensors = [normal(*shape, seed=seed, dtype=dtype), normal(shape[-1], seed=seed + 1, dtype=dtype)]
    keep = normal(*shape, seed=seed + 2) > -1 if dropout else None
    outer = normal(*shape, seed=9, dtype=dtype, scale=1.0)

    def chain(function):
        return lambda x, bias: function(x, kind, bias, keep, 1.25)

    found = gradients(chain(activation), tensors, outer=outer)
    expected = gradients(chain(reference_activation), wide(tensors), outer=outer)
    check_close(found[:2], expected[:2], dtype)
    check_close(found[2:], expected[2:], dtype, 4)  # a sum over the tokens


@settings(max_examples=25, deadline=None)
@given(shape=SHAPE, kind=KIND, dtype=DTYPE, bias=st.booleans(), seed=st.integers(0, 9))
def test_gated_linear_equals_float64_autograd(shape, kind, dtype, bias, seed):
    out = 6
    tensors = [normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)]
    tensors += [normal(out, shape[-1], dtype=dtype, scale=0.2)] + [normal(out, dtype=dtype)] * bias
    outer = normal(*shape[:-1], out, seed=9, dtype=dtype, scale=1.0)

    def fused(g, u, weight, bias=None):
        return gated_linear(g, u, weight, bias, kind)

    def plain(g, u, weight, bias=None):
        return functional.linear(reference_gated(g, u, kind), weight, bias)

    found, expected = gradients(fused, tensors, outer=outer), gradients(plain, wide(tensors), outer=outer)
    check_close(found, expected, dtype, 8)  # sums of up to 300 products


@settings(max_examples=25, deadline=None)
@given(shape=SHAPE, kind=KIND, dtype=DTYPE, bias=st.booleans(), seed=st.integers(0, 9))
def test_activation_linear_equals_float64_autograd(shape, kind, dtype, bias, seed):
    out = 6
    tensors = [normal(*shape, seed=seed, dtype=dtype), normal(out, shape[-1], dtype=dtype, scale=0.2)]
    tensors += [normal(out, dtype=dtype)] * bias
    outer = normal(*shape[:-1], out, seed=9, dtype=dtype, scale=1.0)

    def fused(x, weight, bias=None):
        return activation_linear(x, weight, bias, kind)

    def plain(x, weight, bias=None):
        return functional.linear(reference_activation(x, kind), weight, bias)

    found, expected = gradients(fused, tensors, outer=outer), gradients(plain, wide(tensors), outer=outer)
    check_close(found, expected, dtype, 8)


@pytest.mark.parametrize("kind", list(module.KINDS))
def test_gradcheck(kind):
    g, u, weight, bias = (t.double().requires_grad_() for t in (normal(3, 4), normal(3, 4), normal(5, 4), normal(5)))
    assert torch.autograd.gradcheck(lambda *t: gated(*t, kind), (g, u))
    assert torch.autograd.gradcheck(lambda *t: gated_linear(*t, kind), (g, u, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: activation_linear(*t, kind), (g, weight, bias))
    keep = normal(3, 4) > 0
    assert torch.autograd.gradcheck(
        lambda x, b: activation(x, kind, b, keep, 2.0), (g, normal(4).double().requires_grad_())
    )


def test_bfloat16_costs_one_rounding_of_the_derivative():
    """Gradient in bfloat16 against the same gradient with a float32 derivative: 2^-8 for d and for dy * d each."""
    g, u = normal(200, 64, dtype=torch.bfloat16), normal(200, 64, seed=1, dtype=torch.bfloat16)
    outer = normal(200, 64, seed=2, dtype=torch.bfloat16, scale=1.0)
    found = gradients(gated, [g, u], "silu", outer=outer)[1:]
    expected = gradients(gated, [g.float(), u.float()], "silu", outer=outer)[1:]
    for a, b in zip(found, expected, strict=True):
        assert ((a.float() - b).abs() <= 2 * 2**-8 * b.abs() + 1e-30).all()
        assert not torch.equal(a.float(), b)


def saved_bytes(function, x, weights):
    """Bytes that autograd keeps of a block, without its weights; a storage counts once."""
    outside = {weight.untyped_storage()._cdata for weight in weights}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(x, *weights)
    sizes = sum(storage.nbytes() for storage in kept.values())
    out.sum().backward()
    return sizes


def eager_block(x, gate, up, down):
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def nested_block(x, gate, up, down):
    return functional.linear(gated(functional.linear(x, gate), functional.linear(x, up)), down)


def recompute_block(x, gate, up, down):
    return gated_linear(functional.linear(x, gate), functional.linear(x, up), down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_of_a_swiglu_block(dtype):
    """Of SmolLM2's shape, width 576 and inner width 1536, with the block's input: eager h + 4f, nested h + 3f, recompute
    h + 2f numbers a token, that is 23 % and 46 % less."""
    tokens, h, f = 32, 576, 1536
    x = normal(tokens, h, dtype=dtype).requires_grad_()
    weights = [normal(*shape, dtype=dtype, scale=0.02).requires_grad_() for shape in ((f, h), (f, h), (h, f))]
    eager, nested, recompute = (saved_bytes(b, x, weights) for b in (eager_block, nested_block, recompute_block))
    number = tokens * dtype.itemsize
    assert (eager, nested, recompute) == ((h + 4 * f) * number, (h + 3 * f) * number, (h + 2 * f) * number)
    assert nested <= 0.78 * eager
    assert recompute <= 0.55 * eager


def test_saved_bytes_of_gelu_chains():
    """A GELU alone keeps one tensor either way; with a mask and a scale eager keeps two or more."""
    x, bias = normal(40, 64).requires_grad_(), normal(64)
    keep, tensor = normal(40, 64) > -1, 40 * 64 * 4
    assert saved_bytes(lambda x, bias: functional.gelu(x + bias), x, [bias]) == tensor
    assert saved_bytes(lambda x, bias: functional.gelu(x + bias) * keep.float() * 1.5, x, [bias]) == 2 * tensor
    assert saved_bytes(lambda x, bias: activation(x, "gelu", bias, keep, 1.5), x, [bias]) == tensor


def test_saved_bytes_of_a_gelu_block():
    """Of BERT's and GPT-2's shape: f = 4 h, 44 % less with the block's input."""
    h, f, tokens = 64, 256, 10
    x = normal(tokens, h).requires_grad_()
    weights = [normal(*shape).requires_grad_() for shape in ((f, h), (f,), (h, f), (h,))]

    def block(tail):
        return lambda x, up, up_bias, down, bias: tail(functional.linear(x, up, up_bias), down, bias)

    eager = saved_bytes(block(lambda x, *down: functional.linear(functional.gelu(x), *down)), x, weights)
    recompute = saved_bytes(block(activation_linear), x, weights)
    assert (eager, recompute) == ((h + 2 * f) * tokens * 4, (h + f) * tokens * 4)


def test_nothing_is_saved_without_gradients():
    g, u = normal(4, 8).requires_grad_(), normal(4, 8)
    with torch.no_grad():
        assert torch.equal(gated(g, u), gated(g, u).clone())
        assert gated(g, u).grad_fn is None
    frozen = gated_linear(g, u, normal(3, 8))
    frozen.sum().backward()
    torch.testing.assert_close(
        g.grad, torch.autograd.grad(functional.linear(reference_gated(g, u), normal(3, 8)).sum(), g)[0]
    )


def test_strided_halves_of_one_projection():
    both = normal(6, 20)
    g, u = both.chunk(2, -1)
    torch.testing.assert_close(gated(g, u, "gelu"), reference_gated(g, u, "gelu"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated(torch.ones(3), torch.ones(4)), "differ"),
        (lambda: gated(torch.ones(3), torch.ones(3).double()), "differ"),
        (lambda: gated(torch.ones(3), torch.ones(3), "relu"), "relu"),
        (lambda: activation(torch.ones(3), "gelu", torch.ones(2)), "bias"),
        (lambda: activation(torch.ones(3), "gelu", keep=torch.ones(3)), "keep"),
        (lambda: activation_linear(torch.ones(2, 3), torch.ones(3, 2)), "weight"),
        (lambda: gated_linear(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2)), "weight"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.triton
@pytest.mark.parametrize("kind", list(module.KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_float64_autograd(on_triton, kind, dtype):
    """The interpreter truncates bfloat16: twice the rounding."""
    g, u = normal(40, 60, dtype=dtype), normal(40, 60, seed=1, dtype=dtype)
    weight, bias, keep = normal(7, 60, dtype=dtype, scale=0.2), normal(60, dtype=dtype), normal(40, 60, seed=2) > -1
    factor = 4 if dtype == torch.bfloat16 else 2
    found = on_triton(gradients, gated, (g, u), kind)
    check_close(found, gradients(reference_gated, wide([g, u]), kind), dtype, factor)

    def chain(function):
        return lambda x, bias: function(x, kind, bias, keep.to(x.device), 1.25)

    found = on_triton(gradients, chain(activation), (g, bias))
    check_close(found, gradients(chain(reference_activation), wide([g, bias])), dtype, 4 * factor)

    def plain(g, u, weight):
        return functional.linear(reference_gated(g, u, kind), weight)

    def plain_tail(x, weight):
        return functional.linear(reference_activation(x, kind), weight)

    found = on_triton(gradients, lambda *t: activation_linear(*t, kind=kind), (g, weight))
    check_close(found, gradients(plain_tail, wide([g, weight])), dtype, 8 * factor)
    found = on_triton(gradients, lambda *t: gated_linear(*t, kind=kind), (g, u, weight))
    check_close(found, gradients(plain, wide([g, u, weight])), dtype, 8 * factor)

"""Quantized layers in training: what they multiply with, and their straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from tersor.formats import encodings
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.ops.distill.students.layers import FakeQuantizedLinear, ScaledLinear
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.linears import rounded
from test_distill_students import close

SCHEMES = [
    Scheme(4, group_size=32),
    Scheme(4, symmetric=False, group_size=16),
    Scheme(3, group_size=32),
    Scheme(2, symmetric=False, group_size=32),
    Scheme(8, strategy="channel"),
    Scheme(8, symmetric=False, strategy="channel"),
    Scheme(8, strategy="tensor"),
    Scheme(8, strategy="block", block=(16, 24)),
    Scheme(8, "float", strategy="channel"),
    Scheme(8, "float", strategy="tensor"),
    Scheme(8, "float", strategy="block", block=(16, 24)),
]


def weight_of(scheme: Scheme, shape: tuple[int, int] = (40, 64)) -> QuantizedWeight:
    """Some quantized weight of a scheme."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    if scheme.kind == "float" or scheme.strategy in ("group", "channel"):
        return round_to_nearest(weight, scheme, torch.bfloat16)
    rows, columns = scheme.block or shape
    tiles = -(-shape[0] // rows), -(-shape[1] // columns)
    scale = (0.02 + 0.01 * torch.rand(tiles, generator=generator)).bfloat16()
    spread = scale.float().repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    codes = (weight / spread).round().clamp(-128, 127).to(torch.int8)
    return QuantizedWeight(codes, scale if scheme.strategy == "block" else scale.reshape(1))


def spread(weight: QuantizedWeight, scheme: Scheme, values: torch.Tensor) -> torch.Tensor:
    """One number per weight `[out, in]`, by indexing: the definition."""
    out, columns = weight.codes.shape
    row, column = torch.arange(out)[:, None], torch.arange(columns)
    if scheme.strategy == "tensor":
        return values.reshape(1, 1).expand(out, columns)
    if scheme.strategy == "block":
        return values[row // scheme.block[0], column // scheme.block[1]]
    group = column // (columns // values.shape[1]) if weight.group_index is None else weight.group_index
    return values[row, group[None, :]]


def definition(weight: QuantizedWeight, scheme: Scheme, master: torch.Tensor) -> torch.Tensor:
    """What `master` is rounded to, with the gradient 1 where the range does not clip it and 0 where it does."""
    scale = spread(weight, scheme, weight.scale.float())
    zero = 0.0 if weight.zero_point is None else spread(weight, scheme, weight.zero_point.float())
    place = master.detach() / scale + zero
    if scheme.kind == "float":
        limit = place.clamp(-448, 448)
        codes = limit.to(torch.float8_e4m3fn).float()
        inside = place.abs() <= 464
    else:
        half = 2 ** (scheme.bits - 1)
        codes = place.round().clamp(-half, half - 1)
        inside = place.round() == codes
    return ((codes - zero) * scale - master * inside).detach() + master * inside


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_straight_through_gradients(scheme):
    weight = weight_of(scheme)
    layer = FakeQuantizedLinear(weight, scheme, torch.nn.Parameter(torch.randn(40)))
    assert torch.equal(layer.dense(), encodings.dequantize(weight, scheme))
    with torch.no_grad():
        layer.weight.mul_(1.3).add_(torch.randn(40, 64) * 0.1)  # some are beyond the range now
    master = layer.weight.detach().clone().requires_grad_()
    inputs = torch.randn(2, 5, 64)
    x, y = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected = torch.nn.functional.linear(y, definition(weight, scheme, master), layer.bias.detach())
    found = layer(x)
    torch.testing.assert_close(found, expected)
    loss = torch.randn(found.shape)
    (found * loss).sum().backward()
    (expected * loss).sum().backward()
    torch.testing.assert_close(layer.weight.grad, master.grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, loss.sum((0, 1)))
    assert (layer.weight.grad == 0).any()  # clipped
    alone = torch.autograd.grad((layer.dense() * master.detach()).sum(), layer.weight)[0]
    wanted = torch.autograd.grad((definition(weight, scheme, master) * master.detach()).sum(), master)[0]
    torch.testing.assert_close(alone, wanted)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_of_scales(scheme):
    weight = weight_of(scheme)
    layer = ScaledLinear(weight, scheme)
    assert torch.equal(layer.weight, encodings.dequantize(weight, scheme))
    scale = weight.scale.float().clone().requires_grad_()
    zero = 0.0 if weight.zero_point is None else spread(weight, scheme, weight.zero_point.float())
    inputs = torch.randn(6, 64)
    x, y = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected = y @ ((weight.codes.float() - zero) * spread(weight, scheme, scale)).T
    found = layer(x)
    torch.testing.assert_close(found, expected)
    loss = torch.randn(found.shape)
    (found * loss).sum().backward()
    (expected * loss).sum().backward()
    torch.testing.assert_close(layer.gain.grad, scale.grad * scale.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", [FakeQuantizedLinear, ScaledLinear])
def test_groups_that_are_no_runs_of_columns(kind):
    """GPTQ's desc_act."""
    scheme = Scheme(4, symmetric=False, group_size=16)
    weight = weight_of(scheme)._replace(group_index=torch.randperm(64) // 16)
    layer = kind(weight, scheme)
    assert torch.equal(layer.dense(), encodings.dequantize(weight, scheme))
    parameter = getattr(layer, layer.trained)
    leaf = parameter.detach().clone().requires_grad_()
    if kind is FakeQuantizedLinear:
        wanted = definition(weight, scheme, leaf)
    else:
        counted = weight.codes.float() - spread(weight, scheme, weight.zero_point.float())
        wanted = counted * spread(weight, scheme, weight.scale.float() * leaf)
    loss = torch.randn(40, 64)
    (layer.dense() * loss).sum().backward()
    (wanted * loss).sum().backward()
    torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["int8", "fp8", "fp8-group"])
def test_inputs_are_rounded_straight_through(activations):
    scheme = Scheme(8, "int" if activations == "int8" else "float", strategy="channel", activations=activations)
    weight = weight_of(scheme, (32, 256))
    layer = FakeQuantizedLinear(weight, scheme)
    x = torch.randn(7, 256, requires_grad=True)
    dense = encodings.dequantize(weight, scheme)
    y = layer(x)
    torch.testing.assert_close(y, rounded(x.detach(), activations) @ dense.T)
    assert not torch.equal(y, x @ dense.T)
    loss = torch.randn(y.shape)
    (y * loss).sum().backward()
    torch.testing.assert_close(x.grad, loss @ dense)
    torch.testing.assert_close(layer.weight.grad, loss.T @ rounded(x.detach(), activations))


@pytest.mark.parametrize("kind", [FakeQuantizedLinear, ScaledLinear])
def test_autocast(kind):
    scheme = Scheme(4, group_size=32)
    layer = kind(weight_of(scheme), scheme, torch.nn.Parameter(torch.zeros(40)))
    x = torch.randn(6, 64, requires_grad=True)
    exact = layer(x)
    loss = torch.randn(exact.shape)
    wanted = torch.autograd.grad((exact * loss).sum(), [x, getattr(layer, layer.trained)])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad((y * loss.bfloat16()).sum(), [x, getattr(layer, layer.trained)])
    close(y.float(), exact, 0.02)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        close(one, other, 0.02)


def test_a_scale_of_zero_is_a_weight_of_zero():
    scheme = Scheme(4, group_size=32)
    weight = weight_of(scheme)
    weight.scale[3, 1] = 0
    layer = FakeQuantizedLinear(weight, scheme)
    out = layer(torch.randn(4, 64))
    out.square().sum().backward()
    assert out.isfinite().all() and layer.weight.grad.isfinite().all()
    assert not layer.dense()[3, 32:].any()


def test_no_dense_weight_is_kept_for_the_backward_pass():
    scheme = Scheme(4, group_size=32)
    layer = FakeQuantizedLinear(weight_of(scheme, (512, 256)), scheme)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 256, requires_grad=True))
    extra = [tensor for tensor in held if tensor.data_ptr() != layer.weight.data_ptr()]
    assert held and sum(tensor.nbytes for tensor in extra) <= 4 * 256 * 4

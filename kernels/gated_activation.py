"""Activations that keep less for the backward pass: SwiGLU, GEGLU and plain GELU or SiLU chains.

Nested forward differentiation (arXiv:2209.10778): a chain of element-wise functions carries its derivative along and saves
that alone, one tensor per input, so `dx = dy * d`. Eager `act(g) * u` saves g, act(g) and u; nested saves `act'(g) u` and
`act(g)`. A chain with dropout keeps one tensor instead of two or three; a GELU alone keeps one either way. `gated_linear`
and `activation_linear` also own the down projection, whose input all of these keep: they save g and u, or x, and make
everything else again. Numbers kept per token by a whole block of width h and inner width f, its input among them:

                          eager    nested    with the down projection
    SwiGLU, GEGLU         h + 4f   h + 3f    h + 2f    (46 % less than eager at f = 8/3 h)
    GELU                  h + 2f   h + 2f    h + f     (44 % less at f = 4 h)

Everything is computed in float32 (float64 for float64) and rounded once to the dtype it is stored in, derivatives too.
"""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
PANEL = 1 << 16  # numbers that the CPU takes through a chain at a time: all steps stay in its cache

# ---------------------------------------------------------------- definitions


def reference_activation(x, kind, bias=None, keep=None, scale=1.0):
    """The definition, as eager torch differentiates it."""
    x = x if bias is None else x + bias
    x = functional.silu(x) if kind == "silu" else functional.gelu(x, approximate="tanh" if kind[4:] else "none")
    return x * scale if keep is None else x * keep * scale


def reference_gated(g, u, kind="silu"):
    """The definition: `act(g) * u`."""
    return reference_activation(g, kind) * u


def _value(x, kind, out):
    """act(x)."""
    if kind == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    return torch.ops.aten.gelu.out(x, approximate="tanh" if kind[4:] else "none", out=out)


def _slope(factor, x, kind, out):
    """factor * act'(x)."""
    if kind == "silu":
        return torch.ops.aten.silu_backward.grad_input(factor, x, grad_input=out)
    approximate = "tanh" if kind[4:] else "none"
    return torch.ops.aten.gelu_backward.grad_input(factor, x, approximate=approximate, grad_input=out)


# ---------------------------------------------------------------- Triton


@triton.jit
def _act(x, KIND: tl.constexpr):
    """act(x) and act'(x) in float32."""
    if KIND == 1:
        share = tl.erf(x * 0.7071067811865476) * 0.5 + 0.5
        return x * share, share + x * tl.exp(x * x * -0.5) * 0.3989422804014327
    if KIND == 0:
        share = tl.sigmoid(x)
        return x * share, share + x * share * (1 - share)
    share = tl.sigmoid(x * (1 + x * x * 0.044715) * 1.5957691216057308)  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    slope = (1 + x * x * 0.134145) * 1.5957691216057308
    return x * share, share + x * share * (1 - share) * slope


@triton.jit
def _gated_kernel(
    g_ptr, u_ptr, out_ptr, g_slope_ptr, u_slope_ptr, n, KIND: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(out_ptr + at, (value * u).to(out_ptr.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(g_slope_ptr + at, (slope * u).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(u_slope_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward_kernel(
    out_ptr,
    g_ptr,
    u_ptr,
    u_gradient_ptr,
    product_ptr,
    n,
    KIND: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out`: the product's gradient, replaced by that of g. `product` is written where PRODUCT."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gradient = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(out_ptr + at, (gradient * u * slope).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(u_gradient_ptr + at, (gradient * value).to(out_ptr.dtype.element_ty), mask=inside)
    if PRODUCT:
        tl.store(product_ptr + at, (value * u).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_kernel(
    x_ptr,
    bias_ptr,
    keep_ptr,
    out_ptr,
    slope_ptr,
    scale,
    n,
    columns,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + at % columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(x, KIND)
    factor = scale
    if HAS_KEEP:
        factor = tl.load(keep_ptr + at, mask=inside, other=0).to(tl.float32) * scale
    tl.store(out_ptr + at, (value * factor).to(out_ptr.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(slope_ptr + at, (slope * factor).to(out_ptr.dtype.element_ty), mask=inside)


def _on_triton(tensor):
    return backend(tensor) == "triton" and tensor.dtype != torch.float64


def _launch(kernel, n, *arguments, **values):
    if n:
        block = 1024
        kernel[(triton.cdiv(n, block),)](*arguments, **values, BLOCK=block)


# ---------------------------------------------------------------- element-wise parts, forward and backward


def _over_panels(work, ins, outs):
    """Call `work(*ins, *outs)` on panels of contiguous tensors, in the dtype in which they are computed."""
    ins, outs = ([tensor.view(-1) for tensor in kind] for kind in (ins, outs))
    count, dtype = len(ins[0]), torch.promote_types(ins[0].dtype, torch.float32)
    step = PANEL if ins[0].device.type == "cpu" else max(1, count)
    for first in range(0, count, step):
        place = slice(first, first + step)
        targets = [tensor[place].to(dtype) for tensor in outs]  # the output itself where the dtype is the same
        work(*(tensor[place].to(dtype) for tensor in ins), *targets)
        if dtype != ins[0].dtype:
            for tensor, target in zip(outs, targets, strict=True):
                tensor[place] = target


def _gated_forward(g, u, kind, save):
    """The product and, where `save`, its derivatives in g and in u."""
    out = torch.empty_like(g)
    slopes = (torch.empty_like(g), torch.empty_like(g)) if save else (out, out)
    if _on_triton(g):
        _launch(_gated_kernel, g.numel(), g, u, out, *slopes, g.numel(), KIND=KINDS[kind], SAVE=save)
        return out, *slopes

    def work(g, u, out, g_slope=None, value=None):
        value = _value(g, kind, out if value is None else value)
        torch.mul(value, u, out=out)
        if save:
            _slope(u, g, kind, g_slope)

    _over_panels(work, (g, u), (out, *slopes) if save else (out,))
    return out, *slopes


def _gated_backward(gradient, g, u, kind, product):
    """Gradients of g (in place of `gradient`) and u, and the product where wanted."""
    u_gradient = torch.empty_like(g)
    out = torch.empty_like(g) if product else u_gradient
    if _on_triton(g):
        arguments = gradient, g, u, u_gradient, out, g.numel()
        _launch(_gated_backward_kernel, g.numel(), *arguments, KIND=KINDS[kind], PRODUCT=product)
        return gradient, u_gradient, out

    def work(g, u, gradient, u_gradient, out=None):
        value = _value(g, kind, torch.empty_like(g))
        torch.mul(value, gradient, out=u_gradient)
        if product:
            torch.mul(value, u, out=out)
        _slope(gradient.mul_(u), g, kind, gradient)

    _over_panels(work, (g, u), (gradient, u_gradient, out) if product else (gradient, u_gradient))
    return gradient, u_gradient, out


def _chain_forward(x, bias, keep, scale, kind, save):
    """act(x + bias) * keep * scale and, where `save`, its derivative."""
    out = torch.empty_like(x)
    slope = torch.empty_like(x) if save else out
    if _on_triton(x):
        arguments = (
            x,
            x if bias is None else bias,
            x if keep is None else keep.view(torch.uint8),
            out,
            slope,
            float(scale),
        )
        flags = {"KIND": KINDS[kind], "HAS_BIAS": bias is not None, "HAS_KEEP": keep is not None, "SAVE": save}
        _launch(_activation_kernel, x.numel(), *arguments, x.numel(), x.shape[-1], **flags)
        return out, slope
    columns = x.shape[-1]
    rows = max(1, PANEL // columns)
    x, out_rows, slope_rows = (tensor.view(-1, columns) for tensor in (x, out, slope))
    dtype = torch.promote_types(x.dtype, torch.float32)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        value = x[part].to(dtype)
        value = value if bias is None else value + bias.to(dtype)
        factor = torch.full_like(value, scale)
        if keep is not None:
            factor *= keep.view(-1, columns)[part]
        if save:
            slope_rows[part] = _slope(factor, value, kind, torch.empty_like(value))
        out_rows[part] = _value(value, kind, torch.empty_like(value)).mul_(factor)
    return out, slope


# ---------------------------------------------------------------- autograd


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, kind, save):
        out, g_slope, u_slope = _gated_forward(g.contiguous(), u.contiguous(), kind, save)
        if save:
            ctx.save_for_backward(g_slope, u_slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        g_slope, u_slope = ctx.saved_tensors
        return gradient * g_slope, gradient * u_slope, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, keep, scale, kind, save):
        keep = None if keep is None else keep.contiguous()
        out, slope = _chain_forward(x.contiguous(), bias, keep, scale, kind, save)
        if save:
            ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (slope,) = ctx.saved_tensors
        gradient = gradient * slope
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gradient, bias, None, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, weight, bias, kind):
        g, u = g.contiguous(), u.contiguous()
        ctx.save_for_backward(g, u, weight)
        ctx.kind = kind
        product = _gated_forward(g, u, kind, False)[0]
        return functional.linear(product, weight.to(g.dtype), None if bias is None else bias.to(g.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        g, u, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = (gradient @ weight.to(g.dtype)).contiguous()
        g_gradient, u_gradient, product = _gated_backward(inner, g, u, ctx.kind, needs[2])
        flat = gradient.reshape(-1, gradient.shape[-1])
        weight_gradient = flat.t() @ product.view(-1, product.shape[-1]) if needs[2] else None
        return g_gradient, u_gradient, weight_gradient, flat.sum(0) if needs[3] else None, None


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kind):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.kind = kind
        product = _chain_forward(x, None, None, 1.0, kind, False)[0]
        return functional.linear(product, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        product, slope = _chain_forward(x, None, None, 1.0, ctx.kind, True)
        flat = gradient.reshape(-1, gradient.shape[-1])
        weight_gradient = flat.t() @ product.view(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        bias_gradient = flat.sum(0) if ctx.needs_input_grad[2] else None
        return slope.mul_(gradient @ weight.to(x.dtype)), weight_gradient, bias_gradient, None


# ---------------------------------------------------------------- public


def _check_kind(kind):
    check(kind in KINDS, f"activation {kind!r} is not one of {', '.join(KINDS)}")


def _wanted(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_pair(g, u, kind):
    _check_kind(kind)
    check(g.shape == u.shape and g.dtype == u.dtype, f"gate {tuple(g.shape)} and up {tuple(u.shape)} differ")


def gated(g: Tensor, u: Tensor, kind: str = "silu") -> Tensor:
    """`act(g) * u` of one shape and dtype; `kind`: silu (SwiGLU), gelu (erf) or gelu_tanh (GEGLU).

    Saves two tensors for the backward pass, the derivatives. Raises ValueError when shapes or dtypes differ."""
    _check_pair(g, u, kind)
    if backend(g) == "reference":
        return reference_gated(g, u, kind)
    return _Gated.apply(g, u, kind, _wanted(g, u))


def activation(
    x: Tensor, kind: str, bias: Tensor | None = None, keep: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """`act(x + bias) * keep * scale` of `x` `[..., n]`; saves one tensor, the derivative of the whole chain.

    `bias` `[n]`; `keep` bool, of the shape of `x`: what dropout leaves, with `scale` 1 / (1 - p). Raises ValueError when
    shapes differ."""
    _check_kind(kind)
    check(x.ndim >= 1 and (bias is None or bias.shape == x.shape[-1:]), "bias is not a vector of x's last dimension")
    check(keep is None or (keep.shape == x.shape and keep.dtype == torch.bool), "keep must be bool, of the shape of x")
    if backend(x) == "reference":
        return reference_activation(x, kind, bias, keep, scale)
    return _Activation.apply(x, bias, keep, scale, kind, _wanted(x, bias))


def gated_linear(g: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None = None, kind: str = "silu") -> Tensor:
    """`(act(g) * u) @ weight^T + bias` `[..., out]` of `g` and `u` `[..., n]`, `weight` `[out, n]`.

    Saves g and u; the backward pass makes the product again for the gradient of `weight`. Raises ValueError when shapes
    differ."""
    _check_pair(g, u, kind)
    check(weight.ndim == 2 and weight.shape[1] == g.shape[-1], f"weight {tuple(weight.shape)} of {g.shape[-1]} inputs")
    if backend(g) == "reference":
        return functional.linear(reference_gated(g, u, kind), weight, bias)
    return _GatedLinear.apply(g, u, weight, bias, kind)


def activation_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, kind: str = "gelu") -> Tensor:
    """`act(x) @ weight^T + bias` `[..., out]` of `x` `[..., n]`, `weight` `[out, n]`.

    Saves x; the backward pass makes act(x) again for the gradient of `weight`. Raises ValueError when shapes differ."""
    _check_kind(kind)
    check(weight.ndim == 2 and weight.shape[1] == x.shape[-1], f"weight {tuple(weight.shape)} of {x.shape[-1]} inputs")
    if backend(x) == "reference":
        return functional.linear(reference_activation(x, kind), weight, bias)
    return _ActivationLinear.apply(x, weight, bias, kind)

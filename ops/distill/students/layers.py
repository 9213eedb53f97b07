"""Linear layers that train what a quantized checkpoint stores: the weights that codes stand for, or the scales.

Both multiply with the very weight that the stored form decodes to, make it anew for the backward pass instead of keeping
it, and give straight-through gradients: rounding counts as the identity (Bengio et al. 2013, arXiv 1308.3432). For
weights that is so as far as the grid of codes reaches; beyond it the gradient is zero (clipped STE). Rounding of inputs,
where the scheme has it, is dynamic: nothing lies beyond its grid.
"""

from __future__ import annotations

import torch
from tersor.formats import encodings
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.ops.model.linears import rounded
from torch import Tensor, nn
from torch.autograd import Function

FP8_MAX, FP8_EDGE = 448.0, 464.0  # the largest E4M3 number, and what still rounds to it


class Grid(nn.Module):
    """What weights `[out, in]` are rounded to: codes in a range, counted from zero points, times scales.

    `scale`, like everything of its shape, is `[out, G]`, `[1]`, or one per block.
    """

    def __init__(self, weight: QuantizedWeight, scheme: Scheme):
        super().__init__()
        self.scheme, self.shape = scheme, tuple(weight.codes.shape)
        half = 2 ** (scheme.bits - 1)
        self.low, self.high = (-FP8_MAX, FP8_MAX) if scheme.kind == "float" else (-half, half - 1)
        self.edges = (-FP8_EDGE, FP8_EDGE) if scheme.kind == "float" else (self.low - 0.5, self.high + 0.5)
        self.scale_shape = tuple(weight.scale.shape)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("group_index", None if weight.group_index is None else weight.group_index.long())

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight in a shape with which `spread` scales broadcast."""
        if self.scheme.strategy == "block" or self.group_index is not None:
            return weight
        groups = 1 if self.scheme.strategy == "tensor" else self.scale_shape[1]
        return weight.unflatten(1, (groups, -1))

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of the scales' shape, to be used with `grouped` weights."""
        values = values.float()
        if self.scheme.strategy == "tensor":
            return values.reshape(1, 1, 1)
        if self.scheme.strategy == "block":
            (rows, columns), (out, inputs) = self.scheme.block, self.shape
            tiles = values.reshape(-(-out // rows), -(-inputs // columns))
            return tiles.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inputs]
        return values[..., None] if self.group_index is None else values[:, self.group_index]

    def summed(self, values: Tensor) -> Tensor:
        """Sums of `grouped` numbers over the weights that share a scale: what `spread` is, transposed."""
        if self.scheme.strategy == "block":
            rows, columns = self.scheme.block
            padded = nn.functional.pad(values, (0, -self.shape[1] % columns, 0, -self.shape[0] % rows))
            sums = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum((1, 3))
        elif self.scheme.strategy == "tensor":
            sums = values.sum()
        elif self.group_index is not None:
            sums = values.new_zeros(self.scale_shape).index_add_(1, self.group_index, values)
        else:
            sums = values.sum(-1)
        return sums.reshape(self.scale_shape)

    def counted(self, codes: Tensor) -> Tensor:
        """float32 codes, `grouped`, less their zero points."""
        codes = self.grouped(codes).float()
        return codes if self.zero_point is None else codes - self.spread(self.zero_point)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """float32 `[out, in]`, bit for bit what `encodings.dequantize` gives."""
        return (self.counted(codes) * self.spread(scale)).reshape(self.shape)

    def nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest codes of a float32 `weight`, as float32 and `grouped`. A scale of 0 gives the zero points.

        The definition of `kernels.group_quantize`, of which no kernel is used: those of a CPU read tensors through numpy,
        after which FSDP2 cannot free them.
        """
        place = self.grouped(weight) / self.spread(scale.float().masked_fill(scale == 0, torch.inf))
        if self.zero_point is not None:
            place += self.spread(self.zero_point)
        if self.scheme.kind == "int":
            return place.round_().clamp_(self.low, self.high)
        return place.clamp_(self.low, self.high).to(torch.float8_e4m3fn).float()

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest codes as they are stored: int8 or float8_e4m3fn `[out, in]`."""
        dtype = torch.int8 if self.scheme.kind == "int" else torch.float8_e4m3fn
        return self.nearest(weight, scale).to(dtype).reshape(self.shape)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What the nearest codes stand for, float32 `[out, in]`: bit for bit what they decode to."""
        codes = self.nearest(weight, scale)
        if self.zero_point is not None:
            codes -= self.spread(self.zero_point)
        return codes.mul_(self.spread(scale)).reshape(self.shape)

    def within(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Where a weight is no more than half a step beyond the codes at the ends, bool, `grouped`."""
        zero = 0.0 if self.zero_point is None else self.zero_point.float()
        low, high = (self.spread((edge - zero) * scale.float()) for edge in self.edges)
        grouped = self.grouped(weight)
        return (grouped >= low) & (grouped <= high)


class QuantizedLinear(nn.Module):
    """y = x W^T + bias, with W `[out, in]` made from a parameter in each pass.

    A kind says how: `made(parameter)` is W in float32, `pulled_back(gradient, parameter)` takes W's gradient to that of the
    parameter, for which it may be overwritten. Inputs are rounded as the scheme says.
    """

    trained: str  # the name of the parameter

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.activations = scheme.activations
        self.grid = Grid(weight, scheme)
        self.bias = bias

    def made(self, parameter: Tensor) -> Tensor:
        raise NotImplementedError

    def pulled_back(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W `[out, in]` with its straight-through gradient, as the layer uses it: for those who multiply themselves."""
        return _Made.apply(getattr(self, self.trained), self).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of x or of autocast."""
        device = x.device.type
        rows = x.reshape(-1, self.in_features)
        if self.activations is not None:
            rows = _Rounded.apply(rows, self.activations)
        if torch.is_autocast_enabled(device):
            rows = rows.to(torch.get_autocast_dtype(device))
        y = _Product.apply(rows, getattr(self, self.trained), self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FakeQuantizedLinear(QuantizedLinear):
    """Quantization-aware training: a dense float32 `weight`, rounded to the stored scales and zero points in each pass."""

    trained = "weight"

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: nn.Parameter | None = None):
        super().__init__(weight, scheme, bias)
        self.weight = nn.Parameter(encodings.dequantize(weight, scheme))
        self.register_buffer("scale", weight.scale)

    def made(self, parameter: Tensor) -> Tensor:
        return self.grid.rounded(parameter.detach(), self.scale)

    def pulled_back(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        return self.grid.grouped(gradient).mul_(self.grid.within(parameter, self.scale)).reshape(self.grid.shape)


class ScaledLinear(QuantizedLinear):
    """Codes that stay, and scales that train, by a float32 `gain` on each: 1 at first.

    Scales of different schemes differ a hundredfold; with gains one learning rate does for all of them.
    """

    trained = "gain"

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: nn.Parameter | None = None):
        super().__init__(weight, scheme, bias)
        encodings.dequantize(weight, scheme)  # which says so where scales and codes do not fit each other
        self.gain = nn.Parameter(torch.ones(weight.scale.shape))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("codes", weight.codes)

    @property
    def weight(self) -> Tensor:
        return self.dense()

    @property
    def largest_gain(self) -> float:
        """With which no scale is too large for the dtype it is stored in."""
        peak, largest = float(self.scale.float().abs().max()), torch.finfo(self.scale.dtype).max
        return largest / max(peak, 1.0)

    def made(self, parameter: Tensor) -> Tensor:
        return self.grid.decode(self.codes, self.scale.float() * parameter)

    def pulled_back(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        return self.grid.summed(self.grid.grouped(gradient).mul_(self.grid.counted(self.codes))) * self.scale.float()


class _Product(Function):
    """x W^T `[M, out]` of x `[M, in]`. Keeps x and the parameter, not W."""

    @staticmethod
    def forward(ctx, x, parameter, layer):
        ctx.save_for_backward(x, parameter)
        ctx.layer = layer
        return nn.functional.linear(x, layer.made(parameter).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, parameter = ctx.saved_tensors
        to_x = to_parameter = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ ctx.layer.made(parameter).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_parameter = ctx.layer.pulled_back((gradient.T @ x).float(), parameter)
        return to_x, to_parameter, None


class _Made(Function):
    """W itself."""

    @staticmethod
    def forward(ctx, parameter, layer):
        ctx.save_for_backward(parameter)
        ctx.layer = layer
        return layer.made(parameter)

    @staticmethod
    def backward(ctx, gradient):
        (parameter,) = ctx.saved_tensors
        return ctx.layer.pulled_back(gradient.clone(), parameter), None


class _Rounded(Function):
    """Inputs after dynamic quantization and back; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x, activations):
        return rounded(x, activations)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

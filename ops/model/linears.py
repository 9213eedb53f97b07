"""Linear layers that keep their weight as it is stored: codes and scales, or factors, multiplied by our kernels.

Each takes the place of an `nn.Linear` (or of GPT-2's Conv1D) in a transformers model, and gives what the dense layer with
the decoded weight gives, up to rounding; where the scheme quantizes activations, so does the layer.
"""

from __future__ import annotations

import torch
from tersor.formats import encodings
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.low_rank import kronecker_sum
from tersor.formats.packing import pack_rows
from tersor.formats.scheme import Scheme
from tersor.kernels.active_matmul import active_matmul
from tersor.kernels.dequantize import dequantize_packed
from tersor.kernels.dispatch import backend
from tersor.kernels.fp8_matmul import BLOCK, fp8_matmul, quantize_fp8
from tersor.kernels.int4_matmul import int4_matmul
from tersor.kernels.int8_matmul import LONGEST, int8_matmul, quantize_tokens
from torch import Tensor, nn

FP8_GROUP = 128


class StoredLinear(nn.Module):
    """y = x W^T + bias with W `[out, in]` in some stored form.

    A kind says how to multiply (`matmul`) and what W is (`dense`). `dtype` is that of its inputs and outputs. Inputs with
    |x| <= `threshold` become zero, where there is one. `activations` (a word of `Scheme`) is what the input is then rounded
    to before it is multiplied, for kinds whose kernel does not do that itself.
    """

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, activations: str | None = None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.activations = dtype, activations
        self.threshold: float | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T `[M, out]` of x `[M, in]`."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W `[out, in]`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W, for code that looks at it; made anew each time."""
        return self.dense(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """What the layer holds in memory."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, self.in_features)
        if self.threshold is not None:
            rows = nn.functional.hardshrink(rows, self.threshold)
        y = self.matmul(rows if self.activations is None else rounded(rows, self.activations))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def rounded(x: Tensor, activations: str) -> Tensor:
    """x `[M, K]` in its dtype after dynamic quantization and back: per token to int8 or fp8, or per 128 columns to fp8."""
    if activations == "int8":
        codes, scale = quantize_tokens(x)
        return (codes.float() * scale).to(x.dtype)
    size = FP8_GROUP if activations == "fp8-group" else x.shape[1]
    codes, scale = quantize_fp8(x, size)
    return (codes.float() * scale.repeat_interleave(size, 1)[:, : x.shape[1]]).to(x.dtype)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x, computed in the dtype of the weight."""
    return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype to multiply with a weight that is made anew: CPUs without matrix units are 3 to 4 times as fast in
    float32 as in bfloat16, GPUs are made for the latter."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


class DenseLinear(StoredLinear):
    """A dense weight whose inputs are quantized, or that is one of several experts; other dense layers stay as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activations: str | None):
        super().__init__(tuple(weight.shape), bias, weight.dtype, activations)
        self.register_buffer("matrix", weight)

    def matmul(self, x: Tensor) -> Tensor:
        return multiply(x, self.matrix)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.matrix.to(dtype)


class ActiveLinear(StoredLinear):
    """A dense weight that meets few inputs: it is kept transposed, and rows whose input is below `limit` are not read."""

    def __init__(self, weight: Tensor, bias: Tensor | None, limit: float):
        super().__init__(tuple(weight.shape), bias, weight.dtype)
        self.limit = limit
        self.register_buffer("columns", weight.T.contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        return active_matmul(x, self.columns, self.limit)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.columns.T.to(dtype)


class Int4Linear(StoredLinear):
    """4-bit codes, eight to an int32 word, unpacked inside the kernel."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, activations: str | None = None
    ):
        super().__init__(tuple(weight.codes.shape), bias, dtype, activations)
        self.register_buffer("packed", packed_words(weight.codes, 4))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)

    @staticmethod
    def takes(weight: QuantizedWeight, scheme: Scheme) -> bool:
        """Whether the kernel knows this layout."""
        size = weight.codes.shape[1] // weight.scale.shape[-1]
        regular = scheme.strategy in ("group", "channel") and weight.group_index is None
        return scheme.kind == "int" and scheme.bits == 4 and regular and (weight.scale.shape[1] == 1 or size % 32 == 0)

    def matmul(self, x: Tensor) -> Tensor:
        return int4_matmul(x, self.packed, self.scale, self.zero_point)

    def dense(self, dtype: torch.dtype) -> Tensor:
        size = self.in_features // self.scale.shape[1]
        shape = self.out_features, self.in_features
        return dequantize_packed(self.packed, self.scale, self.zero_point, 4, size, shape, dtype)


class Int4OnCpuLinear(Int4Linear):
    """4-bit codes once more in the order that torch's own loops for a few bfloat16 tokens on a CPU want them.

    4096 x 4096, one core: 1.3 ms for a token, the dense product 4.4 in bfloat16 and 5.5 in float32. Many tokens go through a
    float32 matrix made for them, which is a third of the time of a dense bfloat16 product.
    """

    FEW, GROUPS, ROWS = 32, (32, 64, 128, 256), 16

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activations: str | None = None):
        super().__init__(weight, bias, torch.bfloat16, activations)
        scale = weight.scale.float()
        zero = torch.zeros_like(scale) if weight.zero_point is None else -weight.zero_point.float() * scale
        self.group_size = self.in_features // scale.shape[1]
        self.register_buffer("scale_and_zero", torch.stack((scale.T, zero.T), -1).bfloat16().contiguous())
        self.register_buffer("ordered", torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1))

    @classmethod
    def takes(cls, weight: QuantizedWeight, scheme: Scheme) -> bool:
        size = weight.codes.shape[1] // weight.scale.shape[-1]
        loops = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        return loops and Int4Linear.takes(weight, scheme) and size in cls.GROUPS and not len(weight.codes) % cls.ROWS

    def matmul(self, x: Tensor) -> Tensor:
        if not 0 < len(x) <= self.FEW or x.dtype != torch.bfloat16 or backend(x) != "torch":
            return super().matmul(x)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.ordered, self.group_size, self.scale_and_zero
        )


class Int8Linear(StoredLinear):
    """int8 codes with a scale per row, times int8 activations with a scale per token."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(tuple(weight.codes.shape), bias, dtype)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", per_row(weight))

    @staticmethod
    def takes(weight: QuantizedWeight, scheme: Scheme) -> bool:
        rows = scheme.strategy == "channel" or (scheme.strategy == "tensor" and weight.scale.numel() == 1)
        integers = scheme.kind == "int" and weight.codes.dtype == torch.int8 and weight.zero_point is None
        return integers and scheme.activations == "int8" and rows and weight.codes.shape[1] < LONGEST

    def matmul(self, x: Tensor) -> Tensor:
        codes, scale = quantize_tokens(x)
        return int8_matmul(codes, self.codes, scale, self.scale, x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale.float()).to(dtype)


class Fp8Linear(StoredLinear):
    """E4M3 codes with a scale per row or per 128 x 128 block, times E4M3 activations."""

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(tuple(weight.codes.shape), bias, dtype)
        self.group_size = FP8_GROUP if scheme.activations == "fp8-group" else None
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale if scheme.strategy == "block" else per_row(weight))

    @staticmethod
    def takes(weight: QuantizedWeight, scheme: Scheme) -> bool:
        pairs = {("channel", "fp8"), ("tensor", "fp8"), ("block", "fp8-group")}
        single = scheme.strategy != "tensor" or weight.scale.numel() == 1
        blocks = scheme.strategy != "block" or (scheme.block == (BLOCK, BLOCK) and weight.scale.dim() == 2)
        plain = weight.codes.dtype == torch.float8_e4m3fn and weight.zero_point is None
        return (scheme.strategy, scheme.activations) in pairs and single and blocks and plain

    def matmul(self, x: Tensor) -> Tensor:
        codes, scale = quantize_fp8(x, self.group_size)
        return fp8_matmul(codes, self.codes, scale, self.scale, x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self.group_size is None:
            return (self.codes.float() * self.scale.float()).to(dtype)
        scale = self.scale.float().repeat_interleave(BLOCK, 0)[: self.out_features]
        return (self.codes.float() * scale.repeat_interleave(BLOCK, 1)[:, : self.in_features]).to(dtype)


class DequantizedLinear(StoredLinear):
    """Codes of any scheme, made into a matrix for every product: as small as the file, and as slow as that sounds."""

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(tuple(weight.codes.shape), bias, dtype, scheme.activations)
        regular = scheme.kind == "int" and scheme.strategy in ("group", "channel") and weight.group_index is None
        self.scheme = scheme
        self.bits = scheme.bits if regular and scheme.bits in (2, 4, 8) else None
        self.register_buffer("codes", weight.codes if self.bits is None else packed_words(weight.codes, self.bits))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("group_index", weight.group_index)

    def matmul(self, x: Tensor) -> Tensor:
        return multiply(x, self.dense(compute_dtype(x)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self.bits is None:
            weight = QuantizedWeight(self.codes, self.scale, self.zero_point, self.group_index)
            return encodings.dequantize(weight, self.scheme).to(dtype)
        shape, size = (self.out_features, self.in_features), self.in_features // self.scale.shape[1]
        return dequantize_packed(self.codes, self.scale, self.zero_point, self.bits, size, shape, dtype)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 `[out, in]` as int32 words `[out, ceil(in * bits / 32)]`, in compressed-tensors' order."""
    return pack_rows(codes.view(torch.uint8), bits, 2 ** (bits - 1))


def per_row(weight: QuantizedWeight) -> Tensor:
    """Scales `[out, 1]` of a weight with a scale per row, or one for all."""
    return weight.scale.reshape(-1, 1).expand(weight.codes.shape[0], 1).contiguous()


class LowRankLinear(StoredLinear):
    """y = A (B x) + bias, with A `[out, rank]` and B `[rank, in]`: two stacked linears without anything in between."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor | None = None):
        super().__init__((a.shape[0], b.shape[1]), bias, a.dtype)
        self.lr_a, self.lr_b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.lr_b), self.lr_a)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.lr_a @ self.lr_b).to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lr_b)}"


class KroneckerLinear(StoredLinear):
    """y = sum_k (B_k (x) C_k) x + bias, with B `[terms, m1, n1]` and C `[terms, m2, n2]`, never multiplied out.

    For x as a matrix X `[n1, n2]` each term is B_k X C_k^T.
    """

    def __init__(self, b: Tensor, c: Tensor, bias: Tensor | None = None):
        super().__init__((b.shape[1] * c.shape[1], b.shape[2] * c.shape[2]), bias, b.dtype)
        self.kron_b, self.kron_c = nn.Parameter(b, requires_grad=False), nn.Parameter(c, requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        terms, m1, n1 = self.kron_b.shape
        _, m2, n2 = self.kron_c.shape
        inner = x.reshape(-1, n1, n2) @ self.kron_c.reshape(terms * m2, n2).T  # [tokens, n1, terms m2]
        inner = inner.reshape(-1, n1, terms, m2).transpose(1, 2).reshape(-1, terms * n1, m2)
        outer = self.kron_b.transpose(0, 1).reshape(m1, terms * n1)
        return (outer @ inner).reshape(-1, m1 * m2)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return kronecker_sum(self.kron_b, self.kron_c).to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={len(self.kron_b)}"


class RemovedLinear(StoredLinear):
    """Zeros, for a layer of a branch that was removed from its block."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        super().__init__(shape, None, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.out_features)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(self.out_features, self.in_features)

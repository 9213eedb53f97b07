"""In which form a linear layer runs: as it is stored, or as a dense matrix.

On a GPU the stored form, whose kernel reads fewer bytes. On a CPU what was faster on one core with VNNI against a dense
float32 product (4096 x 4096, 1 to 512 tokens):

- int8 codes with int8 activations: 3.8 times as fast for one token, 2.9 times for 512;
- tiles of which a tenth is left: 1.6 to 8 times; of which a fifth is left 0.8 to 5 times; below 16 MiB, which the cache
  holds, no gain to speak of;
- factors: as their sizes say;
- bitmaps, 50 to 90 % zeros: 0.6 to 1.6 times as fast up to 16 tokens, 0.75 times beyond, so not against float32; a bfloat16
  matrix is as slow for one token and a third as fast for many, so against that they are;
- 4-bit codes, against a bfloat16 matrix: 3.4 times for one token, 2.9 times for 512; against float32 there are no such loops;
- other codes are made into a matrix for every product, which takes 60 to 100 ms, a dense product of one token 6 ms: never.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tersor.formats import encodings
from tersor.formats.dense import DenseView
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.low_rank import Factors
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.kernels.count_tiles import grid_of
from tersor.kernels.int8_matmul import int_mm_is_exact
from tersor.ops.model.linears import (
    DequantizedLinear,
    Fp8Linear,
    Int4Linear,
    Int4OnCpuLinear,
    Int8Linear,
    KroneckerLinear,
    LowRankLinear,
    StoredLinear,
    per_row,
)
from tersor.ops.model.sparse_linears import BitmapLinear, SemiStructuredLinear, TileLinear
from torch import Tensor, nn

FEW_TILES, LARGE = 0.15, 1 << 22  # share of tiles up to which, weights from which a CPU is faster with tiles
TWO_FOUR = "sparse-24-bitmask"
NIBBLE, BYTE = (-8, 7), (-128, 127)


def stored_linear(
    view: DenseView,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    keep_packed: bool | None,
    quantize_inputs: bool = True,
) -> StoredLinear | None:
    """The layer of weight `name`, without its bias, on `device`; None where a dense one is wanted.

    `keep_packed`: None for the faster form, True for the stored one, False for none. `quantize_inputs`: whether the layer
    does so where its scheme says it. Raises TersorError for damage.
    """
    entry = view.tensors[name]
    packed = packed_tensor(view, name)
    if keep_packed is False or (entry.is_stored and packed is None):
        return None
    scheme = entry.scheme
    if scheme is not None and not quantize_inputs:
        scheme = replace(scheme, activations=None)
    if keep_packed is None and device.type == "cpu" and not faster_on_cpu(scheme, packed, entry.factors, dtype):
        return None
    if entry.factors is not None:
        layer = _factors(view, entry.factors, dtype)
    elif scheme is None:
        stored = view.read(name)
        layer = sparse_linear((stored.T if packed.transposed else stored).to(dtype), packed)
    elif packed is None:
        layer = quantized_linear(view.codes(entry.module), scheme, dtype, device)
    else:
        layer = sparse_quantized_linear(view.codes(entry.module), scheme, packed, dtype)
    return layer.to(device)


def packed_tensor(view: DenseView, name: str) -> Packed | None:
    """How the zeros of weight `name`, or of its codes, are left out, if they are."""
    packed = view.checkpoint.packed
    return next((packed[part] for part in view.stored_names(name) if part in packed), None)


def faster_on_cpu(
    scheme: Scheme | None, packed: Packed | None, factors: Factors | None, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether a CPU is faster with the stored form than with a matrix of `dtype`."""
    if factors is not None:
        return True
    if packed is not None and packed.tile is None and dtype != torch.float32:
        return packed.rows * packed.columns >= LARGE
    if packed is not None and packed.tile is not None:
        fibres, tiles = grid_of((packed.rows, packed.columns), packed.tile)
        few = packed.count <= FEW_TILES * fibres * tiles
        return few and packed.rows * packed.columns >= LARGE and (scheme is None or scheme.activations is None)
    if scheme is None or packed is not None:
        return False
    if dtype == torch.bfloat16 and scheme.kind == "int" and scheme.bits == 4:
        return scheme.strategy == "group" and scheme.group_size in Int4OnCpuLinear.GROUPS
    if scheme.activations != "int8":
        return False
    return scheme.symmetric and scheme.strategy in ("channel", "tensor") and int_mm_is_exact()


def quantized_linear(weight: QuantizedWeight, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> StoredLinear:
    """The layer whose kernel takes these codes as they are, else one that makes a matrix of them for every product."""
    if device.type == "cpu" and dtype == torch.bfloat16 and Int4OnCpuLinear.takes(weight, scheme):
        return Int4OnCpuLinear(weight, None, scheme.activations)
    if Int4Linear.takes(weight, scheme):
        return Int4Linear(weight, None, dtype, scheme.activations)
    if Int8Linear.takes(weight, scheme):
        return Int8Linear(weight, None, dtype)
    if Fp8Linear.takes(weight, scheme):
        return Fp8Linear(weight, scheme, None, dtype)
    return DequantizedLinear(weight, scheme, None, dtype)


def sparse_linear(matrix: Tensor, packed: Packed, activations: str | None = None) -> StoredLinear:
    """The layer of a weight `[out, in]` in the dtype of its inputs, in the form that its format is made for."""
    if packed.tile is not None:
        return TileLinear(matrix, packed.tile, None, activations)
    two_four = packed.format == TWO_FOUR and SemiStructuredLinear.takes(matrix)
    return (SemiStructuredLinear if two_four else BitmapLinear)(matrix, None, matrix.dtype, activations=activations)


def sparse_quantized_linear(
    weight: QuantizedWeight, scheme: Scheme, packed: Packed, dtype: torch.dtype
) -> StoredLinear:
    """Codes under a bitmap where the kernel can scale them; else the weights they stand for, in `dtype`."""
    scale, codes = _scale_by_row(weight, scheme), _less_zero_point(weight)
    if packed.tile is None and scale is not None and codes is not None:
        bits = 4 if codes.dtype == torch.int8 and _within(codes, NIBBLE) else None
        if packed.format == TWO_FOUR and SemiStructuredLinear.takes(codes, scale):
            return SemiStructuredLinear(codes, None, dtype, scale, bits, scheme.activations)
        if BitmapLinear.takes(scale, codes.shape[1]):
            return BitmapLinear(codes, None, dtype, scale, bits, scheme.activations)
    matrix = encodings.dequantize(weight, scheme).to(dtype)
    return sparse_linear(matrix, packed, scheme.activations)


def _scale_by_row(weight: QuantizedWeight, scheme: Scheme) -> Tensor | None:
    """Scales `[out, G]`, None where they do not lie so."""
    if weight.group_index is not None:
        return None
    rows, columns = weight.codes.shape
    if scheme.strategy == "block":
        whole = columns % scheme.block[1] == 0
        return weight.scale.repeat_interleave(scheme.block[0], 0)[:rows].contiguous() if whole else None
    return weight.scale if scheme.strategy == "group" else per_row(weight)


def _less_zero_point(weight: QuantizedWeight) -> Tensor | None:
    """Codes that count from zero, None where int8 does not hold them."""
    if weight.zero_point is None:
        return weight.codes
    if weight.zero_point.dim() != 2 or weight.group_index is not None:
        return None
    groups = weight.zero_point.shape[1]
    codes = weight.codes.short().unflatten(1, (groups, -1)) - weight.zero_point.short()[:, :, None]
    return codes.flatten(1).to(torch.int8) if _within(codes, BYTE) else None


def _within(codes: Tensor, bounds: tuple[int, int]) -> bool:
    low, high = codes.aminmax()
    return int(low) >= bounds[0] and int(high) <= bounds[1]


def _factors(view: DenseView, factors: Factors, dtype: torch.dtype) -> nn.Module:
    first, second = (view.checkpoint.read(name).to(dtype) for name in factors.names)
    return (LowRankLinear if factors.grid is None else KroneckerLinear)(first, second)

"""Made-up sparse weights in every format, and the product with each as a runtime runs it; what their kernels are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tersor.formats.header import SAFETENSORS_DTYPES
from tersor.formats.sparse.elements import torch_dtype
from tersor.formats.sparse.packed import Packed, codec
from tersor.kernels.bitmap_matmul import bitmap_matmul, block_offsets
from tersor.kernels.count_tiles import is_m_axis
from tersor.kernels.semi_structured import semi_structured_matmul, to_semi_structured
from tersor.kernels.tile_matmul import tile_matmul, tiles_by_row
from torch import Tensor

Kind = tuple[str, tuple[int, int] | None]  # a format and its tile
DENSE = "dense"
TILES = {"vector": ((32, 1), (16, 1), (1, 64)), "block": ((16, 16), (32, 32))}
PACKED_EXTENT = 64  # rows or columns of micro-tiles that a kernel packs into one dense tile on a GPU


@dataclass(frozen=True)
class Sample:
    """`product(x)` is `x @ weight.T`. `sparsity` is what rounding to whole tiles made of the one asked for. `per_fibre`: tiles stored in each fibre, values where the format has no tiles."""

    weight: Tensor
    sparsity: float
    per_fibre: Tensor
    nbytes: int
    product: Callable[[Tensor], Tensor]


def label(kind: Kind) -> str:
    """`vector 32x1`."""
    format, tile = kind
    return format if tile is None else f"{format} {tile[0]}x{tile[1]}"


def axis(kind: Kind) -> str | None:
    """The axis along which micro-tiles are packed: `K`, or `M` for tiles along a row; None for what is not permuted."""
    format, tile = kind
    if format != "vector" or tile is None:
        return None
    return "M" if is_m_axis(tile) else "K"


def kernel_name(kind: Kind) -> str:
    """The public function of `tersor.kernels` that multiplies by it."""
    names = {"sparse-bitmask": "bitmap_matmul", "sparse-24-bitmask": "semi_structured_matmul"}
    return names.get(kind[0], "matmul" if kind[1] is None else "tile_matmul")


def admits(kind: Kind, shape: tuple[int, int]) -> bool:
    """Whether a weight of this shape can be stored so and multiplied by."""
    return kind[0] != "sparse-24-bitmask" or shape[1] % 4 == 0


def dense_units(kind: Kind, per_fibre: Tensor, on_cpu: bool) -> float:
    """How many dense tiles a product runs over on a GPU: a fibre's micro-tiles fill whole ones, the last in part.

    Micro-tiles on a CPU, which has no dense tiles to fill; values for formats without tiles.
    """
    if kind[1] is None or on_cpu:
        return float(per_fibre.sum())
    rows, columns = kind[1]
    packed = PACKED_EXTENT // (rows if is_m_axis(kind[1]) else columns)
    return float((-(-per_fibre // max(packed, 1))).sum())


def make(
    kind: Kind, shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Sample:
    """A weight `[N, K]` of random values, `sparsity` of its tiles (of its values, for formats without tiles) zero.

    Tiles that are zero are drawn at random, as many in every fibre. The format has to admit the shape.
    """
    generator = torch.Generator(device).manual_seed(seed)
    format, tile = kind
    weight = torch.randn(shape, generator=generator, device=device).abs_().add_(0.1).to(dtype)
    if format == DENSE:
        return Sample(weight, 0.0, torch.tensor([0]), weight.nbytes, lambda x: x @ weight.t())
    weight *= _mask(kind, shape, sparsity, generator)
    bits, module = 8 * dtype.itemsize, codec(format)
    elements = weight.cpu().view(torch_dtype(bits))
    stored = SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]
    packed = Packed("m.weight", format, stored, shape, *shape, bits, module.count(elements, tile), tile=tile)
    parts = {name.removeprefix("m."): part for name, part in module.encode(packed, elements).items()}
    if tile is not None:
        parts["tile_index"] = parts["tile_index"].int()
    parts = {name: part.to(device) for name, part in parts.items()}
    per_fibre = (weight != 0).sum(1) if tile is None else parts["tile_ptr"].long().diff()
    zeros = 1 - float((weight != 0).sum()) / weight.numel()
    return Sample(weight, zeros, per_fibre.cpu(), packed.nbytes, _product(kind, weight, parts))


def _product(kind: Kind, weight: Tensor, parts: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    if kind[0] == "sparse-bitmask":
        values, mask = parts["compressed"], parts["bitmask"]
        offsets = block_offsets(mask, parts["row_offsets"])
        return lambda x: bitmap_matmul(x, values, mask, offsets)
    if kind[0] == "sparse-24-bitmask":
        values, mask = parts["compressed"], parts["bitmask"]
        sparse = to_semi_structured(weight)
        return lambda x: semi_structured_matmul(x, values, mask, sparse=sparse)
    tiles, index, start = parts["tile_values"], parts["tile_index"], parts["tile_ptr"]
    shape = (weight.shape[0], weight.shape[1])
    by_row = tiles_by_row(index, start, shape[0]) if is_m_axis(kind[1]) else None
    return lambda x: tile_matmul(x, tiles, index, start, shape, by_row)


def _mask(kind: Kind, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """Bool `[N, K]`, true where a value is stored."""
    device = generator.device
    if kind[0] == "sparse-24-bitmask":
        draw = torch.rand(shape[0], shape[1] // 4, 4, generator=generator, device=device)
        return (draw.argsort(-1).argsort(-1) < 2).view(shape)
    if kind[1] is None:
        return torch.rand(shape, generator=generator, device=device) >= sparsity
    rows, columns = kind[1]
    along_rows = is_m_axis(kind[1])
    draw = torch.rand(-(-shape[0] // rows), -(-shape[1] // columns), generator=generator, device=device)
    draw = draw.t() if along_rows else draw
    kept = max(1, round((1 - sparsity) * draw.shape[1]))
    mask = torch.zeros_like(draw, dtype=torch.bool).scatter_(1, draw.argsort(1)[:, :kept], True)
    mask = mask.t() if along_rows else mask
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]

"""Linear layers of which only what is not zero is kept: a bitmap and values, two of four, or micro-tiles.

They are made from a matrix `[out, in]` in memory, not from the bytes of a file: whatever a file held has been checked by
then, and one path serves every format.
"""

from __future__ import annotations

import torch
from tersor.kernels.bitmap_matmul import BLOCKS, DECODE, bitmap_matmul, block_offsets, expand
from tersor.kernels.count_tiles import in_tiles, is_m_axis
from tersor.kernels.semi_structured import expand as expand_two_of_four
from tersor.kernels.semi_structured import semi_structured_matmul, to_semi_structured
from tersor.kernels.tile_matmul import reference_tiles, tile_matmul, tiles_by_row
from tersor.ops.model.linears import StoredLinear
from torch import Tensor

BITS = 8  # of a byte of the bitmap


class BitmapLinear(StoredLinear):
    """A bit for each weight, and the values of those that are not zero.

    `matrix` holds weights, or int8 codes (less their zero points) or fp8 codes with a `scale` `[out, G]`. `bits=4`: codes
    from -8 to 7, kept two to a byte.
    """

    def __init__(
        self,
        matrix: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        bits: int | None = None,
        activations: str | None = None,
    ):
        super().__init__(tuple(matrix.shape), bias, dtype, activations)
        self.bits = bits
        mask = nonzero(matrix)
        counts = mask.sum(1)
        values = selected(matrix, mask)
        self.register_buffer("values", values if bits is None else nibbles(values))
        self.register_buffer("bitmask", pack_bits(mask))
        offsets = block_offsets(self.bitmask, counts.cumsum(0) - counts, offset_block(scale, matrix.shape[1]))
        self.register_buffer("offsets", offsets)
        self.register_buffer("scale", scale)

    @staticmethod
    def takes(scale: Tensor, columns: int) -> bool:
        """Whether the kernel can apply these scales `[out, G]`."""
        return offset_block(scale, columns) is not None

    def matmul(self, x: Tensor) -> Tensor:
        return bitmap_matmul(x, self.values, self.bitmask, self.offsets, self.scale, self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return expand(self.values, self.bitmask, self.offsets, self.in_features, self.scale, self.bits, dtype)


class SemiStructuredLinear(StoredLinear):
    """Two values of every four weights, and a bit for each weight; arguments as for `BitmapLinear`.

    More than a few tokens go through torch's sparse product where the GPU has one for weights that are no codes: it keeps a
    second copy of them, made when it is first needed.
    """

    def __init__(
        self,
        matrix: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        bits: int | None = None,
        activations: str | None = None,
    ):
        super().__init__(tuple(matrix.shape), bias, dtype, activations)
        self.bits = bits
        self.library: Tensor | None = None
        self.asked = scale is not None  # whether torch was asked for its form
        mask = two_of_four(matrix)
        values = selected(matrix, mask)
        values = values if bits is None else nibbles(values)
        self.register_buffer("compressed", values.view(len(matrix), -1))
        self.register_buffer("bitmask", pack_bits(mask))
        self.register_buffer("scale", scale)

    @staticmethod
    def takes(matrix: Tensor, scale: Tensor | None = None) -> bool:
        """Whether no four weights in a row hold more than two nonzeros, and the kernel can apply the scales."""
        columns = matrix.shape[1]
        grouped = scale is None or scale.shape[1] == 1 or columns // scale.shape[1] % min(BLOCKS) == 0
        return grouped and columns % 4 == 0 and bool((nonzero(matrix).unflatten(1, (-1, 4)).sum(2) <= 2).all())

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_cuda and len(x) > DECODE and not self.asked:
            self.library, self.asked = to_semi_structured(self.dense(x.dtype)), True
        return semi_structured_matmul(x, self.compressed, self.bitmask, self.scale, self.bits, self.library)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return expand_two_of_four(self.compressed, self.bitmask, self.in_features, self.scale, self.bits, dtype)


class TileLinear(StoredLinear):
    """The tiles `[R, C]` that are not all zero, listed along row blocks, or along column blocks where R is 1."""

    def __init__(self, matrix: Tensor, tile: tuple[int, int], bias: Tensor | None, activations: str | None = None):
        super().__init__(tuple(matrix.shape), bias, matrix.dtype, activations)
        tiles = in_tiles(matrix, tile)
        there = nonzero(tiles).any(3).any(2)
        counts = there.sum(1)
        self.register_buffer("values", tiles[there].contiguous())
        self.register_buffer("index", there.nonzero()[:, 1].int())
        self.register_buffer("start", torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int())
        self.by_row = tiles_by_row(self.index, self.start, len(matrix)) if is_m_axis(tile) else None

    def _apply(self, function, recurse: bool = True):
        result = super()._apply(function, recurse)
        self.by_row = None if self.by_row is None else type(self.by_row)(*map(function, self.by_row))
        return result

    def matmul(self, x: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        return tile_matmul(x, self.values, self.index, self.start, shape, self.by_row)

    def dense(self, dtype: torch.dtype) -> Tensor:
        shape = self.out_features, self.in_features
        return reference_tiles(self.values, self.index, self.start, shape).to(dtype).contiguous()


def nonzero(matrix: Tensor) -> Tensor:
    """Where it is not zero; for fp8 too, which torch does not compare everywhere."""
    return (matrix.view(torch.uint8) & 0x7F != 0) if matrix.dtype == torch.float8_e4m3fn else matrix != 0


def selected(matrix: Tensor, mask: Tensor) -> Tensor:
    """The values under `mask`, row by row."""
    if matrix.dtype == torch.float8_e4m3fn:
        return matrix.view(torch.uint8)[mask].view(matrix.dtype)
    return matrix[mask]


def two_of_four(matrix: Tensor) -> Tensor:
    """Bool `[out, in]`: the nonzeros, and as many of the first zeros as make two of every four."""
    mask = nonzero(matrix).unflatten(1, (-1, 4))
    missing = 2 - mask.sum(2, keepdim=True)
    return (mask | (~mask & ((~mask).cumsum(2) <= missing))).flatten(1)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool `[rows, columns]` to uint8 `[rows, ceil(columns / 8)]`, the first column in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % BITS)).unflatten(1, (-1, BITS))
    return (padded.to(torch.uint8) << torch.arange(BITS, device=mask.device, dtype=torch.uint8)).sum(
        2, dtype=torch.uint8
    )


def nibbles(values: Tensor) -> Tensor:
    """int8 values from -8 to 7 as uint8, two to a byte, the first in the low half."""
    pairs = torch.nn.functional.pad(values, (0, len(values) % 2)).view(-1, 2) & 15
    return (pairs[:, 0] | (pairs[:, 1] << 4)).view(torch.uint8)


def offset_block(scale: Tensor | None, columns: int) -> int | None:
    """Columns per offset: the most that divide a group with one scale; None where none do."""
    if scale is None or scale.shape[1] == 1:
        return max(BLOCKS)
    return max((block for block in BLOCKS if columns // scale.shape[1] % block == 0), default=None)

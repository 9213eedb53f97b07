"""Elements of a tensor that can be packed: unsigned integers `[out, in]` in which 0 is a zero weight, and the way back.

The raw bits of a float or of a signed code, or a code less its zero point modulo 2^bits, one element each: uint8 for up to
8 bits, int16 (a sign bit is a bit like the others) for 16, int32 for 32. -0.0 is not zero, so that its bits come back.

Bits of an int32 word that belong to no code (the end of a row) are taken as zero: `from_elements(to_elements(stored))`
differs from `stored` where they are not, which neither side can see. Whoever packs a tensor compares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tersor.formats.sparse.packed import Packed
    from torch import Tensor

PANEL_VALUES = 1 << 20  # of a transposed tensor, worked on at a time
SIGNED = ("I8",)  # dtypes of codes that are stored with their sign; the others hold code + 2^(bits - 1)


def torch_dtype(bits: int) -> torch.dtype:
    """dtype of a tensor of elements of `bits` bits."""
    import torch

    return torch.uint8 if bits <= 8 else torch.int16 if bits == 16 else torch.int32


def to_elements(packed: Packed, stored: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """Elements `[rows, columns]` of the stored tensor; they share its memory where they are its own bits.

    zero_points: int8 `[out, G]`, signed, where `packed.zero` is "zero_point" (encodings.QuantizedWeight). The group of a
    column is column // (columns / G); where a group index says otherwise, give those of every column, `[out, in]`.
    """
    import torch
    from tersor.formats.sparse.loops import codes_to_elements, over_runs

    if stored.dtype != getattr(torch, TORCH_DTYPES[packed.dtype]) or tuple(stored.shape) != packed.shape:
        raise ValueError(
            f"{packed.name}: {stored.dtype} {list(stored.shape)} is not {packed.dtype} {list(packed.shape)}"
        )
    if not packed.in_words and packed.zero == 0:
        rows = stored.T if packed.transposed else stored
        return rows.contiguous().view(torch_dtype(packed.bits))
    zeros = _zeros(packed, zero_points)
    elements = torch.empty(packed.rows, packed.columns, dtype=torch.uint8)
    out = raw(elements)
    for first, last in _panels(packed):
        codes = raw((stored[:, first:last].T if packed.transposed else stored[first:last]).contiguous())
        codes = codes.view("u1").reshape(last - first, -1)
        panel, zero = out[first:last], zeros if len(zeros) == 1 else zeros[first:last]
        over_runs(partial(codes_to_elements, codes, packed.bits, zero, panel), last - first, panel.size)
    return elements


def from_elements(packed: Packed, elements: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """The stored tensor again, bit for bit; the inverse of `to_elements`. Shares the memory of `elements` as that does."""
    import torch
    from tersor.formats.sparse.loops import elements_to_codes, over_runs

    check(packed, elements)
    dtype = getattr(torch, TORCH_DTYPES[packed.dtype])
    if not packed.in_words and packed.zero == 0:
        stored = elements.contiguous().view(dtype)
        return stored.T.contiguous() if packed.transposed else stored
    zeros = _zeros(packed, zero_points)
    stored = torch.empty(packed.shape, dtype=dtype)
    source = raw(elements)
    for first, last in _panels(packed):
        out = stored[first:last]
        if packed.transposed:
            out = torch.empty(last - first, packed.shape[0], dtype=dtype)
        codes = raw(out).view("u1").reshape(last - first, -1)
        codes[:, packed.columns * packed.bits // 8 :] = 0  # the loop fills what begins here with its codes only
        panel, zero = source[first:last], zeros if len(zeros) == 1 else zeros[first:last]
        over_runs(partial(elements_to_codes, panel, packed.bits, zero, codes), last - first, panel.size)
        if packed.transposed:
            stored[:, first:last] = out.T
    return stored


def _panels(packed: Packed) -> list[tuple[int, int]]:
    """Runs of rows; only a transposed tensor needs more than one, as its columns must be copied."""
    step = max(64, PANEL_VALUES // packed.columns) if packed.transposed else packed.rows
    return [(first, min(packed.rows, first + step)) for first in range(0, packed.rows, step)]


def _zeros(packed: Packed, zero_points: Tensor | None) -> np.ndarray:
    """Stored codes of a zero weight, uint8 `[rows, G]`, or `[1, 1]` where there is one for all."""
    import numpy as np
    import torch

    if packed.bits > 8:
        raise ValueError(f"{packed.name}: zero {packed.zero!r} with elements of {packed.bits} bits")
    if packed.zero != "zero_point":
        return np.full((1, 1), packed.zero, np.uint8)
    if zero_points is None:
        raise ValueError(f"{packed.name}: no zero points")
    if zero_points.numel() == 1:
        zero_points = zero_points.reshape(1, 1)
    groups = zero_points.shape[-1]
    fits = (
        zero_points.dim() == 2 and zero_points.shape[0] in (1, packed.rows) and groups and packed.columns % groups == 0
    )
    if zero_points.dtype != torch.int8 or not fits:
        raise TersorError(
            f"tensor {packed.name!r}: zero points {zero_points.dtype} {list(zero_points.shape)} do not fit "
            f"codes {[packed.rows, packed.columns]}",
            "they must be int8, one for each of the equal groups of a row",
        )
    offset = 0 if packed.dtype in SIGNED else 1 << (packed.bits - 1)
    return (zero_points.numpy().astype(np.int16) + offset).astype(np.uint8)


def nonzero_counts(elements: Tensor) -> Tensor:
    """Nonzeros of each row, int64 `[rows]`."""
    import torch
    from tersor.formats.sparse.loops import count_nonzero, over_runs

    counts, source = torch.empty(elements.shape[0], dtype=torch.int64), raw(elements)
    out = counts.numpy()
    over_runs(partial(count_nonzero, source, out), len(source), source.size)
    return counts


def check(packed: Packed, elements: Tensor) -> None:
    """Raises ValueError when `elements` are not those of `packed`."""
    if elements.dtype != torch_dtype(packed.bits) or tuple(elements.shape) != (packed.rows, packed.columns):
        raise ValueError(
            f"{packed.name}: elements {elements.dtype} {list(elements.shape)}, "
            f"expected {torch_dtype(packed.bits)} {[packed.rows, packed.columns]}"
        )


def check_count(packed: Packed, found: int) -> None:
    """Raises ValueError when other elements are given than those that were counted."""
    if found != packed.count:
        raise ValueError(f"{packed.name}: {found} to store, planned were {packed.count}")


def raw(tensor: Tensor) -> np.ndarray:
    """A tensor's bits as unsigned numbers; a copy where it is not contiguous."""
    import torch

    size = tensor.element_size()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.contiguous().view(whole).numpy().view(f"u{size}")


def values_layout(packed: Packed, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of stored values; codes of less than 8 bits are a stream of bytes along the last dimension."""
    if packed.in_words and packed.bits < 8:
        return "U8", (*shape[:-1], -(-shape[-1] * packed.bits // 8))
    return "U8" if packed.in_words else packed.dtype, shape


def new(layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of a layout, not yet filled."""
    import torch

    return {
        name: torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype])) for name, (dtype, shape) in layout.items()
    }


def new_elements(packed: Packed) -> Tensor:
    """Elements, not yet filled. Raises TersorError when the memory does not hold them."""
    import torch

    try:
        return torch.empty(packed.rows, packed.columns, dtype=torch_dtype(packed.bits))
    except (RuntimeError, MemoryError) as error:
        raise TersorError(
            f"packed tensor {packed.name!r} is {[packed.rows, packed.columns]} of {packed.bits} bits, too large for memory",
            "use a machine with more memory, if the checkpoint really is that large",
        ) from error


def parts(packed: Packed, read: Callable[[str], Tensor]) -> list[np.ndarray]:
    """The bits of each tensor of the layout, in its order. Raises TersorError when one has another dtype or shape."""
    import torch

    found = []
    for name, (dtype, shape) in packed.layout.items():
        tensor = read(name)
        if tensor.dtype != getattr(torch, TORCH_DTYPES[dtype]) or tuple(tensor.shape) != tuple(shape):
            raise packed.damaged(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        found.append(raw(tensor))
    return found

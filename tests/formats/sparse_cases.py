"""Matrices of elements to pack, and damage to what holds them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.sparse.elements import torch_dtype
from tersor.formats.sparse.packed import Packed

KINDS = [
    ("BF16", 16), ("F16", 16), ("F32", 32), ("I8", 8), ("F8_E4M3", 8), ("U8", 8),
    ("I32", 2), ("I32", 3), ("I32", 4), ("I32", 8),
]  # fmt: skip


def entry(
    form: str, dtype: str, bits: int, rows: int, columns: int, count: int = 0, transposed: bool = False,
    zero: int | str | None = None, tile: tuple[int, int] | None = None, name: str = "m.weight",
) -> Packed:  # fmt: skip
    shape = (rows, -(-columns * bits // 32)) if dtype == "I32" else (rows, columns)
    if zero is None:
        zero = 1 << (bits - 1) if dtype == "I32" else 0
    return Packed(
        name, form, dtype, shape[::-1] if transposed else shape, rows, columns, bits, count, transposed, zero, tile
    )


def elements_of(rows: list[list[int]], bits: int = 16) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(torch_dtype(bits))


def random_elements(rows: int, columns: int, bits: int, density: float, seed: int) -> torch.Tensor:
    """Elements that use all bits, the sign bit alone (-0.0) among them."""
    random = np.random.default_rng(seed)
    values = random.integers(1, 1 << bits, (rows, columns), dtype=np.int64)
    values[random.random((rows, columns)) < 0.1] = 1 << (bits - 1)
    values[random.random((rows, columns)) >= density] = 0
    unsigned = values.astype({16: np.uint16, 32: np.uint32}.get(bits, np.uint8))
    return torch.from_numpy(unsigned.view(f"i{unsigned.itemsize}") if bits > 8 else unsigned)


def to_two_of_four(elements: torch.Tensor) -> torch.Tensor:
    """The first two nonzeros of every group."""
    groups = elements.reshape(-1, 4)
    return (groups * ((groups != 0).cumsum(1) <= 2)).to(elements.dtype).reshape(elements.shape)


@st.composite
def kinds_and_elements(draw, multiple: int = 1, kinds=KINDS, most: int = 70):
    """(dtype, bits, elements), at any density from all zero to none."""
    dtype, bits = draw(st.sampled_from(kinds))
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most // multiple)) * multiple
    density = draw(st.sampled_from([0, 0.02, 0.3, 0.5, 0.95, 1]))
    return dtype, bits, random_elements(rows, columns, bits, density, draw(st.integers(0, 2**32 - 1)))


def pack(packed: Packed, elements: torch.Tensor) -> tuple[Packed, dict[str, torch.Tensor]]:
    """Counted, then encoded; the tensors are those of the layout."""
    packed = replace(packed, count=packed.codec.count(elements, packed.tile))
    assert packed.codec.misfit(packed) is None
    tensors = packed.codec.encode(packed, elements)
    assert list(tensors) == list(packed.layout)
    for name, (dtype, shape) in packed.layout.items():
        assert tensors[name].dtype == getattr(torch, TORCH_DTYPES[dtype])
        assert tuple(tensors[name].shape) == tuple(shape)
        assert tensors[name].is_contiguous()
    return packed, tensors


def assert_round_trip(packed: Packed, elements: torch.Tensor) -> None:
    before = elements.clone()
    packed, tensors = pack(packed, elements)
    assert torch.equal(packed.codec.decode(packed, tensors.__getitem__), elements)
    assert torch.equal(elements, before)


@st.composite
def damage(draw):
    """A function that changes some of the tensors it is given: single bytes, single numbers, or all of one."""
    seed = draw(st.integers(0, 2**32 - 1))
    how = draw(st.lists(st.sampled_from(["byte", "bit", "number", "all"]), min_size=1, max_size=3))

    def apply(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        random = np.random.default_rng(seed)
        result = {name: tensor.clone() for name, tensor in tensors.items()}
        filled = [tensor for tensor in result.values() if tensor.numel()]
        for kind in how:
            tensor = filled[random.integers(len(filled))]
            raw = tensor.view(-1).view(torch.uint8).numpy()
            if kind == "all":
                raw[:] = random.integers(0, 256, len(raw))
            elif kind == "byte":
                raw[random.integers(len(raw))] = random.integers(256)
            elif kind == "bit":
                raw[random.integers(len(raw))] ^= 1 << random.integers(8)
            else:
                size = tensor.element_size()
                number = int(random.choice([0, 1, 2, 7, 65535, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1, 2**64 - 2]))
                place = random.integers(len(raw) // size) * size
                raw[place : place + size] = list((number % (1 << (8 * size))).to_bytes(size, "little"))
        return result

    return apply


def decode_damaged(packed: Packed, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Elements, or None where they are refused with a sentence that names the tensor and a number."""
    try:
        elements = packed.codec.decode(packed, tensors.__getitem__)
    except TersorError as error:
        assert repr(packed.name) in str(error)
        assert any(letter.isdigit() for letter in str(error).split(":", 1)[1])
        assert error.hint
        return None
    assert tuple(elements.shape) == (packed.rows, packed.columns)
    return elements


def assert_error_or_what_was_encoded(packed: Packed, tensors: dict[str, torch.Tensor]) -> None:
    """Nothing but the encoding of a matrix decodes to it."""
    elements = decode_damaged(packed, tensors)
    if elements is not None:
        for name, tensor in packed.codec.encode(packed, elements).items():
            assert torch.equal(tensor.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)), name

"""Bitstreams against golden words, against an independent packer, and against compressed-tensors."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.packing import pack_rows, packed_columns, unpack_rows

WIDTHS = range(1, 9)


def words(tensor: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in tensor.flatten().tolist()]


def bitstream(values: np.ndarray, bits: int) -> np.ndarray:
    """The definition: bit k of element i is bit i * bits + k of the row, low bits first."""
    stream = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


@st.composite
def matrices(draw):
    bits = draw(st.sampled_from(list(WIDTHS)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize(
    ("bits", "values", "golden"),
    [
        (4, range(8), [0x76543210]),
        (8, range(4), [0x03020100]),
        (2, [i % 4 for i in range(16)], [0xE4E4E4E4]),
        (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [15], [0x0000000F]),
        (8, [255] * 5, [0xFFFFFFFF, 0x000000FF]),
        (3, [7] * 11, [0xFFFFFFFF, 0x00000001]),
    ],
)
def test_golden_words(bits, values, golden):
    values = torch.tensor([list(values)], dtype=torch.uint8)
    assert words(pack_rows(values, bits)) == golden
    assert torch.equal(unpack_rows(pack_rows(values, bits), bits, values.shape[1]), values)


@settings(max_examples=150, deadline=None)
@given(matrices())
def test_is_the_bitstream_and_comes_back(case):
    bits, values = case
    packed = pack_rows(torch.from_numpy(values), bits)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == (len(values), packed_columns(values.shape[1], bits))
    assert np.array_equal(packed.numpy(), bitstream(values, bits))
    assert np.array_equal(unpack_rows(packed, bits, values.shape[1]).numpy(), values)


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from([0, 1]))
def test_agrees_with_compressed_tensors_on_both_axes(case, axis):
    bits, values = case
    signed = torch.from_numpy(values.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits, packed_dim=axis)
    unsigned = torch.from_numpy(values)
    ours = pack_rows(unsigned, bits) if axis else pack_rows(unsigned.T.contiguous(), bits).T
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack_from_int32(ours.contiguous(), bits, signed.shape, packed_dim=axis), signed)
    back = unpack_rows(theirs if axis else theirs.T, bits, values.shape[axis])
    assert torch.equal(back if axis else back.T, unsigned)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1, 1)])
def test_empty_and_tiny(bits, shape):
    values = torch.zeros(shape, dtype=torch.uint8)
    packed = pack_rows(values, bits)
    assert tuple(packed.shape) == (shape[0], packed_columns(shape[1], bits))
    assert torch.equal(unpack_rows(packed, bits, shape[1]), values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_input_need_not_be_contiguous_nor_is_it_changed(bits):
    values = (torch.arange(40 * 33) % 2**bits).to(torch.uint8).reshape(33, 40).T
    before = values.clone()
    packed = pack_rows(values, bits)
    assert torch.equal(values, before)
    assert torch.equal(packed, pack_rows(values.contiguous(), bits))
    assert torch.equal(unpack_rows(packed.T.contiguous().T, bits, 33), before)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("packed", [
    torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 2**20, dtype=torch.int32).expand(4, -1),
    torch.zeros(4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(2, 2, 3, dtype=torch.int32),
    torch.zeros(4, 3), torch.zeros(0, 5, dtype=torch.int32),
])  # fmt: skip
def test_words_that_do_not_fit_are_refused(bits, packed):
    columns = 96 // bits  # three words a row
    with pytest.raises(TersorError, match="words"):
        unpack_rows(packed, bits, columns)


def test_more_columns_than_memory_are_refused():
    with pytest.raises(TersorError, match="words"):
        unpack_rows(torch.zeros(1, 1, dtype=torch.int32), 4, 2**62)

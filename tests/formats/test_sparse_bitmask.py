"""sparse-bitmask: the layout of compressed-tensors, bit-exact, and nothing but it is read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import (
    assert_error_or_what_was_encoded,
    assert_round_trip,
    damage,
    elements_of,
    entry,
    kinds_and_elements,
    pack,
    random_elements,
)
from tersor.formats.errors import TersorError
from tersor.formats.sparse import bitmask, loops
from tersor.formats.sparse.elements import to_elements

GOLDEN = [[1, 0, 2, 0, 0, 3, 0, 4], [0, 0, 5, 6, 7, 8, 0, 0]]


def test_golden_values():
    weight = torch.tensor(GOLDEN, dtype=torch.bfloat16)
    packed = entry("sparse-bitmask", "BF16", 16, 2, 8, name="a.b.weight")
    packed, tensors = pack(packed, to_elements(packed, weight))
    assert tensors["a.b.compressed"].dtype == torch.bfloat16
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a.b.compressed": [1, 2, 3, 4, 5, 6, 7, 8],
        "a.b.bitmask": [[165], [60]],
        "a.b.row_offsets": [0, 4],
        "a.b.shape": [2, 8],
    }


def test_codes_are_one_stream_over_all_rows():
    _, tensors = pack(entry("sparse-bitmask", "I32", 4, 2, 3), elements_of([[1, 0, 2], [3, 0, 0]], 4))
    assert tensors["m.compressed"].tolist() == [0x21, 0x03]
    _, tensors = pack(entry("sparse-bitmask", "I32", 3, 1, 3), elements_of([[1, 2, 7]], 3))
    assert tensors["m.compressed"].tolist() == [0b11010001, 0b1]


@pytest.mark.parametrize(("density", "limit"), [(0.5, 0.57), (0.2, 0.27)])
def test_size_at_bf16(density, limit):
    elements = random_elements(512, 1024, 16, density, 0)
    packed, tensors = pack(entry("sparse-bitmask", "BF16", 16, 512, 1024), elements)
    assert packed.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert packed.nbytes <= limit * packed.stored_nbytes


@settings(max_examples=150, deadline=None)
@given(kinds_and_elements())
def test_round_trip(case):
    dtype, bits, elements = case
    assert_round_trip(entry("sparse-bitmask", dtype, bits, *elements.shape), elements)
    assert bitmask.count(elements) == int((elements != 0).sum())


@settings(max_examples=50, deadline=None)
@given(kinds_and_elements())
def test_is_numpys_packbits(case):
    dtype, bits, elements = case
    _, tensors = pack(entry("sparse-bitmask", dtype, bits, *elements.shape), elements)
    there = elements.numpy() != 0
    assert np.array_equal(tensors["m.bitmask"].numpy(), np.packbits(there, axis=1, bitorder="little"))
    values = elements.numpy()[there]
    stream = np.unpackbits(values.astype(np.int64).view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")[:, :bits]
    found = tensors["m.compressed"].view(torch.uint8).numpy()
    assert np.array_equal(found, np.packbits(stream.reshape(-1), bitorder="little"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("density", [0.01, 0.5, 1])
def test_threads_give_the_same(bits, density, monkeypatch):
    dtype = {16: "BF16", 32: "F32"}.get(bits, "I32")
    elements = random_elements(301, 77, bits, density, 3)
    packed, expected = pack(entry("sparse-bitmask", dtype, bits, 301, 77), elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)
    for name, tensor in bitmask.encode(packed, elements).items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    assert torch.equal(bitmask.decode(packed, expected.__getitem__), elements)


@settings(max_examples=200, deadline=None)
@given(kinds_and_elements(most=30), damage())
def test_any_bytes_give_an_error_or_a_tensor(case, change):
    dtype, bits, elements = case
    packed, tensors = pack(entry("sparse-bitmask", dtype, bits, *elements.shape), elements)
    assert_error_or_what_was_encoded(packed, change(tensors))


@settings(max_examples=50, deadline=None)
@given(kinds_and_elements(most=30), st.integers(0, 900))
def test_any_count_gives_an_error_or_a_tensor(case, count):
    """A count that differs has tensors of other shapes; the bits decide."""
    dtype, bits, elements = case
    packed, tensors = pack(entry("sparse-bitmask", dtype, bits, *elements.shape), elements)
    wrong = replace(packed, count=count)
    name, (_, shape) = next(iter(bitmask.layout(wrong).items()))
    tensors[name] = torch.ones(shape, dtype=torch.uint8).to(tensors[name].dtype)
    assert_error_or_what_was_encoded(wrong, tensors)


@pytest.mark.parametrize(
    ("part", "place", "value", "words"),
    [
        ("shape", 1, 7, r"m\.shape' is \[2, 7\], expected \[2, 9\]"),
        ("row_offsets", 1, 5, r"m\.row_offsets' row 1 is 5, the bitmask has 4 bits before it"),
        ("row_offsets", 1, -1, r"m\.row_offsets' row 1 is -1"),
        ("bitmask", 3, 0b11, r"m\.bitmask' row 1 has a bit beyond column 8"),
        ("bitmask", 0, 0xFF, r"m\.bitmask' has 13 bits set for 9 values"),
        ("compressed", 5, 0, r"m\.compressed' has a value 0 in row 1"),
    ],
)
def test_damage_is_named(part, place, value, words):
    elements = elements_of([[1, 0, 2, 0, 0, 3, 0, 4, 0], [0, 0, 5, 6, 7, 8, 0, 0, 9]])
    packed, tensors = pack(entry("sparse-bitmask", "BF16", 16, 2, 9), elements)
    tensors[f"m.{part}"].view(-1)[place] = value
    with pytest.raises(TersorError, match=words) as error:
        bitmask.decode(packed, tensors.__getitem__)
    assert "'m.weight'" in str(error.value)


def test_bits_after_the_last_code_are_refused():
    packed, tensors = pack(entry("sparse-bitmask", "I32", 4, 1, 3), elements_of([[1, 2, 3]], 4))
    tensors["m.compressed"][1] |= 0x40
    with pytest.raises(TersorError, match="after its 3 values"):
        bitmask.decode(packed, tensors.__getitem__)


def test_tensors_of_another_layout_are_refused():
    packed, tensors = pack(entry("sparse-bitmask", "BF16", 16, 2, 8), elements_of(GOLDEN))
    for wrong in (tensors["m.bitmask"][:1], tensors["m.bitmask"].view(torch.int8)):
        with pytest.raises(TersorError, match=r"'m\.bitmask' is"):
            bitmask.decode(packed, {**tensors, "m.bitmask": wrong}.__getitem__)


def test_elements_that_were_not_counted_are_refused():
    with pytest.raises(ValueError, match="8 to store, planned were 7"):
        bitmask.encode(entry("sparse-bitmask", "BF16", 16, 2, 8, count=7), elements_of(GOLDEN))

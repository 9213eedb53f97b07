"""sparse-24-bitmask: two of every four, stored as compressed-tensors did, and nothing but it is read."""

import pytest
import torch
from hypothesis import given, settings
from sparse_cases import (
    assert_error_or_what_was_encoded,
    assert_round_trip,
    damage,
    elements_of,
    entry,
    kinds_and_elements,
    pack,
    random_elements,
    to_two_of_four,
)
from tersor.formats.errors import TersorError
from tersor.formats.sparse import loops, two_four
from tersor.formats.sparse.elements import to_elements


def packed_for(dtype: str, bits: int, elements: torch.Tensor):
    return entry("sparse-24-bitmask", dtype, bits, *elements.shape)


def test_golden_values():
    weight = torch.tensor([[1, 0, 2, 0, 0, 3, 0, 4], [0, 0, 5, 6, 7, 8, 0, 0]], dtype=torch.bfloat16)
    packed = entry("sparse-24-bitmask", "BF16", 16, 2, 8, name="a.b.weight")
    packed, tensors = pack(packed, to_elements(packed, weight))
    assert tensors["a.b.compressed"].dtype == torch.bfloat16
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a.b.compressed": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "a.b.bitmask": [[165], [60]],
        "a.b.shape": [[2], [8]],
    }


@pytest.mark.parametrize(
    ("group", "mask", "values"),
    [
        ([0, 0, 0, 0], 0b0011, [0, 0]), ([7, 0, 0, 0], 0b0011, [7, 0]), ([0, 7, 0, 0], 0b0011, [0, 7]),
        ([0, 0, 7, 0], 0b0101, [0, 7]), ([0, 0, 0, 7], 0b1001, [0, 7]), ([7, 8, 0, 0], 0b0011, [7, 8]),
        ([7, 0, 8, 0], 0b0101, [7, 8]), ([7, 0, 0, 8], 0b1001, [7, 8]), ([0, 7, 8, 0], 0b0110, [7, 8]),
        ([0, 7, 0, 8], 0b1010, [7, 8]), ([0, 0, 7, 8], 0b1100, [7, 8]),
    ],
)  # fmt: skip
def test_a_group_stores_its_nonzeros_and_then_its_first_zeros(group, mask, values):
    _, tensors = pack(entry("sparse-24-bitmask", "U8", 8, 1, 4), elements_of([group], 8))
    assert (tensors["m.bitmask"].tolist(), tensors["m.compressed"].tolist()) == ([[mask]], [values])


def test_size_at_bf16_is_nine_sixteenths():
    packed, tensors = pack(*(lambda e: (packed_for("BF16", 16, e), e))(torch.zeros(64, 128, dtype=torch.int16)))
    assert sum(tensor.nbytes for tensor in tensors.values()) - 16 == packed.stored_nbytes * 9 // 16


@settings(max_examples=150, deadline=None)
@given(kinds_and_elements(multiple=4))
def test_round_trip(case):
    dtype, bits, elements = case
    elements = to_two_of_four(elements)
    assert two_four.admits(elements)
    assert_round_trip(packed_for(dtype, bits, elements), elements)


@settings(max_examples=100, deadline=None)
@given(kinds_and_elements(multiple=4, most=40))
def test_more_than_two_are_found_and_named(case):
    dtype, bits, elements = case
    crowded = ((elements.reshape(len(elements), -1, 4) != 0).sum(2) > 2).nonzero()
    assert two_four.admits(elements) == (len(crowded) == 0)
    if len(crowded):
        row, group = crowded[0].tolist()
        packed = packed_for(dtype, bits, elements)
        with pytest.raises(TersorError, match=rf"'m\.weight': [34] nonzeros in row {row}, columns {4 * group} to"):
            pack(packed, elements)


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_columns_that_are_no_groups_are_refused(columns):
    elements = torch.zeros(2, columns, dtype=torch.int16)
    packed = packed_for("BF16", 16, elements)
    assert f"{columns} columns" in two_four.misfit(packed)
    assert not two_four.admits(elements)
    with pytest.raises(TersorError, match=f"{columns} columns are no whole groups of four"):
        two_four.encode(packed, elements)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
def test_threads_give_the_same(bits, monkeypatch):
    dtype = {16: "BF16", 32: "F32"}.get(bits, "I32")
    elements = to_two_of_four(random_elements(301, 76, bits, 0.5, 3))
    packed, expected = pack(packed_for(dtype, bits, elements), elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)
    for name, tensor in two_four.encode(packed, elements).items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    assert torch.equal(two_four.decode(packed, expected.__getitem__), elements)
    elements[200, 4:7] = 1
    assert not two_four.admits(elements)
    with pytest.raises(TersorError, match="row 200, columns 4 to 7"):
        two_four.encode(packed, elements)


@settings(max_examples=200, deadline=None)
@given(kinds_and_elements(multiple=4, most=32), damage())
def test_any_bytes_give_an_error_or_a_tensor(case, change):
    dtype, bits, elements = case
    elements = to_two_of_four(elements)
    packed, tensors = pack(packed_for(dtype, bits, elements), elements)
    assert_error_or_what_was_encoded(packed, change(tensors))


@pytest.mark.parametrize(
    ("part", "place", "value", "words"),
    [
        ("shape", 0, 3, r"m\.shape' is \[3, 12\], expected \[2, 12\]"),
        ("bitmask", 2, 0b00110111, r"m\.bitmask' has 3 bits in row 1, columns 0 to 3"),
        ("bitmask", 3, 0b00010011, r"m\.bitmask' row 1 has a bit after its 12 bits"),
        ("compressed", 2, 0, r"m\.compressed' has a value 0 in row 0"),
    ],
)
def test_damage_is_named(part, place, value, words):
    elements = elements_of([[1, 0, 2, 0, 0, 3, 0, 4, 0, 0, 0, 0], [0, 0, 5, 6, 7, 8, 0, 0, 9, 0, 0, 0]])
    packed, tensors = pack(packed_for("BF16", 16, elements), elements)
    tensors[f"m.{part}"].view(-1)[place] = value
    with pytest.raises(TersorError, match=words) as error:
        two_four.decode(packed, tensors.__getitem__)
    assert "'m.weight'" in str(error.value)


def test_bits_after_the_codes_of_a_row_are_refused():
    packed, tensors = pack(entry("sparse-24-bitmask", "I32", 3, 2, 4), elements_of([[1, 2, 0, 0], [3, 0, 0, 0]], 3))
    tensors["m.compressed"][1] |= 0x40
    with pytest.raises(TersorError, match=r"m\.compressed' row 1 has a bit after its 6 bits"):
        two_four.decode(packed, tensors.__getitem__)

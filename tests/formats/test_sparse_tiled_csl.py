"""Tiled-CSL against hand-made items and against the order of Flash-LLM's writer, played out item by item."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import (
    assert_round_trip,
    damage,
    decode_damaged,
    elements_of,
    entry,
    pack,
    random_elements,
)
from tersor.formats.errors import TersorError
from tersor.formats.sparse import loops, tiled_csl


def packed_for(elements: torch.Tensor, dtype: str = "F16"):
    return entry("tiled-csl", dtype, 16, *elements.shape)


@st.composite
def matrices(draw, most: int = 300):
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most // 2))
    density = draw(st.sampled_from([0, 0.02, 0.3, 0.5, 0.95, 1]))
    return random_elements(rows, columns, 16, density, draw(st.integers(0, 2**32 - 1)))


def flash_llm_order(tile: np.ndarray) -> list[int]:
    """Items of one `[128, 64]` tile: 32 banks are filled row by row, and the fullest gives its last item each time."""
    banks, first_zero = [[] for _ in range(32)], [None] * 32
    for row in range(128):
        for column in range(64):
            swizzled = column ^ (row % 8 << 3)
            place, bank = row * 64 + swizzled, swizzled // 2
            if tile[row, column]:
                banks[bank].append(place << 16 | int(tile[row, column]))
            elif first_zero[bank] is None:
                first_zero[bank] = place
    while sum(map(len, banks)) % 4:
        bank = min(range(32), key=lambda b: len(banks[b]))
        banks[bank].append(first_zero[bank] << 16)
    total = sum(map(len, banks))
    vectors = total // 4
    items = [0] * total

    def lanes(count: int, turns: int) -> list[list[int]]:
        stacks = [[] for _ in range(count)]
        for _ in range(turns):
            for stack in stacks:
                stack.append(max(banks, key=len).pop())
        return stacks

    tail, main = lanes(vectors % 32, 4), lanes(32, vectors // 32 * 4)
    for turn in range(vectors // 32 * 4):
        for lane in range(32):
            items[turn // 4 * 128 + lane * 4 + turn % 4] = main[lane].pop()
    for turn in range(4):
        for lane in range(vectors % 32):
            items[vectors // 32 * 128 + lane * 4 + turn] = tail[lane].pop()
    return items


def test_one_item_by_hand():
    """Row 9, column 5 lies at 9 * 64 + (5 ^ 8) = 589; zeros go to the emptiest banks, the first ones."""
    weight = torch.zeros(128, 64, dtype=torch.float16)
    weight[9, 5] = 1.0
    _, tensors = pack(packed_for(weight), weight.view(torch.int16))
    assert tensors["m.csl_items"].tolist() == [589 << 16 | 0x3C00, 4 << 16, 2 << 16, 0]
    assert tensors["m.csl_offsets"].tolist() == [0, 1, 1]
    raw = tensors["m.csl_items"].view(torch.uint8).tolist()
    assert raw[:4] == [0x00, 0x3C, 589 & 255, 589 >> 8]  # value first in memory, then the place


@pytest.mark.parametrize("density", [0.004, 0.05, 0.2, 0.5, 0.999, 1])
def test_order_is_that_of_flash_llm(density):
    elements = random_elements(128, 128, 16, density, 5)
    packed, tensors = pack(packed_for(elements), elements)
    items = tensors["m.csl_items"].numpy().view(np.uint32)
    ends = (tensors["m.csl_offsets"] * 4).tolist()
    unsigned = elements.numpy().view(np.uint16)
    for tile in range(2):
        expected = flash_llm_order(unsigned[:, 64 * tile : 64 * tile + 64])
        assert items[ends[tile] : ends[tile + 1]].tolist() == expected
    assert ends[2] == ends[3] == packed.count


def test_size_is_four_bytes_for_a_nonzero():
    elements = random_elements(256, 256, 16, 0.2, 0)
    packed, _ = pack(packed_for(elements), elements)
    nonzeros = int((elements != 0).sum())
    assert 4 * nonzeros <= packed.nbytes <= 4 * (nonzeros + 3 * 8 + 10)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(["F16", "BF16"]))
def test_round_trip(elements, dtype):
    assert_round_trip(packed_for(elements, dtype), elements)
    padded = torch.nn.functional.pad(elements, (0, -elements.shape[1] % 64, 0, -elements.shape[0] % 128))
    grid = (padded != 0).reshape(padded.shape[0] // 128, 128, padded.shape[1] // 64, 64).sum((1, 3))
    assert torch.equal(tiled_csl.tile_counts(elements), grid)
    assert tiled_csl.count(elements) == int(((grid + 3) // 4 * 4).sum())


def test_a_small_full_matrix_has_more_items_than_elements():
    elements = elements_of([[1]])
    packed, _ = pack(packed_for(elements), elements)
    assert packed.count == 4
    assert_round_trip(packed_for(elements), elements)


def test_threads_give_the_same(monkeypatch):
    elements = random_elements(700, 200, 16, 0.3, 3)
    packed, expected = pack(packed_for(elements), elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)
    for name, tensor in tiled_csl.encode(packed, elements).items():
        assert torch.equal(tensor, expected[name])
    assert torch.equal(tiled_csl.decode(packed, expected.__getitem__), elements)


@settings(max_examples=200, deadline=None)
@given(matrices(most=200), damage())
def test_any_bytes_give_an_error_or_a_tensor(elements, change):
    packed, tensors = pack(packed_for(elements), elements)
    found = decode_damaged(packed, change(tensors))
    if found is not None:
        assert tiled_csl.count(found) == packed.count


def item(row: int, column: int, value: int) -> int:
    return (row * 64 + (column ^ (row % 8 << 3))) << 16 | value


@pytest.mark.parametrize(
    ("items", "place"),
    [
        ([item(0, 0, 1), item(1, 1, 2), item(0, 0, 3), item(2, 2, 4)], 2),  # a place that is taken
        ([item(0, 0, 1), item(1, 1, 2), item(0, 0, 0), item(2, 2, 4)], 2),  # a zero where there is a value
        ([item(0, 0, 0), item(1, 1, 0), item(2, 2, 0), item(3, 3, 0)], 3),  # four zeros need no items
        ([item(0, 0, 1), item(5, 0, 2), item(1, 1, 0), item(2, 2, 0)], 1),  # below the last row
        ([item(0, 0, 1), item(0, 6, 2), item(1, 1, 0), item(2, 2, 0)], 1),  # right of the last column
        ([item(0, 0, 1), item(128, 0, 2), item(1, 1, 0), item(2, 2, 0)], 1),  # outside of the tile
        ([item(0, 0, 1), (65535 << 16) | 2, item(1, 1, 0), item(2, 2, 0)], 1),
        ([item(0, 0, 1), (65535 << 16), item(1, 1, 0), item(2, 2, 0)], 1),
    ],
)
def test_items_that_no_matrix_has_are_named(items, place):
    elements = torch.zeros(5, 6, dtype=torch.int16)
    elements[0, 0] = elements[1, 1] = elements[2, 2] = 1
    packed, tensors = pack(packed_for(elements), elements)
    tensors["m.csl_items"] = torch.tensor([i - (1 << 32) * (i >> 31) for i in items], dtype=torch.int32)
    with pytest.raises(TersorError, match=rf"'m\.weight'.*'m\.csl_items' item {place} \(0x"):
        tiled_csl.decode(packed, tensors.__getitem__)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1, 1, 2, 2], "goes from 1 to 2, 2, expected 0 to 2, 2"),
        ([0, 1, 3, 2], "goes from 0 to 3, 2, expected 0 to 2, 2"),
        ([0, 1, 2, 1], "goes from 0 to 2, 1, expected 0 to 2, 2"),
        ([0, 3, 2, 2], "goes from 3 to 2 at tile 1"),
        ([0, -1, 2, 2], "goes from 0 to -1 at tile 0"),
    ],
)
def test_offsets_that_no_matrix_has_are_named(offsets, words):
    elements = torch.zeros(5, 70, dtype=torch.int16)
    elements[0, [0, 65]] = 1
    packed, tensors = pack(packed_for(elements), elements)
    assert tensors["m.csl_offsets"].tolist() == [0, 1, 2, 2]
    tensors["m.csl_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(TersorError, match=rf"'m\.csl_offsets' {words}"):
        tiled_csl.decode(packed, tensors.__getitem__)


def test_other_widths_than_16_bits_are_refused():
    packed = entry("tiled-csl", "I8", 8, 4, 4)
    with pytest.raises(TersorError, match=r"'m\.weight': elements of 8 bits, tiled-csl holds 16"):
        tiled_csl.encode(packed, torch.zeros(4, 4, dtype=torch.uint8))

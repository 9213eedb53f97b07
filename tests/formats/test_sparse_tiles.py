"""vector and block: tiles along both axes against a plain definition, and nothing but them is read."""

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
from tersor.formats.sparse import loops, tile_loops, tiles

TILES = [(32, 1), (16, 1), (8, 1), (1, 64), (1, 16), (16, 16), (32, 32), (4, 2), (3, 8), (128, 64)]


def packed_for(dtype: str, bits: int, elements: torch.Tensor, tile: tuple[int, int]):
    return entry("vector" if 1 in tile else "block", dtype, bits, *elements.shape, tile=tile)


def expected_tiles(elements: torch.Tensor, tile: tuple[int, int]):
    """Values, index and ptr by the definition."""
    height, width = tile
    rows, columns = elements.shape
    padded = torch.nn.functional.pad(elements.to(torch.int64), (0, -columns % width, 0, -rows % height))
    grid = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width).transpose(1, 2)
    if height == 1 and width > 1:
        grid = grid.transpose(0, 1)
    values, index, ptr = [], [], [0]
    for fibre in grid:
        for number, values_of_tile in enumerate(fibre):
            if values_of_tile.any():
                values.append(values_of_tile)
                index.append(number)
        ptr.append(len(index))
    return torch.stack(values) if values else torch.zeros(0, height, width, dtype=torch.int64), index, ptr


@st.composite
def tiled(draw, most: int = 70):
    """(packed, elements) with whole tiles zero, others partly."""
    dtype, bits, elements = draw(kinds_and_elements(most=most))
    tile = draw(st.sampled_from(TILES))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    down, across = -(-elements.shape[0] // tile[0]), -(-elements.shape[1] // tile[1])
    kept = random.random((down, across)) < draw(st.sampled_from([0, 0.2, 0.5, 1]))
    kept = np.repeat(np.repeat(kept, tile[0], 0), tile[1], 1)[: elements.shape[0], : elements.shape[1]]
    elements[~torch.from_numpy(kept)] = 0
    return packed_for(dtype, bits, elements, tile), elements


@settings(max_examples=200, deadline=None)
@given(tiled())
def test_round_trip(case):
    assert_round_trip(*case)


@settings(max_examples=100, deadline=None)
@given(tiled())
def test_are_the_tiles_that_are_not_zero(case):
    packed, elements = case
    packed, tensors = pack(packed, elements)
    values, index, ptr = expected_tiles(elements, packed.tile)
    assert tensors["m.tile_index"].tolist() == index
    assert tensors["m.tile_ptr"].tolist() == ptr
    assert tiles.fibre_counts(elements, packed.tile).tolist() == np.diff(ptr).tolist()
    assert tiles.fibres(packed) == len(ptr) - 1
    stored = tensors["m.tile_values"]
    if packed.bits < 8:
        stream = np.unpackbits(values.numpy().astype(np.uint8).reshape(-1, 1), axis=1, bitorder="little")
        stream = np.packbits(stream[:, : packed.bits].reshape(-1), bitorder="little")
        assert np.array_equal(stored.numpy(), stream)
    else:
        size = packed.bits // 8
        raw = values.numpy().astype(f"<i{size}") if size > 1 else values.numpy().astype(np.uint8)
        assert np.array_equal(stored.view(torch.uint8).numpy().reshape(-1), raw.view(np.uint8).reshape(-1))


def test_both_axes_of_a_small_matrix():
    elements = elements_of([[0, 1, 0, 2], [0, 3, 0, 0], [0, 0, 0, 4]])
    _, tensors = pack(packed_for("I8", 8, elements.to(torch.uint8), (2, 1)), elements.to(torch.uint8))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "m.tile_values": [[[1], [3]], [[2], [0]], [[4], [0]]],
        "m.tile_index": [1, 3, 3],
        "m.tile_ptr": [0, 2, 3],
    }
    _, tensors = pack(packed_for("F16", 16, elements, (1, 2)), elements)
    assert tensors["m.tile_values"].view(torch.int16).tolist() == [[[0, 1]], [[0, 3]], [[0, 2]], [[0, 4]]]
    assert tensors["m.tile_index"].tolist() == [0, 1, 0, 2]
    assert tensors["m.tile_ptr"].tolist() == [0, 2, 4]


def test_axes():
    assert [tiles.is_m_axis(tile) for tile in [(32, 1), (1, 64), (16, 16), (1, 1)]] == [False, True, False, False]
    assert tiles.extents(33, 65, (32, 1)) == (2, 65)
    assert tiles.extents(33, 65, (1, 64)) == (2, 33)
    assert tiles.extents(33, 65, (16, 16)) == (3, 5)


@pytest.mark.parametrize(("columns", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_a_wide_index_where_it_is_needed(columns, dtype):
    elements = torch.zeros(1, columns, dtype=torch.uint8)
    elements[0, [0, 40000, columns - 1]] = 1
    packed, tensors = pack(packed_for("I8", 8, elements, (16, 1)), elements)
    assert tensors["m.tile_index"].dtype == dtype
    assert tensors["m.tile_index"].tolist() == [0, 40000, columns - 1]
    assert torch.equal(tiles.decode(packed, tensors.__getitem__), elements)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("tile", [(16, 1), (1, 16), (16, 16)])
def test_threads_and_panels_give_the_same(bits, tile, monkeypatch):
    dtype = {16: "BF16", 32: "F32"}.get(bits, "I32")
    elements = random_elements(301, 777, bits, 0.02, 3)
    packed, expected = pack(packed_for(dtype, bits, elements, tile), elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)
    for name, tensor in tiles.encode(packed, elements).items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    assert torch.equal(tiles.decode(packed, expected.__getitem__), elements)
    assert tiles.count(elements, tile) == packed.count
    assert 2 * tile_loops.PANEL_COLUMNS < 777  # so that a row block is more than one panel


@settings(max_examples=250, deadline=None)
@given(tiled(most=40), damage())
def test_any_bytes_give_an_error_or_a_tensor(case, change):
    packed, tensors = pack(*case)
    assert_error_or_what_was_encoded(packed, change(tensors))


ELEMENTS = [[0, 1, 0, 2, 0], [0, 3, 0, 0, 0], [0, 0, 0, 4, 5]]


@pytest.mark.parametrize(
    ("tile", "part", "place", "value", "words"),
    [
        ((2, 1), "tile_ptr", 0, 1, r"m\.tile_ptr' goes from 1 to 4, expected 0 to 4"),
        ((2, 1), "tile_ptr", 2, 5, r"m\.tile_ptr' goes from 0 to 5, expected 0 to 4"),
        ((2, 1), "tile_ptr", 1, 9, r"m\.tile_ptr' goes from 9 to 4 at fibre 1"),
        ((2, 1), "tile_ptr", 1, -9, r"m\.tile_ptr' goes from 0 to -9 at fibre 0"),
        ((2, 1), "tile_index", 3, 5, r"m\.tile_index' of tile 3 is 5, not below 5"),
        ((2, 1), "tile_index", 1, 1, r"m\.tile_index' of tile 1 is 1, not below 5 or not above the one before"),
        ((2, 1), "tile_values", 6, 0, r"m\.tile_values' tile 3 is all zero"),
        ((2, 1), "tile_values", 7, 1, r"m\.tile_values' tile 3 is all zero, or not zero beyond the edge"),
        ((1, 2), "tile_index", 0, 3, r"m\.tile_index' of tile 0 is 3, not below 3"),
        ((1, 2), "tile_values", 9, 1, r"m\.tile_values' tile 4 is all zero, or not zero beyond the edge"),
        ((1, 2), "tile_values", 1, 0, r"m\.tile_values' tile 0 is all zero"),
        ((2, 2), "tile_values", 13, 1, r"m\.tile_values' tile 3 is all zero, or not zero beyond the edge"),
        ((2, 2), "tile_values", 15, 1, r"m\.tile_values' tile 3 is all zero, or not zero beyond the edge"),
    ],
)
def test_damage_is_named(tile, part, place, value, words):
    elements = elements_of(ELEMENTS)
    packed, tensors = pack(packed_for("BF16", 16, elements, tile), elements)
    tensors[f"m.{part}"].view(-1)[place] = value
    with pytest.raises(TersorError, match=words) as error:
        tiles.decode(packed, tensors.__getitem__)
    assert "'m.weight'" in str(error.value)


def test_a_negative_index_is_named():
    elements = torch.zeros(1, 65537, dtype=torch.uint8)
    elements[0, 3] = 1
    packed, tensors = pack(packed_for("I8", 8, elements, (16, 1)), elements)
    tensors["m.tile_index"][0] = -7
    with pytest.raises(TersorError, match="of tile 0 is -7, not below 65537"):
        tiles.decode(packed, tensors.__getitem__)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (entry("block", "BF16", 16, 2, 2, tile=(1024, 65)), "more than 65536 elements"),
        (entry("vector", "I32", 4, 64, 64, tile=(4, 1)), "tiles 4x1 of 4-bit elements fill no whole bytes"),
        (entry("vector", "BF16", 16, 64, 64, count=129, tile=(32, 1)), "129 tiles 32x1"),
        (entry("vector", "BF16", 16, 1, 1 << 31, tile=(32, 1)), "2147483648 tiles 32x1 in a row"),
    ],
)
def test_what_cannot_be_stored_is_said(packed, words):
    assert words in tiles.misfit(packed)


def test_encode_refuses_a_tile_that_fills_no_bytes_and_what_was_not_counted():
    elements = torch.ones(64, 64, dtype=torch.uint8)
    with pytest.raises(TersorError, match=r"'m\.weight': tiles 4x1 of 4-bit"):
        tiles.encode(entry("vector", "I32", 4, 64, 64, tile=(4, 1)), elements)
    with pytest.raises(ValueError, match="128 to store, planned were 7"):
        tiles.encode(replace(entry("vector", "I8", 8, 64, 64, tile=(32, 1)), count=7), elements)

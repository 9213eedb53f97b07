from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import linear_hash

DTYPES = [np.uint8, np.uint16, np.uint32, np.uint64]


def definition(data: np.ndarray) -> linear_hash.Hash:
    """As the docstring defines it, element by element in Python's integers."""
    low0, low1, *_ = linear_hash._tables()
    words = data.reshape(-1).view(linear_hash.WORDS[data.itemsize])
    sums = [0, 0]
    for index, word in enumerate(words.tolist()):
        high, low = divmod(index, linear_hash.RUN)
        for lane, table in enumerate((low0, low1)):
            weight = (linear_hash._mix(2 * high + lane) | 1) * int(table[low])
            sums[lane] = sums[lane] + weight * (word + 1) & linear_hash.MASK
    return sums[0], sums[1]


def of(data: np.ndarray) -> linear_hash.Hash:
    return linear_hash.of_box(data, tuple((0, extent) for extent in data.shape), data.shape)


def random(shape, dtype=np.uint16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_what_it_says(dtype):
    for shape in ((), (1,), (5000,), (3, 1500), (2, 3, 4)):
        data = random(shape, dtype)
        assert of(data) == definition(data)


def test_is_part_of_the_format():
    """Files that were written must be readable for good."""
    value = of(np.arange(10_000, dtype=np.uint16))
    assert linear_hash.to_text(value) == "4dca031bff8e22f02b5e8a5f495dc3ba"
    assert linear_hash.from_text(linear_hash.to_text(value)) == value


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_add_up_in_any_order(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    tensor = random(shape, data.draw(st.sampled_from(DTYPES)))
    boxes = [()]
    for extent in shape:
        cuts = sorted({0, extent, *data.draw(st.lists(st.integers(0, extent), max_size=3))})
        boxes = [(*box, side) for box in boxes for side in itertools.pairwise(cuts)]
    order = data.draw(st.permutations(boxes))
    hashes = []
    for box in order:
        part = tensor[tuple(slice(*side) for side in box)]  # a view with the strides of the whole
        value = linear_hash.of_box(part, box, shape)
        assert value == linear_hash.of_box(part.copy(), box, shape)
        hashes.append(value)
    assert linear_hash.of_pieces(hashes) == of(tensor)
    left_out = data.draw(st.integers(0, len(hashes) - 1))
    assert linear_hash.of_pieces(hashes[:left_out] + hashes[left_out + 1 :]) != of(tensor)
    assert linear_hash.of_pieces([*hashes, hashes[left_out]]) != of(tensor)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 20_000), st.data())
def test_any_changed_bit_changes_both_sums(dtype, count, data):
    tensor = random(count, dtype)
    before = of(tensor)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 8 * tensor.itemsize - 1))
    tensor[place] ^= dtype(1) << dtype(bit)
    after = of(tensor)
    assert before[0] != after[0] and before[1] != after[1]


def test_swapped_rows_and_elements_change_it():
    tensor = random((64, 4096))
    before = of(tensor)
    rows = tensor.copy()
    rows[[3, 40]] = rows[[40, 3]]
    elements = tensor.copy()
    elements[0, [1, 2]] = elements[0, [2, 1]]
    assert len({before, of(rows), of(elements)}) == 3


def test_zeros_count():
    """A box of zeros that is missing, or there twice, is noticed."""
    tensor = np.zeros((8, 8), np.uint16)
    half = linear_hash.of_box(tensor[:4], ((0, 4), (0, 8)), (8, 8))
    other = linear_hash.of_box(tensor[4:], ((4, 8), (0, 8)), (8, 8))
    assert linear_hash.add(half, other) == of(tensor)
    assert len({half, other, linear_hash.add(half, half), of(tensor)}) == 4
    assert of(np.zeros((0, 8), np.uint16)) == linear_hash.ZERO


def test_strides_of_any_kind():
    """Views that are no regular lines are copied, not read wrongly."""
    tensor = random((6, 10, 8))
    for part in (tensor[::2], tensor[:, ::3], tensor[:, :, ::2], tensor.transpose(2, 0, 1), tensor[1:3, 2:5, 1:7]):
        box = tuple((0, extent) for extent in part.shape)
        shape = tuple(extent + 1 for extent in part.shape)
        assert linear_hash.of_box(part, box, shape) == linear_hash.of_box(np.ascontiguousarray(part), box, shape)

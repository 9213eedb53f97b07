"""Elements against their definition, and every stored tensor back bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import KINDS, entry, random_elements
from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.packing import pack_rows, unpack_rows
from tersor.formats.sparse import loops
from tersor.formats.sparse.elements import from_elements, new_elements, nonzero_counts, to_elements, torch_dtype


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random_stored(packed, seed: int) -> torch.Tensor:
    """Any bits, but zeros where a row of words ends in the middle of one."""
    random = np.random.default_rng(seed)
    if packed.in_words:
        codes = random.integers(0, 1 << packed.bits, (packed.rows, packed.columns), dtype=np.uint8)
        words = pack_rows(torch.from_numpy(codes), packed.bits)
        return words.T.contiguous() if packed.transposed else words
    dtype = getattr(torch, TORCH_DTYPES[packed.dtype])
    raw = random.integers(0, 256, packed.stored_nbytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(packed.shape)


@st.composite
def stored_tensors(draw):
    dtype, bits = draw(st.sampled_from(KINDS))
    zero = None
    groups, rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 90)), draw(st.integers(1, 40))
    if bits <= 8 and dtype != "F8_E4M3":
        zero = draw(st.sampled_from([None, 0, 1, "zero_point"]))
    packed = entry("sparse-bitmask", dtype, bits, rows, groups * width, 0, draw(st.booleans()), zero)
    seed = draw(st.integers(0, 2**32 - 1))
    half = 1 << (bits - 1)
    points = None
    if packed.zero == "zero_point":
        points = np.random.default_rng(seed).integers(-half, half, (packed.rows, groups)).astype(np.int8)
        points = torch.from_numpy(points)
    return packed, random_stored(packed, seed), points


@settings(max_examples=150, deadline=None)
@given(stored_tensors())
def test_are_what_they_are_defined_as_and_come_back(case):
    packed, stored, points = case
    elements = to_elements(packed, stored, points)
    assert elements.dtype == torch_dtype(packed.bits) and elements.is_contiguous()
    assert torch.equal(bits_of(from_elements(packed, elements, points)), bits_of(stored))
    rows = stored.T.contiguous() if packed.transposed else stored
    if packed.in_words:
        codes = unpack_rows(rows, packed.bits, packed.columns).to(torch.int64)
    else:
        codes = rows.view(torch_dtype(packed.bits)).to(torch.int64)
    if points is not None:
        codes = codes - points.to(torch.int64).repeat_interleave(packed.columns // points.shape[1], 1)
        codes = codes if packed.dtype == "I8" else codes - (1 << (packed.bits - 1))
    elif packed.zero:
        codes = codes - packed.zero
    assert torch.equal(elements.to(torch.int64) % (1 << packed.bits), codes % (1 << packed.bits))
    counts = nonzero_counts(elements)
    assert torch.equal(counts, (elements != 0).sum(1))


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 16), ("F16", 16), ("F32", 32), ("F8_E4M3", 8)])
def test_minus_zero_is_an_element(dtype, bits):
    stored = torch.tensor([[0.0, -0.0, 1.0]]).to(getattr(torch, TORCH_DTYPES[dtype]))
    elements = to_elements(entry("sparse-bitmask", dtype, bits, 1, 3), stored)
    assert (elements != 0).tolist() == [[False, True, True]]


def test_symmetric_words_have_their_zero_in_the_middle():
    packed = entry("sparse-bitmask", "I32", 4, 1, 8)
    stored = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert to_elements(packed, stored).tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]


def test_one_zero_point_serves_all_rows():
    packed = entry("sparse-bitmask", "I8", 8, 2, 2, zero="zero_point")
    stored = torch.tensor([[-3, 5], [0, -128]], dtype=torch.int8)
    points = torch.tensor([-3], dtype=torch.int8)
    elements = to_elements(packed, stored, points)
    assert elements.tolist() == [[0, 8], [3, 131]]
    assert torch.equal(from_elements(packed, elements, points), stored)


@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 0, dtype=torch.int8),
        torch.zeros(4, dtype=torch.int8), torch.zeros(2, 2, 2, dtype=torch.int8), torch.zeros(2, 2),
    ],
    ids=lambda points: f"{points.dtype}{list(points.shape)}",
)  # fmt: skip
def test_zero_points_that_do_not_fit_are_refused(points):
    packed = entry("sparse-bitmask", "I32", 4, 2, 16, zero="zero_point")
    with pytest.raises(TersorError, match="zero points") as error:
        to_elements(packed, torch.zeros(2, 2, dtype=torch.int32), points)
    assert "'m.weight'" in str(error.value)


def test_other_tensors_than_the_described_are_refused():
    packed = entry("sparse-bitmask", "BF16", 16, 2, 3)
    for stored in (torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"m\.weight"):
            to_elements(packed, stored)
    for elements in (torch.zeros(3, 2, dtype=torch.int16), torch.zeros(2, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"m\.weight"):
            from_elements(packed, elements)


def test_more_than_memory_holds_is_named():
    with pytest.raises(TersorError, match=r"'m\.weight'.*16777216.*too large for memory"):
        new_elements(entry("vector", "F32", 32, 1 << 24, 1 << 24, tile=(32, 1)))


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 16), ("I32", 3), ("I32", 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_and_panels_give_the_same(dtype, bits, transposed, monkeypatch):
    from tersor.formats.sparse import elements as module

    packed = entry("sparse-bitmask", dtype, bits, 333, 96, 0, transposed)
    stored = random_stored(packed, 1)
    expected = to_elements(packed, stored)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)
    monkeypatch.setattr(module, "PANEL_VALUES", 96 * 70)
    assert torch.equal(to_elements(packed, stored), expected)
    assert torch.equal(bits_of(from_elements(packed, expected)), bits_of(stored))
    assert torch.equal(nonzero_counts(expected), (expected != 0).sum(1))


def test_rows_that_are_not_contiguous_are_counted():
    elements = random_elements(40, 30, 16, 0.5, 0)
    assert torch.equal(nonzero_counts(elements.T), (elements != 0).sum(0))


def test_runs_begin_only_where_they_may(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(loops, "RUN_ELEMENTS", 1)

    def cuts(may_start):
        return loops.over_runs(lambda first, last: (first, last), 8, 100, np.array(may_start, bool))

    assert cuts([1] * 8) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert cuts([1, 0, 0, 0, 0, 1, 0, 0]) == [(0, 5), (5, 8)]
    assert cuts([1] + [0] * 7) == [(0, 8)]
    assert loops.over_runs(lambda first, last: (first, last), 2, 100) == [(0, 1), (1, 2)]

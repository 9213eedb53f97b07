from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from tersor.kernels.sparse_index import build_index, pack_tiles, reference_build_index, reference_pack_tiles
from test_count_tiles import CASES, matrix


def lists(start, index, values=None):
    """What each fibre's list holds, in an order of its own: the one on a GPU is free."""
    result = []
    for begin, end in pairwise(start.tolist()):
        order = index[begin:end].argsort()
        part = index[begin:end][order].tolist()
        result.append(part if values is None else (part, values[begin:end][order].tolist()))
    return result


def same_tiles(found, expected):
    (values, index, start), (true_values, true_index, true_start) = found, expected
    assert values.dtype == true_values.dtype and values.shape[1:] == true_values.shape[1:]
    assert lists(start, index, values) == lists(true_start, true_index, true_values)


def test_by_hand():
    x = torch.tensor([[0, 5, 0], [0, 6, 0], [7, 0, 8]])
    start, index = build_index(x, (2, 1))
    assert (start.tolist(), index.tolist()) == ([0, 1, 3], [1, 0, 2])
    values, index, start = pack_tiles(x, (2, 1))
    assert values[:, :, 0].tolist() == [[5, 6], [7, 0], [8, 0]]  # the last row block has one row
    start, index = build_index(x, (1, 2))  # column blocks, then rows
    assert (start.tolist(), index.tolist()) == ([0, 3, 4], [0, 1, 2, 2])
    assert pack_tiles(x, (1, 2))[0][:, 0].tolist() == [[0, 5], [0, 6], [7, 0], [8, 0]]


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(shape, tile, dtype, density, seed):
    x = matrix(shape, dtype, density, seed)
    for found, expected in zip(build_index(x, tile), reference_build_index(x, tile), strict=True):
        assert found.dtype == torch.int32
        assert torch.equal(found, expected)
    for found, expected in zip(pack_tiles(x, tile), reference_pack_tiles(x, tile), strict=True):
        assert torch.equal(found, expected)


def test_nothing_is_found():
    start, index = build_index(torch.zeros(40, 3), (32, 1))
    assert start.tolist() == [0, 0, 0] and index.numel() == 0
    values, index, start = pack_tiles(torch.zeros(0, 3), (32, 1))
    assert values.shape == (0, 32, 1) and start.tolist() == [0]


def test_wrong_arguments_are_refused():
    for function in (build_index, pack_tiles):
        with pytest.raises(ValueError, match="matrix"):
            function(torch.ones(4), (1, 1))


@pytest.mark.triton
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_triton_finds_the_same_sets(on_triton, shape, tile, dtype, density, seed):
    x = matrix(shape, dtype, density, seed)
    start, index = on_triton(build_index, x, tile)
    true_start, true_index = reference_build_index(x, tile)
    assert torch.equal(start, true_start) and index.dtype == torch.int32
    assert lists(start, index) == lists(true_start, true_index)
    same_tiles(on_triton(pack_tiles, x, tile), reference_pack_tiles(x, tile))


@pytest.mark.triton
def test_triton_needs_more_than_one_program_per_fibre(on_triton):
    x = matrix((40, 700), torch.float32, 0.05, 0)
    for tile in ((32, 1), (1, 5)):
        same_tiles(on_triton(pack_tiles, x, tile), reference_pack_tiles(x, tile))
    same_tiles(on_triton(pack_tiles, x.t(), (1, 5)), reference_pack_tiles(x.t().contiguous(), (1, 5)))
    start, index = on_triton(build_index, torch.zeros(0, 3), (32, 1))
    assert start.tolist() == [0] and index.numel() == 0

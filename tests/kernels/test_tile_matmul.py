from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import tile_matmul as module
from tersor.kernels.count_tiles import grid_of, in_tiles, is_m_axis
from tersor.kernels.sparse_index import pack_tiles
from tersor.kernels.tile_matmul import reference_tile_matmul, reference_tiles, tile_matmul, tiles_by_row

TILES = [(32, 1), (16, 1), (8, 1), (64, 1), (1, 64), (1, 16), (1, 5), (16, 16), (32, 32), (3, 5), (1, 1)]
CASES = {
    "tokens": st.sampled_from([1, 5, 16, 33, 70]),
    "shape": st.tuples(st.sampled_from([1, 32, 75]), st.sampled_from([1, 64, 131])),
    "tile": st.sampled_from(TILES),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 9),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(tokens, shape, tile, density, dtype, seed, whole=False):
    """x, the tiles of a weight and its shape; small whole numbers where asked for."""
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda *size: torch.randint(-4, 5, size, generator=generator).float())
        if whole
        else (lambda *size: torch.randn(*size, generator=generator))
    )
    fibres, tiles = grid_of(shape, tile)
    kept = torch.rand(fibres, tiles, generator=generator) < density
    weight = draw(*shape) if whole else draw(*shape) / shape[1] ** 0.5
    values, start = in_tiles(weight, tile)[kept], torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return draw(tokens, shape[1]).to(dtype), values.to(dtype), kept.nonzero()[:, 1].int(), start.int(), shape


def close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_by_hand():
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [0.0]]])
    index, start = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 3])
    weight = torch.tensor([[3.0, 0, 1], [4, 0, 2], [0, 5, 0]])
    assert torch.equal(reference_tiles(values, index, start, (3, 3)), weight)
    assert torch.equal(tile_matmul(torch.eye(3), values, index, start, (3, 3)), weight.t())
    rows = torch.tensor([[[1.0, 2]], [[3, 4]], [[5, 0]]])  # 1 x 2: two tiles in columns 0 and 1, one in column 2
    weight = torch.tensor([[3.0, 4, 0], [0, 0, 0], [1, 2, 5]])
    arguments = rows, torch.tensor([2, 0, 2]), torch.tensor([0, 2, 3]), (3, 3)
    assert torch.equal(tile_matmul(torch.eye(3), *arguments), weight.t())


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(tokens, shape, tile, density, dtype, seed):
    arguments = layer(tokens, shape, tile, density, dtype, seed)
    close(tile_matmul(*arguments), reference_tile_matmul(*arguments))


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_cpu_is_exact_for_small_whole_numbers(tokens, shape, tile, density, dtype, seed):
    arguments = layer(tokens, shape, tile, density, dtype, seed, whole=True)
    assert torch.equal(tile_matmul(*arguments), reference_tile_matmul(*arguments))


@pytest.mark.parametrize("tile", [(32, 1), (1, 16), (16, 16)])
@pytest.mark.parametrize("tokens", [3, 20])
def test_order_within_a_fibre_is_free(tile, tokens):
    x, values, index, start, shape = layer(tokens, (75, 131), tile, 0.6, torch.float32, 0, whole=True)
    order = torch.cat([torch.arange(b, e).flip(0) for b, e in pairwise(start.tolist())])
    assert torch.equal(
        tile_matmul(x, values[order], index[order], start, shape), tile_matmul(x, values, index, start, shape)
    )


@pytest.mark.parametrize("tokens", [2, 40])
def test_sums_by_row_can_be_prepared(tokens):
    arguments = layer(tokens, (75, 131), (1, 16), 0.5, torch.float32, 1)
    by_row = tiles_by_row(arguments[2], arguments[3], 75)
    assert by_row.start[-1] == len(arguments[1])
    assert torch.equal(tile_matmul(*arguments, by_row), tile_matmul(*arguments))


def test_half_precision_weights_keep_every_value():
    """All float16 values, subnormals and infinities too, through the loops of few tokens."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.float16)
    values = values[~values.isnan()]
    x, index = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    found = tile_matmul(x, values.view(1, -1, 1), index, torch.tensor([0, 1]), (len(values), 1))
    assert torch.equal(found[0], values)


def test_sparse_activations_of_many_tokens():
    """Roles exchanged: the activations are the sparse matrix, indexed at run time."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 96, generator=generator), torch.randn(40, 96, generator=generator)
    x *= torch.rand(2, 96, generator=generator).repeat_interleave(32, 0) < 0.2
    found = tile_matmul(weight, *pack_tiles(x, (32, 1)), tuple(x.shape))
    close(found.t(), x @ weight.t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 63)}, "do not multiply"),
        ({"x": torch.ones(2, 64).half()}, "float16"),
        ({"x": torch.ones(64)}, "matrix"),
        ({"tile_index": torch.zeros(2)}, "shorter"),
        ({"tile_index": torch.tensor([0, 1, 64])}, "64 tiles"),
        ({"tile_index": torch.tensor([0, -1, 1])}, "-1"),
        ({"tile_ptr": torch.tensor([0, 3])}, "tile_ptr"),
        ({"tile_ptr": torch.tensor([0, 4, 3])}, "rise"),
        ({"tile_ptr": torch.tensor([0, 3, 4])}, "rise"),
        ({"shape": (0, 64)}, "hold nothing"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "x": torch.ones(2, 64),
        "tile_values": torch.ones(3, 32, 1),
        "tile_index": torch.tensor([0, 5, 1]),
        "tile_ptr": torch.tensor([0, 2, 3]),
        "shape": (64, 64),
    }
    tile_matmul(**arguments)
    with pytest.raises(ValueError, match=message):
        tile_matmul(**(arguments | change))


def test_nothing_to_multiply():
    x, values, index, start, shape = layer(3, (75, 131), (32, 1), 0.0, torch.float32, 0)
    assert torch.equal(tile_matmul(x, values, index, start, shape), torch.zeros(3, 75))
    assert tile_matmul(x[:0], values, index, start, shape).shape == (0, 75)


@pytest.mark.triton
@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, tokens, shape, tile, density, dtype, seed):
    arguments = layer(tokens, shape, tile, density, dtype, seed)
    close(on_triton(tile_matmul, *arguments), reference_tile_matmul(*arguments))


@pytest.mark.triton
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_triton_is_exact_for_small_whole_numbers(on_triton, tokens, shape, tile, density, dtype, seed):
    arguments = layer(tokens, shape, tile, density, dtype, seed, whole=True)
    assert torch.equal(on_triton(tile_matmul, *arguments), reference_tile_matmul(*arguments))


@pytest.mark.triton
@pytest.mark.parametrize("tile", [(32, 1), (1, 16)])
def test_triton_splits_fibres_and_repeats_itself(on_triton, monkeypatch, tile):
    slices = []
    choose = module._slices
    monkeypatch.setattr(module, "_slices", lambda *a: slices.append(choose(*a)) or slices[-1])
    arguments = layer(3, (300, 40) if is_m_axis(tile) else (40, 700), tile, 0.7, torch.float16, 0)
    first = on_triton(tile_matmul, *arguments)
    close(first, reference_tile_matmul(*arguments))
    assert torch.equal(first, on_triton(tile_matmul, *arguments))
    assert slices[0] > 1


@pytest.mark.triton
def test_triton_keeps_products_of_few_tokens_at_a_time(on_triton, monkeypatch):
    monkeypatch.setattr(module, "SCRATCH", 1 << 12)
    arguments = layer(150, (40, 70), (1, 16), 0.5, torch.float32, 0, whole=True)
    assert torch.equal(on_triton(tile_matmul, *arguments), reference_tile_matmul(*arguments))


@pytest.mark.triton
@pytest.mark.parametrize("tile", [(32, 1), (1, 16)])
def test_triton_multiplies_with_an_index_built_online(on_triton, tile):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(*grid_of((75, 131), tile), generator=generator) < 0.3
    x, values, index, start, shape = layer(20, (75, 131), tile, 1.0, torch.float32, 0, whole=True)
    dense = reference_tiles(values * kept.flatten()[:, None, None], index, start, shape)
    found = on_triton(tile_matmul, x, *on_triton(pack_tiles, dense, tile), shape)
    assert torch.equal(found, x @ dense.t())


@pytest.mark.triton
def test_triton_has_nothing_to_multiply(on_triton):
    x, values, index, start, shape = layer(3, (75, 131), (1, 16), 0.0, torch.float32, 0)
    assert torch.equal(on_triton(tile_matmul, x, values, index, start, shape), torch.zeros(3, 75))

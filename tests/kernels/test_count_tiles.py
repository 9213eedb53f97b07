import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.count_tiles import count_tiles, reference_count_tiles

TILES = [(32, 1), (16, 1), (8, 1), (1, 1), (1, 64), (1, 5), (16, 16), (32, 32), (3, 5)]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASES = {
    "shape": st.tuples(st.sampled_from([1, 31, 32, 70]), st.sampled_from([1, 17, 64, 130])),
    "tile": st.sampled_from(TILES),
    "dtype": st.sampled_from(DTYPES),
    "density": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    "seed": st.integers(0, 9),
}


def matrix(shape, dtype, density, seed):
    """Nonzeros of both signs, or just ones."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=generator) < density
    if dtype in (torch.bool, torch.uint8):
        return mask.to(dtype)
    return (mask * torch.randint(0, 2, shape, generator=generator).mul(2).sub(1)).to(dtype)


def test_by_hand():
    x = torch.zeros(5, 4)
    x[0, 0] = x[1, 0] = x[1, 3] = x[4, 2] = 7
    assert count_tiles(x, (2, 1)).tolist() == [2, 0, 1]
    assert count_tiles(x, (2, 2)).tolist() == [2, 0, 1]
    assert count_tiles(x, (1, 2)).tolist() == [2, 2]  # two column blocks
    assert count_tiles(x, (1, 1)).tolist() == [1, 2, 0, 0, 1]


def test_negative_zero_is_zero_and_nan_is_not():
    x = torch.tensor([[-0.0, 0.0, float("nan"), 1e-45]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert count_tiles(x.to(dtype), (1, 1)).tolist() == [2 if dtype != torch.bfloat16 else 1]


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(shape, tile, dtype, density, seed):
    x = matrix(shape, dtype, density, seed)
    found = count_tiles(x, tile)
    assert found.dtype == torch.int64
    assert torch.equal(found, reference_count_tiles(x, tile))


@pytest.mark.parametrize(
    ("sparsity", "covered"), [(0.9, {32: 0.97, 16: 0.81, 8: 0.57}), (0.99, {32: 0.275, 16: 0.149, 8: 0.077})]
)
def test_random_patterns_cover_what_theory_says(sparsity, covered):
    mask = torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0)) >= sparsity
    for height, expected in covered.items():
        share = count_tiles(mask, (height, 1)).sum() / (mask.numel() / height)
        assert share == pytest.approx(1 - sparsity**height, abs=0.004)
        assert share == pytest.approx(expected, abs=0.006)


def test_views_and_nothing():
    x = matrix((64, 96), torch.float32, 0.1, 0)
    assert torch.equal(count_tiles(x.t(), (16, 1)), reference_count_tiles(x.t().contiguous(), (16, 1)))
    assert count_tiles(x[:0], (32, 1)).tolist() == []
    assert count_tiles(x[:, :0], (32, 1)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("x", "tile", "message"),
    [
        (torch.ones(4), (1, 1), "matrix"),
        (torch.ones(4, 4), (0, 1), "positive"),
        (torch.ones(4, 4), (256, 256), "16384"),
        (torch.ones(4, 4, dtype=torch.complex64), (1, 1), "complex64"),
    ],
)
def test_wrong_arguments_are_refused(x, tile, message):
    with pytest.raises(ValueError, match=message):
        count_tiles(x, tile)


@pytest.mark.triton
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, shape, tile, dtype, density, seed):
    x = matrix(shape, dtype, density, seed)
    assert torch.equal(on_triton(count_tiles, x, tile), reference_count_tiles(x, tile))


@pytest.mark.triton
def test_triton_counts_nothing_and_views(on_triton):
    x = matrix((64, 96), torch.float32, 0.1, 0)
    assert on_triton(count_tiles, x[:, :0], (32, 1)).tolist() == [0, 0]
    assert torch.equal(on_triton(count_tiles, x[:, 8:72], (16, 1)), reference_count_tiles(x[:, 8:72], (16, 1)))

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.group_quantize import group_quantize
from tersor.kernels.group_range import minmax_scale
from tersor.kernels.search_clip import RATIOS, reference_search_clip, search_clip


def random_weight(rows, columns, seed, heavy_tails=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight**3 if heavy_tails else weight) * 0.02


def error(weight, scale, zero_point, bits, size, column_weight=None):
    """Weighted squared error of each group after quantization."""
    codes = group_quantize(weight, scale, zero_point, bits, size).float().unflatten(1, (-1, size))
    zeros = 0 if zero_point is None else zero_point.float()[..., None]
    squared = (weight.float().unflatten(1, (-1, size)) - (codes - zeros) * scale.float()[..., None]).square()
    return (squared if column_weight is None else squared * column_weight.view(-1, size)).sum(2)


SEARCHES = {
    "rows": st.integers(1, 12),
    "groups": st.integers(1, 3),
    "size": st.sampled_from([8, 32, 96]),
    "bits": st.sampled_from([2, 3, 4, 8]),
    "symmetric": st.booleans(),
    "weighted": st.booleans(),
    "scale_dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 9),
}


def case(rows, groups, size, weighted, seed):
    column_weight = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed)) if weighted else None
    return random_weight(rows, groups * size, seed), column_weight


@settings(max_examples=40, deadline=None)
@given(**SEARCHES)
def test_few_ratios_are_searched_exhaustively(rows, groups, size, bits, symmetric, weighted, scale_dtype, seed):
    weight, column_weight = case(rows, groups, size, weighted, seed)
    arguments = (weight, bits, size, symmetric, scale_dtype, column_weight, (1.0, 0.85, 0.7))
    found, expected = search_clip(*arguments), reference_search_clip(*arguments)
    assert found[0].dtype == scale_dtype and (found[1] is None) == symmetric
    found = error(weight, *found, bits, size, column_weight)
    expected = error(weight, *expected, bits, size, column_weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(**SEARCHES)
def test_never_worse_than_min_max(rows, groups, size, bits, symmetric, weighted, scale_dtype, seed):
    weight, column_weight = case(rows, groups, size, weighted, seed)
    found = search_clip(weight, bits, size, symmetric, scale_dtype, column_weight)
    plain = minmax_scale(weight, bits, size, symmetric, scale_dtype)
    found = error(weight, *found, bits, size, column_weight)
    assert (found <= error(weight, *plain, bits, size, column_weight) * 1.0001 + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_within_a_percent_of_the_definition(bits, heavy_tails, weighted):
    weight = random_weight(256, 256, 0, heavy_tails)
    column_weight = torch.rand(256, generator=torch.Generator().manual_seed(1)) if weighted else None
    arguments = (weight, bits, 64, True, torch.bfloat16, column_weight)
    found = error(weight, *search_clip(*arguments), bits, 64, column_weight).sum()
    best = error(weight, *reference_search_clip(*arguments), bits, 64, column_weight).sum()
    plain = error(weight, *minmax_scale(weight, bits, 64, True, torch.bfloat16), bits, 64, column_weight).sum()
    assert found <= best * 1.01
    assert bits == 8 or found < plain * 0.95


@pytest.mark.parametrize("weighted", [False, True])
def test_panels_and_chunks_do_not_matter(monkeypatch, weighted):
    weight = random_weight(70, 96, 2)
    column_weight = torch.rand(96, generator=torch.Generator().manual_seed(1)) if weighted else None
    whole = search_clip(weight, 4, 32, False, torch.bfloat16, column_weight)
    monkeypatch.setattr("tersor.kernels.search_clip._PANEL", 96 * 7)
    pieces = search_clip(weight, 4, 32, False, torch.bfloat16, column_weight)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


def test_threads_do_not_disturb_each_other():
    weights = [random_weight(64, 256, seed) for seed in range(8)]
    alone = [search_clip(w, 4, 64, True, torch.bfloat16)[0] for w in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: search_clip(w, 4, 64, True, torch.bfloat16)[0], weights))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_whole_rows_zero_groups_and_a_single_ratio():
    weight = random_weight(5, 30, 0)
    weight[2] = 0
    scale, _ = search_clip(weight, 4, None, True, torch.float16)
    assert scale.shape == (5, 1) and scale[2] == torch.finfo(torch.float16).eps
    plain = minmax_scale(weight, 4, 30, False, torch.bfloat16)
    single = search_clip(weight, 4, 30, False, torch.bfloat16, ratios=(1.0,))
    assert torch.equal(single[0], plain[0]) and torch.equal(single[1], plain[1])
    assert len(RATIOS) == 16 and RATIOS[0] == 1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        search_clip(torch.ones(2, 10), 4, 3, True, torch.float32)
    with pytest.raises(ValueError, match="column_weight"):
        search_clip(torch.ones(2, 10), 4, 5, True, torch.float32, torch.ones(9))
    with pytest.raises(ValueError, match="ratios"):
        search_clip(torch.ones(2, 10), 4, 5, True, torch.float32, ratios=())


@pytest.mark.triton
@settings(max_examples=10, deadline=None)
@given(**SEARCHES)
def test_triton_finds_the_best_ratio(on_triton, rows, groups, size, bits, symmetric, weighted, scale_dtype, seed):
    weight, column_weight = case(rows, groups, size, weighted, seed)
    arguments = (weight, bits, size, symmetric, scale_dtype, column_weight)
    found, expected = on_triton(search_clip, *arguments), reference_search_clip(*arguments)
    assert found[0].dtype == scale_dtype and (found[1] is None) == symmetric
    found = error(weight, *found, bits, size, column_weight)
    expected = error(weight, *expected, bits, size, column_weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.triton
@pytest.mark.parametrize("weighted", [False, True])
def test_triton_walks_over_wide_groups_and_takes_strided_weights(on_triton, monkeypatch, weighted):
    monkeypatch.setattr("tersor.kernels.search_clip.TILE", 16)
    weight, column_weight = case(5, 2, 70, weighted, 0)
    padded = torch.cat((torch.full((5, 10), 9.0), weight), 1)
    for view in (padded[:, 10:], weight.t().contiguous().t()):
        arguments = (view, 4, 70, False, torch.bfloat16, column_weight)
        found, expected = on_triton(search_clip, *arguments), reference_search_clip(*arguments)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])

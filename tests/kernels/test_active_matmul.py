import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import active_matmul as module
from tersor.kernels.active_matmul import active_matmul, reference_active_matmul

CASES = {
    "tokens": st.sampled_from([1, 2, 7, 16, 33, 40]),
    "rows": st.sampled_from([1, 24, 70]),
    "columns": st.sampled_from([1, 33, 64, 517]),
    "share": st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8, 1.0]),
    "threshold": st.sampled_from([0.0, 0.5]),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 9),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(tokens, rows, columns, share, threshold, dtype, seed, whole=False):
    """x with `share` of its inputs active, the transposed weight and a threshold; small whole numbers where asked for."""
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda *size: torch.randint(-4, 5, size, generator=generator).float())
        if whole
        else (lambda *size: torch.randn(*size, generator=generator))
    )
    x = draw(tokens, columns) * (torch.rand(columns, generator=generator) < share)
    weight = draw(columns, rows) if whole else draw(columns, rows) / columns**0.5
    return x.to(dtype), weight.to(dtype), threshold


def reference(x, weight, threshold):
    return reference_active_matmul(x, weight, threshold).to(x.dtype)


def close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_by_hand():
    weight = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    x = torch.tensor([[0.0, 2, -0.5]])
    assert active_matmul(x, weight).tolist() == [[3.5, 5]]
    assert active_matmul(x, weight, 0.5).tolist() == [[6, 8]]
    assert active_matmul(x, weight, 2.0).tolist() == [[0, 0]]


def test_rows_of_inactive_inputs_are_not_read():
    x, weight, _ = layer(3, 24, 64, 0.3, 0.0, torch.float32, 0)
    expected = active_matmul(x, weight)
    weight[~(x != 0).any(0)] = float("nan")
    assert torch.equal(active_matmul(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_active(dtype):
    weight = torch.ones(8, 2, dtype=dtype)
    x = torch.zeros(1, 8, dtype=dtype)
    x[0, 3] = float("nan")
    assert active_matmul(x, weight, 1.0).isnan().all()
    weight[5] = float("inf")
    assert active_matmul(torch.eye(8, dtype=dtype)[5:6], weight).tolist() == [[float("inf")] * 2]


@settings(max_examples=50, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(**case):
    arguments = layer(**case)
    close(active_matmul(*arguments), reference(*arguments))


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_cpu_is_exact_for_small_whole_numbers(**case):
    arguments = layer(**case, whole=True)
    assert torch.equal(active_matmul(*arguments), reference(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 7)}, "do not multiply"),
        ({"x": torch.ones(2, 8).half()}, "float16"),
        ({"threshold": -1.0}, "negative"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        active_matmul(**({"x": torch.ones(2, 8), "weight_columns": torch.ones(8, 5)} | change))


def test_nothing_to_multiply():
    assert active_matmul(torch.ones(0, 8), torch.ones(8, 5)).shape == (0, 5)
    assert active_matmul(torch.ones(2, 0), torch.ones(0, 5)).tolist() == [[0] * 5] * 2
    assert active_matmul(torch.zeros(2, 8), torch.ones(8, 5)).tolist() == [[0] * 5] * 2


@pytest.mark.triton
@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, **case):
    arguments = layer(**case)
    close(on_triton(active_matmul, *arguments), reference(*arguments))


@pytest.mark.triton
@settings(max_examples=20, deadline=None)
@given(**CASES)
def test_triton_is_exact_for_small_whole_numbers(on_triton, **case):
    arguments = layer(**case, whole=True)
    assert torch.equal(on_triton(active_matmul, *arguments), reference(*arguments))


@pytest.mark.triton
def test_triton_sums_several_segments_per_slice_and_repeats_itself(on_triton, monkeypatch):
    monkeypatch.setattr(module, "SPLITS", 2)
    arguments = layer(3, 70, 2100, 0.4, 0.0, torch.float32, 0)
    first = on_triton(active_matmul, *arguments)
    close(first, reference(*arguments))
    assert torch.equal(first, on_triton(active_matmul, *arguments))


@pytest.mark.triton
def test_triton_does_not_read_rows_of_inactive_inputs(on_triton):
    x, weight, _ = layer(3, 24, 64, 0.3, 0.0, torch.float32, 0)
    expected = on_triton(active_matmul, x, weight)
    weight[~(x != 0).any(0)] = float("nan")
    assert torch.equal(on_triton(active_matmul, x, weight), expected)


@pytest.mark.triton
def test_triton_has_nothing_to_multiply(on_triton):
    assert on_triton(active_matmul, torch.ones(0, 8), torch.ones(8, 5)).shape == (0, 5)
    assert on_triton(active_matmul, torch.zeros(2, 8), torch.ones(8, 5)).tolist() == [[0] * 5] * 2

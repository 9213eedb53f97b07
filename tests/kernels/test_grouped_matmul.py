import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels.grouped_matmul import group_by_expert, grouped_matmul, reference_grouped_matmul

CASES = {
    "counts": st.lists(st.sampled_from([0, 1, 3, 16, 40]), min_size=1, max_size=6),
    "rows": st.sampled_from([1, 24, 70]),
    "columns": st.sampled_from([1, 33, 64]),
    "indexed": st.booleans(),
    "weighted": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 9),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def layer(counts, rows, columns, indexed, weighted, dtype, seed, whole=False):
    """Arguments of a product with `counts` rows per expert; small whole numbers where asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        if whole:
            return torch.randint(-4, 5, size, generator=generator).to(dtype)
        return torch.randn(*size, generator=generator).to(dtype)

    pairs, tokens = sum(counts), 7
    x = draw(tokens if indexed else pairs, columns)
    weights = draw(len(counts), rows, columns)
    token_index = torch.randint(0, tokens, (pairs,), generator=generator).int() if indexed else None
    expert_ptr = torch.tensor([0, *counts]).cumsum(0).int()
    pair_weights = draw(pairs) if weighted else None
    out_index = torch.randperm(pairs, generator=generator).int() if indexed else None
    return x, weights if whole else weights / columns**0.5, token_index, expert_ptr, pair_weights, out_index


def close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_by_hand():
    x = torch.tensor([[1.0, 0], [0, 1]])
    weights = torch.tensor([[[1.0, 2]], [[9, 9]], [[3, 4]]])
    pointers = torch.tensor([0, 1, 1, 3])  # the second expert has no tokens
    assert grouped_matmul(x, weights, torch.tensor([1, 0, 1]), pointers).tolist() == [[2], [3], [4]]
    scattered = grouped_matmul(
        x, weights, torch.tensor([1, 0, 1]), pointers, torch.tensor([1.0, 2, 3]), torch.tensor([2, 0, 1])
    )
    assert scattered.tolist() == [[6], [12], [2]]


def test_groups_by_hand():
    groups = group_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert groups.expert_ptr.tolist() == [0, 2, 2, 4, 6, 6]
    assert groups.pair.tolist() == [1, 2, 0, 4, 3, 5]
    assert groups.token.tolist() == [0, 1, 0, 2, 1, 2]
    with pytest.raises(ValueError, match=r"\[T, k\]"):
        group_by_expert(torch.tensor([0]), 5)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_cpu_agrees_with_the_reference(**case):
    arguments = layer(**case)
    close(grouped_matmul(*arguments), reference_grouped_matmul(*arguments))


@settings(max_examples=20, deadline=None)
@given(**(CASES | {"dtype": st.just(torch.float32)}))
def test_cpu_is_exact_for_small_whole_numbers(**case):
    arguments = layer(**case, whole=True)
    assert torch.equal(grouped_matmul(*arguments), reference_grouped_matmul(*arguments))


def mixture(call, tokens=19, experts=5, chosen=2):
    """A layer of experts through two grouped products, and token by token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 24, generator=generator)
    up, down = torch.randn(experts, 40, 24, generator=generator), torch.randn(experts, 24, 40, generator=generator)
    scores, expert = torch.randn(tokens, experts, generator=generator).softmax(1).topk(chosen)
    groups = group_by_expert(expert, experts)
    hidden = call(grouped_matmul, x, up, groups.token, groups.expert_ptr).relu()
    weights = scores.flatten()[groups.pair.long()]
    found = call(grouped_matmul, hidden, down, None, groups.expert_ptr, weights, groups.pair)
    expected = torch.stack(
        [
            sum(s * (down[e] @ (up[e] @ x[t]).relu()) for s, e in zip(scores[t], expert[t], strict=True))
            for t in range(tokens)
        ]
    )
    torch.testing.assert_close(found.view(tokens, chosen, -1).sum(1), expected, rtol=1e-4, atol=1e-4)


def test_mixture_of_experts():
    mixture(lambda function, *arguments: function(*arguments))


def test_ragged_batch():
    """Batches of 3, 0 and 5 rows, each with a matrix of its own, as in a padded batch product."""
    x, others = torch.randn(8, 16), torch.randn(3, 6, 16)
    lengths = [3, 0, 5]
    padded = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True) @ others.transpose(1, 2)
    expected = torch.cat([padded[i, :length] for i, length in enumerate(lengths)])
    close(grouped_matmul(x, others, None, torch.tensor([0, 3, 3, 8])), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 7)}, "do not multiply"),
        ({"x": torch.ones(2, 8).half()}, "float16"),
        ({"weights": torch.ones(5, 8)}, r"\[E, N, K\]"),
        ({"expert_ptr": torch.tensor([0, 3])}, "expert_ptr"),
        ({"expert_ptr": torch.tensor([0, 1, 2])}, "not 0 to 3"),
        ({"expert_ptr": torch.tensor([0, 4, 3])}, "falls|not"),
        ({"pair_weights": torch.ones(2)}, "pair_weights"),
        ({"out_index": torch.zeros(4, dtype=torch.int32)}, "out_index"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "x": torch.ones(2, 8),
        "weights": torch.ones(2, 5, 8),
        "token_index": torch.tensor([0, 1, 1]),
        "expert_ptr": torch.tensor([0, 1, 3]),
    }
    grouped_matmul(**arguments)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))


def test_nothing_to_multiply():
    nothing = torch.zeros(3, dtype=torch.int32)
    assert grouped_matmul(torch.ones(0, 8), torch.ones(2, 5, 8), None, nothing).shape == (0, 5)


@pytest.mark.triton
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_triton_agrees_with_the_reference(on_triton, **case):
    arguments = layer(**case)
    close(on_triton(grouped_matmul, *arguments), reference_grouped_matmul(*arguments))


@pytest.mark.triton
@settings(max_examples=15, deadline=None)
@given(**(CASES | {"dtype": st.just(torch.float32)}))
def test_triton_is_exact_for_small_whole_numbers(on_triton, **case):
    arguments = layer(**case, whole=True)
    assert torch.equal(on_triton(grouped_matmul, *arguments), reference_grouped_matmul(*arguments))


@pytest.mark.triton
def test_triton_walks_through_many_blocks(on_triton):
    """More blocks of rows than go through W together, and an expert of several."""
    arguments = layer([300, 0, 7, 129, 1, 1, 1, 260], 140, 33, True, True, torch.float32, 0, whole=True)
    assert torch.equal(on_triton(grouped_matmul, *arguments), reference_grouped_matmul(*arguments))


@pytest.mark.triton
def test_triton_mixture_of_experts(on_triton):
    mixture(on_triton)


@pytest.mark.triton
def test_triton_has_nothing_to_multiply(on_triton):
    nothing = torch.zeros(3, dtype=torch.int32)
    assert on_triton(grouped_matmul, torch.ones(0, 8), torch.ones(2, 5, 8), None, nothing).shape == (0, 5)

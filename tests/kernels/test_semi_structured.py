import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import semi_structured as module
from tersor.kernels.semi_structured import (
    expand,
    reference_expand,
    reference_semi_structured_matmul,
    semi_structured_matmul,
    to_semi_structured,
)

CASES = {
    "tokens": st.sampled_from([1, 3, 6, 19]),
    "rows": st.sampled_from([1, 17, 37]),
    "columns": st.sampled_from([(4, 4), (36, 36), (132, 132), (192, 64), (256, 128)]),
    "values": st.sampled_from(["float32", "int8", "e4m3", "4"]),
    "grouped": st.booleans(),
    "seed": st.integers(0, 9),
}


def packed(weight, mask, values):
    """compressed, bitmask, bits of a dense 2:4 weight of which `mask` says what is stored."""
    bitmask = torch.nn.functional.pad(mask, (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))
    bitmask = (bitmask * 2 ** torch.arange(8)).sum(2).to(torch.uint8)
    compressed = weight[mask].view(len(weight), -1)
    if values == "4":
        codes = compressed.int() % 16
        return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), bitmask, 4
    return compressed.to(getattr(torch, {"e4m3": "float8_e4m3fn"}.get(values, values))), bitmask, None


def layer(rows, columns, values, grouped, seed):
    """A dense weight of small integers, some of its stored values zero, times its scale; its parts; the scale."""
    generator = torch.Generator().manual_seed(seed)
    columns, size = columns
    kept = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2)[..., :2]
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, kept, True).flatten(1)
    weight = torch.randint(-7, 8, (rows, columns), generator=generator).float() * mask
    parts = packed(weight, mask, values)
    scale = 2.0 ** torch.randint(-3, 2, (rows, columns // size), generator=generator) if grouped else None
    return weight if scale is None else weight * scale.repeat_interleave(size, 1), parts, scale


def operand(tokens, columns, seed):
    return torch.randint(-3, 4, (tokens, columns), generator=torch.Generator().manual_seed(seed + 1)).float()


def test_golden():
    """The example of the compressed-tensors format."""
    compressed = torch.arange(1.0, 9).view(2, 4)
    bitmask = torch.tensor([[165], [60]], dtype=torch.uint8)
    dense = torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 4], [0.0, 0, 5, 6, 7, 8, 0, 0]])
    assert torch.equal(expand(compressed, bitmask, 8), dense)
    assert torch.equal(reference_expand(compressed, bitmask, 8), dense)
    assert torch.equal(semi_structured_matmul(torch.eye(8), compressed, bitmask), dense.t())
    nibbles = torch.tensor([[0x21, 0x43], [0x65, 0x87]], dtype=torch.uint8)
    signed = torch.where(dense == 8, -8.0, dense)
    assert torch.equal(semi_structured_matmul(torch.eye(8), nibbles, bitmask, bits=4), signed.t())


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_cpu_and_reference_are_exact(tokens, rows, columns, values, grouped, seed):
    weight, (compressed, bitmask, bits), scale = layer(rows, columns, values, grouped, seed)
    x = operand(tokens, columns[0], seed)
    for multiply, spread in (
        (semi_structured_matmul, expand),
        (reference_semi_structured_matmul, reference_expand),
    ):
        assert torch.equal(multiply(x, compressed, bitmask, scale, bits), x @ weight.t())
        assert torch.equal(spread(compressed, bitmask, columns[0], scale, bits), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_takes_16_bits(dtype):
    weight, (compressed, bitmask, _), _ = layer(70, (132, 132), "float32", False, 0)
    x = operand(9, 132, 0)
    found = semi_structured_matmul(x.to(dtype), compressed.to(dtype), bitmask)
    assert torch.equal(found, (x @ weight.t()).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 130)}, "groups of 4"),
        ({"x": torch.ones(2, 136)}, "does not hold"),
        ({"compressed": torch.ones(4, 63)}, r"compressed must be \[4, 64\]"),
        ({"bits": 4}, r"compressed must be \[4, 32\]"),
        ({"bits": 2}, "bits must be"),
        ({"bitmask": torch.ones(4, 16)}, "does not hold"),
        ({"scale": torch.ones(4, 8)}, "groups"),
        ({"sparse": torch.ones(4, 64)}, "sparse is not"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "x": torch.ones(2, 128),
        "compressed": torch.ones(4, 64),
        "bitmask": torch.full((4, 16), 0b10101010, dtype=torch.uint8),
    }
    assert semi_structured_matmul(**arguments).tolist() == [[64.0] * 4] * 2
    with pytest.raises(ValueError, match=message):
        semi_structured_matmul(**arguments | change)


def test_bits_that_are_not_two_of_four_are_refused():
    bitmask = torch.full((4, 16), 0b10101110, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not belong together"):
        semi_structured_matmul(torch.ones(1, 128), torch.ones(4, 64), bitmask)


def test_nothing_to_multiply():
    compressed, bitmask = torch.ones(4, 8), torch.full((4, 2), 0x33, dtype=torch.uint8)
    assert semi_structured_matmul(torch.ones(0, 16), compressed, bitmask).shape == (0, 4)
    assert semi_structured_matmul(torch.ones(2, 16), compressed[:0], bitmask[:0]).shape == (2, 0)


def test_many_tokens_go_to_torch_where_it_has_the_weights():
    """A dense tensor stands in for torch's sparse one, which only a GPU has."""
    weight, (compressed, bitmask, _), _ = layer(5, (132, 132), "float32", False, 0)
    for tokens, expected in ((16, weight), (17, weight + 1)):
        x = operand(tokens, 132, 0)
        assert torch.equal(semi_structured_matmul(x, compressed, bitmask, sparse=weight + 1), x @ expected.t())


def test_torch_has_no_sparse_product_here():
    assert to_semi_structured(torch.zeros(64, 128, dtype=torch.float16)) is None
    with pytest.raises(ValueError, match="weight must be"):
        to_semi_structured(torch.zeros(64))


@pytest.mark.triton
@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_triton_is_exact(on_triton, tokens, rows, columns, values, grouped, seed):
    weight, (compressed, bitmask, bits), scale = layer(rows, columns, values, grouped, seed)
    x = operand(tokens, columns[0], seed)
    assert torch.equal(on_triton(semi_structured_matmul, x, compressed, bitmask, scale, bits), x @ weight.t())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 20])
def test_triton_takes_16_bits(on_triton, dtype, tokens):
    weight, (compressed, bitmask, _), _ = layer(33, (132, 132), "float32", False, 0)
    x = operand(tokens, 132, 0)
    found = on_triton(semi_structured_matmul, x.to(dtype), compressed.to(dtype), bitmask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), x @ weight.t(), rtol=1e-2, atol=1e-2)


@pytest.mark.triton
def test_triton_splits_k_and_repeats_itself(on_triton, monkeypatch):
    splits = []
    choose = module.split_k
    monkeypatch.setattr(module, "split_k", lambda *a: splits.append(choose(*a)) or splits[-1])
    weight, (compressed, bitmask, _), scale = layer(17, (32 * 9, 32), "float32", True, 0)
    x = operand(3, 32 * 9, 0)
    first = on_triton(semi_structured_matmul, x, compressed, bitmask, scale)
    assert torch.equal(first, x @ weight.t())
    assert torch.equal(first, on_triton(semi_structured_matmul, x, compressed, bitmask, scale))
    assert splits[0] > 1


@pytest.mark.triton
def test_torch_multiplies_what_it_was_given():
    """On a GPU that has it; elsewhere there is nothing to test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    weight, (compressed, bitmask, _), _ = layer(64, (128, 128), "float32", False, 0)
    x = operand(33, 128, 0)
    for dtype in (torch.float16, torch.bfloat16):
        dense = weight.to(dtype).cuda()
        sparse = to_semi_structured(dense)
        if sparse is None:
            pytest.skip("torch has no sparse product for this GPU")
        parts = compressed.to(dtype).cuda(), bitmask.cuda()
        found = semi_structured_matmul(x.to(dtype).cuda(), *parts, sparse=sparse)
        assert torch.equal(found.float().cpu(), (x @ weight.t()).to(dtype).float())
        with pytest.raises(ValueError, match="more than 2 nonzeros"):
            to_semi_structured(torch.ones_like(dense))

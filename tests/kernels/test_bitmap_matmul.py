import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import bitmap_matmul as module
from tersor.kernels import bitmap_matmul_cpu
from tersor.kernels.bitmap_matmul import (
    bitmap_matmul,
    block_offsets,
    expand,
    reference_bitmap_matmul,
    reference_expand,
)

VALUES = ["float32", "float16", "bfloat16", "int8", "e4m3", "4", "2"]
CASES = {
    "tokens": st.sampled_from([1, 3, 6, 19]),
    "rows": st.sampled_from([1, 17, 37]),
    "columns": st.sampled_from([(5, 128), (130, 128), (96, 32), (200, 64)]),
    "sparsity": st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    "values": st.sampled_from(VALUES),
    "grouped": st.booleans(),
    "seed": st.integers(0, 9),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def packed(weight, values, block):
    """values, bitmask, offsets, bits of a dense weight, written independently of the kernels' own definitions."""
    mask = weight != 0
    bitmask = torch.nn.functional.pad(mask, (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))
    bitmask = (bitmask * 2 ** torch.arange(8)).sum(2).to(torch.uint8)
    counts = mask.sum(1)
    stored, bits = weight[mask], None
    if values in ("4", "2"):
        bits = int(values)
        codes = torch.nn.functional.pad(stored.int() % 2**bits, (0, -len(stored) % (8 // bits))).view(-1, 8 // bits)
        stored = (codes << torch.arange(0, 8, bits)).sum(1).to(torch.uint8)
    else:
        stored = stored.to(getattr(torch, {"e4m3": "float8_e4m3fn"}.get(values, values)))
    return stored, bitmask, block_offsets(bitmask, counts.cumsum(0) - counts, block), bits


def layer(rows, columns, sparsity, values, grouped, seed):
    """A dense weight as its values hold it, before its scale; values, bitmask, offsets, bits; scale."""
    generator = torch.Generator().manual_seed(seed)
    columns, block = columns
    low = -(1 << int(values) - 1) if values in ("4", "2") else -7
    weight = torch.randint(low, -low, (rows, columns), generator=generator).float()
    weight *= torch.rand(rows, columns, generator=generator) >= sparsity
    scale = None
    if grouped:
        groups = columns // block if columns % block == 0 else 1
        scale = 2.0 ** torch.randint(-3, 2, (rows, groups), generator=generator)
    return weight, packed(weight, values, block), scale


def scaled(weight, scale):
    return weight if scale is None else weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)


def case(tokens, rows, columns, sparsity, values, grouped, seed):
    """Arguments of small integers and powers of two, for which every order of adding gives the same float32, and the
    product."""
    weight, (stored, bitmask, offsets, bits), scale = layer(rows, columns, sparsity, values, grouped, seed)
    x = torch.randint(-3, 4, (tokens, columns[0]), generator=torch.Generator().manual_seed(seed + 1)).float()
    return (x, stored, bitmask, offsets, scale, bits), x @ scaled(weight, scale).t()


def test_golden():
    """The example of the compressed-tensors format."""
    stored = torch.arange(1.0, 9)
    bitmask = torch.tensor([[165], [60]], dtype=torch.uint8)
    offsets = block_offsets(bitmask, torch.tensor([0, 4]))
    assert offsets.tolist() == [[0], [4]]
    dense = [[1.0, 0, 2, 0, 0, 3, 0, 4], [0.0, 0, 5, 6, 7, 8, 0, 0]]
    assert expand(stored, bitmask, offsets, 8).tolist() == dense
    assert reference_expand(stored, bitmask, offsets, 8).tolist() == dense
    x = torch.eye(8)[2:4]
    assert bitmap_matmul(x, stored, bitmask, offsets).tolist() == [[2.0, 5.0], [0.0, 6.0]]
    halves = bitmap_matmul(x, torch.tensor([0x21, 0xF3, 0x70, 0x8], dtype=torch.uint8), bitmask, offsets, bits=4)
    assert halves.tolist() == [[2.0, 0.0], [0.0, 7.0]]


def test_block_offsets():
    bitmask = torch.tensor([[255] * 8 + [1] * 8 + [0, 3]], dtype=torch.uint8)
    assert block_offsets(bitmask, torch.tensor([0]), 64).tolist() == [[0, 64, 72]]
    assert block_offsets(bitmask, torch.tensor([0]), 128).tolist() == [[0, 72]]
    with pytest.raises(ValueError, match="do not agree"):
        block_offsets(bitmask, torch.tensor([1]))
    with pytest.raises(ValueError, match="block must be"):
        block_offsets(bitmask, torch.tensor([0]), 48)
    with pytest.raises(ValueError, match=r"must be \[1\]"):
        block_offsets(bitmask, torch.tensor([0, 0]))


@settings(max_examples=40, deadline=None)
@given(**CASES, wide=st.booleans())
def test_cpu_and_reference_are_exact(tokens, rows, columns, sparsity, values, grouped, seed, wide):
    weight, parts, scale = layer(rows, columns, sparsity, values, grouped, seed)
    arguments, product = case(tokens, rows, columns, sparsity, values, grouped, seed)
    dense = scaled(weight, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap_matmul_cpu, "WIDE", wide and bitmap_matmul_cpu.WIDE)
        patch.setattr(bitmap_matmul_cpu, "PANEL", 64 * columns[0])  # more than one panel
        for multiply, spread in ((bitmap_matmul, expand), (reference_bitmap_matmul, reference_expand)):
            assert torch.equal(multiply(*arguments), product)
            assert torch.equal(spread(*parts[:3], columns[0], scale, parts[3]), dense)
            assert torch.equal(spread(*parts[:3], columns[0], scale, parts[3], torch.bfloat16), dense.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cpu_takes_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 200, generator=generator) * (torch.rand(80, 200, generator=generator) > 0.8)
    weight = weight.to(dtype).float()
    stored, bitmask, offsets, _ = packed(weight, str(dtype).removeprefix("torch."), 128)
    for tokens in (1, 9):
        x = torch.randn(tokens, 200, generator=generator).to(dtype)
        found = bitmap_matmul(x, stored, bitmask, offsets)
        assert found.dtype == dtype and found.is_contiguous()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found.float(), x.float() @ weight.t(), rtol=tolerance, atol=tolerance)


def test_every_bit_pattern_of_a_float_survives():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        stored = every.view(dtype)
        stored = torch.where(stored.isnan(), torch.ones_like(stored), stored)
        bitmask = torch.full((1, len(stored) // 8), 255, dtype=torch.uint8)
        offsets = block_offsets(bitmask, torch.tensor([0]))
        found = expand(stored, bitmask, offsets, len(stored), dtype=dtype)
        assert torch.equal(found[0].view(torch.int16), stored.view(torch.int16))


def test_what_the_bits_ask_for_must_be_there():
    weight = torch.ones(70, 128)
    for stored in (torch.ones(70 * 128 - 1), torch.ones(0)):
        _, bitmask, offsets, _ = packed(weight, "float32", 128)
        with pytest.raises(ValueError, match="do not belong together"):
            bitmap_matmul(torch.ones(1, 128), stored, bitmask, offsets)
        with pytest.raises(ValueError, match="do not belong together"):
            expand(stored, bitmask, offsets, 128)
    with pytest.raises(ValueError, match="do not belong together"):
        bitmap_matmul(torch.ones(9, 128), torch.ones(70 * 128), bitmask, offsets - 5)
    bitmask[3, 5] = 0
    with pytest.raises(ValueError, match="do not belong together"):
        bitmap_matmul(torch.ones(1, 128), torch.ones(70 * 128), bitmask, offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 240)}, "does not hold"),
        ({"x": torch.ones(2, 256, dtype=torch.float16)}, "does not hold values"),
        ({"x": torch.ones(2, 256, dtype=torch.int8)}, "x must be"),
        ({"values": torch.ones(4, 256)}, "1-D"),
        ({"values": torch.ones(1024, dtype=torch.float64)}, "values must be"),
        ({"bits": 4}, "values must be"),
        ({"bits": 3}, "bits must be"),
        ({"offsets": torch.zeros(4, 3, dtype=torch.int32)}, "no blocks"),
        ({"offsets": torch.zeros(4, 2)}, "offsets must be"),
        ({"scale": torch.ones(4, 3)}, "groups"),
        ({"scale": torch.ones(4, 4)}, "groups"),
        ({"scale": torch.ones(3, 1)}, "scale must be"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    stored, bitmask, offsets, _ = packed(torch.ones(4, 256), "float32", 128)
    arguments = {"x": torch.ones(2, 256), "values": stored, "bitmask": bitmask, "offsets": offsets}
    with pytest.raises(ValueError, match=message):
        bitmap_matmul(**arguments | change)


def test_nothing_to_multiply():
    stored, bitmask, offsets, _ = packed(torch.ones(4, 40), "float32", 128)
    assert bitmap_matmul(torch.ones(0, 40), stored, bitmask, offsets).shape == (0, 4)
    assert bitmap_matmul(torch.ones(2, 40), stored[:0], bitmask[:0], offsets[:0]).shape == (2, 0)
    assert expand(stored[:0], bitmask[:0], offsets[:0], 40).shape == (0, 40)


@pytest.mark.triton
@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_triton_is_exact(on_triton, tokens, rows, columns, sparsity, values, grouped, seed):
    arguments, product = case(tokens, rows, columns, sparsity, values, grouped, seed)
    if values in ("float16", "bfloat16"):
        arguments = (arguments[0], arguments[1].float(), *arguments[2:])
    assert torch.equal(on_triton(bitmap_matmul, *arguments), product)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(**{name: CASES[name] for name in ("rows", "columns", "sparsity", "values", "grouped", "seed")})
def test_triton_expands_exactly(on_triton, rows, columns, sparsity, values, grouped, seed):
    weight, (stored, bitmask, offsets, bits), scale = layer(rows, columns, sparsity, values, grouped, seed)
    assert torch.equal(on_triton(expand, stored, bitmask, offsets, columns[0], scale, bits), scaled(weight, scale))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "values"), [(2, None), (20, "int8"), (40, None), (70, None)])
def test_triton_takes_16_bits(on_triton, dtype, tokens, values):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 136, generator=generator) * (torch.rand(33, 136, generator=generator) > 0.8)
    weight = weight.to(dtype).float() if values is None else (weight * 40).round().clamp(-127, 127)
    stored, bitmask, offsets, _ = packed(weight, values or str(dtype).removeprefix("torch."), 64)
    x = torch.randn(tokens, 136, generator=generator).to(dtype)
    found = on_triton(bitmap_matmul, x, stored, bitmask, offsets)
    assert found.dtype == dtype
    size = weight.abs().max().clamp(min=1).item()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), x.float() @ weight.t(), rtol=tolerance, atol=tolerance * size)


@pytest.mark.triton
def test_triton_splits_k_and_repeats_itself(on_triton, monkeypatch):
    splits = []
    choose = module.split_k
    monkeypatch.setattr(module, "split_k", lambda *a: splits.append(choose(*a)) or splits[-1])
    arguments, product = case(3, 17, (32 * 9, 32), 0.8, "float32", False, 0)
    first = on_triton(bitmap_matmul, *arguments)
    assert torch.equal(first, product)
    assert torch.equal(first, on_triton(bitmap_matmul, *arguments))
    assert splits[0] > 1


@pytest.mark.triton
def test_triton_has_nothing_to_multiply(on_triton):
    stored, bitmask, offsets, _ = packed(torch.ones(4, 40), "float32", 128)
    assert on_triton(bitmap_matmul, torch.ones(0, 40), stored, bitmask, offsets).shape == (0, 4)
    assert on_triton(bitmap_matmul, torch.ones(2, 40), stored[:0], bitmask[:0], offsets[:0]).shape == (2, 0)
    assert on_triton(expand, stored[:0], bitmask[:0], offsets[:0], 40).shape == (0, 40)

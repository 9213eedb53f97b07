"""Layers that keep their weight as it is stored: each is the matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import encodings
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.kernels.bitmap_matmul import decode_values, unpack_bits
from tersor.ops.model.choose_linear import quantized_linear, sparse_linear, sparse_quantized_linear
from tersor.ops.model.linears import ActiveLinear, DenseLinear, RemovedLinear, rounded
from tersor.ops.model.sparse_linears import BitmapLinear, TileLinear, nibbles, pack_bits, two_of_four

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(scheme: Scheme, rows: int, columns: int, zeros: float = 0.0, seed: int = 0) -> QuantizedWeight:
    """Made-up codes; `zeros` of them stand for 0."""
    generator = torch.Generator().manual_seed(seed)
    half, groups = 1 << (scheme.bits - 1), scheme.groups(columns)
    scale = torch.rand(rows, groups, generator=generator).to(torch.bfloat16) * 0.1 + 0.01
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    zero_point = None
    if scheme.kind == "float":
        codes = random(rows, columns, seed=seed).mul_(100).to(torch.float8_e4m3fn)
    elif not scheme.symmetric:
        zero_point = torch.randint(-half, half, (rows, groups), generator=generator, dtype=torch.int8)
    drop = torch.rand(rows, columns, generator=generator) < zeros
    nothing = (
        torch.zeros(1, dtype=torch.int8) if zero_point is None else zero_point.repeat_interleave(columns // groups, 1)
    )
    codes = (codes.float() * ~drop).to(codes.dtype) if scheme.kind == "float" else torch.where(drop, nothing, codes)
    if scheme.strategy == "tensor":
        scale = scale[:1, 0]
    if scheme.strategy == "block":
        blocks = -(-rows // scheme.block[0]), -(-columns // scheme.block[1])
        scale = torch.rand(blocks, generator=generator) * 0.1 + 0.01
    return QuantizedWeight(codes, scale, zero_point)


def same(layer, weight: torch.Tensor, dtype: torch.dtype = torch.float32, scheme: Scheme | None = None) -> None:
    """The layer is a linear of `weight`, for any leading dimensions."""
    rows, columns = weight.shape
    assert (layer.out_features, layer.in_features) == (rows, columns)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer.weight.float(), weight, rtol=tolerance, atol=tolerance * float(weight.abs().max()))
    bias = random(rows, seed=4).to(dtype)
    for shape in ((2, 3, columns), (1, columns), (0, columns), (columns,)):
        x = random(*shape, seed=5).to(dtype)
        layer.bias = None
        plain = layer(x)
        layer.bias = torch.nn.Parameter(bias)
        found = layer(x)
        seen = x.reshape(-1, columns)
        if scheme is not None and scheme.activations is not None and len(seen):
            seen = rounded(seen, scheme.activations)
        wanted = (seen.float() @ weight.T).reshape(*shape[:-1], rows)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(plain.float(), wanted, rtol=tolerance, atol=tolerance * scale)
        torch.testing.assert_close(found.float(), wanted + bias.float(), rtol=tolerance, atol=tolerance * max(scale, 1))


SCHEMES = {
    "w4 by 32": (Scheme(4, group_size=32), "Int4Linear"),
    "w4 by row, zero points": (Scheme(4, symmetric=False, strategy="channel"), "Int4Linear"),
    "w4 by 16": (Scheme(4, group_size=16), "DequantizedLinear"),
    "w4a8": (Scheme(4, group_size=32, activations="int8"), "Int4Linear"),
    "w2 by 32": (Scheme(2, group_size=32), "DequantizedLinear"),
    "w3 by 32, zero points": (Scheme(3, symmetric=False, group_size=32), "DequantizedLinear"),
    "w8 by 64": (Scheme(8, group_size=64), "DequantizedLinear"),
    "w8a8 by row": (Scheme(8, strategy="channel", activations="int8"), "Int8Linear"),
    "w8a8 by tensor": (Scheme(8, strategy="tensor", activations="int8"), "Int8Linear"),
    "w8a8 by group": (Scheme(8, group_size=32, activations="int8"), "DequantizedLinear"),
    "fp8 by row": (Scheme(8, "float", strategy="channel", activations="fp8"), "Fp8Linear"),
    "fp8 by tensor": (Scheme(8, "float", strategy="tensor", activations="fp8"), "Fp8Linear"),
    "fp8 by block": (Scheme(8, "float", strategy="block", block=(128, 128), activations="fp8-group"), "Fp8Linear"),
    "fp8 by other block": (
        Scheme(8, "float", strategy="block", block=(16, 32), activations="fp8"),
        "DequantizedLinear",
    ),
    "fp8 weights only": (Scheme(8, "float", strategy="channel"), "DequantizedLinear"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes(name, dtype):
    scheme, kind = SCHEMES[name]
    for rows, columns in ((5, 64), (140, 192)):
        weight = codes_of(scheme, rows, columns)
        layer = quantized_linear(weight, scheme, dtype, CPU)
        assert type(layer).__name__ == kind
        same(layer, encodings.dequantize(weight, scheme), dtype, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
def test_4_bits_in_bfloat16_on_a_cpu(symmetric, monkeypatch):
    scheme = Scheme(4, symmetric=symmetric, group_size=32)
    weight = codes_of(scheme, 48, 96)
    layer = quantized_linear(weight, scheme, torch.bfloat16, CPU)
    assert type(layer).__name__ == "Int4OnCpuLinear"
    same(layer, encodings.dequantize(weight, scheme), torch.bfloat16)
    for tokens in (1, 32, 33):
        x = random(tokens, 96, seed=tokens).bfloat16()
        found = layer(x).float()
        monkeypatch.setenv("TERSOR_KERNELS", "reference")
        wanted = layer(x).detach().float()
        monkeypatch.delenv("TERSOR_KERNELS")
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_columns_in_any_order_of_groups():
    scheme = Scheme(4, group_size=32)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    weight = codes_of(scheme, 6, 64)._replace(group_index=index.int())
    layer = quantized_linear(weight, scheme, torch.float32, CPU)
    assert type(layer).__name__ == "DequantizedLinear"
    same(layer, encodings.dequantize(weight, scheme))


FORMATS = {
    "sparse-bitmask": (None, "BitmapLinear"),
    "sparse-24-bitmask": (None, "SemiStructuredLinear"),
    "vector": ((4, 1), "TileLinear"),
    "block": ((4, 8), "TileLinear"),
    "tiled-csl": (None, "BitmapLinear"),
}


def packed(format: str, shape: tuple[int, int], tile: tuple[int, int] | None) -> Packed:
    return Packed("a.weight", format, "BF16", shape, *shape, 16, 0, tile=tile)


def zeros_for(format: str, weight: torch.Tensor) -> torch.Tensor:
    """Half of it zero, in the pattern of the format."""
    rows, columns = weight.shape
    tile = FORMATS[format][0]
    if format == "sparse-24-bitmask":
        keep = weight.unflatten(1, (-1, 4)).abs().argsort(2).argsort(2) >= 2
        return weight * keep.flatten(1)
    if tile is None:
        return weight * (random(rows, columns, seed=8) > 0)
    grid = random(-(-rows // tile[0]), -(-columns // tile[1]), seed=8) > 0
    return weight * grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[:rows, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_without_zeros(format, dtype):
    tile, kind = FORMATS[format]
    for shape in ((7, 20), (64, 72)):
        weight = zeros_for(format, random(*shape)).to(dtype)
        layer = sparse_linear(weight, packed(format, shape, tile))
        assert type(layer).__name__ == kind
        same(layer, weight.float(), dtype)
        assert layer.stored_bytes < 2 * weight.nbytes


def test_a_pattern_that_is_not_there():
    weight = random(8, 16)
    layer = sparse_linear(weight, packed("sparse-24-bitmask", (8, 16), None))
    assert isinstance(layer, BitmapLinear)
    same(layer, weight)


def test_tiles_along_rows():
    weight = random(9, 40) * (random(9, 5, seed=2) > 0).repeat_interleave(8, 1)
    layer = TileLinear(weight, (1, 8), None)
    same(layer, weight)
    same(layer.to("cpu"), weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_without_zeros(name, format):
    scheme, _ = SCHEMES[name]
    tile, _ = FORMATS[format]
    for rows, columns in ((5, 64), (140, 192)):
        weight = codes_of(scheme, rows, columns, zeros=0.6)
        layer = sparse_quantized_linear(weight, scheme, packed(format, (rows, columns), tile), torch.float32)
        same(layer, encodings.dequantize(weight, scheme), scheme=scheme)
        by_codes = tile is None and name not in ("w4 by 16", "fp8 by block")  # 192 columns are no whole blocks
        assert (getattr(layer, "scale", None) is not None) == by_codes


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.floats(0, 1), st.integers(0, 9))
def test_bits(shape, share, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(unpack_bits(pack_bits(mask), shape[1]), mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-8, 7), max_size=30))
def test_two_codes_to_a_byte(codes):
    stream = nibbles(torch.tensor(codes, dtype=torch.int8))
    assert len(stream) == -(-len(codes) // 2)
    assert decode_values(stream, 4)[: len(codes)].tolist() == codes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_two_of_every_four(rows, groups, seed):
    weight = zeros_for("sparse-24-bitmask", random(rows, 4 * groups, seed=seed))
    weight *= random(rows, 4 * groups, seed=seed + 1) > -0.5  # some fours have fewer than two
    mask = two_of_four(weight)
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert torch.equal(weight * mask, weight)


@pytest.mark.parametrize("activations", ["int8", "fp8", "fp8-group"])
def test_dense_with_rounded_inputs(activations):
    weight = random(6, 130)
    layer = DenseLinear(weight, None, activations)
    same(layer, weight, scheme=Scheme(8, activations=activations))
    x = random(3, 130, seed=1)
    error = torch.linalg.vector_norm(rounded(x, activations) - x) / torch.linalg.vector_norm(x)
    assert 1e-4 < error < 0.04


def test_thresholds():
    weight, x = random(6, 32), random(5, 32, seed=1)
    wanted = torch.where(x.abs() <= 0.7, 0, x) @ weight.T
    torch.testing.assert_close(ActiveLinear(weight, None, 0.7)(x), wanted, rtol=1e-5, atol=1e-5)
    layer = DenseLinear(weight, None, None)
    layer.threshold = 0.7
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    same(ActiveLinear(weight, None, 0.0), weight)


def test_what_was_removed_adds_nothing():
    same(RemovedLinear((4, 6), torch.float32), torch.zeros(4, 6))

"""Rounding to nearest: against brute force, and through a whole data-free run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tersor.cli.main import app
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.encodings import dequantize
from tersor.formats.scheme import Scheme
from tersor.ops.model.schemes import SCHEMES, fit_group, scheme_from_name
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.quantize import data_free
from tersor.ops.quantize.rtn import RTN
from tersor.ops.quantize.run import Request, quantize
from typer.testing import CliRunner

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """With heavy tails, as trained weights have."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.02


def integer_scheme(bits: int, symmetric: bool, size: int | None) -> Scheme:
    return Scheme(bits, symmetric=symmetric, strategy="channel" if size is None else "group", group_size=size)


INTEGER = {
    "rows": st.integers(1, 6),
    "groups": st.integers(1, 3),
    "size": st.sampled_from([16, 24, 32, 40, None]),
    "bits": st.sampled_from([2, 3, 4, 8]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 99),
}


@settings(max_examples=40, deadline=None)
@given(clip=st.booleans(), **INTEGER)
def test_every_code_is_the_nearest(rows, groups, size, bits, symmetric, dtype, seed, clip):
    """Of all codes there are, none is nearer than the chosen one, to within float32 rounding of a tie."""
    weight = random_weight(rows, groups * (size or 32), seed)
    found = RTN(clip).quantize(weight, None, integer_scheme(bits, symmetric, size), dtype)
    assert found.scale.dtype == dtype and (found.zero_point is None) == symmetric
    grouped = weight.double().unflatten(1, (found.scale.shape[1], -1))[..., None]
    scale = found.scale.double()[..., None, None]
    zero = 0 if symmetric else found.zero_point.double()[..., None, None]
    every = (torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64) - zero) * scale
    nearest = (grouped - every).abs().amin(-1)
    chosen = (weight.double() - dequantize(found, integer_scheme(bits, symmetric, size)).double()).abs()
    assert (chosen.view_as(nearest) <= nearest + 1e-4 * scale[..., 0]).all()


@settings(max_examples=30, deadline=None)
@given(**INTEGER)
def test_grid_without_clip_is_the_definition(rows, groups, size, bits, symmetric, dtype, seed):
    """The formulas of the compressed-tensors format, in Python numbers, group by group."""
    weight = random_weight(rows, groups * (size or 32), seed)
    found = RTN(clip=False).quantize(weight, None, integer_scheme(bits, symmetric, size), dtype)
    width, half = size or weight.shape[1], 2 ** (bits - 1)
    for row in range(rows):
        for group in range(weight.shape[1] // width):
            values = weight[row, group * width : (group + 1) * width].tolist()
            low, high = min(0.0, *values), max(0.0, *values)
            span = 2 * max(high, -low) if symmetric else high - low
            scale = torch.tensor(span / (2**bits - 1)).to(dtype)
            assert math.isclose(
                found.scale[row, group].float(), scale.float(), rel_tol=1e-2 if dtype != DTYPES[0] else 1e-6
            )
            if not symmetric:
                exact = -half - low / float(found.scale[row, group])
                assert abs(int(found.zero_point[row, group]) - min(max(exact, -half), half - 1)) <= 0.5 + 1e-4


@settings(max_examples=40, deadline=None)
@given(weighted=st.booleans(), **INTEGER)
def test_clip_is_never_worse(rows, groups, size, bits, symmetric, dtype, seed, weighted):
    weight = random_weight(rows, groups * (size or 32), seed)
    scheme, statistics, importance = integer_scheme(bits, symmetric, size), None, torch.ones(weight.shape[1])
    if weighted:
        statistics = InputStatistics({"column_norms"})
        statistics.add(torch.randn(20, weight.shape[1], generator=torch.Generator().manual_seed(seed)) ** 3)
        importance = statistics.column_norms.square()
    errors = []
    for clip in (True, False):
        found = RTN(clip).quantize(weight, statistics, scheme, dtype)
        squared = (dequantize(found, scheme) - weight).square() * importance
        errors.append(squared.unflatten(1, (found.scale.shape[1], -1)).sum(-1))
    assert (errors[0] <= errors[1] * 1.0001 + 1e-12).all()


def test_clip_helps_where_it_should():
    """Heavy tails in few bits gain; the importance of the inputs steers where."""
    weight, statistics = random_weight(64, 256), InputStatistics({"column_norms"})
    inputs = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    statistics.add(inputs * torch.logspace(-1, 1, 256))
    scheme = Scheme(3, group_size=64)

    def error(clip, given, importance):
        found = RTN(clip).quantize(weight, given, scheme, torch.float32)
        return float(((dequantize(found, scheme) - weight).square() * importance).sum())

    plain, energy = torch.ones(256), statistics.column_norms.square()
    assert error(True, None, plain) < 0.85 * error(False, None, plain)
    assert error(True, statistics, energy) < 0.97 * error(True, None, energy)


FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FP8 = FP8[FP8.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (130, 200), (128, 128), (1, 257)])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_fp8_is_the_nearest_value(strategy, shape, dtype):
    weight = random_weight(*shape)
    scheme = Scheme(8, kind="float", strategy=strategy, block=(128, 128) if strategy == "block" else None)
    found = RTN().quantize(weight, None, scheme, dtype)
    blocks = {"channel": (shape[0], 1), "tensor": (1,), "block": (-(-shape[0] // 128), -(-shape[1] // 128))}
    assert found.scale.shape == blocks[strategy] and found.scale.dtype == dtype
    scale = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for start in range(0, shape[1], 128):
            index = {"channel": (row, 0), "tensor": (0,), "block": (row // 128, start // 128)}[strategy]
            scale[row, start : start + 128] = float(found.scale[index])
    reach = (scale * 448).clamp(min=1e-30)
    nearest = (weight.double()[..., None] - FP8 * scale[..., None]).abs().amin(-1)
    chosen = (weight.double() - dequantize(found, scheme).double()).abs()
    assert (chosen <= nearest + 1e-6 * weight.abs()).all()
    assert (weight.abs() <= reach * (1.01 if dtype != torch.float32 else 1.0001)).all()  # nothing is cut off


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_flat_groups(name, dtype):
    scheme = SCHEMES[name]
    weight = torch.zeros(256, 256)
    weight[1, 128:], weight[2, 3] = 0.5, -7.0
    for symmetric in (True, False) if scheme.kind == "int" and scheme.activations is None else (True,):
        chosen = scheme_from_name(name, symmetric=symmetric)
        found = RTN(clip=False).quantize(weight, None, chosen, dtype)
        decoded = dequantize(found, chosen)
        assert torch.isfinite(decoded).all()
        assert (decoded[weight == 0] == 0).all()
        # half a step of the group: 7.0 and 0.5 stand in groups, blocks and rows of their own, where they set the step
        step = 1 / 16 if chosen.kind == "float" else 1.02 / (2**chosen.bits - 1)
        assert (decoded - weight)[1].abs().max() <= 0.5 * step * (7 if chosen.strategy == "block" else 1)
        assert (decoded - weight)[2].abs().max() <= 7 * step


# ---- fitting a group size


@pytest.mark.parametrize(
    ("columns", "asked", "size"),
    [
        (576, 128, 96),
        (1536, 128, 128),
        (96, 64, 32),
        (64, 128, 64),
        (48, 32, 24),
        (40, 32, 20),
        (51, 32, 17),
        (200, 128, 40),
    ],
)
def test_fitted_group(columns, asked, size):
    found, reason = fit_group(scheme_from_name("w4a16", asked), columns)
    assert (found.strategy, found.group_size) == ("group", size)
    assert columns % size == 0
    assert (reason is None) == (size == asked)
    assert reason is None or (str(columns) in reason and str(asked) in reason and str(size) in reason)


@given(columns=st.integers(16, 4096), asked=st.sampled_from([16, 24, 32, 64, 128, 256]))
def test_fitted_group_always_divides(columns, asked):
    found, _ = fit_group(scheme_from_name("w4a16", asked), columns)
    if found.strategy == "channel":
        assert not any(columns % size == 0 for size in range(16, asked + 1))
        return
    assert columns % found.group_size == 0 and 16 <= found.group_size <= asked
    larger = [size for size in range(found.group_size + 1, asked + 1) if columns % size == 0]
    assert not any(size % 32 == 0 for size in larger)
    assert found.group_size % 8 == 0 or not any(size % 8 == 0 for size in larger)


def test_fitted_group_of_peers_divides_all():
    found, reason = fit_group(scheme_from_name("w4a16", 128), 2048, frozenset({2048, 704}))
    assert found.group_size == 64
    assert "704" in reason and "experts" in reason
    assert fit_group(scheme_from_name("w4a16", 64), 2048, frozenset({2048, 704}))[1] is None


# ---- the whole run


def write_layers(folder, dtype=torch.bfloat16, **widths):
    """A bare checkpoint of linear layers with biases: name -> (out, in)."""
    tensors = {}
    for number, (name, shape) in enumerate(widths.items()):
        tensors[f"model.layers.0.{name}.weight"] = random_weight(*shape, number).to(dtype)
        tensors[f"model.layers.0.{name}.bias"] = torch.randn(shape[0]).to(dtype)
    tensors["model.norm.weight"] = torch.ones(16, dtype=dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


ODD = {"up_proj": (96, 576), "down_proj": (576, 96), "ragged": (130, 200), "prime": (37, 53), "small": (16, 16)}


@pytest.mark.parametrize("panel", [1, 1 << 20], ids=["rows", "whole"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_run_gives_what_the_method_gives(name, symmetric, panel, tmp_path, monkeypatch):
    """Odd widths of every scheme, read in panels: the same codes as the whole weight at once, all else untouched."""
    scheme = SCHEMES[name]
    if not symmetric and scheme.strategy != "group":
        pytest.skip("symmetric only")
    monkeypatch.setattr(data_free, "PANEL_WEIGHTS", panel)
    tensors = write_layers(tmp_path / "model", **ODD)
    report = quantize(Request(str(tmp_path / "model"), tmp_path / "out", name, symmetric=symmetric))
    entries = {entry.name: entry for entry in report.tensors}
    view = DenseView(Checkpoint(tmp_path / "out"))
    assert set(view.tensors) == set(tensors)
    for tensor, weight in tensors.items():
        entry = entries[tensor]
        if weight.dim() == 1:
            assert entry.action == "keep" and entry.reason
            assert torch.equal(view.read(tensor), weight)
            continue
        fitted, reason = fit_group(scheme_from_name(name, symmetric=symmetric), weight.shape[1])
        expected = RTN().quantize(weight, None, fitted, torch.bfloat16)
        found = view.codes(tensor.removesuffix(".weight"))
        assert view.tensors[tensor].scheme == fitted
        assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(found.scale, expected.scale)
        assert (found.zero_point is None) == (expected.zero_point is None)
        assert found.zero_point is None or torch.equal(found.zero_point, expected.zero_point)
        assert entry.reason == (reason or "linear layer in a block")
        decoded = dequantize(expected, fitted)
        relative = float((decoded - weight.float()).square().sum() / weight.float().square().sum())
        assert math.isclose(entry.error["relative_mse"], relative, rel_tol=1e-4)
        assert math.isclose(entry.error["sqnr_db"], -10 * math.log10(relative), rel_tol=1e-4)
        assert entry.after["bytes"] * 8 == pytest.approx(entry.bits * weight.numel())


def test_group_that_does_not_fit(tmp_path):
    """576 columns in groups of 128: fitted and explained, or with --strict refused."""
    write_layers(tmp_path / "model", up_proj=(96, 576))
    arguments = ["quantize", str(tmp_path / "model"), "-q", "--json"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    entry = next(entry for entry in report["tensors"] if entry["action"] == "quantize")
    assert "576 columns are not divisible by 128: groups of 96" in entry["reason"]
    assert "g96" in entry["after"]["dtype"]
    assert any("96" in warning and "vLLM" in warning for warning in report["warnings"])
    refused = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "strict"), "--strict"])
    assert refused.exit_code == 1
    assert "up_proj" in refused.stderr and "576" in refused.stderr and "hint: " in refused.stderr
    assert refused.stdout == "" and not (tmp_path / "strict").exists()


def test_block_that_does_not_fit(tmp_path):
    write_layers(tmp_path / "model", up_proj=(96, 576), down_proj=(130, 256))
    request = Request(str(tmp_path / "model"), tmp_path / "out", "fp8-block")
    reasons = {entry.name.split(".")[-2]: entry.reason for entry in quantize(request).tensors if entry.bits}
    assert reasons["up_proj"] == "576 columns are not divisible by 128: one scale per row"
    assert reasons["down_proj"] == "linear layer in a block"
    arguments = [
        "quantize",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "strict"),
        "--scheme",
        "fp8-block",
        "--strict",
    ]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "--scheme fp8" in refused.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_have_the_dtype_of_the_weights(dtype, tmp_path):
    write_layers(tmp_path / "model", dtype, up_proj=(32, 64))
    quantize(Request(str(tmp_path / "model"), tmp_path / "out", group_size=32))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.up_proj.weight_scale"].dtype == dtype
    assert stored["model.layers.0.up_proj.bias"].dtype == dtype


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "mixtral"])
def test_families(name, family, tmp_path):
    """Decoded layers are near the originals, the right way round; biases and all that is kept are the same bytes."""
    report = quantize(Request(str(family(name)), tmp_path / "out", "w8a16", group_size=32))
    before, after = DenseView(Checkpoint(family(name))), DenseView(Checkpoint(tmp_path / "out"))
    assert set(before.tensors) == set(after.tensors)
    quantized = {entry.name for entry in report.tensors if entry.action == "quantize"}
    assert quantized
    for tensor in before.tensors:
        original, found = before.read(tensor), after.read(tensor)
        if tensor in quantized:
            assert (found - original.float()).abs().max() < 0.01 * original.abs().max()
        else:
            assert torch.equal(found, original) and found.dtype == original.dtype
    assert any(tensor.endswith(".bias") for tensor in before.tensors) == (name in ("gpt2", "opt", "bert"))


def test_conv1d_groups_run_along_the_inputs(family, tmp_path):
    """A Conv1D holds [in, out]; groups are of inputs all the same."""
    quantize(Request(str(family("gpt2")), tmp_path / "out", group_size=32))
    before, after = DenseView(Checkpoint(family("gpt2"))), DenseView(Checkpoint(tmp_path / "out"))
    name = next(name for name in before.tensors if name.endswith("0.mlp.c_fc.weight"))
    weight = before.read(name)
    assert weight.shape == (64, 256)
    scheme = scheme_from_name("w4a16", 32)
    expected = RTN().quantize(weight.T.contiguous(), None, scheme, torch.float16)
    found = after.codes(name.removesuffix(".weight"))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    assert torch.equal(after.read(name), dequantize(expected, scheme).T)


def test_pruned_zeros_stay(tmp_path):
    tensors = write_layers(tmp_path / "model", up_proj=(64, 128))
    name = "model.layers.0.up_proj.weight"
    tensors[name][:, ::2] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    for number, (scheme, symmetric) in enumerate([("w4a16", True), ("w4a16", False), ("w8a8", True), ("fp8", True)]):
        out = tmp_path / f"out{number}"
        report = quantize(Request(str(tmp_path / "model"), out, scheme, symmetric=symmetric))
        assert (DenseView(Checkpoint(out)).read(name)[:, ::2] == 0).all()
        assert next(entry for entry in report.tensors if entry.name == name).sparsity == 0.5

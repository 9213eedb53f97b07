"""Students of quantized checkpoints: weights trained through rounding, or scales under codes that stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats import encodings
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.students.layers import FakeQuantizedLinear, QuantizedLinear
from tersor.ops.model import load
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.sparsify.request import Request as SparsifyRequest
from tersor.ops.sparsify.run import sparsify
from test_distill_students import (
    close,
    output,
    pruned,
    same_bytes,
    student_of,
    train,
    trained_tensors,
    write,
    zeros_in,
)

QUANTIZED = [
    ("llama", "w4a16", {"group_size": 32}),
    ("llama-tied", "w4a16", {"group_size": -1, "symmetric": False}),
    ("qwen3", "w8a16", {"group_size": 32, "symmetric": False}),
    ("gemma", "w3a16", {"group_size": 32}),
    ("phi3", "w2a16", {"group_size": 32}),
    ("gpt2", "w4a16", {"group_size": 32, "format": "gptq"}),
    ("llama", "w3a16", {"group_size": 32, "format": "gptq", "symmetric": False}),
    ("qwen2-moe", "w4a16", {"group_size": 16}),
    ("mixtral", "w8a8", {}),
    ("opt", "w8a8", {}),
    ("bert-mlm", "fp8", {}),
    ("llama-bias", "fp8-block", {}),
]


def quantized(model: Path, out: Path, scheme: str, **settings) -> Path:
    quantize(QuantizeRequest(str(model), out, scheme=scheme, **settings))
    return out


def tolerance_of(folder: Path) -> float:
    """Where inputs are rounded to codes, one that lies between two of them may go either way."""
    schemes = [entry.scheme for entry in DenseView(open_checkpoint(folder)).tensors.values() if entry.scheme]
    return 3e-2 if any(scheme.activations for scheme in schemes) else 1e-4


def parts(folder: Path, suffixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Stored tensors of quantized modules."""
    view = DenseView(open_checkpoint(folder))
    names = {part for name, entry in view.tensors.items() if entry.scheme for part in view.stored_names(name)}
    return {name: view.checkpoint.read(name) for name in sorted(names) if name.endswith(suffixes)}


def layers_of(student) -> set[str]:
    return {type(layer).__name__ for layer in student.model.modules() if isinstance(layer, QuantizedLinear)}


CODES = (".weight_packed", ".qweight", ".weight")
OTHERS = (".weight_scale", ".scales", ".weight_zero_point", ".qzeros", ".weight_shape", ".g_idx")


@pytest.mark.parametrize(("name", "scheme", "settings"), QUANTIZED, ids=str)
def test_quantization_aware(name, scheme, settings, family, tmp_path):
    """Codes train; scales and zero points are, byte for byte, those of the checkpoint."""
    folder = quantized(family(name, dtype="float32"), tmp_path / "small", scheme, **settings)
    student = student_of(folder)
    assert layers_of(student) == {"FakeQuantizedLinear"}
    same_bytes(student)
    tolerance = tolerance_of(folder)
    close(output(student.model), output(load(folder, "cpu", keep_packed=False)), tolerance)
    train(student)
    trained = write(student, folder, tmp_path / "trained")
    close(output(load(trained, "cpu", keep_packed=False)), output(student.model), tolerance)
    before, after = parts(folder, CODES), parts(trained, CODES)
    raw = [tensor.view(torch.uint8) for tensor in (*before.values(), *after.values())]
    assert all(not torch.equal(*pair) for pair in zip(raw[: len(before)], raw[len(before) :], strict=True))
    kept = parts(folder, OTHERS)
    assert kept and all(torch.equal(tensor, parts(trained, OTHERS)[part]) for part, tensor in kept.items())
    assert not student.zeros  # what rounding made zero is free


@pytest.mark.parametrize(("name", "scheme", "settings"), QUANTIZED, ids=str)
def test_scales_alone(name, scheme, settings, family, tmp_path):
    """Codes and zero points are, byte for byte, those of the checkpoint."""
    folder = quantized(family(name, dtype="float32"), tmp_path / "small", scheme, **settings)
    student = student_of(folder, quantized="scales")
    assert layers_of(student) == {"ScaledLinear"}
    assert set(student.scales) == {path for path in student.trainable() if path.endswith(".gain")}
    same_bytes(student)
    tolerance = max(tolerance_of(folder), 1e-2)  # scales of gptq are fp16
    close(output(student.model), output(load(folder, "cpu", keep_packed=False)), tolerance)
    train(student, lr=0.01)
    trained = write(student, folder, tmp_path / "trained")
    close(output(load(trained, "cpu", keep_packed=False)), output(student.model), tolerance)
    kept = parts(folder, (*CODES, ".weight_zero_point", ".qzeros", ".weight_shape", ".g_idx"))
    assert kept and all(torch.equal(tensor, parts(trained, CODES + OTHERS)[part]) for part, tensor in kept.items())
    scales = parts(trained, (".weight_scale", ".scales"))
    assert all(not torch.equal(tensor, parts(folder, OTHERS)[part]) for part, tensor in scales.items())


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8"])
def test_bfloat16_scales(scheme, family, tmp_path):
    folder = quantized(family("llama"), tmp_path / "small", scheme)
    for how in ("qat", "scales"):
        student = student_of(folder, quantized=how)
        same_bytes(student)
        train(student, lr=3e-3)
        trained = write(student, folder, tmp_path / how)
        close(output(load(trained, "cpu", keep_packed=False)), output(student.model), 0.05)


def test_nothing_but_scales(family, tmp_path):
    folder = quantized(family("mixtral"), tmp_path / "small", "w4a16", group_size=32)
    student = student_of(folder, train="scales")
    assert set(student.trainable()) == set(student.scales)
    assert all(tensor.endswith(".weight_scale") for tensor in trained_tensors(student))


def test_scales_stay_within_their_dtype(family, tmp_path):
    folder = quantized(family("llama"), tmp_path / "small", "w4a16", group_size=32, format="gptq")
    student = student_of(folder, train="scales")
    path = next(iter(student.scales))
    with torch.no_grad():
        student.trainable()[path][0] = -1.0
        student.trainable()[path][1] = 1e9
    student.after_step()
    stored = next(name for name, parameter in student.changed.items() if parameter == path)
    scales = dict(student.export())[stored]
    assert not scales[:, 0].any() and (scales[:, 1] > 1e3).all() and scales.isfinite().all()


def test_frozen_layers_keep_codes(family, tmp_path):
    """They need no dense weights."""
    folder = quantized(family("llama"), tmp_path / "small", "w4a16", group_size=32)
    student = student_of(folder, include=[r"layers\.0\."])
    kinds = {path: type(layer) for path, layer in student.model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(kinds) == 14
    assert all((kind is FakeQuantizedLinear) == ("layers.0." in path) for path, kind in kinds.items())
    assert all("layers.0." in name for name in trained_tensors(student))


@pytest.mark.parametrize("pattern", ["layers.0.*q_proj.weight$", "layers.0.*q_proj.weight_packed"])
def test_patterns_know_both_names(pattern, family, tmp_path):
    folder = quantized(family("llama"), tmp_path / "small", "w4a16", group_size=32)
    assert list(student_of(folder, include=[pattern]).trainable()) == ["model.layers.0.self_attn.q_proj.weight"]


def test_a_quantized_head(family, tmp_path):
    folder = quantized(family("llama", dtype="float32"), tmp_path / "small", "w8a16", group_size=32, include=["."])
    student = student_of(folder)
    assert isinstance(student.model.lm_head, FakeQuantizedLinear)
    weight, bias = student.head()
    assert weight.shape == (256, 64) and bias is None
    assert torch.equal(
        weight, encodings.dequantize(student.view.codes("lm_head"), student.view.tensors["lm_head.weight"].scheme)
    )
    weight.sum().backward()
    assert student.model.lm_head.weight.grad.any()


ZEROS = [
    ("llama", "unstructured", "w4a16", {"group_size": 32}),
    ("gpt2", "unstructured", "w4a16", {"group_size": 32, "format": "gptq"}),
    ("mixtral", "2:4", "w8a16", {"group_size": 32, "symmetric": False}),
    ("opt", "unstructured", "w8a8", {}),
    ("llama", "unstructured", "fp8", {}),
]


@pytest.mark.parametrize(("name", "pattern", "scheme", "settings"), ZEROS, ids=str)
def test_zeros_of_a_pruned_model_stay(name, pattern, scheme, settings, family, tmp_path):
    zeros = pruned(family(name, dtype="float32"), tmp_path / "zeros", pattern)
    folder = quantized(zeros, tmp_path / "small", scheme, **settings)
    before = zeros_in(folder)
    for how in ("qat", "scales"):
        student = student_of(folder, quantized=how)
        same_bytes(student)
        assert len(student.zeros) == (len(before) if how == "qat" else 0)
        train(student, lr=1e-3)
        after = zeros_in(write(student, folder, tmp_path / how))
        assert after.keys() == before.keys()
        assert all(bool(after[tensor][mask].all()) for tensor, mask in before.items())
    assert not student_of(folder, keep_zeros=False).zeros


@pytest.mark.parametrize("remove", ["layers", "neurons"])
def test_zeros_of_rounding_are_free_after_other_cuts(remove, family, text, tmp_path):
    cut = tmp_path / "cut"
    prune(PruneRequest(str(family("llama")), cut, remove, sparsity=0.5, calib=str(text), samples=2, seq_len=32))
    folder = quantized(cut, tmp_path / "small", "w4a16", group_size=16)
    assert zeros_in(folder)
    assert not student_of(folder).zeros


def test_two_of_four_needs_no_report(family, tmp_path):
    zeros = pruned(family("llama"), tmp_path / "zeros", "2:4")
    folder = quantized(zeros, tmp_path / "small", "w4a16", group_size=32)
    (folder / "report.json").unlink()
    assert len(student_of(folder).zeros) == 14


@pytest.mark.parametrize(
    ("name", "pattern", "scheme", "settings", "form"),
    [
        ("llama", "unstructured", "w4a16", {"group_size": 32}, "sparse-bitmask"),
        ("gpt2", "unstructured", "w4a16", {"group_size": 32, "format": "gptq"}, "sparse-bitmask"),
        ("mixtral", "unstructured", "w3a16", {"group_size": 32}, "sparse-bitmask"),
        ("llama", "2:4", "w8a8", {}, "sparse-24-bitmask"),
    ],
)
def test_packed_over_quantized(name, pattern, scheme, settings, form, family, tmp_path):
    zeros = pruned(family(name), tmp_path / "zeros", pattern, 0.5 if pattern == "2:4" else 0.7)
    small = quantized(zeros, tmp_path / "small", scheme, **settings)
    folder = tmp_path / "sparse"
    sparsify(SparsifyRequest(str(small), folder, format=form, device="cpu"))
    (folder / "report.json").unlink()
    student = student_of(folder)
    same_bytes(student)
    before = zeros_in(folder)
    assert len(student.zeros) == len(before)
    train(student, lr=1e-3)
    after = zeros_in(write(student, folder, tmp_path / "trained"))
    assert all(bool(after[tensor][mask].all()) for tensor, mask in before.items())


def desc_act(folder: Path, out: Path, version: str) -> Path:
    """The same gptq checkpoint with groups that are no runs of columns, and zero points by another version."""
    shutil.copytree(folder, out)
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)].contiguous()
        if name.endswith(".qzeros"):
            tensors[name] = torch.randint(
                -(2**31), 2**31 - 1, tensor.shape, generator=generator, dtype=torch.int64
            ).int()
    config["quantization_config"] |= {"desc_act": True, "checkpoint_format": version, "sym": False}
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_as_others_write_it(version, bits, family, tmp_path):
    """Any zero point, groups in any order: what `encode` would not write is given back as it is, and codes fit it."""
    small = quantized(family("llama"), tmp_path / "small", f"w{bits}a16", group_size=32, format="gptq")
    folder = desc_act(small, tmp_path / version, version)
    for how in ("qat", "scales"):
        student = student_of(folder, quantized=how)
        same_bytes(student)
        train(student, lr=1e-3)
        trained = write(student, folder, tmp_path / f"{version}-{how}")
        close(output(load(trained, "cpu", keep_packed=False)), output(student.model), 0.05)


def test_scales_of_zero_keep_their_codes(family, tmp_path):
    small = quantized(family("llama"), tmp_path / "small", "w4a16", group_size=32)
    tensors = load_file(small / "model.safetensors")
    for name in tensors:
        if name.endswith("q_proj.weight_scale"):
            tensors[name][::3] = 0
    save_file(tensors, small / "model.safetensors")
    for how in ("qat", "scales"):
        same_bytes(student_of(small, quantized=how))


def test_a_quantized_table_is_refused(family, tmp_path):
    small = quantized(family("llama"), tmp_path / "small", "w8a16", group_size=32)
    tensors = load_file(small / "model.safetensors")
    name = "model.embed_tokens.weight"
    table = round_to_nearest(tensors.pop(name).float(), Scheme(8, group_size=32), torch.bfloat16)
    encoding, module = encodings.encoding("compressed-tensors"), name.removesuffix(".weight")
    tensors |= encoding.encode(module, table, Scheme(8, group_size=32))
    save_file(tensors, small / "model.safetensors")
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(TersorError, match=r"embed_tokens\.weight.*no linear layer"):
        student_of(small)

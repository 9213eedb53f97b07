"""Weights of every encoding as headers tell them: dense shapes, all bytes counted, and zeros that are declared."""

from __future__ import annotations

import json
from pathlib import Path

import header_models as models
import pytest
from tersor.formats import compressed_tensors, gptq
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import load_hardware
from tersor.formats.scheme import Scheme
from tersor.ops.model.facts import facts
from tersor.ops.model.operators import operators
from tersor.ops.model.stored import place_of, stored_weights
from tersor.ops.profile.headers.run import profile_headers
from tersor.ops.profile.request import Workload

TINY = models.TINY_LLAMA


def profile(folder: Path, hardware: str = "h100", **workload) -> dict:
    return profile_headers(Checkpoint(folder), load_hardware(hardware), Workload(**workload))


def codes(data: dict) -> set[str]:
    return {warning["code"] for warning in data["warnings"]}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.12.up_proj.weight", ("model.layers", 3, "mlp.experts.*.up_proj.weight", True)),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", ("model.layers", 3, "mlp.shared_experts.up_proj.weight", False)),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", ("encoder.block", 0, "layer.1.DenseReluDense.wi.weight", False)),
        ("h.0.attn.bias", ("h", 0, "attn.bias", False)), ("0.weight", ("", 0, "weight", False)),
        ("x.12a.3.w", ("x.12a", 3, "w", False)), ("model.embed_tokens.weight", None), ("layers.1", None),
        (f"layers.{'9' * 5000}.w", None),
    ],
)  # fmt: skip
def test_places_in_the_blocks(name, place):
    assert place_of(name) == place


def quantized(folder: Path, encoding, scheme: Scheme, method: str) -> tuple[Path, dict]:
    """TINY with the linear layers of its blocks quantized, headers only; and its layout."""
    schemes, layout = {}, {}
    for name, shape in models.llama_shapes(TINY).items():
        if "proj" in name:
            module = name.removesuffix(".weight")
            schemes[module] = scheme
            layout |= encoding.layout(module, shape, scheme, "BF16")
        else:
            layout[name] = ("BF16", shape)
    config = TINY | {"quantization_config": encoding.quantization_config(schemes, ["lm_head"])}
    assert config["quantization_config"]["quant_method"] == method
    return models.write_layout(folder, config, layout), layout


@pytest.mark.parametrize(
    ("encoding", "scheme", "method", "label", "precision"),
    [
        (compressed_tensors, Scheme(4, group_size=32), "compressed-tensors", "int4", ("bf16", True)),
        (compressed_tensors, Scheme(4, symmetric=False, group_size=32), "compressed-tensors", "int4", ("bf16", True)),
        (compressed_tensors, Scheme(8, strategy="channel"), "compressed-tensors", "int8", ("bf16", True)),
        (compressed_tensors, Scheme(8, strategy="channel", activations="int8"), "compressed-tensors", "int8", ("int8", False)),
        (compressed_tensors, Scheme(8, "float", strategy="channel", activations="fp8"), "compressed-tensors", "fp8", ("fp8", False)),
        (gptq, Scheme(4, group_size=32), "gptq", "int4", ("bf16", True)),
        (gptq, Scheme(3, strategy="channel"), "gptq", "int3", ("bf16", True)),
    ],
)  # fmt: skip
def test_quantized_weights_are_seen_dense(tmp_path, encoding, scheme, method, label, precision):
    folder, _ = quantized(tmp_path / "q", encoding, scheme, method)
    checkpoint = Checkpoint(folder)
    weights = stored_weights(checkpoint)
    assert {name: weight.shape for name, weight in weights.items()} == models.llama_shapes(TINY)
    assert sum(weight.nbytes for weight in weights.values()) == checkpoint.nbytes
    linear = weights["model.layers.0.mlp.up_proj.weight"]
    assert linear.label == label
    found = {operator.name: operator for operator in operators(facts(checkpoint, weights), weights)}
    assert (found["mlp.up_proj"].precision, found["mlp.up_proj"].unpacks) == precision
    assert (found["lm_head"].precision, found["lm_head"].unpacks) == ("bf16", False)
    dense = profile(models.write_model(tmp_path / "dense", TINY, models.llama_shapes(TINY)))
    assert profile(folder)["flops"] == dense["flops"]


def test_packed_rows_whose_width_only_the_shape_tensor_tells(tmp_path):
    """3 bits by channel: 33 words may hold 352 columns or fewer. The two numbers are read then, without torch."""
    scheme, shape = Scheme(3, strategy="channel"), (64, 350)
    layout = {"model.layers.0.mlp.up_proj.weight_packed": ("I32", (64, 33))}
    layout |= {
        k: v
        for k, v in compressed_tensors.layout("model.layers.0.mlp.up_proj", shape, scheme, "BF16").items()
        if "packed" not in k
    }
    config = {"quantization_config": compressed_tensors.quantization_config({"model.layers.0.mlp.up_proj": scheme}, [])}
    checkpoint = Checkpoint(models.write_layout(tmp_path / "m", config, layout))
    info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight_shape"]
    with open(info.file, "r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"".join(extent.to_bytes(8, "little") for extent in shape))
    assert stored_weights(checkpoint)["model.layers.0.mlp.up_proj.weight"].shape == shape


def test_fp8_as_deepseek_stores_it(tmp_path):
    layout = {}
    for name, shape in models.llama_shapes(TINY).items():
        layout[name] = ("F8_E4M3" if "proj" in name else "BF16", shape)
        if "proj" in name:
            layout[f"{name}_scale_inv"] = ("F32", (1, 1))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    checkpoint = Checkpoint(models.write_layout(tmp_path / "m", TINY | {"quantization_config": settings}, layout))
    weights = stored_weights(checkpoint)
    assert set(weights) == set(models.llama_shapes(TINY))
    assert sum(weight.nbytes for weight in weights.values()) == checkpoint.nbytes
    found = {operator.name: operator for operator in operators(facts(checkpoint, weights), weights)}
    assert found["mlp.up_proj"].precision == "fp8" and found["mlp.up_proj"].label == "fp8"
    assert "no-fp8" in codes(profile(checkpoint.path, "a100"))
    assert "no-fp8" not in codes(profile(checkpoint.path, "h100"))


def test_awq(tmp_path):
    layout = {}
    for name, (out, *inputs) in models.llama_shapes(TINY).items():
        module = name.removesuffix(".weight")
        if "proj" not in name:
            layout[name] = ("BF16", (out, *inputs))
            continue
        layout[f"{module}.qweight"] = ("I32", (inputs[0], out // 8))
        layout[f"{module}.qzeros"] = ("I32", (inputs[0] // 32, out // 8))
        layout[f"{module}.scales"] = ("F16", (inputs[0] // 32, out))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    checkpoint = Checkpoint(models.write_layout(tmp_path / "m", TINY | {"quantization_config": settings}, layout))
    weights = stored_weights(checkpoint)
    assert {name: weight.shape for name, weight in weights.items()} == models.llama_shapes(TINY)
    assert sum(weight.nbytes for weight in weights.values()) == checkpoint.nbytes


def test_factors(tmp_path):
    """A matrix of rank 4 costs the products with both factors, not with the matrix they stand for."""
    module = "model.layers.0.mlp.up_proj"
    layout = {name: ("BF16", shape) for name, shape in models.llama_shapes(TINY).items() if module not in name}
    layout |= {f"{module}.lr_a": ("BF16", (128, 4)), f"{module}.lr_b": ("BF16", (4, 64))}
    folder = models.write_layout(tmp_path / "m", TINY, layout)
    entry = {"kind": "low_rank", "rank": 4, "shape": [128, 64], "dtype": "BF16", "transposed": False}
    (folder / "lowrank.json").write_text(json.dumps({"schema": "tersor.lowrank/1", "modules": {module: entry}}))
    weight = stored_weights(Checkpoint(folder))[f"{module}.weight"]
    assert (
        weight.shape == (128, 64)
        and weight.macs == weight.params == 4 * (128 + 64)
        and weight.nbytes == 2 * weight.params
    )
    dense = profile(models.write_model(tmp_path / "dense", TINY, models.llama_shapes(TINY)), batch=1, prompt=10)
    saved = dense["flops"]["prefill_square_flops"] - profile(folder, prompt=10)["flops"]["prefill_square_flops"]
    assert saved == 2 * 10 * (128 * 64 - 4 * (128 + 64))


def test_kronecker_factors_take_the_cheaper_order(tmp_path):
    module = "model.layers.0.mlp.up_proj"
    layout = {name: ("BF16", shape) for name, shape in models.llama_shapes(TINY).items() if module not in name}
    layout |= {f"{module}.kron_b": ("BF16", (2, 16, 4)), f"{module}.kron_c": ("BF16", (2, 8, 16))}
    folder = models.write_layout(tmp_path / "m", TINY, layout)
    entry = {"kind": "kronecker", "terms": 2, "shape": [128, 64], "dtype": "BF16", "transposed": False}
    (folder / "lowrank.json").write_text(json.dumps({"schema": "tersor.lowrank/1", "modules": {module: entry}}))
    # x as [4, 16]: first Cᵀ (4·16·8), then B (16·4·8); the other way 16·4·16, then 16·16·8
    assert stored_weights(Checkpoint(folder))[f"{module}.weight"].macs == 2 * (4 * 16 * 8 + 16 * 4 * 8)


def test_the_report_of_prune_declares_zeros(tmp_path):
    folder = models.write_model(tmp_path / "m", TINY, models.llama_shapes(TINY))
    assert profile(folder)["sparsity"] is None
    step = {"command": "prune", "args": {"remove": "weights", "pattern": "2:4"}, "totals": {"sparsity": 0.5}}
    (folder / "report.json").write_text(json.dumps(step | {"history": []}))
    assert profile(folder)["sparsity"] == {"pattern": "2:4", "sparsity": 0.5, "source": "report.json"}
    assert "2:4-stored-dense" in codes(profile(folder))
    later = {"command": "quantize", "args": {}, "totals": {"sparsity": 0.45}, "history": [step]}
    (folder / "report.json").write_text(json.dumps(later))
    assert profile(folder)["sparsity"]["sparsity"] == 0.45
    width = {"command": "prune", "args": {"remove": "neurons", "pattern": "unstructured"}, "totals": {"sparsity": None}}
    for content in (json.dumps(width), "not json", "[]", "[" * 100_000):
        (folder / "report.json").write_text(content)
        assert profile(folder)["sparsity"] is None


def test_the_config_declares_zeros(tmp_path):
    settings = quantized(
        tmp_path / "q",
        compressed_tensors,
        Scheme(8, "float", strategy="channel", activations="fp8"),
        "compressed-tensors",
    )
    folder = settings[0]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"sparsity_structure": "unstructured", "global_sparsity": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert profile(folder)["sparsity"] == {"pattern": "unstructured", "sparsity": 0.5, "source": "config.json"}
    assert "zeros-are-read" in codes(profile(folder))

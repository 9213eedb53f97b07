"""Neurons, heads and channels over the families: what is written loads and computes what the masked model does."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tersor.formats.errors import TersorError
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tiny_models import FAMILIES, IMAGE_FAMILIES

ALL = FAMILIES | IMAGE_FAMILIES
NEURONS = ("llama", "llama-tied", "llama-bias", "gemma3", "gpt2", "opt", "phi", "phi3", "falcon", "mixtral", "qwen3-moe",
           "qwen2-moe", "bert-mlm", "vit")  # fmt: skip
HEADS = ("llama-tied", "llama-bias", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "mixtral", "vit")
CHANNELS = ("llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen2-moe")


@pytest.fixture
def shrink(tmp_path, text):
    """shrink(model, remove, **request) -> output folder; keep_shape gives the masked model."""

    def run(model, remove, name="out", **changes):
        settings = {"method": "magnitude", "repair": False, "sparsity": 0.5 if remove == "heads" else 0.25, "samples": 4,
                    "seq_len": 32, "calib": str(text), "device": "cpu"}  # fmt: skip
        prune(Request(model=str(model), output=tmp_path / name, remove=remove, **settings | changes))
        return tmp_path / name

    return run


def loaded(folder, family):
    """The model from `from_pretrained`, which must find exactly the tensors that it wants."""
    class_ = getattr(transformers, ALL[family][0])
    model, info = class_.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator))[0]
    return model(input_ids=torch.randint(1, 200, (2, 40), generator=generator))[0]


def assert_same(sliced, masked, family):
    small, full = loaded(sliced, family), loaded(masked, family)
    found, expected = outputs(small), outputs(full)
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert small.num_parameters() < full.num_parameters()


@pytest.mark.parametrize("name", NEURONS)
def test_sliced_neurons_equal_masked_ones(family, shrink, name):
    model = family(name, "float32")
    sliced, masked = shrink(model, "neurons"), shrink(model, "neurons", "masked", keep_shape=True)
    assert_same(sliced, masked, name)
    assert float((outputs(loaded(masked, name)) - outputs(loaded(model, name))).abs().max()) > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_sliced_heads_equal_masked_ones(family, shrink, name):
    model = family(name, "float32")
    sliced, masked = shrink(model, "heads"), shrink(model, "heads", "masked", keep_shape=True)
    assert_same(sliced, masked, name)
    assert float((outputs(loaded(masked, name)) - outputs(loaded(model, name))).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CHANNELS)
def test_sliced_channels_equal_masked_ones(family, shrink, name):
    """RMS over all channels and over those that are left differ by a factor, which the narrow gains make up for."""
    model = family(name, "float32")
    sliced, masked = shrink(model, "channels"), shrink(model, "channels", "masked", keep_shape=True)
    assert_same(sliced, masked, name)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, sliced))
    assert after["hidden_size"] == 48
    assert after["rms_norm_eps"] == pytest.approx(before["rms_norm_eps"] * 64 / 48)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_repaired_sliced_equals_repaired_masked(family, shrink, name):
    model = family(name, "float32")
    settings = {"repair": True, "method": "activation"}
    sliced = shrink(model, "neurons", **settings)
    masked = shrink(model, "neurons", "masked", keep_shape=True, **settings)
    assert_same(sliced, masked, name)


def test_repaired_heads(family, shrink):
    settings = {"repair": True, "method": "saliency"}
    model = family("qwen3", "float32")
    assert_same(shrink(model, "heads", **settings), shrink(model, "heads", "m", keep_shape=True, **settings), "qwen3")


@pytest.mark.parametrize(
    ("name", "remove", "changed"),
    [
        ("llama", "neurons", {"intermediate_size": 72}),
        ("gpt2", "neurons", {"n_inner": 192}),
        ("opt", "neurons", {"ffn_dim": 72}),
        ("qwen2-moe", "neurons", {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 36}),
        ("qwen2", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ],
)
def test_only_the_keys_that_must_change(family, shrink, name, remove, changed):
    model = family(name, "float32")
    before = json.loads((model / "config.json").read_text())
    assert json.loads((shrink(model, remove) / "config.json").read_text()) == before | changed


def test_keep_shape_writes_zeros_for_whole_units(family, shrink):
    model = family("llama-bias", "float32")
    masked = load_file(shrink(model, "neurons", keep_shape=True) / "model.safetensors")
    before = load_file(model / "model.safetensors")
    for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):
        gone = (masked[layer + "up_proj.weight"] == 0).all(1)
        assert int(gone.sum()) == 24
        assert torch.equal((masked[layer + "gate_proj.weight"] == 0).all(1), gone)
        assert torch.equal((masked[layer + "down_proj.weight"] == 0).all(0), gone)
        assert torch.equal(masked[layer + "up_proj.bias"], before[layer + "up_proj.bias"] * ~gone)
        assert torch.equal(masked[layer + "up_proj.weight"][~gone], before[layer + "up_proj.weight"][~gone])
    assert json.loads((model / "config.json").read_text())["intermediate_size"] == 96


def test_heads_keep_shape_where_config_has_no_head_size(family, shrink):
    """BERT's head size is hidden / heads, so that only the masked form exists."""
    model = family("bert-mlm", "float32")
    with pytest.raises(TersorError, match=r"attention.output.dense.weight stays \[64, 64\]") as error:
        shrink(model, "heads")
    assert "--keep-shape" in error.value.hint
    masked = shrink(model, "heads", keep_shape=True)
    weight = load_file(masked / "model.safetensors")["bert.encoder.layer.0.attention.output.dense.weight"]
    assert int((weight.reshape(64, 4, 16) == 0).all(2).all(0).sum()) == 2


def test_kept_number_is_rounded_up(family, shrink):
    model = family("llama", "float32")
    for sparsity, multiple_of, kept in ((0.25, 32, 96), (0.4, 16, 64), (0.7, 1, 29), (0.3333, 1, 65)):
        request = Request(str(model), model, "neurons", "magnitude", sparsity, multiple_of=multiple_of)
        if kept == 96:
            with pytest.raises(TersorError, match="removes none of 96 neurons"):
                plan(request)
            continue
        steps = plan(request)[1]
        assert steps.config == {"intermediate_size": kept}
        assert steps.layout["model.layers.0.mlp.up_proj.weight"][1] == (kept, 64)


def test_pruned_twice_and_stored_dtype(family, shrink):
    once = shrink(family("llama"), "neurons", repair=True, method="saliency")
    twice = shrink(once, "heads", "twice", repair=True, method="taylor")
    tensors = load_file(twice / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (64, 72)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)
    assert torch.isfinite(outputs(loaded(twice, "llama"))).all()
    assert [entry["command"] for entry in json.loads((twice / "report.json").read_text())["history"]] == ["prune"]


def test_masked_model_can_be_sliced(family, shrink):
    """Neurons that are zero already show in no forward pass of the model itself, and are found all the same."""
    model = family("llama", "float32")
    masked = shrink(model, "neurons", keep_shape=True)
    sliced = shrink(masked, "neurons", "sliced")
    assert_same(sliced, masked, "llama")


def test_report(family, shrink):
    report = json.loads((shrink(family("llama"), "neurons", repair=True) / "report.json").read_text())
    entry = next(entry for entry in report["tensors"] if entry["name"] == "model.layers.0.mlp.down_proj.weight")
    assert entry["action"] == "slice" and entry["after"]["shape"] == [64, 72]
    assert entry["reason"] == "72 of 96 neurons stay; least squares"
    assert 0 < entry["error"]["output_relative_mse"] < entry["error"]["output_relative_mse_without_repair"]
    assert report["quality"]["neurons"]["kept"] == {"of 96": 72}

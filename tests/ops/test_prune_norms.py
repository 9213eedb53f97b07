"""prune --remove norms: the same function, fewer tensors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.errors import TersorError
from tersor.ops.prune.norms.find import NormFinder
from tersor.ops.prune.norms.fold import folded_bias, folded_weight
from tersor.ops.prune.norms.gain import GainLaw, gain_law
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tiny_models import build
from torch import nn

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))

# family -> how many norms can go: two a block and the last one, where the head is not tied to the embeddings
FOLDABLE = {
    "llama": 5, "llama-tied": 4, "llama-bias": 5, "qwen3": 5, "gemma": 4, "gemma3": 14, "gpt2": 4, "opt": 4, "phi": 3,
    "phi3": 5, "falcon": 2, "mixtral": 5, "qwen2-moe": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def gained(tmp_path_factory):
    """gained(family, dtype) -> a tiny model whose vectors are not the ones and zeros of an untrained one."""
    made = {}

    def get(name: str, dtype: str = "float32"):
        if (name, dtype) not in made:
            folder = build(name, tmp_path_factory.mktemp("gained") / name, dtype)
            tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
            for tensor in tensors.values():
                if tensor.dim() == 1:
                    tensor += (0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            made[name, dtype] = folder
        return made[name, dtype]

    return get


def request(model, out, **settings) -> Request:
    return Request(model=str(model), output=out, remove="norms", **settings)


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


@torch.no_grad()
def output(folder):
    return load(folder)[0](input_ids=IDS)[0]


@pytest.mark.parametrize("name", FOLDABLE)
def test_same_function_fewer_tensors(name, gained, tmp_path):
    source = gained(name)
    report = prune(request(source, tmp_path / "out"))
    assert report.quality["norms"]["folded"] == FOLDABLE[name]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    gone = {entry.name for entry in report.tensors if entry.action == "drop"}
    assert gone == before.keys() - after.keys() and not after.keys() - before.keys()
    _, info = load(tmp_path / "out")
    assert len(info["missing_keys"]) == len(gone) >= FOLDABLE[name] and not info["unexpected_keys"]
    torch.testing.assert_close(output(tmp_path / "out"), output(source), rtol=1e-4, atol=1e-5)
    assert any("--keep-shape" in warning for warning in report.warnings)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "falcon"])
def test_keep_shape_loads_anywhere(name, gained, tmp_path):
    report = prune(request(gained(name), tmp_path / "out", keep_shape=True))
    _, info = load(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not report.warnings
    torch.testing.assert_close(output(tmp_path / "out"), output(gained(name)), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((gained(name) / "config.json").read_text())
    neutral = 0.0 if name == "gemma" else 1.0
    gains = {
        entry.name
        for entry in report.tensors
        if entry.reason.startswith("neutral now") and entry.name.endswith("weight")
    }
    assert len(gains) == FOLDABLE[name]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((tensors[gain] == neutral).all()) for gain in gains)


def test_a_bias_without_a_place_is_divided(gained, tmp_path):
    """Falcon's linear layers have no bias: that of the norm stays, and the norm gives out what it should."""
    report = prune(request(gained("falcon"), tmp_path / "out"))
    before, after = load_file(gained("falcon") / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "transformer.h.0.input_layernorm"
    torch.testing.assert_close(after[f"{name}.bias"], before[f"{name}.bias"] / before[f"{name}.weight"])
    assert f"{name}.weight" not in after
    assert "divided" in next(entry.reason for entry in report.tensors if entry.name == f"{name}.bias")


def test_why_norms_stay(gained, tmp_path):
    kept = prune(request(gained("gemma3"), tmp_path / "out")).quality["norms"]["kept"]
    assert kept["model.layers.0.self_attn.q_norm.weight"] == "the operation mul reads it"
    assert kept["model.layers.0.post_attention_layernorm.weight"] == "the operation add reads it"
    kept = prune(request(gained("llama-tied"), tmp_path / "tied")).quality["norms"]["kept"]
    assert list(kept) == ["model.norm.weight"] and "tied" in kept["model.norm.weight"]


def test_rounding_is_reported(gained, tmp_path):
    source = gained("llama", "bfloat16")
    report = prune(request(source, tmp_path / "out"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name, gain = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"
    exact = before[name].float() * before[gain].float()
    assert torch.equal(after[name], exact.bfloat16())
    entry = next(entry for entry in report.tensors if entry.name == name)
    wanted = float((exact - exact.bfloat16().float()).square().sum() / exact.square().sum())
    assert entry.action == "fold" and entry.error["relative_mse"] == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(output(tmp_path / "out"), output(source), rtol=0.1, atol=0.1)


def test_our_own_commands_read_it(gained, text, tmp_path):
    """evaluate sees the same model; quantizing and pruning go on from it, and folding again finds nothing new to drop."""
    from tersor.ops.evaluate.run import Request as Evaluate
    from tersor.ops.evaluate.run import evaluate
    from tersor.ops.quantize.run import Request as Quantize
    from tersor.ops.quantize.run import quantize

    source = gained("llama")
    prune(request(source, tmp_path / "out"))
    quality = evaluate(
        Evaluate(str(tmp_path / "out"), str(text), seq_len=64, max_windows=4, compare=str(source))
    ).quality
    assert quality["kl_divergence"] < 1e-6
    quantize(
        Quantize(
            model=str(tmp_path / "out"), output=tmp_path / "small", scheme="w8a16", method="awq", group_size=32,
            calib=str(text), samples=4, seq_len=64,
        )
    )  # fmt: skip
    quality = evaluate(
        Evaluate(str(tmp_path / "small"), str(text), seq_len=64, max_windows=4, compare=str(source))
    ).quality
    assert quality["kl_divergence"] < 1e-2
    with pytest.raises(TersorError, match="no norm is left"):
        prune(request(tmp_path / "out", tmp_path / "again"))


def test_a_lost_norm_is_still_an_error(gained, text, tmp_path):
    """Only what config.json lists may be missing."""
    from tersor.ops.evaluate.run import Request as Evaluate
    from tersor.ops.evaluate.run import evaluate

    prune(request(gained("llama"), tmp_path / "out", exclude=["layers.1.input"]))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match="input_layernorm"):
        evaluate(Evaluate(str(tmp_path / "out"), str(text), seq_len=64, max_windows=1))


def test_vision_models(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(tmp_path / "vit")
    report = prune(request(tmp_path / "vit", tmp_path / "out"))
    assert report.quality["norms"]["folded"] == 5
    other = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(image).logits, model(image).logits, rtol=1e-4, atol=1e-5)


class Offset(nn.Module):
    """Gemma's kind of gain, with a bias, under names of its own."""

    def __init__(self, width: int, power: int = 1):
        super().__init__()
        self.shift, self.slope, self.power = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width)), power

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * (1 + self.slope) ** self.power + self.shift


def test_gain_laws_are_found_by_trying():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert gain_law(nn.LayerNorm(16), (x,), {}) == GainLaw("weight", "bias", 0.0)
    assert gain_law(nn.RMSNorm(16), (x,), {}) == GainLaw("weight", None, 0.0)
    law = gain_law(Offset(16), (x,), {})
    assert law == GainLaw("slope", "shift", 1.0) and law.neutral == 0.0
    assert gain_law(Offset(16, power=2), (x,), {}) is None
    assert gain_law(nn.PReLU(16), (torch.randn(5, 16, 3),), {}) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_folding_arithmetic(transposed):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(3, 8, generator=generator)
    gain, shift, bias = (torch.randn(size, generator=generator) for size in (8, 8, 6))
    stored = weight.T if transposed else weight
    new = folded_weight(stored, gain, transposed)
    found = x @ (new if transposed else new.T) + folded_bias(stored, bias, shift, transposed)
    torch.testing.assert_close(found, (x * gain + shift) @ weight.T + bias)


def test_unseen_readers_are_found_by_doing_it(gained, monkeypatch):
    """A residual that slips past the watching is caught by the change of the output."""
    from tersor.formats.checkpoint import Checkpoint
    from tersor.formats.dense import DenseView
    from tersor.ops.model.skeleton import Skeleton

    skeleton = Skeleton(DenseView(Checkpoint(gained("llama"))), torch.device("cpu"))
    block = skeleton.blocks[0]
    forward = block.input_layernorm.forward

    def leaking(x):
        block.leak = forward(x)
        return block.leak

    original = type(block).forward

    def with_leak(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            return result + self.leak if hasattr(self, "leak") else result

    monkeypatch.setattr(block.input_layernorm, "forward", leaking)
    monkeypatch.setattr(type(block), "forward", with_leak)
    finder = NormFinder(skeleton, set(skeleton.view.tensors))
    details = finder.everything(lambda *_: None)
    assert "changes the output" in details.kept["model.layers.0.input_layernorm.weight"]
    assert "model.layers.0.post_attention_layernorm.weight" in [fold.gain for fold in details.folds]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {}, "no norm can be folded: .*: the operation add reads it"),
        ("llama", {"include": ["nothing"]}, "--include 'nothing' matches no tensor"),
        ("llama", {"exclude": ["norm"]}, "no norm is left"),
        ("llama", {"method": "magnitude"}, "has no method 'magnitude'"),
    ],
)
def test_bad_input(name, settings, message, family, tmp_path):
    with pytest.raises(TersorError, match=message):
        prune(request(family(name), tmp_path / "out", **settings))
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_the_bytes(gained, tmp_path):
    _, steps = plan(request(gained("llama"), tmp_path / "out"))
    report = prune(request(gained("llama"), tmp_path / "out"))
    assert steps.nbytes == report.totals()["bytes_after"]

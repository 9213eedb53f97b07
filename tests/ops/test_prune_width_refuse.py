"""What cannot be made narrower is refused by name, and an interrupted run ends in the bytes of one that was not."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats.errors import TersorError
from tersor.formats.output import partial_path
from tersor.formats.writer import CheckpointWriter
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune


@pytest.fixture
def request_for(tmp_path, text):
    def make(model, remove="neurons", **changes):
        settings = {"method": "magnitude", "sparsity": 0.25, "samples": 4, "seq_len": 32, "calib": str(text),
                    "device": "cpu"}  # fmt: skip
        return Request(model=str(model), output=tmp_path / "out", remove=remove, **settings | changes)

    return make


@pytest.mark.parametrize(
    ("name", "remove", "changes", "message"),
    [
        ("llama", "neurons", {"sparsity": 0.0}, "removes none of 96"),
        ("llama", "neurons", {"sparsity": 0.001}, "removes none of 96"),
        ("llama", "neurons", {"multiple_of": 200}, "removes none of 96"),
        ("llama", "neurons", {"multiple_of": 0}, "not positive"),
        ("llama", "neurons", {"allocate": "owl"}, "same number"),
        ("llama", "neurons", {"exclude": ["layers.0"]}, "same number"),
        ("llama", "neurons", {"rounds": 2}, "one round"),
        ("llama", "heads", {"sparsity": 0.25}, "removes none of 2 heads"),
        ("falcon", "heads", {"sparsity": 0.5}, r"no layer has heads .*self_attention.dense.* hang together"),
        ("gpt2", "heads", {"sparsity": 0.5}, r"c_attn.bias stays \[192\] where \[96\]"),
        ("opt", "heads", {"sparsity": 0.5}, "opt makes the number of heads"),
        ("gpt2", "channels", {}, "ln_f .LayerNorm.: is no RMS norm"),
        ("bert", "channels", {}, "LayerNorm"),
        ("gemma", "channels", {}, "multiplies its embeddings by the root of its hidden width, 8"),
        ("llama", "channels", {"sparsity": 0.1}, "gives a hidden width of 58"),  # which 4 heads do not divide
        ("vit", "neurons", {"method": "saliency"}, "reads pixel_values"),
        ("vit", "heads", {"method": "activation", "sparsity": 0.5}, "reads pixel_values"),
    ],
)
def test_refused_and_nothing_written(family, request_for, name, remove, changes, message):
    request = request_for(family(name), remove, **changes)
    with pytest.raises(TersorError, match=message) as error:
        prune(request)
    assert error.value.hint
    assert not request.output.exists() and not partial_path(request.output).exists()


def test_images_are_pruned_without_text(family, request_for):
    report = prune(request_for(family("vit"), "neurons"))
    assert any("does not read any" in warning for warning in report.warnings)


def test_bare_file_and_nan(family, request_for, tmp_path):
    with pytest.raises(TersorError, match=r"no config\.json"):
        plan(request_for(family("llama") / "model.safetensors"))
    broken = tmp_path / "broken"
    shutil.copytree(family("llama"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for method in ("magnitude", "saliency", "random"):
        request = request_for(broken, method=method)
        with pytest.raises(TersorError, match=r"'model.layers.1.mlp.gate_proj.weight' holds NaN"):
            prune(request)
        assert not request.output.exists() and not partial_path(request.output).exists()


@pytest.mark.parametrize(("name", "remove", "method"), [
    ("qwen3-moe", "neurons", "activation"), ("gpt2", "neurons", "saliency"), ("qwen3", "heads", "taylor"),
    ("llama", "channels", "magnitude"), ("llama", "neurons", "activation"),
])  # fmt: skip
def test_resume_gives_the_same_bytes(family, request_for, tmp_path, monkeypatch, name, remove, method):
    settings = {"method": method, "sparsity": 0.5 if remove == "heads" else 0.25}
    request = request_for(family(name), remove, **settings)
    prune(request)
    whole = load_bytes(request.output)
    shutil.rmtree(request.output)

    finish = CheckpointWriter.finish

    def interrupted(self, unit, data):
        finish(self, unit, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(request)
    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    assert not request.output.exists()
    request.resume = True
    prune(request)
    assert load_bytes(request.output) == whole


def load_bytes(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("report")}


def test_random_depends_on_the_seed_alone(family, request_for):
    found = []
    for seed in (0, 0, 1):
        request = request_for(family("llama"), method="random", seed=seed, repair=False, force=True)
        prune(request)
        found.append(load_file(request.output / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_last_proof_refuses_a_model_that_computes_something_else(family, request_for, monkeypatch):
    """A gain that is not what the derivation says is found before anything gets its name."""
    from tersor.ops.prune.width import channels

    monkeypatch.setattr(channels.math, "sqrt", lambda value: value**0.4)
    request = request_for(family("llama", "float32"), "channels")
    with pytest.raises(
        TersorError, match=r"model.layers.0: the smaller model does not compute what the masked one does"
    ):
        prune(request)
    assert not request.output.exists() and not partial_path(request.output).exists()

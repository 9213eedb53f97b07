"""Channels over the families: what moves, that the model computes the same, and that more is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.ops.model.coupling import BlockProbe
from tersor.ops.model.patterns import parse_pattern
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.sparsify.permutation import run as run_module
from tersor.ops.sparsify.permutation.groups import find_channels, find_groups
from tersor.ops.sparsify.permutation.run import find_permutations
from test_prune_width_algorithms import FFN, FakePass
from tiny_models import FAMILIES, IMAGE_FAMILIES
from torch import nn

ALL = FAMILIES | IMAGE_FAMILIES
CPU = torch.device("cpu")
NAMES = ("llama", "llama-bias", "qwen3", "mistral", "gemma", "gpt2", "opt", "phi", "phi3", "falcon", "mixtral", "qwen3-moe",
         "qwen2-moe", "bert", "vit")  # fmt: skip
OUTSIDE = ("embed", "wte", "wpe", "lm_head", "mlp.gate.", "moe.gate.", "shared_expert_gate", "pooler", "classifier",
           "predictions", "position")  # fmt: skip


def linears(view: DenseView) -> list[str]:
    return [
        name
        for name, entry in view.tensors.items()
        if len(entry.shape) == 2 and name.endswith("weight") and not any(part in name for part in OUTSIDE)
    ]


def permutations(folder, text="2:4", **settings):
    view = DenseView(Checkpoint(folder))
    return find_permutations(view, parse_pattern(text), 0.5, linears(view), CPU, **settings)


def written(folder, found, target):
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: found.apply(name, tensor).contiguous() for name, tensor in tensors.items()}
    assert {name for name in tensors if not torch.equal(tensors[name], moved[name])} <= found.names <= tensors.keys()
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


@torch.no_grad()
def outputs(folder, family) -> torch.Tensor:
    class_ = getattr(transformers, ALL[family][0])
    settings = {"experts_implementation": "eager"} if "mo" in family or "mix" in family else {}
    model = class_.from_pretrained(folder, dtype=torch.float64, **settings).eval()
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator).double())[0]
    return model(input_ids=torch.randint(1, 200, (2, 40), generator=generator))[0]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / left.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_and_more_is_kept(family, tmp_path, name):
    model = family(name, "float32")
    found = permutations(model)
    expected = outputs(model, name)
    assert difference(expected, outputs(written(model, found, tmp_path / "out"), name)) < 1e-6
    report = found.report()
    assert report["reasons"] == [] and set(report["kinds"]) == {"neurons", "values"}
    for kind in report["kinds"].values():
        assert kind["kept"]["after"] > kind["kept"]["before"] + 0.002
    assert report["kept"]["after"] > report["kept"]["before"]
    assert all(entry["moved"] for entry in report["groups"])
    reader = next(group for group, _ in found.groups if group.kind == "neurons").units.readers[0]
    found.fold.remove({reader})  # the rows of the writers alone are another model
    assert difference(expected, outputs(written(model, found, tmp_path / "wrong"), name)) > 1e-3


@pytest.mark.parametrize(
    ("name", "text"), [("llama", "block:8x8"), ("gpt2", "vector:8x1"), ("phi3", "block:8x8"), ("opt", "vector:1x8")]
)
def test_tiles(family, tmp_path, name, text):
    model = family(name, "float32")
    found = permutations(model, text)
    assert difference(outputs(model, name), outputs(written(model, found, tmp_path / "out"), name)) < 1e-6
    kept = found.report()["kinds"]["neurons"]["kept"]
    assert kept["after"] > kept["before"] + 0.02


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "mixtral", "gpt2", "opt", "phi", "falcon", "bert-mlm", "vit"])
def test_the_stream_on_request(family, tmp_path, name):
    """Embeddings, norms and the head move as well, tied ones stay tied."""
    model = family(name, "float32")
    found = permutations(model, groups=("neurons", "values", "stream"))
    assert {group.kind for group, _ in found.groups} == {"neurons", "values", "stream"}
    assert any("norm" in name.lower() or "ln_f" in name for name in found.names)
    assert difference(outputs(model, name), outputs(written(model, found, tmp_path / "out"), name)) < 1e-6
    assert found.report()["kept"]["after"] > permutations(model).report()["kept"]["after"]


def test_layouts(family):
    def groups(name):
        skeleton = Skeleton(DenseView(Checkpoint(family(name))), CPU)
        return [group for group in find_groups(skeleton)[0] if group.units.block == 0]

    values = next(group for group in groups("llama") if group.kind == "values")
    slots = {slot.name.split(".")[-2]: slot for slot in values.units.slots}
    assert slots.keys() == {"v_proj", "o_proj"}
    assert torch.equal(slots["v_proj"].index[:, 0], torch.arange(32))
    assert slots["o_proj"].index[17].tolist() == [33, 49]  # channel 1 of KV head 1, for query heads 2 and 3
    assert torch.equal(values.classes, torch.arange(32) // 16)
    fused = next(group for group in groups("gpt2") if group.kind == "values")
    assert [(slot.axis, int(slot.index[0, 0])) for slot in fused.units.slots] == [(1, 128), (0, 128), (0, 0)]
    alone = next(group for group in groups("falcon") if group.kind == "values")
    assert alone.units.count == 16 and int(alone.classes.max()) == 0
    assert sum(group.kind == "neurons" for group in groups("qwen2-moe")) == 7


def channels(block: nn.Module):
    return find_channels(BlockProbe(FakePass, 0, block.requires_grad_(False), "block"))


def test_what_may_not_change_places():
    found, why = channels(FFN(fused="interleaved"))
    assert [(item.kind, item.rows["up"][3].tolist()) for item in found] == [("neurons", [6, 7])] and not why
    found, why = channels(FFN(twist=lambda x: x / x.square().mean(-1, keepdim=True).sqrt()))
    assert not found and "hang together" in why[0]
    found, why = channels(FFN(leak=lambda up: up.sum(-1, keepdim=True)))
    assert not found and "another way" in why[0]
    scale = torch.linspace(1, 2, 12)
    found, why = channels(FFN(twist=lambda x: x * scale))  # separable, and every neuron another function
    assert not found and "way of its own" in why[0]
    halves = torch.arange(12).ge(6).float() + 1
    found, _ = channels(FFN(twist=lambda x: x * halves))
    assert torch.equal(found[0].classes, torch.arange(12) // 6)


class Attention(nn.Module):
    """Two heads of four; `norm` over the values ties them, a gate has a row for every column."""

    def __init__(self, norm=False, gate=False):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 24), nn.Linear(8, 16)
        self.gate = nn.Linear(16, 8) if gate else None
        self.norm = norm

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        v = v / v.square().mean(-1, keepdim=True).sqrt() if self.norm else v
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        y = y.transpose(1, 2).flatten(2)
        return x + self.o(y if self.gate is None else y * self.gate(x).sigmoid())


def test_values_of_odd_attention():
    found, _ = channels(Attention())
    assert found[0].rows["qkv"].flatten().tolist() == list(range(16, 24))
    assert found[0].classes.tolist() == [0] * 4 + [1] * 4 and found[0].kind == "values"
    found, why = channels(Attention(norm=True))
    assert not found and "hang together" in why[0]
    found, _ = channels(Attention(gate=True))
    assert found[0].rows.keys() == {"qkv", "gate"} and torch.equal(found[0].rows["gate"][:, 0], torch.arange(8))


def test_only_for_what_is_masked(family):
    view = DenseView(Checkpoint(family("llama")))
    ups = [name for name in linears(view) if "up_proj" in name]
    assert find_permutations(view, parse_pattern("2:4"), 0.5, ups, CPU).names == set()
    found = find_permutations(view, parse_pattern("vector:8x1"), 0.5, ups, CPU)
    assert {name.split(".")[-2] for name in found.names} == {"gate_proj", "up_proj", "down_proj"}
    seen = []

    def importance(name, weight):
        seen.append((name, tuple(weight.shape)))
        return weight.float().abs() * (torch.arange(weight.shape[1]) % 4 < 2)

    downs = [name for name in linears(view) if "down_proj" in name]
    found = find_permutations(view, parse_pattern("2:4"), 0.5, downs, CPU, importance)
    assert dict(seen) == dict.fromkeys(downs, (64, 96))
    assert found.report()["kept"]["after"] == pytest.approx(1, abs=1e-6) and not found.names  # nothing to be gained


def test_the_same_every_time(family):
    first, second = permutations(family("qwen3"), seed=1), permutations(family("qwen3"), seed=1)
    for name, axes in first.fold.moves.items():
        assert all(torch.equal(source, second.fold.moves[name][axis]) for axis, source in axes.items())
    tensor = torch.arange(64 * 96, dtype=torch.int64).reshape(64, 96)
    name = "model.layers.0.mlp.down_proj.weight"
    assert first.apply(name, tensor).dtype == torch.int64
    assert torch.equal(first.apply(name, tensor).sort(1).values, tensor)
    assert first.apply("model.norm.weight", tensor) is tensor


def test_nothing_found_is_said(family):
    found = permutations(family("llama"), "unstructured")
    assert not found.names and "unstructured" in found.report()["reasons"][0]
    view = DenseView(Checkpoint(family("llama")))
    view.encoding = object()
    found = find_permutations(view, parse_pattern("2:4"), 0.5, linears(view), CPU)
    assert not found.names and "codes" in found.report()["reasons"][0]
    found = permutations(family("llama"), groups=())
    assert not found.names and found.report()["kept"]["before"] == found.report()["kept"]["after"] > 0.7


def test_a_block_that_computes_something_else_is_left_alone(family, monkeypatch):
    """A wrong group is found before anything is written."""

    def wrong(skeleton, kinds):
        groups, reasons = find_groups(skeleton, kinds)
        for group in groups:
            if group.kind == "values":
                group.classes = torch.zeros_like(group.classes)  # as if heads did not matter
        return groups, reasons

    monkeypatch.setattr(run_module, "find_groups", wrong)
    found = permutations(family("llama"))
    report = found.report()
    assert not found.names and len(report["reasons"]) == 2
    assert "model.layers.0: permuted it computes something else" in report["reasons"][0]
    assert report["kept"]["before"] == report["kept"]["after"]

"""`prune --remove attention` and `mlp`: the output is the model in which those branches add nothing, in every command."""

from __future__ import annotations

import json

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.evaluate.run import Request as EvaluateRequest
from tersor.ops.evaluate.run import evaluate
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.verify.run import verify
from test_prune_depth import IDS, blocks_of, folder_of, load, outputs

# family -> the last layers of attention and of mlp, whose outputs are made zero by hand
ENDS = {
    "llama-bias": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mixtral": ("self_attn.o_proj", "mlp"),
    "bert-mlm": ("attention.output.dense", "output.dense"),
}
KINDS = ("attention", "mlp")


def request(folder, out, remove, text=None, **settings) -> Request:
    settings = {"method": "cosine", "sparsity": 0.4, "samples": 4, "seq_len": 32} | settings
    return Request(str(folder), out, remove=remove, calib=None if text is None else str(text), **settings)


def masked(folder, name, remove, indices):
    model = load(folder)
    for index in indices:
        end = blocks_of(model)[index].get_submodule(ENDS[name][KINDS.index(remove)])
        end.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    return model


def by_blocks(folder) -> torch.Tensor:
    """Logits as evaluate gets them."""
    skeleton = Skeleton(DenseView(Checkpoint(folder)), torch.device("cpu"))
    run = BlockPass(skeleton, IDS)
    for index in range(len(run)):
        with skeleton.filled(index) as block:
            run.run(index, block)
    return torch.cat([part for _, part in run.logits(0)], dim=1)


@pytest.mark.parametrize("remove", KINDS)
@pytest.mark.parametrize("name", ENDS)
def test_is_the_model_without(name, remove, family, text, tmp_path):
    folder = folder_of(family, name)
    report = prune(request(folder, tmp_path / "out", remove, text))
    gone = report.quality["removed_from_blocks"]
    assert len(gone) == round(0.4 * len(blocks_of(load(folder))))
    expected = outputs(masked(folder, name, remove, gone))
    assert not torch.allclose(outputs(load(folder)), expected, atol=1e-3)
    assert torch.allclose(by_blocks(tmp_path / "out"), expected, atol=1e-4)
    assert verify(str(tmp_path / "out")).problems == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["drop_attn_list" if remove == "attention" else "drop_mlp_list"] == gone
    assert config["drop_mlp_list" if remove == "attention" else "drop_attn_list"] == []
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert after.nbytes < before.nbytes and after.tensors.keys() < before.tensors.keys()
    prune(request(folder, tmp_path / "zeros", remove, text, keep_shape=True))
    assert Checkpoint(tmp_path / "zeros").tensors.keys() == before.tensors.keys()
    assert torch.allclose(outputs(load(tmp_path / "zeros")), expected, atol=1e-5)


def test_the_norm_goes_with_its_branch(family, text, tmp_path):
    report = prune(request(folder_of(family, "llama"), tmp_path / "out", "mlp", text, sparsity=0.2))
    (gone,) = report.quality["removed_from_blocks"]
    dropped = {entry.name for entry in report.tensors if entry.action == "drop"}
    assert dropped == {
        f"model.layers.{gone}.{part}.weight"
        for part in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert all(entry.after["bytes"] == 0 for entry in report.tensors if entry.action == "drop")
    assert "--keep-shape" in report.warnings[0]


def test_cosine_is_the_published_score(family, text, tmp_path):
    """S = 1 - mean cos(X, X + f(Norm(X)))."""
    folder = folder_of(family, "llama")
    windows = load_windows(folder, str(text), 4, 32)
    model, seen = load(folder), {}
    for index, block in enumerate(blocks_of(model)):
        for place, module in (("x", block.input_layernorm), ("middle", block.post_attention_layernorm)):
            module.register_forward_pre_hook(lambda _, args, key=(place, index): seen.__setitem__(key, args[0]))
        block.register_forward_hook(lambda _, args, output, key=("end", index): seen.__setitem__(key, output))
    with torch.no_grad():
        model(input_ids=windows)
    for remove, places in (("attention", ("x", "middle")), ("mlp", ("middle", "end"))):
        scores = prune(request(folder, tmp_path / remove, remove, text)).quality["scores"]
        for index in range(5):
            cosine = torch.nn.functional.cosine_similarity(*(seen[place, index] for place in places), dim=-1)
            assert scores[str(index)] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_knapsack_measures_what_removal_does(name, family, text, tmp_path):
    folder = folder_of(family, name)
    quality = prune(request(folder, tmp_path / "out", "attention", text, method="knapsack")).quality
    windows = load_windows(folder, str(text), 4, 32)
    with torch.no_grad():
        dense = load(folder).base_model(input_ids=windows)[0]
        for indices, loss in [
            *(([index], quality["scores"][str(index)]) for index in range(5)),
            (quality["removed_from_blocks"], quality["measured_output_loss"]),
        ]:
            changed = masked(folder, name, "attention", indices).base_model(input_ids=windows)[0] - dense
            assert loss == pytest.approx(float(changed.square().sum() / dense.square().sum()), rel=1e-3)


@pytest.mark.parametrize("remove", KINDS)
def test_knapsack_counts_parameters(remove, tmp_path, text):
    """A block with a dense feed-forward part in place of experts has fewer of them."""
    from tiny_models import build

    folder = build("qwen3-moe", tmp_path / "moe", "float32", num_hidden_layers=5, mlp_only_layers=[1, 2])
    _, steps = plan(request(folder, tmp_path / "out", remove, method="knapsack"))
    sizes = {index: candidate.size for index, candidate in steps.details.candidates.items()}
    report = prune(request(folder, tmp_path / "out", remove, text, method="knapsack"))
    gone = report.quality["removed_from_blocks"]
    assert 0 < len(gone) < 5 and sum(sizes[index] for index in gone) >= 0.4 * sum(sizes.values())
    assert len(set(sizes.values())) == (1 if remove == "attention" else 2)


def test_evaluate_agrees_with_zeros(family, text, tmp_path):
    folder = folder_of(family, "llama")
    perplexity = {}
    for keep_shape in (False, True):
        out = tmp_path / str(keep_shape)
        prune(request(folder, out, "attention", text, keep_shape=keep_shape))
        quality = evaluate(EvaluateRequest(str(out), text=str(text), seq_len=64, max_windows=8)).quality
        perplexity[keep_shape] = quality["perplexity"]
    assert perplexity[False] == pytest.approx(perplexity[True], rel=1e-6)
    dense = evaluate(EvaluateRequest(str(folder), text=str(text), seq_len=64, max_windows=8)).quality["perplexity"]
    assert perplexity[False] != pytest.approx(dense, rel=1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_then_quantize(name, method, family, text, tmp_path):
    prune(request(folder_of(family, name), tmp_path / "pruned", "attention", text))
    prune(request(tmp_path / "pruned", tmp_path / "both", "mlp", text, sparsity=0.2))
    quantize(
        QuantizeRequest(
            str(tmp_path / "both"), tmp_path / "out", scheme="w8a16", method=method, group_size=32, calib=str(text),
            samples=4, seq_len=32,
        )
    )  # fmt: skip
    assert verify(str(tmp_path / "out")).problems == []
    quantized, dense = by_blocks(tmp_path / "out"), by_blocks(tmp_path / "both")
    assert float((quantized - dense).norm() / dense.norm()) < 0.1  # a router may choose another expert for a token


def test_removing_twice_and_then_layers(family, text, tmp_path):
    folder = folder_of(family, "llama")
    prune(request(folder, tmp_path / "a", "attention", method="even"))
    report = prune(request(tmp_path / "a", tmp_path / "b", "attention", text))
    assert set(report.quality["scores"]) == {"0", "2", "4"} and len(report.quality["removed_from_blocks"]) == 1
    lists = json.loads((tmp_path / "b/config.json").read_text())["drop_attn_list"]
    assert lists == sorted([1, 3, *report.quality["removed_from_blocks"]])
    prune(request(tmp_path / "b", tmp_path / "c", "layers", method="even"))  # takes 1 and 3
    assert json.loads((tmp_path / "c/config.json").read_text())["drop_attn_list"] == [
        [0, 2, 4].index(index) for index in lists if index in (0, 2, 4)
    ]
    model = masked(folder, "llama-bias", "attention", lists)
    for index in (1, 3):
        blocks_of(model)[index].register_forward_hook(lambda _, args, output: args[0])
    assert torch.allclose(by_blocks(tmp_path / "c"), outputs(model), atol=1e-5)


def test_then_masks_and_even_spacing(family, text, tmp_path):
    folder = folder_of(family, "llama")
    report = prune(request(folder, tmp_path / "a", "mlp", method="even"))
    assert report.quality["removed_from_blocks"] == [1, 3] and report.quality["scores"] == {}
    prune(Request(str(tmp_path / "a"), tmp_path / "b", method="wanda", calib=str(text), samples=4, seq_len=32))
    assert verify(str(tmp_path / "b")).problems == []


@pytest.mark.parametrize("settings", [{"sparsity": 0.95}, {"sparsity": 0.05}, {"sparsity": 0.7, "method": "even"}])
def test_bad_input(settings, family, tmp_path):
    with pytest.raises(TersorError, match=r"none|first and the last"):
        prune(request(folder_of(family, "llama"), tmp_path / "out", "attention", **settings))
    assert list(tmp_path.iterdir()) == []


def test_none_is_left(family, tmp_path):
    folder = folder_of(family, "llama")
    prune(request(folder, tmp_path / "a", "attention", method="even", sparsity=0.6))
    with pytest.raises(TersorError, match="leaves the model none"):
        plan(request(tmp_path / "a", tmp_path / "b", "attention", sparsity=0.9))

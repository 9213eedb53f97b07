"""`profile --sensitivity` and `--collect` on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.encodings import dequantize
from tersor.formats.errors import TersorError
from tersor.formats.statistics import Statistics
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.schemes import fit_group, scheme_from_name
from tersor.ops.model.spill import SpillPool
from tersor.ops.profile.request import Request
from tersor.ops.profile.sensitivity.candidates import PRUNED
from tersor.ops.profile.sensitivity.page import sections
from tersor.ops.profile.sensitivity.run import analyse
from tersor.ops.profile.sensitivity.suggest import suggest
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import plan as quantize_plan

CPU = torch.device("cpu")


def request(model, text, **settings) -> Request:
    settings = {"sensitivity": True, "samples": 4, "seq_len": 64} | settings
    return Request([str(model)], calib=None if text is None else str(text), **settings)


def found_for(model: Path, text, folder=None, **settings) -> dict:
    return analyse(Checkpoint(model), request(model, text, **settings), CPU, folder=folder)


@pytest.fixture(scope="module")
def llama(family):
    return family("llama", dtype="float32")


@pytest.fixture(scope="module")
def found(llama, text):
    return found_for(llama, text)


def test_is_json_and_has_a_page(found):
    json.dumps(found)
    page = sections(found)
    assert [section.title for section in page] == [
        "What each scheme does to the model", "Which layers are sensitive", "What depth does",
    ]  # fmt: skip
    assert all(section.lead for section in page)


def test_every_layer_and_scheme(found, llama):
    names = [name for name in Checkpoint(llama).tensors if ".layers." in name and "norm" not in name]
    assert set(found["tensors"]) == set(names)
    for numbers in found["tensors"].values():
        assert {"w2a16-g32", "w4a16-g128", "w8a8", "fp8", "fp8-block", "50%", "2:4"} <= numbers["schemes"].keys()
        for row in numbers["schemes"].values():
            assert row["damage"] >= 0 and 0 < row["output_relative_mse"] < 2 and row["sqnr_db"] > 0
        assert numbers["tokens"] == 256
    damages = [
        sum(t["schemes"][f"w{bits}a16-g32"]["damage"] for t in found["tensors"].values()) for bits in (2, 3, 4, 8)
    ]
    assert damages == sorted(damages, reverse=True)


def test_output_error_and_sqnr_are_those_of_the_weight_that_would_be_stored(found, llama, text):
    """Against the model's own forward pass."""
    name = "model.layers.1.mlp.down_proj.weight"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    inputs = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(load_windows(llama, str(text), 4, 64))
    scheme = fit_group(scheme_from_name("w3a16", 32), layer.weight.shape[1])[0]
    weight = layer.weight.detach()
    changed = dequantize(round_to_nearest(weight, scheme, torch.float32), scheme)
    x = torch.cat(inputs)
    expected = float((x @ (changed - weight).T).square().sum() / (x @ weight.T).square().sum())
    row = found["tensors"][name]["schemes"]["w3a16-g32"]
    assert row["output_relative_mse"] == pytest.approx(expected, rel=1e-3)
    error = float((changed - weight).square().sum() / weight.square().sum())
    assert row["sqnr_db"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    norms = x.square().sum(0).sqrt()
    assert found["tensors"][name]["outliers"]["max_to_median"] == pytest.approx(
        float(norms.max() / norms.median()), rel=1e-4
    )


def test_damage_foretells_the_divergence(found, llama, text):
    """All layers under 8 bits, which is little enough for the second order to hold."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    windows = load_windows(llama, str(text), 4, 64)
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        for label, slack in (("w8a16-g32", 0.35), ("w4a16-g32", 0.5)):
            changed = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
            scheme = scheme_from_name(label.partition("-")[0], 32)
            foretold = 0.0
            for name, numbers in found["tensors"].items():
                weight = changed.get_parameter(name)
                weight.copy_(dequantize(round_to_nearest(weight, scheme, torch.float32), scheme))
                foretold += numbers["schemes"][label]["damage"]
            after = changed(windows).logits.log_softmax(-1)
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            assert foretold == pytest.approx(kl, rel=slack)


def test_damage_of_an_encoder_foretells_how_far_its_output_moves(family, text):
    folder = family("bert", dtype="float32")
    data = found_for(folder, text)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    windows = load_windows(folder, str(text), 4, 64)
    scheme = scheme_from_name("w8a16", 32)
    with torch.no_grad():
        before = model(windows).last_hidden_state
        for name in data["tensors"]:
            weight = model.get_parameter(name)
            weight.copy_(dequantize(round_to_nearest(weight, scheme, torch.float32), scheme))
        after = model(windows).last_hidden_state
    moved = float((after - before).square().sum() / before.square().sum())
    foretold = sum(numbers["schemes"]["w8a16-g32"]["damage"] for numbers in data["tensors"].values())
    assert foretold == pytest.approx(moved, rel=0.35)


def test_depth(found, llama, text):
    """LIM and cosines against transformers' own hidden states."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    states = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
    with torch.no_grad():
        model(load_windows(llama, str(text), 4, 64))
    for row, (before, after) in zip(found["blocks"], states, strict=True):
        after = after[0] if isinstance(after, tuple) else after
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(before, after, dim=-1).mean()), abs=1e-4)
        lim = -float(torch.cosine_similarity(before.flatten(), after.flatten(), dim=0))
        assert row["lim"] == pytest.approx(lim, abs=1e-4)
        assert [branch["kind"] for branch in row["branches"]] == ["attention", "mlp"]
        assert all(branch["residual_contribution"] > 0 for branch in row["branches"])


@pytest.mark.parametrize("name", ["gpt2", "phi", "gemma3", "bert", "opt", "falcon", "bert-mlm"])
def test_families(name, family, text):
    data = found_for(family(name), text, samples=2, seq_len=32)
    assert data["damage_is"] == ("nats per token" if "bert" not in name else "squared relative change of the output")
    for numbers in data["tensors"].values():
        assert all(row["damage"] > 0 for row in numbers["schemes"].values())
    assert sections(data)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe"])
def test_experts(name, family, text, tmp_path):
    model = family(name)
    data = found_for(model, text, tmp_path, collect=["routing", "norms"])
    assert len(data["routing"]) == 2
    first, second = data["routing"].values()
    assert sum(first["counts"]) == 256 * 2 and "transitions" not in first
    assert sum(map(sum, second["transitions"])) == 256 * 4
    assert [sum(row) for row in second["transitions"]] == [2 * value for value in first["counts"]]
    stored = Statistics(tmp_path).routing()
    assert {name: counts.tolist() for name, (counts, _) in stored.items()} == {
        name: numbers["counts"] for name, numbers in data["routing"].items()
    }
    units = {numbers["unit"] for tensor, numbers in data["tensors"].items() if ".experts." in tensor}
    assert len(units) == 2  # all experts of a block together
    page = sections(data)
    assert "Where experts are used" in [section.title for section in page]


def test_experts_that_no_token_reaches(family, text):
    data = found_for(family("qwen3-moe"), text, samples=1, seq_len=8)
    missed = [numbers for numbers in data["tensors"].values() if not numbers["tokens"]]
    assert missed, "the text reaches all experts, which leaves nothing to test"
    for numbers in missed:
        assert numbers["outliers"] is None
        assert all(row["damage"] == 0 for row in numbers["schemes"].values())
    suggest(data, "4bits")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_bytes_are_those_that_quantize_writes(name, family, text):
    model = family(name)
    data = found_for(model, text, samples=2, seq_len=32)
    for label in ("w4a16-g32", "w2a16-g64", "w8a16-g128", "fp8-block"):
        if name == "gpt2" and label == "fp8-block":
            continue
        scheme, _, group = label.partition("-g")
        settings = {"scheme": scheme, "group_size": int(group)} if group else {"scheme": label}
        steps = quantize_plan(QuantizeRequest(str(model), Path("out"), **settings))[1]
        assert {step: entry.nbytes for step, entry in steps.steps.items()} == {
            tensor: numbers["schemes"][label]["bytes"] for tensor, numbers in data["tensors"].items()
        }
        total = sum(entry.nbytes for entry in steps.steps.values())
        assert data["other_bytes"] + total == steps.nbytes


def test_layers_of_one_input_are_one_unit(found):
    units = {name.split(".")[-2]: numbers["unit"].split(".")[-2] for name, numbers in found["tensors"].items()}
    assert units == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj", "gate_proj": "gate_proj",
        "up_proj": "gate_proj", "down_proj": "down_proj",
    }  # fmt: skip


def test_same_input_same_numbers(found, llama, text):
    assert found_for(llama, text) == found


def test_max_memory_changes_nothing(llama, text, found, monkeypatch):
    spilled = []
    write = SpillPool._write
    monkeypatch.setattr(SpillPool, "_write", lambda *arguments: spilled.append(1) or write(*arguments))
    monkeypatch.setattr("tersor.ops.profile.sensitivity.run.parking_space", lambda *_: 1)
    data = found_for(llama, text, max_memory_bytes=1)
    assert spilled and data["tensors"] == found["tensors"]


def test_a_bare_file_needs_no_text(llama, found):
    data = found_for(llama / "model.safetensors", None)
    assert "no text was run" in data["warnings"][0]
    for name, numbers in data["tensors"].items():
        for label, row in numbers["schemes"].items():
            if label not in PRUNED:  # whose masks need the inputs
                assert row["sqnr_db"] == pytest.approx(found["tensors"][name]["schemes"][label]["sqnr_db"], abs=1e-4)
    assert [row["zd"] for row in data["blocks"]] == pytest.approx([row["zd"] for row in found["blocks"]], abs=1e-6)
    assert suggest(data, "4.5bits")["bits_per_weight"] <= 4.5
    assert sections(data)


def test_images_are_refused_with_what_can_be_had(family):
    with pytest.raises(TersorError, match="reads pixel_values") as caught:
        found_for(family("vit"), None)
    assert "ZD" in caught.value.hint and ".safetensors" in caught.value.hint
    data = found_for(family("vit") / "model.safetensors", None)
    assert data["tensors"]


def test_quantized_is_refused(llama, tmp_path):
    from tersor.ops.quantize.run import quantize

    quantize(QuantizeRequest(str(llama), tmp_path / "q"))
    with pytest.raises(TersorError, match="is quantized"):
        found_for(tmp_path / "q", None)


def test_unknown_kind(llama, text, tmp_path):
    with pytest.raises(TersorError, match="'hessians' is not known"):
        found_for(llama, text, tmp_path, collect=["hessians"])


def test_collect_alone_judges_nothing(llama, text, tmp_path):
    data = found_for(llama, text, tmp_path, sensitivity=False, collect=["norms", "hessian"])
    assert data["tensors"] == {} and data["blocks"] == []
    stored = Statistics(tmp_path)
    assert stored.kinds == ["norms", "hessian"]
    assert stored.aliases["model.layers.0.self_attn.k_proj.weight"] == "model.layers.0.self_attn.q_proj.weight"
    squares = stored.squares("model.layers.1.mlp.up_proj.weight")
    hessian = stored.hessian("model.layers.1.mlp.up_proj.weight")
    assert torch.allclose(hessian.diagonal() * stored.tokens("model.layers.1.mlp.up_proj.weight"), squares, rtol=1e-4)
    stored.belongs_to(Checkpoint(llama))


def test_routing_of_a_dense_model_is_a_warning(llama, text, tmp_path):
    data = found_for(llama, text, tmp_path, sensitivity=False, collect=["norms", "routing"])
    assert "no mixture of experts" in data["warnings"][0]


@pytest.mark.parametrize("target", ["1bits", "1kB"])
def test_an_impossible_budget_is_refused_before_anything_runs(target, llama, text, monkeypatch):
    monkeypatch.setattr("tersor.ops.profile.sensitivity.run.Skeleton", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(TersorError, match="less than any mix") as caught:
        found_for(llama, text, suggest=target)
    assert "smallest possible is" in caught.value.hint


def test_the_smallest_possible_is_possible(llama, text, found):
    with pytest.raises(TersorError) as caught:
        found_for(llama, text, suggest="1bits")
    smallest = caught.value.hint.removeprefix("the smallest possible is ")
    assert {label.partition("-")[0] for label in suggest(found, smallest)["labels"].values()} == {"w2a16"}

"""plan-parallel as a user runs it: plans, shards, resharding, proof, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_refused, ok, report, run
from header_models import LLAMA_405B, llama_shapes, write_model
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tersor.formats.plan import read_plan

SMALL = ["--cluster", "2x4xh100", "--global-batch", 16, "--seq-len", 512]


@pytest.fixture
def model(family) -> Path:
    return family("llama", num_hidden_layers=4)


def planned(model: Path, out: Path, *options) -> Path:
    return ok("plan-parallel", model, "-o", out, *SMALL, *options)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: tensor.view(-1).numpy(force=True).tobytes() for name, tensor in _loaded(folder).items()}


def _loaded(folder: Path) -> dict:
    import torch

    return {name: tensor.view(torch.uint8) for name, tensor in load_file(folder / "model.safetensors").items()}


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_it_is_and_why(model, tmp_path):
    out = planned(model, tmp_path / "P", "--why-not", "tp=2,pp=2", "--why-not", "tp=3", "--tokens", "1B")
    plan = read_plan(out)
    layout, found = plan["layout"], report(out)["quality"]["plan"]
    assert layout["tp"] * layout["pp"] * layout["dp"] * layout["cp"] == 8
    assert plan["predicted"]["fits"]
    assert sum(plan["predicted"]["parts"].values()) == pytest.approx(plan["predicted"]["step_seconds"])
    assert found["training_seconds"] == pytest.approx(1e9 / plan["predicted"]["tokens_per_second"])
    assert "does not divide" in plan["why_not"]["tp=3"] or "multiple" in plan["why_not"]["tp=3"]
    assert plan["why_not"]["tp=2,pp=2"]
    assert plan["others"]
    assert all(other["step_seconds"] >= plan["predicted"]["step_seconds"] * 0.99 for other in plan["others"])
    page = (out / "report.html").read_text()
    assert "Where a step goes" in page and "--why-not tp=2,pp=2" in page
    assert any((out / "exports").rglob("*.sh"))


def test_the_same_request_gives_the_same_plan(model, tmp_path):
    plans = [read_plan(planned(model, tmp_path / name)) for name in ("a", "b")]
    for plan in plans:
        del plan["searched"]["seconds"]
    assert plans[0] == plans[1]


def test_fixed_choices_are_kept(model, tmp_path):
    pins = tmp_path / "pins.yaml"
    pins.write_text("tp: 2\nschedule: [1f1b, interleaved]\n")
    plan = read_plan(planned(model, tmp_path / "P", "--pin", pins, "--fix", "pp=2,zero=1", "--fix", "stages=3+1"))
    assert (plan["layout"]["tp"], plan["layout"]["pp"], plan["layout"]["zero"]) == (2, 2, 1)
    assert plan["layout"]["stages"] == [3, 1]
    (inside,) = plan["inside_blocks"]
    along = {name: cut for name, _, cut, _ in inside["rows"] if name}
    assert inside["blocks"] == [0, 1, 2, 3]
    assert (along["keys"], along["mlp.up"], along["mlp.down"]) == ("g", "f", "f")
    assert "Schedule of one step" in (tmp_path / "P" / "report.html").read_text()


def test_every_runtime_gets_a_plan_that_it_can_run(family, tmp_path):
    """The plan itself, or the best of those that it can; --for keeps the search to them."""
    out = planned(family("mixtral"), tmp_path / "P", "--fix", "schedule=zbv,pp=2")
    exports = read_plan(out)["exports"]
    assert "unsupported" in exports["megatron"]  # which has no such schedule, and none else is allowed
    free = read_plan(planned(family("mixtral"), tmp_path / "Q"))["exports"]
    assert (tmp_path / "Q" / "exports" / "megatron" / "megatron.sh").is_file()
    assert "files" in free["torchtitan"] and "files" in free["deepspeed"]
    plan = read_plan(planned(family("mixtral"), tmp_path / "R", "--for", "deepspeed"))
    assert "files" in plan["exports"]["deepspeed"] and "layout" not in plan["exports"]["deepspeed"]
    refused = run("plan-parallel", family("mixtral"), "-o", tmp_path / "S", *SMALL, "--for", "vllm", "-q")
    assert_refused(refused, "vllm", "megatron")
    options = ["--for", "deepspeed", "--fix", "cp=2", "-q"]
    refused = run("plan-parallel", family("mixtral"), "-o", tmp_path / "S", *SMALL, *options)
    assert_refused(refused, "deepspeed", "cp=2")


def test_uneven_links_are_mapped(model, tmp_path):
    cluster = tmp_path / "cluster.toml"
    speeds = [[450, 50, 50, 5], [50, 450, 5, 50], [50, 5, 450, 50], [5, 50, 50, 450]]
    cluster.write_text(f'hardware = "h100"\nnodes = 4\ndevices_per_node = 2\nbandwidth = {speeds}\n')
    options = ["--cluster", cluster, "--map", "--fix", "pp=4,tp=2"]
    plan = read_plan(ok("plan-parallel", model, "-o", tmp_path / "P", *SMALL, *options))
    nodes = [device // 2 for device in plan["ranks"][::2]]
    assert sorted(plan["ranks"]) == list(range(8))
    assert all(speeds[first][second] == 50 for first, second in pairwise(nodes))


def test_a_plan_to_serve(family, tmp_path):
    out = planned(
        family("mixtral"), tmp_path / "P", "--mode", "serve", "--tpot", 0.05, "--prompt", 64, "--generate", 32
    )
    plan = read_plan(out)
    assert plan["predicted"]["tpot_seconds"] <= 0.05
    assert plan["workload"]["mode"] == "serve"
    assert any((out / "exports").rglob("vllm.sh")) or any("unsupported" in entry for entry in plan["exports"].values())


def test_experts_are_placed_and_the_model_stays_the_same(family, tmp_path):
    """Tokens go from expert e to its neighbour in the next layer: what is sent together should lie together."""
    model = family("mixtral")
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (400, 1)) * 2 + np.array([[0, 1]])
    trace = np.stack([first, (first + 1) % 4], 1).astype(np.int32)  # [tokens, layers, k]
    save_file({"trace": trace}, tmp_path / "trace.safetensors")
    options = ["--experts", tmp_path / "trace.safetensors", "--fix", "ep=2,tp=1,pp=1", "--shard"]
    out = planned(model, tmp_path / "P", *options)
    found = read_plan(out)["experts"]
    assert found["after"]["cost"] <= found["before"]["cost"]
    ok("verify", out)
    ok("verify", out / "model")
    assert not [file for file in (out / "exports").rglob("*.*") if "P.partial" in file.read_text()]
    before, after = (
        json.loads(run("evaluate", folder, "--text", _text(tmp_path), "--seq-len", 32, "--json", "-q").stdout)
        for folder in (model, out / "model")
    )
    assert after["quality"]["perplexity"] == pytest.approx(before["quality"]["perplexity"], rel=1e-5)


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away from it at once " * 30)
    return path


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rank", "dcp"])
def test_shards_move_from_layout_to_layout(form, model, tmp_path):
    first = planned(model, tmp_path / "P", "--fix", "tp=2,pp=2,zero=3", "--shard", "--shard-format", form)
    assert ok("verify", first) == first
    second = planned(model, tmp_path / "Q", "--fix", "tp=1,pp=4", "--shard", "--from", first)
    third = planned(model, tmp_path / "R", "--fix", "tp=1,pp=1,dp=8,zero=0", "--shard", "--from", second)
    ok("verify", second)
    ok("verify", third, "--against", model)
    whole = load_file(next((third / "shards").glob("*.safetensors")))
    for name, tensor in load_file(model / "model.safetensors").items():
        assert tensor.dtype == whole[name].dtype and bool((tensor == whole[name]).all()), name


def test_an_altered_shard_is_named(model, tmp_path):
    out = planned(model, tmp_path / "P", "--fix", "tp=2,pp=2", "--shard")
    shard = sorted((out / "shards").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    result = run("verify", out)
    assert result.exit_code == 1
    assert shard.name in result.stderr and "model.layers" in result.stderr
    refused = run("plan-parallel", model, "-o", tmp_path / "Q", *SMALL, "--shard", "--from", out, "-q")
    assert_refused(refused, shard.name)
    assert not (tmp_path / "Q").exists()
    shard.unlink()
    result = run("verify", out)
    assert result.exit_code == 1 and shard.name in result.stderr


def test_a_quantized_model_is_cut_between_its_groups(model, tmp_path):
    small = ok("quantize", model, "-o", tmp_path / "q", "--group-size", 16)
    out = ok("plan-parallel", small, "-o", tmp_path / "P", *SMALL, "--fix", "tp=2", "--shard")
    ok("verify", out)
    assert [step["command"] for step in report(out)["history"]] == ["quantize"]


def test_a_packed_model_is_refused_by_name(model, tmp_path):
    sparse = ok("prune", model, "-o", tmp_path / "s", "--method", "magnitude", "--sparsity", 0.5)
    packed = ok("sparsify", sparse, "-o", tmp_path / "packed")
    ok("plan-parallel", packed, "-o", tmp_path / "P", *SMALL)
    refused = run("plan-parallel", packed, "-o", tmp_path / "Q", *SMALL, "--shard", "-q")
    assert_refused(refused, "convert")
    assert not (tmp_path / "Q").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster", "8xb999"], ["b999", "h100"]),
        (["--fix", "tp=7"], ["tp=7"]),
        (["--fix", "tp=3,pp=3"], ["divide"]),
        (["--fix", "colour=blue"], ["colour"]),
        (["--why-not", "tp"], ["tp"]),
        (["--mode", "dream"], ["dream", "serve"]),
        (["--optimizer", "magic"], ["magic", "adamw"]),
        (["--tokens", "many"], ["many"]),
        (["--calibrate", "absent.json"], ["absent.json"]),
        (["--measured", "absent.json"], ["absent.json"]),
        (["--map"], ["bandwidth"]),
        (["--from", "absent"], ["--shard"]),
        (["--from", "absent", "--shard"], ["absent"]),
        (["--experts", "absent.safetensors", "--fix", "ep=1"], ["experts"]),
        (["--pin", "absent.yaml"], ["absent.yaml"]),
        (["--global-batch", 7, "--fix", "dp=4"], ["7"]),
    ],
)
def test_refused(options, words, model, tmp_path):
    out = tmp_path / "P"
    refused = run("plan-parallel", model, "-o", out, *SMALL, *options, "-q")
    assert_refused(refused, *words)
    assert not out.exists() and not out.with_name("P.partial").exists()


def test_a_model_that_fits_nowhere(tmp_path):
    """The nearest plan is named, with what it lacks."""
    big = write_model(tmp_path / "big", LLAMA_405B, llama_shapes(LLAMA_405B))
    refused = run(
        "plan-parallel", big, "-o", tmp_path / "P", "--cluster", "8xh100", "--global-batch", 8, "--seq-len", 1024, "-q"
    )
    assert_refused(refused, "no plan fits", "lacking", "nearest", "GB")


def test_another_checkpoint_is_not_the_plans(model, family, tmp_path):
    first = planned(model, tmp_path / "P", "--fix", "tp=2", "--shard")
    other = family("llama")
    refused = run("plan-parallel", other, "-o", tmp_path / "Q", *SMALL, "--shard", "--from", first, "-q")
    assert_refused(refused, "plan for")
    refused = run("verify", first, "--against", other, "-q")
    assert_refused(refused, "plan for")

"""What profile saves, used by the commands that it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tersor.cli.main import app
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.selection import select
from tersor.ops.profile.request import Request as ProfileRequest
from tersor.ops.profile.sensitivity.run import analyse
from tersor.ops.profile.sensitivity.suggest import policy_of, suggest
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from typer.testing import CliRunner

SMALL = {"samples": 4, "seq_len": 64}
FIRST = "model.layers.0.self_attn.q_proj.weight"


def collect(model, text, folder: Path, kinds=("norms", "hessian")) -> Path:
    request = ProfileRequest([str(model)], calib=str(text), collect=list(kinds), **SMALL)
    analyse(Checkpoint(model), request, torch.device("cpu"), folder=folder)
    return folder / "stats.safetensors"


@pytest.fixture(scope="module")
def llama(family):
    return family("llama", dtype="float32")


@pytest.fixture(scope="module")
def stats(llama, text, tmp_path_factory):
    return collect(llama, text, tmp_path_factory.mktemp("stats"))


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
def test_prune_from_statistics_is_as_calibrated_where_nothing_came_before(method, llama, text, stats, tmp_path):
    """The first layers see the same input in both runs: same numbers to the bit. Later ones need not."""
    prune(PruneRequest(str(llama), tmp_path / "a", method=method, stats=stats))
    prune(PruneRequest(str(llama), tmp_path / "b", method=method, calib=str(text), **SMALL))
    one, other = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    for name in (FIRST, FIRST.replace("q_proj", "k_proj"), FIRST.replace("q_proj", "v_proj")):
        assert torch.equal(one.read(name), other.read(name))
    for name in select(one).linears:
        assert (one.read(name) == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_gptq_from_statistics_is_as_calibrated_where_nothing_came_before(llama, text, stats, tmp_path):
    settings = {"method": "gptq", "group_size": 32}
    report = quantize(QuantizeRequest(str(llama), tmp_path / "a", stats=stats, **settings))
    quantize(QuantizeRequest(str(llama), tmp_path / "b", calib=str(text), **SMALL, **settings))
    one, other = DenseView(Checkpoint(tmp_path / "a")), DenseView(Checkpoint(tmp_path / "b"))
    assert torch.equal(one.read(FIRST), other.read(FIRST))
    errors = [entry.error["output_relative_mse"] for entry in report.tensors if entry.error]
    assert len(errors) == 14 and all(0 < error < 0.1 for error in errors)


def test_norms_are_enough_for_wanda_and_so_is_a_hessian(llama, text, stats, tmp_path):
    """The diagonal of the Hessian is the norms, but for rounding."""
    norms = collect(llama, text, tmp_path / "norms", ["norms"])
    hessian = collect(llama, text, tmp_path / "hessian", ["hessian"])
    for place, file in (("a", stats), ("b", norms), ("c", hessian)):
        prune(PruneRequest(str(llama), tmp_path / place, method="wanda", stats=file, repair=False))
    a, b, c = (Checkpoint(tmp_path / place) for place in "abc")
    for name in select(a).linears:
        assert torch.equal(a.read(name), b.read(name))
        assert ((a.read(name) == 0) == (c.read(name) == 0)).float().mean() > 0.999


def test_no_text_and_no_model_code(llama, stats, tmp_path, monkeypatch):
    """Nothing is run: a model that cannot be built is quantized all the same."""
    import tersor.ops.model.skeleton as skeleton

    monkeypatch.setattr(skeleton, "_build", lambda view: pytest.fail("the model was built"))
    quantize(QuantizeRequest(str(llama), tmp_path / "q", method="gptq", stats=stats))
    prune(PruneRequest(str(llama), tmp_path / "p", stats=stats))


def test_resumed_runs_write_the_same_bytes(llama, stats, tmp_path, monkeypatch):
    from tersor.formats.writer import CheckpointWriter

    request = QuantizeRequest(str(llama), tmp_path / "q", method="gptq", stats=stats)
    quantize(request)
    finish, calls = CheckpointWriter.finish, []

    def dying(self, unit, data):
        finish(self, unit, data)
        calls.append(unit)
        if len(calls) == 9:
            self.flush()
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish", dying)
    broken = QuantizeRequest(str(llama), tmp_path / "r", method="gptq", stats=stats)
    with pytest.raises(KeyboardInterrupt):
        quantize(broken)
    monkeypatch.setattr(CheckpointWriter, "finish", finish)
    broken.resume = True
    quantize(broken)
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "r" / name).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "qwen3-moe", "bert"])
def test_other_families(name, family, text, tmp_path):
    model = family(name)
    stats = collect(model, text, tmp_path / "stats")
    quantize(QuantizeRequest(str(model), tmp_path / "q", method="gptq", stats=stats, group_size=32))
    prune(PruneRequest(str(model), tmp_path / "p", stats=stats, sparsity=0.6))
    pruned = Checkpoint(tmp_path / "p")
    for linear in select(pruned).linears:
        assert (pruned.read(linear) == 0).float().mean() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "awq"}, "runs each block"),
        ({"method": "rtn"}, "uses no statistics"),
        ({"method": "gptq", "calib": "book.txt"}, "--stats and --calib"),
    ],
)
def test_quantize_refuses(settings, message, llama, stats, tmp_path):
    with pytest.raises(TersorError, match=message):
        quantize(QuantizeRequest(str(llama), tmp_path / "q", stats=stats, **settings))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"remove": "neurons"}, "takes no --stats"),
        ({"method": "magnitude"}, "takes no --stats"),
        ({"allocate": "rd"}, "--allocate rd runs the blocks"),
        ({"rounds": 3}, "--rounds"),
        ({"calib": "book.txt"}, "--stats and --calib"),
    ],
)
def test_prune_refuses(settings, message, llama, stats, tmp_path):
    from tersor.ops.prune.rounds import prune as prune_rounds

    with pytest.raises(TersorError, match=message):
        prune_rounds(PruneRequest(str(llama), tmp_path / "p", stats=stats, **settings))
    assert not (tmp_path / "p").exists()


def test_a_kind_that_was_not_collected(llama, text, tmp_path):
    norms = collect(llama, text, tmp_path, ["norms"])
    with pytest.raises(TersorError, match="holds norms, hessian is needed") as caught:
        prune(PruneRequest(str(llama), tmp_path / "p", method="sparsegpt", stats=norms))
    assert "--collect hessian" in caught.value.hint
    with pytest.raises(TersorError) as caught:
        prune(PruneRequest(str(llama), tmp_path / "p", method="wanda", stats=norms))
    assert "--no-repair" in caught.value.hint
    assert not list(tmp_path.glob("p*"))


def test_statistics_of_another_model(family, stats, tmp_path):
    with pytest.raises(TersorError, match="statistics of another checkpoint"):
        quantize(QuantizeRequest(str(family("qwen2")), tmp_path / "q", method="gptq", stats=stats))


def test_on_the_command_line(llama, stats, tmp_path):
    arguments = ["quantize", llama, "-o", tmp_path / "q", "--method", "gptq", "--stats", stats, "-q"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    arguments = ["prune", llama, "-o", tmp_path / "p", "--method", "wanda", "--stats", stats, "--dry-run"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0 and "peak memory" in result.output
    result = CliRunner().invoke(app, ["prune", str(llama), "-o", str(tmp_path / "x"), "--stats", str(tmp_path / "no")])
    assert result.exit_code == 1 and "no such file" in result.output


@pytest.mark.parametrize("name, target", [("llama", "4.5bits"), ("gpt2", "5bits"), ("qwen3-moe", "3.5bits")])
def test_the_policy_is_executed_to_the_byte(name, target, family, text, tmp_path):
    """quantize writes what the suggestion promised, whatever its own default is."""
    model = family(name)
    request = ProfileRequest([str(model)], calib=str(text), sensitivity=True, suggest=target, **SMALL)
    found = analyse(Checkpoint(model), request, torch.device("cpu"))
    chosen = suggest(found, target)
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(policy_of(found, chosen["labels"])))
    for scheme in ("w4a16", "fp8"):
        report = quantize(QuantizeRequest(str(model), tmp_path / scheme, scheme=scheme, policy=policy))
        assert report.totals()["bytes_after"] == chosen["checkpoint_bytes"]
        linear = [entry for entry in report.tensors if entry.name in found["tensors"]]
        bits = (
            8 * sum(e.after["bytes"] for e in linear) / sum(e.after["shape"][0] * e.after["shape"][1] for e in linear)
        )
        assert bits == pytest.approx(chosen["bits_per_weight"]) and bits <= float(target.removesuffix("bits"))
        assert not [warning for warning in report.warnings if "changes nothing" in warning]


def test_prune_executes_the_same_policy(llama, text, tmp_path):
    """Half of all weights, more where it does less damage; what is kept dense is kept here too."""
    request = ProfileRequest([str(llama)], calib=str(text), sensitivity=True, **SMALL)
    found = analyse(Checkpoint(llama), request, torch.device("cpu"))
    policy = policy_of(found, suggest(found, "4.25bits")["labels"])
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    settings = {"method": "wanda", "calib": str(text), "policy": tmp_path / "policy.json", **SMALL}
    prune(PruneRequest(str(llama), tmp_path / "p", **settings))
    quantize(QuantizeRequest(str(tmp_path / "p"), tmp_path / "q", policy=tmp_path / "policy.json"))
    pruned, both = Checkpoint(tmp_path / "p"), DenseView(Checkpoint(tmp_path / "q"))
    zeros = weights = 0
    for name in select(pruned).linears:
        zero = pruned.read(name) == 0
        wanted = policy["tensors"][re.escape(name)]["sparsity"]
        assert float(zero.float().mean()) == pytest.approx(wanted, abs=0.02)
        assert bool((both.read(name)[zero] == 0).all())
        zeros, weights = zeros + int(zero.sum()), weights + zero.numel()
    assert zeros / weights == pytest.approx(0.5, abs=0.02)
    assert len({settings["sparsity"] for settings in policy["tensors"].values()}) > 1

"""prune in a pipe: before and after the other commands, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from command_line import ok, report, run
from safetensors.torch import load_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.ops.model.selection import select

TERSOR = f"{sys.executable} -m tersor.cli.main"


def calibration(text) -> list:
    return ["--calib", text, "--samples", 4, "--seq-len", 64]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_prune_then_quantize_keeps_every_zero(method, pattern, family, text, tmp_path):
    """The main pipeline, in a shell: stdout carries nothing but the path."""
    model, calib = family("llama"), f"--calib {text} --samples 4 --seq-len 64"
    line = (
        f"{TERSOR} prune {model} -o A --remove weights --method sparsegpt --pattern {pattern} {calib} "
        f"| {TERSOR} quantize - -o B --scheme w4a16 --group-size 32 --method {method} {calib if method == 'gptq' else ''}"
    )
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "B\n"
    pruned, quantized = Checkpoint(tmp_path / "A"), DenseView(Checkpoint(tmp_path / "B"))
    for name in select(pruned).linears:
        zero = pruned.read(name) == 0
        assert 0.49 < zero.float().mean() < 0.52
        assert (quantized.read(name)[zero] == 0).all(), name
    first, second = report(tmp_path / "A"), report(tmp_path / "B")
    assert [step["command"] for step in second["history"]] == ["prune"]
    assert (
        second["history"][0]["output"]["fingerprint"]
        == first["output"]["fingerprint"]
        == second["input"]["fingerprint"]
    )
    assert first["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert second["totals"]["sparsity"] >= first["totals"]["sparsity"] - 1e-6


@pytest.mark.parametrize(
    "target", ["weights", "neurons", "heads", "channels", "layers", "attention", "mlp", "ranks", "norms"]
)
def test_every_target_is_sound_and_runs(target, family, text, tmp_path):
    """verify finds nothing, evaluate gives a perplexity, and the output is smaller where it should be."""
    model = family("llama", num_hidden_layers=4)
    out = ok("prune", model, "-o", tmp_path / "out", "--remove", target, "--sparsity", 0.5, *calibration(text))
    assert run("verify", out, "-q").exit_code == 0
    scored = run("evaluate", out, "--text", text, "--seq-len", 64, "--max-windows", 4, "--json", "-q")
    assert scored.exit_code == 0, scored.output
    assert 1 < json.loads(scored.stdout)["quality"]["perplexity"] < 10_000
    totals = report(out)["totals"]
    if target not in ("weights", "norms"):
        assert totals["params_after"] < totals["params_before"] and totals["bytes_after"] < totals["bytes_before"]


@pytest.mark.parametrize("target", ["neurons", "heads", "layers", "experts"])
def test_cut_then_quantized_loads(target, family, text, tmp_path):
    from transformers import AutoModelForCausalLM

    name = "mixtral" if target == "experts" else "llama"
    cut = ok("prune", family(name), "-o", tmp_path / "cut", "--remove", target, "--sparsity", 0.5, *calibration(text))
    model, loading = AutoModelForCausalLM.from_pretrained(cut, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
    small = ok("quantize", cut, "-o", tmp_path / "small", "--group-size", 16)
    assert [step["command"] for step in report(small)["history"]] == ["prune"]


@pytest.mark.parametrize("target", ["weights", "neurons", "layers", "ranks"])
def test_prune_after_quantize_names_the_way_out(target, family, text, tmp_path):
    codes = ok("quantize", family("llama"), "-o", tmp_path / "codes", "--group-size", 32)
    refused = run("prune", codes, "-o", tmp_path / "out", "--remove", target, *calibration(text))
    assert refused.exit_code == 1 and "tersor convert" in refused.stderr and "--to dense" in refused.stderr
    assert not (tmp_path / "out").exists()
    dense = ok("convert", codes, "--to", "dense", "-o", tmp_path / "dense")
    ok("prune", dense, "-o", tmp_path / "out", "--remove", target, "--sparsity", 0.5, *calibration(text))


def test_cut_twice(family, text, tmp_path):
    model = family("llama", num_hidden_layers=4)
    once = ok("prune", model, "-o", tmp_path / "once", "--remove", "layers", "--sparsity", 0.5, *calibration(text))
    twice = ok("prune", once, "-o", tmp_path / "twice", "--remove", "neurons", "--sparsity", 0.5, *calibration(text))
    config = json.loads((twice / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 48)
    assert [step["args"]["remove"] for step in report(twice)["history"]] == ["layers"]
    names = load_file(twice / "model.safetensors").keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}


def test_dry_run_writes_nothing_and_says_all(family, tmp_path):
    for target in ("weights", "neurons", "heads", "layers", "ranks"):
        shown = run("prune", family("llama"), "--remove", target, "--sparsity", 0.5, "--dry-run", "--json")
        assert shown.exit_code == 0, shown.output
        found = json.loads(shown.stdout)
        assert {row["name"] for row in found["tensors"]} == Checkpoint(family("llama")).tensors.keys()
        assert 0 < found["output_bytes"] <= found["input_bytes"] and found["peak_memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_html_report_of_a_cut_model(family, text, tmp_path):
    out = ok(
        "prune", family("llama"), "-o", tmp_path / "out", "--remove", "neurons", "--sparsity", 0.5, *calibration(text)
    )
    page = (out / "report.html").read_text()
    assert "prune" in page and "down_proj" in page and "<svg" in page

"""distill as a user runs it: what it learns, what stays as it was, interruption, several processes, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ok, report, run
from safetensors.torch import load_file
from tersor.formats.sparse.view import open_checkpoint

TERSOR = [sys.executable, "-m", "tersor.cli"]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tersor.cli"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SHORT = ["--steps", 6, "--batch", 4, "--seq-len", 32, "--lr", 1e-3]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def on_two_processes(arguments: list, out: Path) -> Path:
    command = [*LAUNCHER, *map(str, [*arguments, "-o", out, "-q"])]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(out)
    return out


@pytest.fixture
def student(family, tmp_path) -> Path:
    """Half of the weights are zero, so that there is something to learn."""
    return ok("prune", family("llama"), "-o", tmp_path / "student", "--method", "magnitude", "--sparsity", 0.5)


def test_learns_and_keeps_its_zeros(student, family, text, tmp_path):
    out = ok(
        "distill", student, "--teacher", family("llama"), "-o", tmp_path / "out", "--data", text, *SHORT, "--steps", 30
    )
    losses = [line["loss"] for line in lines(out)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    changed = 0
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        if "_proj" in name:
            assert bool((after[name][tensor == 0] == 0).all())
            changed += not torch.equal(after[name], tensor)
    assert changed == 14
    found = report(out)
    assert [step["command"] for step in found["history"]] == ["prune"]
    training, memory = found["quality"]["training"], found["quality"]["memory"]
    assert training["tokens"] == 30 * 4 * 31
    assert training["nested_layers"] == 2
    assert memory["activations_bytes"] < memory["adamw"]["activations_bytes"]
    assert memory["weights_bytes"] == memory["adamw"]["weights_bytes"]
    assert ok("verify", out) == out


KINDS = {
    "quantized": ["quantize", "--scheme", "w4a16", "--group-size", 32],
    "scales": ["quantize", "--scheme", "w4a16", "--group-size", 32],
    "factors": ["prune", "--remove", "ranks", "--method", "svd", "--sparsity", 0.5],
    "packed": ["sparsify", "--pattern", "2:4", "--no-permute"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_student_keeps_its_form(kind, family, text, tmp_path):
    command, *options = KINDS[kind]
    student = ok(command, family("llama"), "-o", tmp_path / "student", *options)
    extra = ["--quantized", "scales", "--train", "scales"] if kind == "scales" else []
    out = ok("distill", student, "--teacher", family("llama"), "-o", tmp_path / "out", "--data", text, *SHORT, *extra)
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    assert weights(out) != weights(student)
    ok("verify", out)
    if kind == "scales":
        assert all(
            torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith("weight_packed")
        )
    if kind == "packed":
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith("bitmask"))
        assert open_checkpoint(out).packed.keys() == open_checkpoint(student).packed.keys()
    assert lines(out)[-1]["loss"] < lines(out)[0]["loss"]


def test_unequal_depth_and_width(family, text, tmp_path):
    """A smaller model that starts from the teacher; hidden states are compared through a map and a projection."""
    config = json.loads((family("gemma3") / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "intermediate_size": 48}
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = ok(
        "distill", "--config", tmp_path / "config.json", "--teacher", family("gemma3"), "-o", tmp_path / "out", "--data", text,
        "--loss", "kl=1,hidden=0.5,next=0.1", *SHORT,
    )  # fmt: skip
    assert {"kl", "hidden", "next"} <= lines(out)[0].keys()
    assert len(open_checkpoint(out).tensors) < len(open_checkpoint(family("gemma3")).tensors)
    assert "layer map" in report(out)["quality"]["training"]["layer_map"]
    result = run("evaluate", out, "--text", text, "--seq-len", 32, "--max-windows", 2, "-q")
    assert result.exit_code == 0, result.output


def test_cached_teacher(student, family, text, tmp_path):
    """Written once, read by the next run, which then needs no teacher and gives nearly the same."""
    cache = tmp_path / "logits.safetensors"
    common = ["--data", text, *SHORT, "--top-k", 256, "--loss", "kl"]
    whole = ok("distill", student, "--teacher", family("llama"), "-o", tmp_path / "whole", *common)
    first = ok(
        "distill", student, "--teacher", family("llama"), "-o", tmp_path / "a", "--cache-teacher", cache, *common
    )
    second = ok("distill", student, "--teacher", cache, "-o", tmp_path / "b", *common)
    assert weights(first) == weights(second)
    for exact, cached in zip(lines(whole), lines(second), strict=True):
        assert cached["loss"] == pytest.approx(exact["loss"], rel=2e-2)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "apollo", "apollo-mini", "lion"])
def test_optimizers(optimizer, student, family, text, tmp_path):
    options = ["--optimizer", optimizer, "--lr", 2e-4 if optimizer == "lion" else 1e-3, "--steps", 20]
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT]
    out = ok(*base, "-o", tmp_path / "out", *options)
    losses = [line["loss"] for line in lines(out)]
    assert sum(losses[-5:]) < sum(losses[:5])
    memory = report(out)["quality"]["memory"]
    assert memory["optimizer_bytes"] < memory["adamw"]["optimizer_bytes"]


def test_recompute_and_micro_batches_change_nothing(student, family, text, tmp_path):
    """But the memory."""
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT]
    plain = ok(*base, "-o", tmp_path / "plain", "--no-nested")
    other = ok(*base, "-o", tmp_path / "other", "--recompute", "--micro-batch", 1)
    for left, right in zip(lines(plain), lines(other), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
    activations = [report(folder)["quality"]["memory"]["activations_bytes"] for folder in (plain, other)]
    assert activations[1] < 0.5 * activations[0]


def test_replay_is_bit_for_bit(student, family, text, tmp_path):
    options = ["--optimizer", "mezo", "--lr", 1e-4]
    out = ok(
        "distill", student, "--teacher", family("llama"), "-o", tmp_path / "out", "--data", text, *SHORT[:-2], *options
    )
    again = ok("distill", student, "-o", tmp_path / "again", "--replay", out / "log.jsonl", "--optimizer", "mezo")
    assert weights(again) == weights(out)
    assert weights(out) != weights(student)
    result = run("distill", family("llama"), "-o", tmp_path / "other", "--replay", out / "log.jsonl")
    assert result.exit_code == 1


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_then_resumed(number, student, family, text, tmp_path):
    """Exit 130, the state kept; --resume ends with the bytes of a run that was never interrupted."""
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT, "--steps", 40]
    whole = ok(*base, "-o", tmp_path / "whole")
    out = tmp_path / "out"
    command = [*TERSOR, *map(str, [*base, "-o", out])]
    process = subprocess.Popen(
        [*command, "--save-every", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    latest = tmp_path / "out.training" / "latest.json"
    deadline = time.monotonic() + 120
    while process.poll() is None and not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "--resume" in stderr
    assert not out.exists()
    assert 0 < json.loads(latest.read_text())["step"] < 40
    refused = run(*base, "-o", out)
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr
    other = run(*base, "-o", out, "--resume", "--seed", 1)
    assert other.exit_code == 1
    assert "seed" in other.stderr
    assert ok(*base, "-o", out, "--resume") == out
    assert weights(out) == weights(whole)
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(whole)]
    assert not latest.parent.exists()


def test_a_loss_that_is_no_number(student, family, text, tmp_path, monkeypatch):
    """The step is named, the last state whose loss was a number is kept, and the run can go on from it."""
    from tersor.ops.distill.session import Session

    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT]
    whole, plain = ok(*base, "-o", tmp_path / "whole"), Session.loss

    def broken(self, step, ids):
        loss, parts = plain(self, step, ids)
        return (loss * float("nan") if step == 4 else loss), parts

    monkeypatch.setattr(Session, "loss", broken)
    out = tmp_path / "out"
    result = run(*base, "-o", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "step 5: the loss is nan" in result.stderr
    assert "--save-every" in result.stderr
    assert not (tmp_path / "nothing.training").exists()
    result = run(*base, "-o", out, "--save-every", 1)
    assert result.exit_code == 1
    assert "step 5: the loss is nan; the last good state, after step 3" in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    assert weights(ok(*base, "-o", out, "--resume")) == weights(whole)


def test_two_processes_give_the_curve_of_one(student, family, text, tmp_path):
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT]
    one = ok(*base, "-o", tmp_path / "one")
    two = on_two_processes(base, tmp_path / "two")
    for left, right in zip(lines(one), lines(two), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3)
    before, after = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in before.items():
        assert torch.allclose(tensor.float(), after[name].float(), atol=2e-2), name
        assert torch.equal(tensor == 0, after[name] == 0) or "_proj" not in name


@pytest.mark.parametrize("optimizer", [pytest.param("adamw8bit", marks=pytest.mark.slow), "mezo"])
def test_two_processes_go_on_where_they_were_interrupted(optimizer, student, family, text, tmp_path):
    """To the same bytes, and with mezo to the same log, which one process can replay."""
    settings = ["--steps", 10, "--optimizer", optimizer]
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT, *settings]
    whole, out = on_two_processes(base, tmp_path / "whole"), tmp_path / "out"
    command = [*LAUNCHER, *map(str, [*base, "-o", out, "--save-every", 1])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    latest = tmp_path / "out.training" / "latest.json"
    deadline = time.monotonic() + 120
    while process.poll() is None and not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    assert not out.exists()
    assert 0 < json.loads(latest.read_text())["step"] < 10
    on_two_processes([*base, "--resume"], out)
    assert weights(out) == weights(whole)
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(whole)]
    if optimizer == "mezo":
        assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
        again = ok("distill", student, "-o", tmp_path / "again", "--replay", out / "log.jsonl", "--optimizer", "mezo")
        assert weights(again) == weights(out)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "nonsense"], ["nonsense", "kl"]),
        (["--optimizer", "sgd"], ["sgd", "adamw"]),
        (["--schedule", "square"], ["square"]),
        (["--batch", 100000], ["shorter than one batch"]),
        (["--lisa", 9], ["--lisa"]),
        (["--layer-map", "0:7", "--loss", "hidden"], ["block 7"]),
        (["--include", "nothing-like-it"], ["nothing-like-it"]),
        (["--optimizer", "qzo", "--train", "scales"], ["scales"]),
    ],
)
def test_refused(options, words, student, family, text, tmp_path):
    out = tmp_path / "out"
    result = run("distill", student, "--teacher", family("llama"), "-o", out, "--data", text, *SHORT, *options)
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.stderr
    assert not out.exists()
    assert not out.with_name("out.training").exists()


def test_another_vocabulary_is_refused(student, family, text, tmp_path):
    teacher = family("llama", vocab_size=100)
    result = run("distill", student, "--teacher", teacher, "-o", tmp_path / "out", "--data", text, *SHORT)
    assert result.exit_code == 1
    assert "embeddings" in result.stderr or "vocabular" in result.stderr


# --- elastic ----------------------------------------------------------------------------------------------------------


def test_scalars_for_tensorboard(student, family, text, tmp_path, monkeypatch):
    """Every number of every step goes to its writer; without the package the run stops before it begins."""
    base = ["distill", student, "--teacher", family("llama"), "--data", text, *SHORT, "--log-dir", tmp_path / "logs"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused = run(*base, "-o", tmp_path / "refused")
    assert refused.exit_code == 1
    assert "pip install tensorboard" in refused.stderr
    seen, closed = [], []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "logs")

        def add_scalar(self, name, value, step):
            seen.append((step, name, value))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    out = ok(*base, "-o", tmp_path / "out")
    wanted = [(line["step"], name, line[name]) for line in lines(out) for name in line if name != "step"]
    assert seen == wanted
    assert closed == [True]


def test_elastic_then_extract(family, text, tmp_path):
    """One training run, many models: each extracts as a smaller checkpoint; an interrupted run ends with the same bytes."""
    base = ["distill", family("llama"), "--teacher", family("llama"), "--data", text, *SHORT, "--elastic"]
    out = ok(*base, "-o", tmp_path / "out")
    assert {"largest", "smallest"} <= lines(out)[0].keys()
    assert (out / "elastic.json").is_file()
    assert report(out)["quality"]["elastic"]["networks"]["smallest"]["parameters"] > 0
    small = ok("prune", out, "-o", tmp_path / "small", "--extract", "smallest")
    assert open_checkpoint(small).nbytes < open_checkpoint(out).nbytes
    result = run("evaluate", small, "--text", text, "--seq-len", 32, "--max-windows", 2, "-q")
    assert result.exit_code == 0, result.output
    refused = run(*base, "-o", tmp_path / "other", "--loss", "hidden")
    assert refused.exit_code == 1
    assert "--elastic" in refused.stderr

"""Commands one after another: what works, what is refused and how, and what the report tells at the end."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from command_line import ok, report, run
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView

INDEX = "model.safetensors.index.json"


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    view = DenseView(Checkpoint(folder))
    return {name: view.read(name) for name in view.tensors}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shards(folder: Path, count: int) -> Path:
    """The checkpoint of `folder` in several files and an index; tensors of one layer lie in different ones."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        part = list(tensors)[number::count]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def model(family, tmp_path) -> Path:
    return shutil.copytree(family("llama"), tmp_path / "model")


# --- quantize after ... -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_quantize_after_quantize_is_refused(encoding, method, model, tmp_path):
    """Twice rounded is worse than once: the way out is named."""
    ok("quantize", model, "-o", tmp_path / "once", "--group-size", 32, "--format", encoding)
    result = run("quantize", tmp_path / "once", "-o", tmp_path / "twice", "--method", method)
    assert result.exit_code == 1
    assert "quantized already" in result.stderr
    assert "tersor convert" in result.stderr
    assert "--to dense" in result.stderr
    assert not (tmp_path / "twice").exists()


def test_quantize_after_dense(model, tmp_path):
    """The hint of the refusal, followed. The report tells the whole life."""
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32, "--scheme", "w8a16")
    ok("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "dense")
    ok("quantize", tmp_path / "b", "-o", tmp_path / "c", "--group-size", 32, "--scheme", "w4a16")
    assert ok("verify", tmp_path / "c", "--against", tmp_path / "b") == tmp_path / "c"
    found = report(tmp_path / "c")
    steps = [*found["history"], found]
    assert [step["command"] for step in steps] == ["quantize", "convert", "quantize"]
    assert [step["args"].get("scheme", step["args"].get("to")) for step in steps] == ["w8a16", "dense", "w4a16"]
    assert [step["output"]["path"] for step in steps] == [str(tmp_path / name) for name in "abc"]
    for earlier, later in pairwise(steps):
        assert later["input"]["fingerprint"] == earlier["output"]["fingerprint"]
        assert later["input"]["bytes"] == earlier["output"]["bytes"]
    assert found["input"]["fingerprint"] == Checkpoint(tmp_path / "b").fingerprint()
    assert found["output"]["fingerprint"] == Checkpoint(tmp_path / "c").fingerprint()


def test_history_begins_with_the_first_command(model, tmp_path):
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32)
    assert report(tmp_path / "a")["history"] == []


def test_quality_travels(model, text, tmp_path):
    """A measurement that was recorded is part of the step it measured."""
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32)
    ok("evaluate", tmp_path / "a", "--text", text, "--seq-len", 32, "--max-windows", 2, "--record")
    ok("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "gptq")
    quality = report(tmp_path / "a")["quality"]
    assert quality["perplexity"] > 1
    assert report(tmp_path / "b")["history"][0]["quality"] == quality
    assert report(tmp_path / "b")["quality"] == {}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_convert_after_calibrated(method, model, text, tmp_path):
    calibration = ["--method", method, "--calib", text, "--samples", 4, "--seq-len", 32]
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32, *calibration)
    ok("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "gptq")
    ok("convert", tmp_path / "b", "-o", tmp_path / "c", "--to", "compressed-tensors")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "c" / "config.json").read_bytes()


def test_evaluate_sees_the_same_model_in_every_form(model, text, tmp_path):
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32)
    ok("convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "gptq")
    ok("convert", tmp_path / "a", "-o", tmp_path / "c", "--to", "dense", "--dtype", "float32")
    found = {}
    for name in "abc":
        result = run("evaluate", tmp_path / name, "--text", text, "--seq-len", 32, "--max-windows", 4, "--json", "-q")
        found[name] = json.loads(result.stdout)["quality"]["perplexity"]
    assert found["a"] == found["b"] == found["c"]


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gptq", "dense"])
def test_convert_of_shards(to, model, tmp_path):
    """The parts of one layer lie in different files; the output is that of the single file."""
    ok("quantize", model, "-o", tmp_path / "whole", "--group-size", 32)
    shards(shutil.copytree(tmp_path / "whole", tmp_path / "parted"), 3)
    for name in ("whole", "parted"):
        ok("convert", tmp_path / name, "-o", tmp_path / f"{name}-{to}", "--to", to)
    assert same(decoded(tmp_path / f"parted-{to}"), decoded(tmp_path / f"whole-{to}"))
    assert not (tmp_path / f"parted-{to}" / INDEX).exists()
    ok("verify", tmp_path / f"parted-{to}")


def test_quantize_of_shards(model, tmp_path):
    ok("quantize", model, "-o", tmp_path / "whole", "--group-size", 32)
    ok("quantize", shards(model, 3), "-o", tmp_path / "parted", "--group-size", 32)
    assert same(
        load_file(tmp_path / "parted" / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    )


def test_output_in_shards(model, tmp_path, monkeypatch):
    """Past the largest shard the writer begins another one; every later command reads them all."""
    from tersor.formats import writer

    ok("quantize", model, "-o", tmp_path / "whole", "--group-size", 32)
    largest = Checkpoint(tmp_path / "whole").nbytes // 3
    monkeypatch.setattr(writer.CheckpointWriter.__init__, "__defaults__", (False, largest))
    ok("quantize", model, "-o", tmp_path / "parted", "--group-size", 32)
    files = sorted(path.name for path in (tmp_path / "parted").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "parted" / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == Checkpoint(tmp_path / "whole").nbytes
    assert same(decoded(tmp_path / "parted"), decoded(tmp_path / "whole"))
    ok("verify", tmp_path / "parted", "--against", model)
    ok("convert", tmp_path / "parted", "-o", tmp_path / "dense", "--to", "dense", "--dtype", "float32")
    assert same(decoded(tmp_path / "dense"), decoded(tmp_path / "whole"))


# --- one bare file ----------------------------------------------------------------------------------------------------


def test_bare_file_there_and_back(model, tmp_path):
    """Data-free work needs no config.json: codes as from the folder, a config that says how they are packed, and back."""
    bare = tmp_path / "bare.safetensors"
    shutil.copy(model / "model.safetensors", bare)
    ok("quantize", bare, "-o", tmp_path / "a", "--group-size", 32)
    ok("quantize", model, "-o", tmp_path / "b", "--group-size", 32)
    assert same(load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors"))
    assert list(json.loads((tmp_path / "a" / "config.json").read_text())) == ["quantization_config"]
    ok("verify", tmp_path / "a", "--against", bare)
    ok("convert", tmp_path / "a", "-o", tmp_path / "c", "--to", "gptq")
    assert same(decoded(tmp_path / "c"), decoded(tmp_path / "a"))
    ok("convert", tmp_path / "c", "-o", tmp_path / "d", "--to", "dense", "--dtype", "float32")
    assert not (tmp_path / "d" / "config.json").exists()
    assert same(decoded(tmp_path / "d"), decoded(tmp_path / "a"))


@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_bare_file_cannot_be_run(command, model, text, tmp_path):
    arguments = {
        "evaluate": ["--text", text],
        "quantize": ["--method", "gptq", "--calib", text, "-o", tmp_path / "out"],
    }[command]
    result = run(command, model / "model.safetensors", *arguments)
    assert result.exit_code == 1
    assert "no config.json" in result.stderr
    assert not (tmp_path / "out").exists()


def test_quantized_file_without_its_config(model, tmp_path):
    """Codes mean nothing without the config that says how they are packed."""
    ok("quantize", model, "-o", tmp_path / "a", "--group-size", 32)
    for command in (
        ["convert", "-o", tmp_path / "out", "--to", "dense"],
        ["quantize", "-o", tmp_path / "out"],
        ["verify"],
    ):
        result = run(command[0], tmp_path / "a" / "model.safetensors", *command[1:])
        assert result.exit_code == 1
        assert "quantization_config" in result.stderr
        assert not (tmp_path / "out").exists()

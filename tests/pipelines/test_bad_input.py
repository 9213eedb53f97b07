"""Bad input: exit 1, one line of error, one of hint, nothing on stdout, no output folder."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TERSOR = [sys.executable, "-m", "tersor.cli.main"]


def tersor(*arguments, limit: int | None = None, **options) -> subprocess.CompletedProcess:
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [*TERSOR, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        preexec_fn=small_disk if limit else None, **options,
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess, out: Path, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert result.returncode == 1, result.stderr
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    for word in words:
        assert word in lines[0] + lines[1], result.stderr


@pytest.fixture
def model(family, tmp_path) -> Path:
    return shutil.copytree(family("llama"), tmp_path / "model")


def sharded(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def rewrite_header(model: Path, change) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def first(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


def missing_shard(model):
    (sharded(model) / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def truncated_shard(model):
    path = sharded(model) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "truncated"


def index_outside(model):
    path = sharded(model) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    return "outside"


def overlap(model):
    def move_last(header):
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        last = max(entries, key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [offset - 2 for offset in last["data_offsets"]]

    rewrite_header(model, move_last)
    return "overlaps"


def gap(model):
    path = model / "model.safetensors"
    rewrite_header(
        model,
        lambda header: [
            entry.__setitem__("data_offsets", [offset + 8 for offset in entry["data_offsets"]])
            for name, entry in header.items()
            if name != "__metadata__"
        ],
    )
    path.write_bytes(path.read_bytes() + bytes(8))
    return "gap"


def unknown_dtype(model):
    rewrite_header(model, lambda header: first(header).__setitem__("dtype", "F7_E9M9"))
    return "F7_E9M9"


def nan_weight(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.1.mlp.up_proj.weight"


def inf_in_a_kept_tensor(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "model.embed_tokens.weight"


def pickle_only(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return "pickle"


def not_a_header(model):
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!!")
    return "JSON"


DAMAGES = [missing_shard, truncated_shard, index_outside, overlap, gap, unknown_dtype, nan_weight, inf_in_a_kept_tensor,
           pickle_only, not_a_header]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, model, tmp_path):
    word = damage(model)
    assert_refused(tersor("quantize", model, "-o", tmp_path / "out", "--group-size", 32), tmp_path / "out", word)


@pytest.mark.parametrize("damage", [nan_weight, truncated_shard])
def test_damaged_checkpoint_calibrated(damage, model, tmp_path, text):
    word = damage(model)
    result = tersor(
        "quantize", model, "-o", tmp_path / "out", "--method", "gptq", "--group-size", 32, "--calib", text, "--samples", 2,
        "--seq-len", 32,
    )  # fmt: skip
    assert_refused(result, tmp_path / "out", word)


def test_no_config_where_one_is_needed(model, tmp_path, text):
    (model / "config.json").unlink()
    out = tmp_path / "out"
    assert_refused(tersor("quantize", model, "-o", out, "--method", "gptq", "--calib", text), out, "config.json")
    assert tersor("quantize", model, "-o", out, "--group-size", 32).returncode == 0


def test_calibration_text_too_short(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    result = tersor("quantize", model, "-o", tmp_path / "out", "--method", "gptq", "--calib", short, "--seq-len", 32)
    assert_refused(result, tmp_path / "out", "short.txt", "windows", "--samples")


def test_disk_full(model, tmp_path):
    result = tersor("quantize", model, "-o", tmp_path / "out", "--group-size", 32, limit=4096)
    assert_refused(result, tmp_path / "out", "cannot be written")


def test_output_not_empty(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    result = tersor("quantize", model, "-o", out)
    assert result.returncode == 1
    assert "not empty" in result.stderr
    assert (out / "precious.txt").read_text() == "mine"


def test_output_is_the_input(model):
    result = tersor("quantize", model, "-o", model, "--force")
    assert result.returncode == 1
    assert "is the input" in result.stderr


def test_quantized_already(model, tmp_path):
    assert tersor("quantize", model, "-o", tmp_path / "once", "--group-size", 32).returncode == 0
    result = tersor("quantize", tmp_path / "once", "-o", tmp_path / "out")
    assert_refused(result, tmp_path / "out", "quantized already", "--to dense")


def test_strict_group_size(model, tmp_path):
    assert_refused(tersor("quantize", model, "-o", tmp_path / "out", "--strict"), tmp_path / "out", "not divisible")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--scheme", "w5a16"], "w5a16"),
        (["--method", "magic"], "magic"),
        (["--format", "zip"], "zip"),
        (["--group-size", "7"], "multiple"),
        (["--scheme", "fp8", "--group-size", "32"], "no groups"),
        (["--include", "("], "regular expression"),
        (["--include", "no_such_tensor"], "matches no tensor"),
        (["--device", "tpu"], "device"),
        (["--policy", "/nonexistent.json"], "policy"),
        (["--max-memory", "lots"], "size"),
    ],
)
def test_nonsense_arguments(arguments, word, model, tmp_path):
    assert_refused(tersor("quantize", model, "-o", tmp_path / "out", *arguments), tmp_path / "out", word)


def test_missing_model(tmp_path):
    assert_refused(tersor("quantize", tmp_path / "nothing", "-o", tmp_path / "out"), tmp_path / "out", "nothing")


def test_wrong_usage_is_exit_2(model):
    assert tersor("quantize", model, "--no-such-option").returncode == 2
    assert tersor("quantize", model).returncode == 2
    assert tersor("no-such-command").returncode == 2


def test_empty_pipe(tmp_path):
    assert_refused(tersor("quantize", "-", "-o", tmp_path / "out", input=""), tmp_path / "out", "stdin")


def test_bare_file(model, tmp_path):
    """A single safetensors file is enough for what needs no forward pass."""
    result = tersor("quantize", model / "model.safetensors", "-o", tmp_path / "out", "--group-size", 32)
    assert result.returncode == 0, result.stderr
    assert torch.is_tensor(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    )

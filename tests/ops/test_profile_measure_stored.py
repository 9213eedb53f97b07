"""What the stored form does to speed: which layers are timed, and what is said of them. No test asks for a speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.low_rank import Factors
from tersor.formats.page_text import render
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.profile.measure import host, operators, run, runtime, stored, stored_page
from tersor.ops.profile.measure.page import sections
from tersor.ops.profile.measure.stored import find_kinds, form_of, measure_stored
from tersor.ops.profile.request import Workload
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.sparsify.request import Request as SparsifyRequest
from tersor.ops.sparsify.run import sparsify

CPU, WORKLOAD = torch.device("cpu"), Workload(2, 16, 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Few and short runs, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "ROUNDS", 3)
    monkeypatch.setattr(stored, "cache_bytes", lambda device: 1 << 14)


def quantized(model: Path, out: Path, scheme: str = "w4a16", **settings) -> Path:
    quantize(QuantizeRequest(str(model), out, scheme=scheme, **settings))
    return out


def measured(folder: Path) -> dict | None:
    return measure_stored(Checkpoint(folder), WORKLOAD, CPU, torch.float32)


def test_nothing_to_say_of_dense_layers(family):
    assert measured(family("llama")) is None


def test_kinds_of_layers(family, tmp_path):
    policy = tmp_path / "policy.json"
    tensors = {".*down_proj.weight": {"scheme": "w8a16"}, ".*v_proj.*": {"keep": True}}
    policy.write_text(json.dumps({"schema": "tersor.policy/1", "tensors": tensors}))
    folder = quantized(family("llama"), tmp_path / "small", group_size=32, policy=policy)
    view = DenseView(open_checkpoint(folder))
    kinds = {(kind.form, kind.shape): kind for kind in find_kinds(view)}
    assert {key: len(kind.names) for key, kind in kinds.items()} == {
        ("int4 by 32", (64, 64)): 4, ("int4 by 32", (32, 64)): 2, ("int4 by 32", (96, 64)): 4, ("int8 by 96", (64, 96)): 2,
    }  # fmt: skip
    stored_bytes = sum(view.checkpoint.tensors[name].nbytes for name in view.checkpoint.tensors if "down_proj" in name)
    assert kinds["int8 by 96", (64, 96)].stored_bytes == stored_bytes


def test_kinds_of_transposed_layers_and_experts(family, tmp_path):
    folder = quantized(family("gpt2"), tmp_path / "gpt2", group_size=32)
    assert {kind.shape for kind in find_kinds(DenseView(open_checkpoint(folder)))} == {
        (192, 64), (64, 64), (256, 64), (64, 256),
    }  # fmt: skip
    prune(PruneRequest(str(family("gpt2")), tmp_path / "zeros", method="magnitude", sparsity=0.7))
    sparsify(SparsifyRequest(str(tmp_path / "zeros"), tmp_path / "packed", format="sparse-bitmask", device="cpu"))
    kinds = find_kinds(DenseView(open_checkpoint(tmp_path / "packed")))
    assert {(kind.form, kind.shape) for kind in kinds} >= {("sparse-bitmask", (192, 64)), ("sparse-bitmask", (64, 256))}
    moe = find_kinds(DenseView(open_checkpoint(quantized(family("mixtral"), tmp_path / "moe", group_size=32))))
    assert not any("experts" in name for kind in moe for name in kind.names)  # decoded while they are loaded


def test_forms_in_words():
    packed = Packed("a.weight", "vector", "BF16", (64, 64), 64, 64, 16, 3, tile=(32, 1))
    assert form_of(Scheme(4, group_size=64), None, None) == "int4 by 64"
    assert form_of(Scheme(8, "float", strategy="block", activations="fp8-group"), None, None) == (
        "fp8 by block, fp8-group activations"
    )
    assert form_of(None, packed, None) == "vector 32x1"
    assert form_of(Scheme(4, strategy="channel"), packed, None) == "int4 by channel, vector 32x1"
    assert form_of(None, None, Factors("a", "low_rank", 22, (64, 64), "BF16")) == "rank 22"
    assert form_of(None, None, Factors("a", "kronecker", 3, (64, 64), "BF16", grid=(8, 8))) == "3 Kronecker terms"


@pytest.mark.parametrize("what", ["w4a16", "w8a8", "fp8", "ranks", "sparse"])
def test_stored_against_dense(what, family, tmp_path):
    folder = tmp_path / "small"
    if what == "ranks":
        prune(PruneRequest(str(family("llama")), folder, "ranks", "svd", 0.3))
    elif what == "sparse":
        prune(PruneRequest(str(family("llama")), tmp_path / "zeros", method="magnitude", sparsity=0.7))
        sparsify(SparsifyRequest(str(tmp_path / "zeros"), folder, format="sparse-bitmask", device="cpu"))
    else:
        quantized(family("llama"), folder, what)
    data = measured(folder)
    assert json.loads(json.dumps(data)) == data
    layers = {"w4a16": "Int4Linear", "w8a8": "Int8Linear", "fp8": "Fp8Linear", "ranks": "LowRankLinear"}
    for kind in data["kinds"]:
        assert kind["kernel"] == layers.get(what, "BitmapLinear")
        assert kind["file_bytes"] < kind["dense_bytes"] == 4 * kind["shape"][0] * kind["shape"][1]
        assert 1 <= kind["timed_layers"] <= kind["layers"]
        assert [entry["tokens"] for entry in kind["times"]] == [2, 32]
        for entry in kind["times"]:
            assert entry["stored"]["runs"] == entry["dense"]["runs"] == 3
            assert entry["speedup"] == pytest.approx(entry["dense"]["seconds"] / entry["stored"]["seconds"])
    rows = {row["form"]: row for row in data["whole"]["rows"]}
    assert rows["as loaded"]["tokens"] == 16
    fullest = max(row["memory_bytes"] for row in rows.values())
    assert min(row["memory_bytes"] for row in rows.values()) < fullest
    assert len({json.dumps(row["layers"]) for row in rows.values()}) == len(rows)


def test_without_memory_the_whole_model_is_left_out(family, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "free_bytes", lambda device: 1000)
    whole = measured(quantized(family("llama"), tmp_path / "small"))["whole"]
    assert whole["rows"] == []
    assert "are free" in whole["left_out_because"]
    assert "was not run: the model takes" in stored_page._whole(whole).lines[0]


def kind_of(speedups: list[float], runs_stored: bool) -> dict:
    entries = [
        {
            "tokens": tokens,
            "stored": {"seconds": 1 / speedup, "low_seconds": 0.9 / speedup, "high_seconds": 1.1 / speedup, "runs": 3},
            "dense": {"seconds": 1.0, "low_seconds": 0.9, "high_seconds": 1.1, "runs": 3},
            "speedup": speedup,
        }
        for tokens, speedup in zip((1, 512), speedups, strict=True)
    ]
    return {
        "form": "int4 by 64", "shape": [4096, 1024], "layers": 3, "timed_layers": 3, "kernel": "Int4Linear",
        "runs_stored": runs_stored, "file_bytes": 1000, "memory_bytes": 1000, "dense_bytes": 8000, "times": entries,
    }  # fmt: skip


def test_smaller_and_slower_is_said():
    assert stored_page.slower_sentences([kind_of([2.0, 0.97], True)]) == []
    assert stored_page.slower_sentences([kind_of([0.5, 2.0], True)]) == [
        "Smaller is slower here: int4 by 64 4,096 × 1,024 takes 2× for 1 token as long as dense; it runs so all the same."
    ]
    assert stored_page.slower_sentences([kind_of([0.5, 0.25], False)]) == [
        "Smaller is slower here: int4 by 64 4,096 × 1,024 takes 2× for 1 token and 4× for 512 tokens as long as dense; "
        "so load makes it dense."
    ]
    kinds, whole = [kind_of([4.0, 0.5], True)], {"rows": [], "left_out_because": "reasons"}
    section = stored_page.section({"device": {"dtype": "float32"}, "stored": {"kinds": kinds, "whole": whole}})
    assert section.lead == (
        "The layers that are not stored as plain matrices take 3 kB in the file, 24 kB as float32 matrices; run as they are "
        "stored, they are 4× as fast for 1 token and 2× as slow for 512 tokens."
    )


def test_part_of_measure(family, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(host, "SIZES", {"cpu": (32,)})
    monkeypatch.setattr(host, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(host, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(runtime, "MIN_ROUNDS", 4)
    monkeypatch.setattr(runtime, "MAX_ROUNDS", 4)
    monkeypatch.setattr(operators, "RUNS", 3)
    folder, stages = quantized(family("llama"), tmp_path / "small"), []
    data = run.measure(Checkpoint(folder), WORKLOAD, CPU, lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == list(run.STAGES)
    assert json.loads(json.dumps(data)) == data
    assert data["stored"]["kinds"][0]["form"].startswith("int4")
    text = render(sections(data), 140)
    assert "The stored form" in text
    assert "The whole model, its own weights" in text
    plain = run.measure(Checkpoint(family("llama")), WORKLOAD, CPU)
    assert plain["stored"] is None
    assert "The stored form" not in render(sections(plain), 140)

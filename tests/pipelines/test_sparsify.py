"""Zeros packed away: smaller files, the same model to every command, and back bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import ok, report, run
from safetensors.torch import load_file, save_file
from tersor.formats.dense import DenseView
from tersor.formats.sparse.packed import FORMATS
from tersor.formats.sparse.view import open_checkpoint
from tiny_models import build

FAMILIES = ["llama", "llama-bias", "qwen3", "gemma", "gpt2", "opt", "phi3", "mixtral", "qwen2-moe", "bert"]
# The way quantize is called -> whether all its layers can be packed.
SCHEMES = {
    "w8a16": [],
    "w4a16": [],
    "w3a16": [],
    "w4a16 asymmetric": ["--asymmetric"],
    "w8a16 asymmetric": ["--asymmetric"],
    "w8a8": [],
    "fp8": [],
    "fp8-block": [],
    "w4a16 gptq": ["--format", "gptq"],
}


@pytest.fixture(autouse=True)
def no_measured_costs(tmp_path_factory, monkeypatch):
    """What was measured on this machine before must not decide what is tested."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the report, which holds times and paths."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith("report.")
    }


def masked(model: Path, out: Path, pattern: str = "unstructured", sparsity: float = 0.5) -> Path:
    share = ["--sparsity", sparsity] if ":4" not in pattern else []
    return Path(ok("prune", model, "-o", out, "--method", "magnitude", "--pattern", pattern, *share))


def perplexity(folder: Path, text: Path) -> float:
    found = run("evaluate", folder, "--text", text, "--seq-len", 32, "--max-windows", 4, "--json", "-q")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)["quality"]["perplexity"]


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, family, text, tmp_path):
    """Smaller, sound, the same perplexity to the last digit, and back to the same files."""
    a = masked(family(name), tmp_path / "a")
    b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
    assert ok("verify", b, "--against", a) == b
    found = report(b)
    packed = [entry for entry in found["tensors"] if entry["action"] == "pack"]
    assert len(packed) == sum(entry["action"] == "mask" for entry in report(a)["tensors"])
    assert all(entry["after"]["bytes"] < entry["before"]["bytes"] for entry in packed)
    assert (b / "model.safetensors").stat().st_size < (a / "model.safetensors").stat().st_size
    assert found["output"]["bytes"] == found["totals"]["bytes_after"]
    if name != "bert":
        assert perplexity(b, text) == perplexity(a, text)
    c = Path(ok("convert", b, "-o", tmp_path / "c", "--to", "dense"))
    assert digests(c) == digests(a)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_over_codes(scheme, family, text, tmp_path):
    """prune, quantize, sparsify: the codes' zeros are packed, and convert gives the quantized checkpoint back."""
    a = masked(family("llama"), tmp_path / "a", "2:4")
    options = ["--scheme", scheme.split()[0], *SCHEMES[scheme]]
    options += ["--group-size", 32] if "a16" in scheme else []
    b = Path(ok("quantize", a, "-o", tmp_path / "b", *options))
    c = Path(ok("sparsify", b, "-o", tmp_path / "c"))
    assert ok("verify", c) == c
    assert open_checkpoint(c).nbytes < open_checkpoint(b).nbytes
    assert len(open_checkpoint(c).packed) == sum(entry["action"] == "pack" for entry in report(c)["tensors"]) == 14
    assert perplexity(c, text) == perplexity(b, text)
    d = Path(ok("convert", c, "-o", tmp_path / "d", "--to", "dense"))
    assert digests(d) == digests(b)
    assert [step["command"] for step in report(d)["history"]] == ["prune", "quantize", "sparsify"]
    e = Path(ok("convert", c, "-o", tmp_path / "e", "--to", "dense", "--dtype", "float32"))
    f = Path(ok("convert", b, "-o", tmp_path / "f", "--to", "dense", "--dtype", "float32"))
    assert digests(e) == digests(f)


@pytest.mark.parametrize(
    ("format", "pattern"),
    [
        ("sparse-bitmask", "unstructured"),
        ("sparse-24-bitmask", "2:4"),
        ("vector", "vector:32x1"),
        ("vector:16x1", "vector:16x1"),
        ("vector:1x16", "vector:1x16"),
        ("block", "block:16x16"),
        ("tiled-csl", "unstructured"),
    ],
)
def test_every_format(format, pattern, family, tmp_path):
    a = masked(family("llama"), tmp_path / "a", pattern, 0.75)
    b = Path(ok("sparsify", a, "-o", tmp_path / "b", "--format", format))
    formats = {packed.format for packed in open_checkpoint(b).packed.values()}
    assert formats == {format.partition(":")[0]}
    assert set(FORMATS) >= formats
    plan = json.loads((b / "plan.json").read_text())
    assert len(plan["tensors"]) == 14
    c = Path(ok("convert", b, "-o", tmp_path / "c", "--to", "dense"))
    assert digests(c) == digests(a)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "vector:32x1", "vector:1x16", "block:16x16", "unstructured"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_patterns(name, pattern, family, tmp_path):
    """The pattern holds in every layer, and what it keeps is reported; reordered channels keep no less."""
    kept = {}
    for permute in ("--permute", "--no-permute"):
        out = Path(ok("sparsify", family(name), "-o", tmp_path / permute, "--pattern", pattern, permute))
        found = report(out)
        kept[permute] = found["quality"]["kept_importance"]
        ok("verify", out, "--against", family(name))
        checkpoint = open_checkpoint(out)
        for entry in found["tensors"]:
            if entry["action"] != "pack":
                continue
            assert entry["sparsity"] >= (0.75 if pattern == "1:4" else 0.49)
            weight = checkpoint.read(entry["name"])
            weight = weight.T if name == "gpt2" else weight
            if pattern.endswith(":4"):
                most = int((weight.reshape(len(weight), -1, 4) != 0).sum(2).max())
                assert most <= int(pattern[0])
    assert kept["--permute"] >= kept["--no-permute"]
    if pattern == "unstructured":
        assert kept["--permute"] == kept["--no-permute"]


def dead_neurons(model: Path, out: Path) -> Path:
    """Every second neuron is zero: a pattern of whole rows removes nothing, once they lie together."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if "up_proj" in name or "gate_proj" in name:
            tensor[1::2] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("packed_before", [False, True])
def test_permuted_model_is_the_same_function(packed_before, family, tmp_path, text):
    """Only the order of channels differs, also where it is that of a layer which came packed and is left out."""
    a = b = dead_neurons(family("llama"), tmp_path / "a")
    if packed_before:
        b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
        assert len(open_checkpoint(b).packed) == 4
    c = Path(ok("sparsify", b, "-o", tmp_path / "c", "--pattern", "vector:16x1", "--include", "up_proj"))
    assert report(c)["quality"]["kept_importance"] == pytest.approx(1, abs=1e-6)
    actions = {entry["name"].split(".")[-2]: entry for entry in report(c)["tensors"] if "_proj" in entry["name"]}
    moved = {name for name, entry in actions.items() if "reordered" in (entry["reason"] or "")}
    assert moved == {"gate_proj", "up_proj", "down_proj"}
    assert actions["gate_proj"]["action"] == ("pack" if packed_before else "reorder")
    assert perplexity(c, text) == pytest.approx(perplexity(a, text), rel=1e-4)
    ok("verify", c, "--against", a)


def test_bits_that_belong_to_no_code_stay(tmp_path):
    """Elements have no place for them, so that such a layer is copied as it is."""
    a = masked(build("llama", tmp_path / "model", intermediate_size=100), tmp_path / "a", sparsity=0.75)
    b = Path(ok("quantize", a, "-o", tmp_path / "b", "--scheme", "w4a16", "--group-size", -1))
    tensors = load_file(b / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_packed"
    tensors[name][:, -1] |= 0x7F << 24
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    c = Path(ok("sparsify", b, "-o", tmp_path / "c"))
    assert len(open_checkpoint(c).packed) == 13
    d = Path(ok("convert", c, "-o", tmp_path / "d", "--to", "dense"))
    assert digests(d) == digests(b)


def test_fastest(family, tmp_path, monkeypatch):
    """By measured times; where dense wins everywhere it says so, and not that zeros are missing."""
    from tersor.ops.model.tile_costs import Points, TileCosts

    fast = None

    def measure(device, dtype, shapes, tokens, progress):
        kinds = [("dense", None), ("sparse-bitmask", None)]
        points = {
            (kind, shape, count): Points((0.5, 0.9), (0.0, 1e6), (1.0, 1.0) if kind[0] != fast else (0.1, 0.1))
            for kind in kinds
            for shape in shapes
            for count in tokens
        }
        return TileCosts("cpu test", "float32", points)

    monkeypatch.setattr(TileCosts, "measure", measure)
    a = masked(family("llama"), tmp_path / "a", "2:4")
    refused("sparsify", a, "--format", "fastest", out=tmp_path / "out", words=["dense kernel", "--format auto"])
    fast = "sparse-bitmask"
    b = Path(ok("sparsify", a, "-o", tmp_path / "b", "--format", "fastest"))
    assert {packed.format for packed in open_checkpoint(b).packed.values()} == {fast}
    assert report(b)["quality"]["predicted_matmuls"]["gain"] == pytest.approx(10)


def test_pack_again(family, tmp_path):
    """Sparsify after sparsify packs anew; what is left out stays as it was packed."""
    a = masked(family("llama"), tmp_path / "a", "2:4")
    b = Path(ok("sparsify", a, "-o", tmp_path / "b", "--format", "sparse-bitmask"))
    c = Path(ok("sparsify", b, "-o", tmp_path / "c", "--include", "q_proj", "--format", "sparse-24-bitmask"))
    formats = {packed.name.split(".")[-2]: packed.format for packed in open_checkpoint(c).packed.values()}
    assert formats.pop("q_proj") == "sparse-24-bitmask"
    assert set(formats.values()) == {"sparse-bitmask"}
    assert len(open_checkpoint(c).packed) == 14
    d = Path(ok("convert", c, "-o", tmp_path / "d", "--to", "dense"))
    assert digests(d) == digests(a)


def test_quantize_after_sparsify_keeps_the_zeros(family, tmp_path, text):
    a = masked(family("llama"), tmp_path / "a", "2:4")
    b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
    for method in ("rtn", "gptq"):
        calibration = ["--calib", text, "--samples", 4, "--seq-len", 32] if method == "gptq" else []
        options = ["--group-size", 32, "--method", method, *calibration]
        c = Path(ok("quantize", b, "-o", tmp_path / f"c-{method}", *options))
        direct = Path(ok("quantize", a, "-o", tmp_path / f"direct-{method}", *options))
        assert digests(c) == digests(direct)


def test_other_commands_after_sparsify(family, tmp_path, text):
    a = masked(family("llama"), tmp_path / "a")
    b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
    result = run("prune", b, "-o", tmp_path / "c")
    assert result.exit_code == 1
    assert "tersor convert" in result.stderr
    refused("convert", b, "--to", "gptq", out=tmp_path / "c", words=["no codes", "tersor quantize"])
    found = json.loads(run("profile", b, "--json", "-q").stdout)
    assert found["quality"]["models"][0]["bytes"] == open_checkpoint(b).nbytes
    assert "sparse" in json.dumps(found["quality"]["models"][0]["headers"])


def test_other_loaders_refuse(family, tmp_path):
    """transformers would fill in random weights if config.json said nothing."""
    from transformers import AutoModelForCausalLM

    b = Path(ok("sparsify", masked(family("llama"), tmp_path / "a"), "-o", tmp_path / "b"))
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(b)


def test_bare_file(family, tmp_path):
    a = masked(family("llama"), tmp_path / "a")
    bare = tmp_path / "bare.safetensors"
    shutil.copy(a / "model.safetensors", bare)
    b = Path(ok("sparsify", bare, "-o", tmp_path / "b"))
    assert not (b / "config.json").exists()
    c = Path(ok("convert", b, "-o", tmp_path / "c", "--to", "dense"))
    assert not (c / "config.json").exists()
    assert (c / "model.safetensors").read_bytes() == bare.read_bytes()


def test_shards(family, tmp_path, monkeypatch):
    from tersor.formats import writer

    a = masked(family("llama"), tmp_path / "a")
    monkeypatch.setattr(writer.CheckpointWriter.__init__, "__defaults__", (False, 100_000))
    b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
    assert len(list(b.glob("*.safetensors"))) > 1
    ok("verify", b, "--against", a)
    monkeypatch.undo()
    c = Path(ok("convert", b, "-o", tmp_path / "c", "--to", "dense"))
    assert digests(c) == digests(a)


def negative_zeros(model: Path, out: Path) -> Path:
    """As `weight * mask` leaves them: half of the zeros have a sign."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = tensor * (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_negative_zeros(family, tmp_path):
    """They are kept as they are, with a word about it, unless they may go."""
    a = negative_zeros(family("llama"), tmp_path / "a")
    b = Path(ok("sparsify", a, "-o", tmp_path / "b"))
    assert any("-0.0" in warning for warning in report(b)["warnings"])
    c = Path(ok("convert", b, "-o", tmp_path / "c", "--to", "dense"))
    assert (c / "model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()
    d = Path(ok("sparsify", a, "-o", tmp_path / "d", "--positive-zeros"))
    assert not any("-0.0" in warning for warning in report(d)["warnings"])
    assert open_checkpoint(d).nbytes < 0.85 * open_checkpoint(b).nbytes
    view, original = DenseView(open_checkpoint(d)), DenseView(open_checkpoint(a))
    assert all(torch.equal(view.read(name), original.read(name)) for name in original.tensors)


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(*arguments, out: Path, words: list[str]) -> None:
    result = run(*arguments, "-o", out)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert [line.split(":")[0] for line in result.stderr.splitlines() if line.startswith(("error", "hint"))] == [
        "error",
        "hint",
    ]
    for word in words:
        assert word in result.stderr, result.stderr
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pattern", "2:5"], ["does not fit", "_proj", "divisible by 5"]),
        (["--pattern", "block:48x48"], ["does not divide into tiles", "--exclude"]),
        (["--pattern", "diagonal"], ["not known"]),
        (["--pattern", "2:4", "--sparsity", 0.7], ["50.0%", "70.0%"]),
        (["--sparsity", 0.5], ["--pattern"]),
        (["--pattern", "unstructured", "--sparsity", 1.5], ["1.5"]),
        (["--format", "csr"], ["csr", "sparse-bitmask"]),
        ([], ["enough zeros", "prune"]),
        (["--format", "sparse-bitmask"], ["zeros, too few", "it pays from", "_proj"]),
        (["--format", "sparse-24-bitmask"], ["group of four", "--exclude"]),
        (["--format", "vector:32x1"], ["empty tiles"]),
        (["--activations", 1.5], ["1.5"]),
        (["--stats", "statistics.safetensors"], ["--stats", "--pattern"]),
        (["--include", "nothing"], ["matches no tensor"]),
    ],
)
def test_refused(arguments, words, family, tmp_path):
    refused("sparsify", family("llama"), *arguments, out=tmp_path / "out", words=words)


def test_pattern_on_codes_is_refused(family, tmp_path):
    a = Path(ok("quantize", family("llama"), "-o", tmp_path / "a", "--group-size", 32))
    refused("sparsify", a, "--pattern", "2:4", out=tmp_path / "out", words=["quantized", "then quantize"])


def test_factors_are_refused(family, tmp_path):
    a = Path(ok("prune", family("llama"), "-o", tmp_path / "a", "--remove", "ranks", "--method", "svd"))
    refused("sparsify", a, out=tmp_path / "out", words=["factors"])


@pytest.fixture
def packed(family, tmp_path) -> Path:
    return Path(ok("sparsify", masked(family("llama"), tmp_path / "a"), "-o", tmp_path / "packed"))


def flip_mask(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.bitmask"))
    tensors[name] = tensors[name] ^ 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "q_proj"


def bad_offsets(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.row_offsets"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "k_proj"


def no_description(folder: Path) -> str:
    (folder / "sparse.json").unlink()
    return "sparse.json"


def wrong_shape(folder: Path) -> str:
    content = json.loads((folder / "sparse.json").read_text())
    next(iter(content["tensors"].values()))["rows"] += 1
    (folder / "sparse.json").write_text(json.dumps(content))
    return "sparse.json"


@pytest.mark.parametrize("damage", [flip_mask, bad_offsets, no_description, wrong_shape])
def test_damage_is_named(damage, packed, text, tmp_path):
    word = damage(packed)
    refused("convert", packed, "--to", "dense", out=tmp_path / "out", words=[word])
    assert run("verify", packed).exit_code == 1
    (packed / "report.json").unlink()  # whose fingerprint has given the damage away
    result = run("verify", packed)
    assert result.exit_code == 1
    assert word in result.stderr
    result = run("evaluate", packed, "--text", text, "--seq-len", 32, "--max-windows", 1)
    assert result.exit_code == 1
    assert word in result.stderr


def test_policy(family, tmp_path):
    a = masked(family("llama"), tmp_path / "a")
    policy = tmp_path / "policy.json"
    entries = {
        r".*q_proj\.weight": {"keep": True},
        r".*k_proj\.weight": {"pattern": "2:4", "format": "sparse-24-bitmask"},
    }
    policy.write_text(json.dumps({"schema": "tersor.policy/1", "tensors": entries}))
    b = Path(ok("sparsify", a, "-o", tmp_path / "b", "--policy", policy))
    formats = {packed.name.split(".")[-2]: packed.format for packed in open_checkpoint(b).packed.values()}
    assert "q_proj" not in formats
    assert formats.pop("k_proj") == "sparse-24-bitmask"
    assert set(formats.values()) == {"sparse-bitmask"}


def test_dry_run_knows_the_bytes(family, tmp_path):
    """From the report of what made the zeros, or from the pattern: within a percent of what is written."""
    a = masked(family("llama"), tmp_path / "a")
    for model, extra in ((a, []), (family("llama"), ["--pattern", "2:4", "--no-permute"])):
        found = json.loads(run("sparsify", model, *extra, "--dry-run", "--json").stdout)
        out = Path(ok("sparsify", model, "-o", tmp_path / f"b{len(extra)}", *extra))
        assert found["output_bytes"] == pytest.approx(open_checkpoint(out).nbytes, rel=0.01)


# --- activations ------------------------------------------------------------------------------------------------------

CALIBRATION = ["--samples", 4, "--seq-len", 32]


@pytest.fixture(scope="module")
def thresholds(family, text, tmp_path_factory) -> Path:
    """No zeros to pack, thresholds only: the weights stay as they are."""
    out = tmp_path_factory.mktemp("thresholds") / "out"
    return Path(ok("sparsify", family("llama"), "-o", out, "--activations", 0.5, "--calib", text, *CALIBRATION))


def test_activations_are_zeroed(thresholds, family, text):
    found = report(thresholds)["quality"]["activation_sparsity"]
    assert found["inputs_zeroed"] == pytest.approx(0.5, abs=0.1)
    weights = "model.safetensors"
    assert (thresholds / weights).read_bytes() == (family("llama") / weights).read_bytes()
    assert not (thresholds / "sparse.json").exists()
    evaluated = json.loads(
        run("evaluate", thresholds, "--text", text, "--seq-len", 32, "--max-windows", 4, "--json", "-q").stdout
    )["quality"]
    assert 0.2 < evaluated["activation_sparsity"]["weight_bytes_not_read"] < 0.5
    assert evaluated["perplexity"] != perplexity(family("llama"), text)


def test_experts_without_tokens(family, text, tmp_path):
    """They get the threshold that the others of their role have, or none where no token reaches any of these."""
    few = ["--activations", 0.5, "--calib", text, "--samples", 1, "--seq-len", 8]
    a = Path(ok("sparsify", family("qwen2-moe"), "-o", tmp_path / "a", *few))
    entries = json.loads((a / "activation_sparsity.json").read_text())["tensors"]
    experts = [name for name in DenseView(open_checkpoint(a)).tensors if ".experts." in name]
    assert set(experts) <= entries.keys()
    found = [
        run(
            "sparsify",
            family("qwen2-moe"),
            "-o",
            tmp_path / str(number),
            *few,
            "--include",
            rf"mlp\.experts\.{number}\.",
        )
        for number in range(6)
    ]
    assert all(result.exit_code == 0 or result.stderr.splitlines()[-2].startswith("error: ") for result in found)
    assert any("no token reached it" in " ".join(result.stderr.split()) for result in found)


def test_thresholds_travel(thresholds, tmp_path, text):
    """Through quantize and through sparsify of what comes after; where inputs change they are refused by name."""
    b = Path(ok("quantize", thresholds, "-o", tmp_path / "b", "--scheme", "w8a16", "--group-size", 32))
    name = "activation_sparsity.json"
    assert (b / name).read_bytes() == (thresholds / name).read_bytes()
    for command in (["prune", "--remove", "layers"], ["prune", "--remove", "neurons"], ["quantize", "--method", "awq"]):
        refused(command[0], thresholds, *command[1:], out=tmp_path / "out", words=["activation_sparsity.json"])

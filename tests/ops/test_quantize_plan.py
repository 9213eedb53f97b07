"""What the planner decides: schemes and reasons for each tensor, policies, refusals, the dry run."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from tersor.cli.main import app
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.ops.model.schemes import SCHEMES, scheme_from_name
from tersor.ops.model.selection import compile_patterns
from tersor.ops.quantize.plan import build_plan
from tersor.ops.quantize.run import Request, plan, quantize
from typer.testing import CliRunner

W4 = scheme_from_name("w4a16", 32)
Q, UP, DOWN = (f"model.layers.0.{part}_proj.weight" for part in ("self_attn.q", "mlp.up", "mlp.down"))


def planned(folder, scheme=W4, rules=None, **options):
    rules = list(zip(compile_patterns(list(rules or {}), "policy"), (rules or {}).values(), strict=True))
    return build_plan(Checkpoint(folder), scheme, policy=rules, **options)


def tersor(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---- scheme names


@pytest.mark.parametrize(
    ("name", "size", "symmetric", "word"),
    [
        ("w5a16", None, True, "w5a16"),
        ("fp8", 128, True, "no groups"),
        ("w8a8", None, False, "symmetric"),
        ("fp8-block", None, False, "symmetric"),
        ("w4a16", 8, True, "--group-size 8"),
        ("w4a16", 36, True, "--group-size 36"),
        ("w4a16", 0, True, "--group-size 0"),
        ("w4a16", -2, True, "--group-size -2"),
    ],
)
def test_impossible_schemes(name, size, symmetric, word):
    with pytest.raises(TersorError, match=word):
        scheme_from_name(name, size, symmetric)


def test_possible_schemes():
    assert scheme_from_name("w4a16") == Scheme(4, group_size=128)
    assert scheme_from_name("w3a16", 64, False) == Scheme(3, symmetric=False, group_size=64)
    assert scheme_from_name("w8a16", -1) == Scheme(8, strategy="channel")
    assert scheme_from_name("fp8-block").block == (128, 128)
    assert {name for name, scheme in SCHEMES.items() if scheme.activations} == {"w8a8", "fp8", "fp8-block"}


# ---- every tensor has an action, a reason and exact bytes


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "bert", "opt"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_dry_run_says_what_the_run_does(name, method, family, text, tmp_path):
    """Actions, reasons and bytes of the forecast are those of the report; the bytes are those of the files."""
    arguments = ["quantize", family(name), "--method", method, "--group-size", 64, "-q", "--json"]
    arguments += ["--calib", text, "--samples", 3, "--seq-len", 64]
    dry = tersor(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    forecast = json.loads(dry.stdout)
    report = json.loads(tersor(*arguments, "-o", tmp_path / "out").stdout)
    rows = {entry["name"]: entry for entry in report["tensors"]}
    assert set(rows) == {row["name"] for row in forecast["tensors"]}
    for row in forecast["tensors"]:
        entry = rows[row["name"]]
        assert (row["action"], row["after_bytes"]) == (entry["action"], entry["after"]["bytes"])
        assert entry["reason"].startswith(row["reason"])
    assert forecast["output_bytes"] == report["totals"]["bytes_after"] == Checkpoint(tmp_path / "out").nbytes
    assert forecast["output_bytes"] < forecast["input_bytes"]
    assert forecast["peak_memory_bytes"] > 0
    assert forecast["warnings"] == report["warnings"][: len(forecast["warnings"])]


def test_dry_run_for_people(family, tmp_path):
    result = tersor("quantize", family("llama"), "--dry-run", "--group-size", 64, "-o", tmp_path / "out")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(
        line.startswith("quantize") and DOWN in line and "96 columns are not divisible by 64" in line for line in lines
    )
    assert any(
        line.startswith("keep") and "lm_head.weight" in line and "outside the repeated blocks" in line for line in lines
    )
    assert any(line.startswith("output") for line in lines)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_layout_is_what_is_written(family, tmp_path):
    request = Request(str(family("qwen3-moe")), tmp_path / "out", group_size=32, symmetric=False)
    _, found = plan(request)
    quantize(request)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert set(names) == set(found.layout)
        for name in names:
            assert tuple(file.get_slice(name).get_shape()) == tuple(found.layout[name][1])


# ---- formats


def test_format_of_conv1d_families(family):
    assert planned(family("gpt2")).format == "gptq"
    assert planned(family("llama")).format == "compressed-tensors"
    with pytest.raises(TersorError, match="Conv1D"):
        planned(family("gpt2"), format="compressed-tensors")


def test_layers_a_format_cannot_hold_stay_dense(family):
    """gptq needs sides that are multiples of 32; --strict says so instead."""
    folder = family("llama", intermediate_size=72)
    found = planned(folder, format="gptq")
    assert Q in found.steps
    assert "multiples of 32" in found.kept[UP] and "multiples of 32" in found.kept[DOWN]
    assert UP.removesuffix(".weight") in found.dense_modules
    with pytest.raises(TersorError, match=r"mlp\.\w+_proj"):
        planned(folder, format="gptq", strict=True)
    with pytest.raises(TersorError, match=r"no tensor is left.*weights only"):
        planned(family("llama"), SCHEMES["fp8"], format="gptq")


def test_nothing_left(family):
    with pytest.raises(TersorError, match=r"no tensor is left to quantize: .*_proj.weight is kept \(.*matched by --"):
        planned(family("llama"), include=["q_proj"], exclude=["q_proj"])


# ---- strict


def test_strict(family):
    assert planned(family("llama"), strict=True).steps[DOWN].scheme.group_size == 32
    with pytest.raises(TersorError, match="96 columns are not divisible by 64"):
        planned(family("llama"), scheme_from_name("w4a16", 64), strict=True)
    assert planned(family("llama"), scheme_from_name("w4a16", -1), strict=True).steps[DOWN].scheme.strategy == "channel"


# ---- policy


def test_policy_changes_single_layers(family):
    rules = {
        r".*\.self_attn\..*": {"scheme": "w8a16", "group_size": 64},
        r".*\.mlp\.down_proj\.weight": {"symmetric": False},
        r".*\.1\.mlp\.up_proj\.weight": {"keep": True},
        r".*\.mlp\.gate_proj\.weight": {"group_size": -1},
    }
    found = planned(family("llama"), rules=rules)
    assert found.steps[Q].scheme == Scheme(8, group_size=64)
    assert found.steps[DOWN].scheme == Scheme(4, symmetric=False, group_size=32)
    assert found.steps[UP].scheme == W4
    assert found.steps["model.layers.0.mlp.gate_proj.weight"].scheme == Scheme(4, strategy="channel")
    assert found.kept["model.layers.1.mlp.up_proj.weight"] == "kept dense by the policy"
    assert "model.layers.1.mlp.up_proj" in found.dense_modules


@pytest.mark.parametrize("name", SCHEMES)
def test_policy_without_a_scheme_keeps_the_one_asked_for(name, family):
    """Also where two schemes share their bits: w8a8 must not become w8a16, nor fp8-block fp8."""
    sizes = (32, -1) if SCHEMES[name].strategy == "group" else (None,)
    for size in sizes:
        scheme = scheme_from_name(name, size)
        found = planned(family("llama", hidden_size=128, intermediate_size=128), scheme, {".*": {"symmetric": True}})
        assert found.steps[Q].scheme == scheme


def test_policy_run(family, tmp_path):
    policy = tmp_path / "policy.json"
    tensors = {r".*\.v_proj\.weight": {"scheme": "w8a16", "group_size": 32}, r".*\.o_proj\.weight": {"keep": True}}
    policy.write_text(json.dumps({"schema": "tersor.policy/1", "tensors": tensors}))
    result = tersor("quantize", family("llama"), "-o", tmp_path / "out", "--group-size", 32, "--policy", policy, "-q")
    assert result.exit_code == 0, result.stderr
    view = DenseView(Checkpoint(tmp_path / "out")).tensors
    assert view["model.layers.1.self_attn.v_proj.weight"].scheme.bits == 8
    assert view["model.layers.1.self_attn.o_proj.weight"].scheme is None
    assert view["model.layers.1.self_attn.q_proj.weight"].scheme.bits == 4


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"up_proj": {"keep": True}}, "matches no whole tensor name"),
        ({".*": {"bits": 4}}, r"unknown keys \['bits'\]"),
        ({".*": {"scheme": "w9"}}, "unknown scheme"),
        ({".*": {"scheme": 4}}, "scheme is 4"),
        ({".*": {"group_size": "64"}}, "group_size is '64'"),
        ({".*": {"group_size": True}}, "group_size is True"),
        ({".*": {"symmetric": 0}}, "symmetric is 0"),
        ({".*": {"keep": "yes"}}, "keep is 'yes'"),
        ({".*": {"scheme": "fp8", "group_size": 64}}, "no groups"),
    ],
)
def test_policies_that_make_no_sense(rules, words, family):
    with pytest.raises(TersorError, match=words):
        planned(family("llama"), rules=rules)


def test_policy_for_what_is_not_selected_is_warned_of(family):
    found = planned(family("llama"), rules={"lm_head.weight": {"scheme": "w8a16"}})
    assert any("lm_head.weight is kept (outside the repeated blocks)" in warning for warning in found.warnings)
    found = planned(family("llama"), rules={"lm_head.weight": {"scheme": "w8a16"}}, include=["layers", "lm_head"])
    assert found.steps["lm_head.weight"].scheme.bits == 8
    assert not any("lm_head" in warning for warning in found.warnings)


# ---- heads and embeddings


def test_head_and_embeddings(family, tmp_path):
    """Kept by default and named in the config; the head is quantized when asked for, a tied one never."""
    found = planned(family("llama"))
    assert "lm_head.weight" in found.kept and "model.embed_tokens.weight" in found.kept
    assert "lm_head" in found.quantization_config()["ignore"]
    asked = planned(family("llama"), include=["layers", "lm_head"])
    assert "lm_head.weight" in asked.steps and len(asked.steps) == 15
    assert "lm_head" not in asked.quantization_config()["ignore"]
    tied = planned(family("llama-tied"))
    assert "lm_head" in tied.quantization_config()["ignore"]
    quantize(Request(str(family("llama-tied")), tmp_path / "out", group_size=32))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").tensors
    assert Checkpoint(tmp_path / "out").config["tie_word_embeddings"] is True


# ---- warnings


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (scheme_from_name("w4a16", 24), "Marlin"),
        (scheme_from_name("w3a16", 32), "2 and 3 bit"),
        (scheme_from_name("w4a16", 32, False), "asymmetric"),
        (W4, None),
        (SCHEMES["w8a8"], None),
    ],
)
def test_warnings(scheme, words, family):
    warnings = planned(family("llama"), scheme).warnings
    assert warnings == [] if words is None else any(words in warning for warning in warnings)

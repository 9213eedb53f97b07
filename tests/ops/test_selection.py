"""Which tensors a command works on, from headers alone."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.selection import load_policy, policy_for, select

BLOCK = {"llama": 7, "opt": 6, "phi": 6, "phi3": 4, "gpt2": 4, "bert": 6, "bert-mlm": 6, "roberta": 6, "falcon": 4}


def bare(tmp_path, dtype=torch.bfloat16, **shapes) -> Checkpoint:
    """A checkpoint of these tensors; `__` in a name is a dot."""
    save_file(
        {name.replace("__", "."): torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("name", BLOCK)
def test_dense_families(name, family):
    """Every linear layer of the blocks and nothing else."""
    selection = select(Checkpoint(family(name)))
    assert len(selection.linears) == 2 * BLOCK[name]
    assert all(re.search(r"\.[01]\.|^h\.", linear) for linear in selection.linears)


@pytest.mark.parametrize(("name", "experts"), [("mixtral", 4), ("qwen3-moe", 6), ("qwen2-moe", 6)])
def test_experts_are_selected_and_routers_are_not(name, experts, family):
    selection = select(Checkpoint(family(name)))
    found = [linear for linear in selection.linears if ".experts." in linear]
    assert len(found) == 2 * 3 * experts
    routers = [tensor for tensor in selection.reasons if re.search(r"\.gate\.weight$", tensor)]
    assert len(routers) == 2
    assert all(tensor.removesuffix(".weight") in selection.dense_modules for tensor in routers)
    assert not any("gate.weight" in linear and "experts" not in linear for linear in selection.linears)


def test_router_as_wide_as_a_layer(tmp_path):
    """64 experts: the router is large enough to be a layer, and known by the experts beside it."""
    shapes = {f"model__layers__0__mlp__experts__{number}__up_proj__weight": (32, 64) for number in range(64)}
    shapes |= {"model__layers__0__mlp__gate__weight": (64, 64), "model__layers__0__mlp__shared__weight": (32, 64)}
    selection = select(bare(tmp_path, **shapes))
    assert "router" in selection.reasons["model.layers.0.mlp.gate.weight"]
    assert "model.layers.0.mlp.shared.weight" in selection.linears


def test_shapes_are_out_in(family):
    linears = select(Checkpoint(family("gpt2"))).linears
    name = next(name for name in linears if name.endswith("0.mlp.c_fc.weight"))
    assert linears[name].shape == (256, 64) and linears[name].transposed
    linears = select(Checkpoint(family("llama"))).linears
    assert linears["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    assert not linears["model.layers.0.mlp.up_proj.weight"].transposed


def test_conv1d_of_a_bare_file_is_known_by_its_bias(family, tmp_path):
    import shutil

    shutil.copy(family("gpt2") / "model.safetensors", tmp_path)
    linears = select(Checkpoint(tmp_path / "model.safetensors")).linears
    assert len(linears) == 8 and all(linear.transposed for linear in linears.values())


def test_what_is_left_alone_and_why(tmp_path):
    selection = select(
        bare(
            tmp_path,
            model__embed_tokens__weight=(256, 64),
            model__layers__0__up_proj__weight=(64, 64),
            model__layers__0__up_proj__bias=(64,),
            model__layers__0__conv1d__weight=(64, 64),
            model__layers__0__conv__weight=(64, 1, 4),
            model__layers__0__input_layernorm__weight=(64,),
            model__layers__0__relative_attention_bias__weight=(32, 64),
            model__layers__0__shared_expert_gate__weight=(1, 64),
            model__layers__0__scale_table=(64, 64),
            lm_head__weight=(256, 64),
        )
    )
    assert list(selection.linears) == ["model.layers.0.up_proj.weight"]
    reasons = {
        name.removeprefix("model.layers.0.").removesuffix(".weight"): why for name, why in selection.reasons.items()
    }
    assert reasons["model.embed_tokens"] == reasons["conv1d"] == "embedding, norm or convolution"
    assert reasons["relative_attention_bias"] == "embedding, norm or convolution"
    assert "3-D" in reasons["conv"]
    assert "shorter than 16" in reasons["shared_expert_gate"]
    assert reasons["scale_table"] == "not the weight of a linear layer"
    assert reasons["lm_head"] == "outside the repeated blocks"
    assert sorted(selection.dense_modules) == ["lm_head", "model.layers.0.shared_expert_gate"]
    assert "model.embed_tokens" in selection.tables


def test_other_dtypes_are_left_alone(tmp_path):
    save_file(
        {
            "model.layers.0.a.weight": torch.zeros(32, 32, dtype=torch.int8),
            "model.layers.0.b.weight": torch.zeros(32, 32, dtype=torch.float8_e4m3fn),
            "model.layers.0.c.weight": torch.zeros(32, 32, dtype=torch.float16),
        },
        tmp_path / "model.safetensors",
    )
    selection = select(Checkpoint(tmp_path))
    assert list(selection.linears) == ["model.layers.0.c.weight"]
    assert "F8_E4M3" in selection.reasons["model.layers.0.b.weight"]
    assert sorted(selection.dense_modules) == ["lm_head", "model.layers.0.a", "model.layers.0.b"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", ["lm_head"]),
        ("llama-tied", ["lm_head"]),
        ("bert-mlm", ["cls.predictions.decoder"]),
        ("roberta", ["lm_head.decoder"]),
    ],
)
def test_heads_are_dense_modules_once(name, heads, family):
    """Tied heads too, which no tensor of the checkpoint tells of."""
    modules = select(Checkpoint(family(name))).dense_modules
    assert all(modules.count(head) == 1 for head in heads)
    assert len(modules) == len(set(modules))


def test_towers_of_a_multimodal_model(tmp_path):
    shapes = {"vision_tower__layers__0__up__weight": (32, 32), "language_model__layers__0__up__weight": (32, 32)}
    bare(tmp_path, **shapes)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}, "model_type": "llava"}))
    checkpoint = Checkpoint(tmp_path)
    assert list(select(checkpoint).linears) == ["language_model.layers.0.up.weight"]
    assert list(select(checkpoint, include=["vision_tower"]).linears) == ["vision_tower.layers.0.up.weight"]


# ---- include and exclude


def test_include_means_only(family):
    checkpoint = Checkpoint(family("llama"))
    assert set(select(checkpoint, include=["lm_head"]).linears) == {"lm_head.weight"}
    both = select(checkpoint, include=[r"\.mlp\.", "lm_head"])
    assert len(both.linears) == 7
    assert both.reasons["model.layers.0.self_attn.q_proj.weight"] == "not matched by --include"
    assert "model.layers.0.self_attn.q_proj" in both.dense_modules and "lm_head" not in both.dense_modules


def test_exclude_wins(family):
    selection = select(Checkpoint(family("llama")), include=["mlp"], exclude=[r"\.1\."])
    assert set(selection.linears) == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert selection.reasons["model.layers.1.mlp.up_proj.weight"] == "matched by --exclude"


def test_embeddings_cannot_be_included(family):
    selection = select(Checkpoint(family("llama")), include=["embed_tokens|up_proj"])
    assert "model.embed_tokens.weight" in selection.reasons and len(selection.linears) == 2


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing_or_are_none(option, family):
    checkpoint = Checkpoint(family("llama"))
    with pytest.raises(TersorError, match=rf"--{option} 'gate_porj' matches no tensor"):
        select(checkpoint, **{option: ["up_proj", "gate_porj"]})
    with pytest.raises(TersorError, match=rf"--{option}: '\*' is not a regular expression"):
        select(checkpoint, **{option: ["*"]})
    with pytest.raises(TersorError, match="lm_head"):  # tied: there is no such tensor
        select(Checkpoint(family("llama-tied")), include=["lm_head"])


# ---- policy files


def policy(tmp_path, content) -> list:
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_policy(path)


def test_policy_matches_whole_names_and_the_last_wins(tmp_path):
    tensors = {r".*\.weight": {"scheme": "w4a16"}, r".*\.mlp\..*": {"scheme": "w8a16"}, "up_proj": {"keep": True}}
    rules = policy(tmp_path, {"schema": "tersor.policy/1", "tensors": tensors})
    assert policy_for(rules, "model.layers.0.q_proj.weight") == {"scheme": "w4a16"}
    assert policy_for(rules, "model.layers.0.mlp.up_proj.weight") == {"scheme": "w8a16"}
    assert policy_for(rules, "model.norm.bias") == {}
    assert load_policy(None) == []


@pytest.mark.parametrize(
    "content",
    [
        "{not json",
        "[]",
        {"tensors": {}},
        {"schema": "tersor.policy/2", "tensors": {}},
        {"schema": "tersor.policy/1"},
        {"schema": "tersor.policy/1", "tensors": {"a": "w4a16"}},
        {"schema": "tersor.policy/1", "tensors": {"(": {}}},
    ],
)
def test_malformed_policies(content, tmp_path):
    with pytest.raises(TersorError, match=r"policy\.json"):
        policy(tmp_path, content)

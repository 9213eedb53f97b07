"""Branches are found by running blocks, and a checkpoint without some of them runs as if they gave zeros."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.branches import find_branches, passes_through
from tersor.ops.model.skeleton import Skeleton
from tiny_models import FAMILIES

CPU = torch.device("cpu")
# family -> the modules in which attention and mlp end, what both leave in the block, what silences them
EXPECTED = {
    "llama": ("self_attn", "mlp", set(), {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
    "llama-bias": (
        "self_attn", "mlp", set(),
        {"self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"},
    ),
    "gemma3": (
        "post_attention_layernorm", "post_feedforward_layernorm", set(),
        {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    ),
    "gpt2": (
        "attn", "mlp", set(), {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    ),
    "opt": ("self_attn", "fc2", set(), {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"}),
    "phi": (
        "self_attn", "mlp", {"input_layernorm.weight", "input_layernorm.bias"},
        {"self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
    ),
    "falcon": (
        "self_attention", "mlp", {"input_layernorm.weight", "input_layernorm.bias"},
        {"self_attention.dense.weight", "mlp.dense_4h_to_h.weight"},
    ),
    "mixtral": ("self_attn", "mlp", set(), {"self_attn.o_proj.weight", "mlp.experts.down_proj"}),
    "qwen2-moe": (
        "self_attn", "mlp", set(),
        {"self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"},
    ),
    "bert": (
        "attention.output.dropout", "output.dropout",
        {f"{norm}.{kind}" for norm in ("attention.output.LayerNorm", "output.LayerNorm") for kind in ("weight", "bias")},
        {"attention.output.dense.weight", "attention.output.dense.bias", "output.dense.weight", "output.dense.bias"},
    ),
}  # fmt: skip


def skeleton_of(folder) -> Skeleton:
    return Skeleton(DenseView(Checkpoint(folder)), CPU)


@pytest.mark.parametrize("name", EXPECTED)
def test_found(name, family):
    skeleton = skeleton_of(family(name))
    attention, mlp, left, silent = EXPECTED[name]
    branches = find_branches(skeleton, 0)
    assert {branch.kind: branch.end for branch in branches} == {"attention": attention, "mlp": mlp}
    assert not branches[0].parameters & branches[1].parameters
    everything = {parameter for parameter, _ in skeleton.blocks[0].named_parameters()}
    assert everything - branches[0].parameters - branches[1].parameters == left
    assert branches[0].projections | branches[1].projections == silent
    assert passes_through(skeleton, 0, branches) == (name != "bert")
    assert all(parameter.is_meta for parameter in skeleton.blocks[0].parameters())


def test_scale_of_the_sum(tmp_path):
    config = {**FAMILIES["llama"][2], "residual_multiplier": 0.22}
    transformers.GraniteForCausalLM(transformers.GraniteConfig(**config)).save_pretrained(tmp_path)
    branches = find_branches(skeleton_of(tmp_path), 1)
    assert [(branch.place, branch.kind) for branch in branches] == [
        ("post_attention_layernorm", "attention"),
        ("", "mlp"),
    ]
    assert [branch.scale for branch in branches] == pytest.approx([0.22, 0.22], rel=1e-4)


def test_images(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    found = find_branches(skeleton_of(tmp_path), 0)
    assert {branch.kind: branch.end for branch in found} == {"attention": "attention", "mlp": "mlp"}
    assert "layernorm_before.weight" in found[0].parameters


def without(folder, tmp_path, names, **settings):
    """A copy of a checkpoint that lacks the tensors `names`, and says so in its config."""
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if not names(name)}, tmp_path / "copy" / "model.safetensors"
    )
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | settings))
    return tmp_path / "copy"


def test_skeleton_needs_all_that_no_list_names(family, tmp_path):
    attention = ("layers.1.self_attn.", "layers.1.input_layernorm.")
    folder = without(
        family("llama"), tmp_path, lambda name: any(part in name for part in attention), drop_attn_list=[1]
    )
    with skeleton_of(folder).filled(1) as block:
        assert not bool(block.self_attn.o_proj.weight.any())
        assert bool(block.mlp.down_proj.weight.any())
    shutil.rmtree(folder)
    folder = without(
        family("llama"), tmp_path, lambda name: any(part in name for part in (*attention, "layers.1.mlp.up")),
        drop_attn_list=[1],
    )  # fmt: skip
    with pytest.raises(TersorError, match=r"layers\.1\.mlp\.up_proj"):
        skeleton_of(folder)


def test_a_tensor_of_a_listed_branch_plays_no_part(family, tmp_path):
    """LLM-Drop's own files may still hold it."""
    skeleton = skeleton_of(without(family("mixtral"), tmp_path, lambda name: False, drop_mlp_list=[0]))
    assert not any("experts" in name or "gate" in name for name in skeleton.checkpoint_names(0))
    with skeleton.filled(0) as block:
        assert not bool(block.mlp(torch.randn(1, 6, 64)).any())


@pytest.mark.parametrize("bad", [[2], [-1], ["0"], [True], {"0": 1}])
def test_bad_list(bad, family, tmp_path):
    with pytest.raises(TersorError, match="drop_attn_list"):
        skeleton_of(without(family("llama"), tmp_path, lambda name: False, drop_attn_list=bad))

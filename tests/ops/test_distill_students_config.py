"""Students that start from a config and a teacher."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.from_config import even_layers, from_config
from tersor.ops.distill.students.student import Student
from tersor.ops.model import load
from test_distill_students import CPU, close, output, same_bytes, train, write


def started(folder: Path, changes: dict, **settings) -> Student:
    teacher = DenseView(open_checkpoint(folder))
    return from_config(teacher.config | changes, teacher, Request(None, folder / "out", **settings), CPU)


@pytest.mark.parametrize("count", range(1, 9))
def test_even_layers(count):
    layers = even_layers(count, 8)
    assert layers[0] == 0 and len(layers) == count
    assert count == 1 or layers[-1] == 7
    steps = {after - before for before, after in itertools.pairwise(layers)}
    assert not steps or (max(steps) - min(steps) <= 1 and min(steps) >= 1)


SMALLER = [
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"hidden_size": 48, "head_dim": 16}),
    ("llama", {"hidden_size": 48, "head_dim": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"hidden_size": 32, "num_hidden_layers": 1, "layer_types": ["full_attention"]}),
    ("gemma", {"hidden_size": 32, "intermediate_size": 48}),
    ("gpt2", {"n_layer": 1, "n_inner": 128}),
    ("gpt2", {"n_embd": 48, "n_head": 3}),
    ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 2, "ffn_dim": 64}),
    ("phi3", {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ("mixtral", {"intermediate_size": 64, "num_hidden_layers": 1}),
    ("qwen2-moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}),
    ("bert-mlm", {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), SMALLER, ids=str)
def test_smaller(name, changes, family, tmp_path):
    """It runs, trains, and what it exports is a checkpoint of that config that computes the same."""
    student = started(family(name, dtype="float32"), changes)
    assert student.layout.keys() == student.changed.keys()
    same_bytes(student)
    train(student)
    folder = write(student, tmp_path, tmp_path / "small")
    architecture = student.view.config["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    close(output(model), output(student.model), 1e-5)


def test_what_is_weak_goes(family, tmp_path):
    """A teacher that does not use some of its neurons and heads gives a student that computes the very same."""
    folder = shutil.copytree(family("llama", dtype="float32"), tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for index in range(2):
        weak = torch.randperm(96, generator=generator)[:32]
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            tensors[f"model.layers.{index}.mlp.{name}_proj.weight"].index_fill_(axis, weak, 0)
        head = index  # one KV head of two, its query heads with it
        for name, axis, width in (("q", 0, 32), ("k", 0, 16), ("v", 0, 16), ("o", 1, 32)):
            places = torch.arange(head * width, (head + 1) * width)
            tensors[f"model.layers.{index}.self_attn.{name}_proj.weight"].index_fill_(axis, places, 0)
    save_file(tensors, folder / "model.safetensors")
    changes = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    close(output(started(folder, changes).model), output(load(folder, "cpu")), 1e-5)


def test_hidden_channels_are_the_same_everywhere(family):
    folder = family("llama", dtype="float32")
    before = load_file(folder / "model.safetensors")
    after = dict(started(folder, {"hidden_size": 48, "head_dim": 16}).export())
    table = before["model.embed_tokens.weight"]
    kept = [int((table == column[:, None]).all(0).nonzero()) for column in after["model.embed_tokens.weight"].T]
    assert kept == sorted(set(kept)) and len(kept) == 48
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"][kept])
    for index in range(2):
        block = f"model.layers.{index}."
        assert torch.equal(after[block + "mlp.up_proj.weight"], before[block + "mlp.up_proj.weight"][:, kept])
        assert torch.equal(after[block + "mlp.down_proj.weight"], before[block + "mlp.down_proj.weight"][kept])


def test_blocks_keep_their_order(family):
    folder = family("llama", dtype="float32", num_hidden_layers=5)
    before = load_file(folder / "model.safetensors")
    after = dict(started(folder, {"num_hidden_layers": 3}).export())
    for new, old in enumerate((0, 2, 4)):
        for part in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm"):
            assert torch.equal(after[f"model.layers.{new}.{part}.weight"], before[f"model.layers.{old}.{part}.weight"])
    assert not any("layers.3." in name for name in after)


def test_dtype_of_the_config(family):
    student = started(family("llama"), {"dtype": "float16", "num_hidden_layers": 1})
    assert {dtype for dtype, _ in student.layout.values()} == {"F16"}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"num_hidden_layers": 3}, "3 blocks, the teacher has 2"),
        ("llama", {"head_dim": 8}, "k_proj.*along axis 0"),
        ("llama", {"num_attention_heads": 2, "head_dim": 16}, "o_proj.*along axis 1"),  # half of each group
        ("gpt2", {"n_embd": 48}, "c_attn"),  # heads of another size
        ("llama", {"vocab_size": 128}, r"lm_head\.weight.*256.*128"),
        ("llama", {"intermediate_size": 128}, "mlp"),
        ("llama", {"attention_bias": True}, "no tensor for .*bias"),
        ("llama-tied", {"tie_word_embeddings": False}, r"no tensor for 'lm_head\.weight'"),
        ("mixtral", {"num_local_experts": 2}, "gate.weight' has 4 in the teacher and 2"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "new student is dense"),
        ("llama", {"model_type": "nonsense"}, "cannot build"),
    ],
    ids=str,
)
def test_what_cannot_be_derived_is_named(name, changes, words, family):
    with pytest.raises(TersorError, match=words):
        started(family(name), changes)

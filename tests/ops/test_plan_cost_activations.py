"""Formulas of kept activations against what autograd really keeps, and against published ones."""

from __future__ import annotations

import pytest
from header_models import LLAMA_8B, MIXTRAL, llama_shapes, write_model
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.plan_parallel.cost.activations import block_bytes, head_bytes, kept_per_token, parts_per_token
from tersor.ops.plan_parallel.cost.shape import BlockShape, block_shape
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel

LLAMA_2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """shape(config) -> BlockShape of the first block of a llama or mixtral"""

    def make(config: dict) -> BlockShape:
        small = config | {"num_hidden_layers": 1}
        folder = write_model(tmp_path_factory.mktemp("model"), small, llama_shapes(small))
        model = PlanModel(Checkpoint(folder))
        return block_shape(model, model.pieces[1])

    return make


def test_shape_of_a_block(shape):
    assert shape(LLAMA_8B)[:2] == (4096, 8192)
    block = shape(LLAMA_8B)
    assert (block.ffn, block.up, block.queries, block.keys, block.attended) == (14336, 28672, 4096, 1024, 4096)
    experts = shape(MIXTRAL)
    assert (experts.ffn, experts.experts, experts.active, experts.expert_ffn, experts.expert_up) == (
        0, 8, 2, 14336, 28672,
    )  # fmt: skip


def test_llama_2_7b_under_hugging_face_keeps_45_66_hidden_sizes_a_token(shape):
    """As counted with saved_tensors_hooks (365 MiB a layer at 2,048 tokens)."""
    kept = kept_per_token(shape(LLAMA_2_7B), "hf")
    assert kept / 4096 == pytest.approx(45.66, rel=0.005)
    assert kept * 2048 / 2**20 == pytest.approx(365, rel=0.005)


def test_megatron_keeps_korthikantis_34_hidden_sizes_less_the_masks():
    """Of a block with a GELU of width 4 h: 34 less dropout's masks (1 + 1 for attention's and the MLP's output), but with
    the outputs of both norms, which the formula leaves out, and the log-sum-exp."""
    from tersor.ops.model.facts import Attention

    hidden = 4096
    block = BlockShape(hidden, 2 * hidden, attention=Attention(32, 32, 128, 128), ffn=4 * hidden, up=4 * hidden)
    parts = parts_per_token(block, "megatron")
    assert parts["mlp"] == 16 * hidden
    assert parts["attention"] == (8 * hidden) + 4 * 32
    assert parts["norms"] == 8 * hidden
    assert sum(parts.values()) - 4 * 32 == (34 - 2) * hidden


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("llama", 0.01), ("llama-bias", 0.01), ("qwen3", 0.02), ("gemma", 0.01), ("gemma3", 0.06), ("opt", 0.02),
        ("phi", 0.05), ("phi3", 0.07), ("falcon", 0.03), ("mixtral", 0.06), ("qwen3-moe", 0.06), ("qwen2-moe", 0.07),
    ],
)  # fmt: skip
def test_formulas_agree_with_what_autograd_keeps(family, name, within):
    from tersor.ops.model.activations import saved_bytes

    checkpoint = Checkpoint(family(name))
    model = PlanModel(checkpoint)
    for kind in saved_bytes(checkpoint, 64, lengths=(16, 32, 48)).values():
        block = block_shape(model, model.pieces[1 + kind["layers"][0]])
        assert kept_per_token(block, "hf") == pytest.approx(kind["per_token_bytes"], rel=within)


def test_everything_is_cut_by_tensor_parallelism_with_sequence_parallelism(shape):
    block = shape(LLAMA_8B)
    one, eight = (kept_per_token(block, "megatron", tp) for tp in (1, 8))
    assert eight == pytest.approx(one / 8)
    sixteen = kept_per_token(block, "megatron", 16)  # each head of keys and values is there twice
    assert sixteen == pytest.approx(one / 16 + 2 * 2 * 1024 / 16)


def test_experts_cut_over_etp_see_the_tokens_of_all_its_ranks(shape):
    block = shape(MIXTRAL)
    apart, cut = (parts_per_token(block, "megatron", 2, etp)["experts"] for etp in (1, 2))
    assert cut - apart == pytest.approx(2 * 2 * 4096 * 2 / 2)  # inputs and outputs, two experts a token, over tp


def test_recomputation(shape):
    block, tokens = shape(LLAMA_8B), 1000
    none = block_bytes(block, Layout(), "megatron", tokens)
    full = block_bytes(block, Layout(recompute="full"), "megatron", tokens)
    attention = block_bytes(block, Layout(recompute="attention"), "megatron", tokens)
    assert none == (tokens * kept_per_token(block, "megatron"), 0.0)
    assert full == (tokens * 2 * 4096, none[0])
    assert attention[0] == none[0]  # fused attention keeps its inputs and its output anyway
    selective = block_bytes(block, Layout(recompute="attention"), "torchtitan", tokens)
    # input, q, v, gate, down, attention's output and its log-sum-exp
    assert selective[0] == tokens * (2 * (4096 * 4 + 1024 + 14336) + 4 * 32)


def test_logits_of_the_last_stage_are_cut_over_the_vocabulary():
    kept, logits = head_bytes(4096, 128256, Layout(tp=4), 6.0, 8192)
    assert logits == 8192 * 128256 * 6 / 4
    assert kept == 8192 * 4 * 4096 / 4

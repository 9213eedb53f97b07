"""Bytes of weights, gradients and optimizer states: published tables, and counts of real tensors."""

from __future__ import annotations

import pytest
from header_models import DEEPSEEK_V3, LLAMA_8B, MIXTRAL, deepseek_shapes, llama_shapes, write_model
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.cost.conventions import kept, state_bytes
from tersor.ops.plan_parallel.cost.states import expert_ranks, held_by_rank, states_of, tied_table
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

WORKLOAD = Workload()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(config, shapes) -> PlanModel"""

    def make(config: dict, shapes: dict) -> PlanModel:
        return PlanModel(Checkpoint(write_model(tmp_path_factory.mktemp("model"), config, shapes)))

    return make


def total(convention: str, zero: int, ranks: int, workload: Workload = WORKLOAD, numbers: float = 1.0) -> float:
    return state_bytes(numbers, numbers, kept(convention, workload, zero), zero, ranks).total


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper_example_of_7_5_billion_on_64(zero, gigabytes):
    assert round(total("paper", zero, 64, numbers=7.5e9) / 1e9, 1) == gigabytes


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize(
    ("convention", "zero", "expected", "workload"),
    [
        ("megatron", 0, lambda d: 18, WORKLOAD),
        ("megatron", 1, lambda d: 6 + 12 / d, WORKLOAD),
        ("megatron", 1, lambda d: 8 + 8 / d, Workload(weight_bytes=4, master=False)),
        ("megatron", 0, lambda d: 16, Workload(weight_bytes=4, master=False)),
        ("paper", 1, lambda d: 4 + 12 / d, WORKLOAD),
        ("paper", 2, lambda d: 2 + 14 / d, WORKLOAD),
        ("paper", 3, lambda d: 16 / d, WORKLOAD),
        ("deepspeed", 0, lambda d: 20, WORKLOAD),
        ("deepspeed", 1, lambda d: 4 + 16 / d, WORKLOAD),
        ("deepspeed", 2, lambda d: 2 + 18 / d, WORKLOAD),
        ("deepspeed", 3, lambda d: 18 / d, WORKLOAD),
        ("torchtitan", 3, lambda d: 16 / d, WORKLOAD),
        ("torchtitan", 2, lambda d: 2 + 16 / d, WORKLOAD),
        ("torchtitan", 0, lambda d: 16, WORKLOAD),
    ],
)
def test_bytes_a_parameter_as_the_runtimes_document_them(convention, zero, expected, workload, ranks):
    assert total(convention, zero, ranks, workload) == pytest.approx(expected(ranks))


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_number"), [("adamw", 12), ("lion", 8), ("sgd", 4), ("adamw8bit", 6 + 8 / 256)]
)
def test_optimizers_keep_what_they_are_known_for(optimizer, bytes_a_number):
    assert kept("megatron", Workload(optimizer=optimizer)).optimizer == bytes_a_number


def test_unknown_convention_and_optimizer_are_named():
    with pytest.raises(TersorError, match="convention 'mine' is not known"):
        kept("mine", WORKLOAD)
    with pytest.raises(TersorError, match="optimizer 'shampoo' is not known"):
        kept("megatron", Workload(optimizer="shampoo"))


def test_numbers_are_counted_from_the_headers(model):
    llama = model(LLAMA_8B, llama_shapes(LLAMA_8B))
    whole = sum(held_by_rank(llama, piece, 1, 1, 1).numbers for piece in llama.pieces)
    assert whole == sum(weight.params for weight in llama.stored.values()) == 8_030_261_248
    # norms, q and o, k and v, gate, up and down of one block, of which tp = 16 finds 8 heads of keys and values
    block = held_by_rank(llama, llama.pieces[1], 16, 1, 1)
    assert block.dense == 2 * 4096 + 2 * 4096 * 4096 / 16 + 2 * 1024 * 4096 / 8 + 3 * 14336 * 4096 / 16


def test_experts_are_cut_over_their_own_ranks(model):
    mixtral = model(MIXTRAL, llama_shapes(MIXTRAL))
    block = held_by_rank(mixtral, mixtral.pieces[1], 1, 8, 1)
    assert block.expert == 3 * 14336 * 4096
    assert held_by_rank(mixtral, mixtral.pieces[1], 2, 4, 2).expert == block.expert
    keep = kept("megatron", WORKLOAD)
    layout = Layout(dp=32, ep=8, zero=1)
    states = states_of(block, keep, layout)
    assert expert_ranks(layout) == 4
    assert states.optimizer == pytest.approx(12 * (block.dense / 32 + block.expert / 4))
    assert states.weights == 2 * block.numbers


def test_latent_attention_keeps_its_down_projections_whole(model):
    config = DEEPSEEK_V3 | {"num_hidden_layers": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    deepseek = model(config, deepseek_shapes(config))
    whole, cut = (held_by_rank(deepseek, deepseek.pieces[1], tp, 1, 1).dense for tp in (1, 8))
    copied = 7168 * (1536 + 512 + 64) + 1536 + 512 + 2 * 7168
    assert cut == pytest.approx(copied + (whole - copied) / 8)


def test_stored_bytes_follow_the_share(model):
    llama = model(LLAMA_8B, llama_shapes(LLAMA_8B))
    block = held_by_rank(llama, llama.pieces[1], 4, 1, 1)
    assert block.dense_bytes == 2 * block.dense


def test_low_rank_optimizers_keep_moments_of_the_projections_only(model):
    llama = model(LLAMA_8B, llama_shapes(LLAMA_8B))
    block = llama.pieces[1]
    full = held_by_rank(llama, block, 1, 1, 1, "adamw")
    mini = held_by_rank(llama, block, 1, 1, 1, "apollo-mini")
    assert full.dense_moments == full.dense
    matrices = [llama.stored[name] for name in block.weights if len(llama.stored[name].shape) == 2]
    assert mini.dense_moments == pytest.approx(sum(max(weight.shape) for weight in matrices) + 2 * 4096)
    table = llama.pieces[0]  # which Adam updates
    assert held_by_rank(llama, table, 1, 1, 1, "apollo").dense_moments == 128256 * 4096


def test_a_tied_head_needs_a_copy_on_the_last_stage(model):
    config = LLAMA_8B | {"tie_word_embeddings": True}
    tied = model(config, llama_shapes(config))
    assert tied_table(tied, 4).dense == 128256 * 4096 / 4
    assert tied_table(model(LLAMA_8B, llama_shapes(LLAMA_8B)), 4).dense == 0


def test_a_degree_that_cuts_heads_names_the_tensor(model):
    llama = model(LLAMA_8B, llama_shapes(LLAMA_8B))
    with pytest.raises(TersorError, match=r"_proj\.weight"):
        held_by_rank(llama, llama.pieces[1], 7, 1, 1)

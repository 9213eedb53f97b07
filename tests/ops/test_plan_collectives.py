"""The collectives of a block against the published counts, and of families whose parts are not all cut."""

from __future__ import annotations

import pytest
from header_models import (
    DEEPSEEK_V3,
    LLAMA_8B,
    MIXTRAL,
    TINY_LLAMA,
    deepseek_shapes,
    llama_shapes,
    write_model,
)
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.plan_parallel.dependencies.collectives import block_collectives, tied_embedding_gradient
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel

TOKENS = 4096


def of(folder, config, shapes) -> PlanModel:
    return PlanModel(Checkpoint(write_model(folder, config, shapes)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LLAMA_8B | {"num_hidden_layers": 2}
    return of(tmp_path_factory.mktemp("llama") / "m", config, llama_shapes(config))


def collectives(model, piece=1, sequence_parallel=True, tokens=TOKENS, **degrees):
    return block_collectives(model, model.pieces[piece], Layout(**degrees), tokens, sequence_parallel)


def moved(found, axis: str, ranks: int) -> float:
    """Bytes that each rank sends, by ring algorithms."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
    return sum(
        entry.count * passes[entry.name] * (ranks - 1) / ranks * entry.nbytes
        for entry in found
        if entry.axis == axis and not entry.overlappable
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 8])
def test_tensor_parallel_traffic_of_a_layer(llama, tp, sequence_parallel):
    """Megatron-LM (Narayanan et al. 2021, section 3.2): 8 b s h (t - 1) / t numbers for each layer and micro-batch; sequence
    parallelism moves as much (Korthikanti et al. 2022, section 4.2.2)."""
    found = collectives(llama, tp=tp, sequence_parallel=sequence_parallel)
    assert moved(found, "tp", tp) == pytest.approx(8 * TOKENS * 4096 * (tp - 1) / tp * 2)
    names = {(entry.name, entry.phase): entry.count for entry in found if not entry.overlappable}
    if sequence_parallel:
        assert set(names.values()) == {2} and len(names) == 4
    else:
        assert names == {("all_reduce", "forward"): 2, ("all_reduce", "backward"): 2}


def test_alone_there_are_none(llama):
    assert all(collectives(llama, piece) == [] for piece in range(4))
    assert collectives(llama, dp=8, pp=2) == []


def test_context_parallel_ring(llama):
    forward, backward = collectives(llama, cp=4, tp=2)[-2:]
    assert (forward.name, forward.axis, forward.count, forward.overlappable) == ("send", "cp", 3, True)
    assert forward.nbytes == TOKENS / 4 * 4 * (128 + 128) * 2  # of eight heads of keys, four are on this rank
    assert backward.nbytes == 2 * forward.nbytes and backward.phase == "backward"
    assert collectives(llama, cp=2, tp=16)[-2].nbytes == TOKENS / 2 * 1 * 256 * 2  # copies of one head


def test_embedding_and_head(llama):
    front, back = collectives(llama, 0, tp=4), collectives(llama, -1, tp=4)
    assert [(entry.name, entry.phase) for entry in front] == [("reduce_scatter", "forward"), ("all_gather", "backward")]
    loss = next(entry for entry in back if entry.name == "all_reduce")
    assert (loss.nbytes, loss.count, loss.phase) == (4 * TOKENS, 3, "forward")
    assert [entry.name for entry in collectives(llama, 0, False, tp=4)] == ["all_reduce"]
    assert tied_embedding_gradient(llama, Layout(pp=2), 4) == 0


def test_a_tied_table_is_reduced_between_the_ends(tmp_path):
    config = TINY_LLAMA | {"tie_word_embeddings": True}
    model = of(tmp_path / "m", config, llama_shapes(config))
    assert tied_embedding_gradient(model, Layout(pp=2, tp=2), 4) == 256 * 64 / 2 * 4
    assert tied_embedding_gradient(model, Layout(tp=2), 4) == 0


def test_experts(tmp_path):
    config = MIXTRAL | {"num_hidden_layers": 2}
    model = of(tmp_path / "m", config, llama_shapes(config))
    found = collectives(model, tp=2, dp=4, ep=8)
    there = [entry for entry in found if entry.axis == "ep"]
    assert [(entry.name, entry.count, entry.phase) for entry in there] == [
        ("all_to_all", 2, "forward"), ("all_to_all", 2, "backward"),
    ]  # fmt: skip
    assert there[0].nbytes == TOKENS / 2 * 2 * 4096 * 2  # half of the tokens, each to two experts
    assert moved(found, "tp", 2) == pytest.approx(4 * TOKENS * 4096 / 2 * 2)  # attention alone is cut by tp
    assert {entry.axis for entry in collectives(model, tp=2)} == {"tp"}  # all experts here: tokens stay where they are
    inside = [entry for entry in collectives(model, tp=4, etp=4) if entry.axis == "etp"]
    assert [(entry.name, entry.nbytes) for entry in inside[:2]] == [
        ("all_gather", TOKENS * 4096 * 2), ("reduce_scatter", TOKENS * 4096 * 2),
    ]  # fmt: skip


def test_shared_experts_and_latent_attention(tmp_path):
    config = DEEPSEEK_V3 | {"num_hidden_layers": 4}
    model = of(tmp_path / "m", config, deepseek_shapes(config))
    found = collectives(model, 4, tp=8, ep=8)
    assert next(entry for entry in found if entry.axis == "tp").count == 2  # attention and the shared expert
    ring = collectives(model, 4, tp=8, cp=2)[-2]
    assert ring.nbytes == TOKENS / 2 * 16 * (192 + 128) * 2


def test_attention_that_is_not_cut(tmp_path):
    """Its output is whole on every rank: tokens are gathered, and nothing is reduced."""
    block = "model.layers.0"
    config = {
        "model_type": "mystery", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (512, 64),
        f"{block}.attention.query_key_value.weight": (192, 64), f"{block}.attention.dense.weight": (64, 64),
        f"{block}.mlp.dense_h_to_4h.weight": (96, 64), f"{block}.mlp.dense_4h_to_h.weight": (64, 96),
    }  # fmt: skip
    model = of(tmp_path / "m", config, shapes)
    forward = [entry for entry in collectives(model, tp=2) if entry.phase == "forward"]
    assert [(entry.name, entry.count) for entry in forward] == [
        ("all_gather", 1),
        ("reduce_scatter", 1),
        ("all_gather", 1),
    ]
    assert [entry.count for entry in collectives(model, sequence_parallel=False, tp=2)] == [1, 1]


def test_norms_over_all_heads(tmp_path):
    shapes = llama_shapes(TINY_LLAMA)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        shapes |= {f"{attention}.q_norm.weight": (64,), f"{attention}.k_norm.weight": (32,)}
    model = of(tmp_path / "m", TINY_LLAMA | {"model_type": "olmo2"}, shapes)
    gathered = collectives(model, tp=2)[-2]
    assert (gathered.name, gathered.nbytes) == ("all_gather", TOKENS * 96 * 2)

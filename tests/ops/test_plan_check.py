"""The check that runs a plan: how layouts and models are made small, and a run of several layouts on four processes."""

from __future__ import annotations

import header_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.check import run
from tersor.ops.plan_parallel.check.shrink import micro_batches, shrink_config, shrink_layouts
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.schedule.builders import why_not

QWEN3_MOE = models.LLAMA_8B | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128,
    "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "tie_word_embeddings": True,
}  # fmt: skip


def shapes_of(config: dict) -> models.Shapes:
    """Of a model with experts named as Qwen's, with norms of queries and keys."""
    hidden, wide = config["hidden_size"], config["moe_intermediate_size"]
    shapes: models.Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= models.grouped_attention(block, config)
        shapes |= {f"{block}.self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
        shapes[f"{block}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            shapes |= models.gated_mlp(f"{block}.mlp.experts.{expert}", hidden, wide)
    return shapes


def plan_model(folder, config: dict, shapes: models.Shapes) -> PlanModel:
    return PlanModel(Checkpoint(models.write_model(folder / "m", config, shapes)))


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "degrees"),
    [
        (Layout(tp=8, pp=4, dp=8), [(2, 2, 1), (2, 1, 2)]),
        (Layout(tp=8), [(4, 1, 1)]),
        (Layout(pp=16), [(1, 4, 1)]),
        (Layout(dp=64, zero=3), [(1, 1, 4)]),
        (Layout(tp=4, dp=2), [(2, 1, 2)]),
        (Layout(pp=4, dp=4), [(1, 2, 2)]),
        (Layout(), [(1, 1, 4)]),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else "",
)
def test_small_layouts_cover_the_plan(layout, degrees):
    found, _ = shrink_layouts(layout, 4)
    assert [(small.tp, small.pp, small.dp) for small in found] == degrees
    assert all(small.world == 4 for small in found)


@settings(deadline=None, max_examples=300)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    pp=st.sampled_from([1, 2, 3, 8]),
    dp=st.sampled_from([1, 2, 8]),
    cp=st.sampled_from([1, 2]),
    zero=st.integers(0, 3),
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"]),
    experts=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2)]),
    processes=st.sampled_from([2, 3, 4, 6, 8]),
)
def test_every_small_layout_can_run(tp, pp, dp, cp, zero, schedule, experts, processes):
    ep, etp = experts if dp * cp * tp % (experts[0] * experts[1]) == 0 else (1, 1)
    chunks = {"interleaved": 3, "zbv": 2}.get(schedule, 1)
    layout = Layout(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, etp=etp, zero=zero, schedule=schedule, chunks=chunks)
    found, notes = shrink_layouts(layout, processes)
    assert found
    for small in found:
        assert small.world == processes and small.cp == 1
        assert len(small.stages) == small.pp * small.chunks and min(small.stages) >= 1
        assert small.pp == 1 or not why_not(small.schedule, small.pp, micro_batches(small), small.chunks)
        assert small.ep == 1 or (small.ep % small.tp == 0 and small.dp * small.tp % small.ep == 0)
    assert (cp > 1) == any("Context" in note for note in notes)


def test_uneven_stages_stay_uneven():
    (small,), _ = shrink_layouts(Layout(pp=4, stages=(6, 8, 9, 9)), 2)
    assert small.stages == (1, 2)


def test_a_check_of_too_many_processes():
    with pytest.raises(TersorError, match="64 processes"):
        shrink_layouts(Layout(dp=64), 64)


# --- models -----------------------------------------------------------------------------------------------------------


def test_small_model_keeps_its_kind():
    small = shrink_config(QWEN3_MOE, [Layout(tp=2, dp=2, ep=2)])
    assert small["model_type"] == "qwen3_moe"
    assert small["num_attention_heads"] == 4 * small["num_key_value_heads"]  # 32 and 8 before
    assert small["num_key_value_heads"] % 2 == 0 and small["num_experts"] % 2 == 0
    assert small["tie_word_embeddings"]


def test_small_latent_attention_and_groups_of_experts():
    config = models.DEEPSEEK_V3 | {"n_group": 8, "topk_group": 4, "quantization_config": {"quant_method": "fp8"}}
    small = shrink_config(config, [Layout(dp=4, ep=4, stages=(2,))])
    assert small["kv_lora_rank"] == 16 and small["n_routed_experts"] % small["n_group"] == 0
    assert small["first_k_dense_replace"] == 1 and small["num_hidden_layers"] == 2
    assert "quantization_config" not in small


def test_small_model_has_layers_of_every_kind():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = models.GEMMA3_27B | {"layer_types": kinds * 10 + kinds[:2]}
    small = shrink_config(config, [Layout(pp=4, stages=(2, 2, 2, 2))])
    assert set(small["layer_types"]) == set(kinds) and len(small["layer_types"]) == 8
    assert small["sliding_window"] < 24


def test_text_model_of_a_model_with_a_tower():
    small = shrink_config(
        models.GEMMA3_4B
        | {"text_config": models.GEMMA3_4B["text_config"] | {"num_attention_heads": 8, "num_key_value_heads": 4}},
        [Layout(tp=2, stages=(2,))],
    )
    assert small["model_type"] == "gemma3_text" and "vision_config" not in small


# --- runs -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "tensor and pipeline, experts cut": Layout(tp=2, pp=2, etp=2, schedule="gpipe", stages=(1, 3)),
    "tensor and data, whole experts": Layout(tp=2, dp=2, ep=2, zero=3, stages=(4,)),
    "zero bubble and data": Layout(pp=2, dp=2, schedule="zbv", chunks=2, zero=2, stages=(1, 1, 1, 1)),
    "replicas of shards": Layout(dp=4, replicate=2, zero=3, recompute="full", stages=(4,)),
    "a style forgotten": Layout(tp=2, dp=2, zero=0, stages=(4,)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, run.Run]:
    """All layouts, on one start of four processes."""
    config = QWEN3_MOE | {"num_hidden_layers": 1, "num_experts": 2}
    model = plan_model(tmp_path_factory.mktemp("check"), config, shapes_of(config))
    plans = [run._plan(model, layout) for layout in LAYOUTS.values()]
    for name in ("q_norm", "k_norm"):
        assert plans[-1]["tp_plan"].pop(f"model.layers.*.self_attn.{name}") == "replicated_with_grad_allreduce"
    results = run.run_plans(shrink_config(QWEN3_MOE, list(LAYOUTS.values())), plans, 4, seed=1)
    return {name: run._run(layout, result) for (name, layout), result in zip(LAYOUTS.items(), results, strict=True)}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "a style forgotten"])
def test_a_plan_gives_the_gradients_of_one_process(name, runs):
    assert runs[name].passed, (runs[name].loss_difference, runs[name].gradient_difference, runs[name].worst)
    assert runs[name].gradient_difference > 0 or runs[name].loss_difference > 0  # sums in another order


def test_gradients_that_are_not_summed_are_found(runs):
    found = runs["a style forgotten"]
    assert not found.passed
    assert found.loss_difference <= run.LOSS_TOLERANCE and found.gradient_difference > 0.1
    assert found.worst.endswith(("q_norm.weight", "k_norm.weight"))


def test_layouts_are_those_that_were_used(runs):
    cut = runs["tensor and pipeline, experts cut"].layouts
    assert cut["model.layers.3.self_attn.q_proj.weight"] == "tp:S(0), local [64, 128] of [128, 128]"
    assert cut["model.layers.0.self_attn.o_proj.weight"] == "tp:S(1), local [128, 64] of [128, 128]"
    assert cut["model.layers.0.input_layernorm.weight"] == "replicated [128]"
    assert "tp:" in cut["model.layers.0.mlp.experts.down_proj"]
    whole = runs["tensor and data, whole experts"].layouts
    assert "ep:S(0)" in whole["model.layers.0.mlp.experts.gate_up_proj"]
    assert whole["model.layers.0.input_layernorm.weight"] == "shard:S(0), local [64] of [128]"
    replicas = runs["replicas of shards"].layouts["model.layers.0.input_layernorm.weight"]
    assert replicas == "replicate:R shard:S(0), local [64] of [128]"
    bubble = runs["zero bubble and data"].layouts
    assert {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(4)} | {"lm_head.weight"} <= set(bubble)


def test_a_check_from_beginning_to_end(tmp_path, monkeypatch):
    """With results that a run would give, one of them wrong."""
    config = models.TINY_LLAMA | {"tie_word_embeddings": True}
    model = plan_model(tmp_path, config, models.llama_shapes(config))
    given_plans = []

    def results(config, plans, processes, seed):
        given_plans.extend(plans)
        wrong = [1e-6, 0.5]
        return [
            {
                "loss": 4.0,
                "expected_loss": 4.0,
                "gradients": {"a": 0.0, "b": wrong[number]},
                "layouts": {"a": "x"},
                "unseen": [],
            }
            for number, _ in enumerate(plans)
        ]

    monkeypatch.setattr(run, "run_plans", results)
    found = run.execute_check(model, Layout(tp=8, pp=2, dp=4, zero=1), 4, seed=3)
    assert not found.passed and found.gradient_difference == 0.5
    assert [single.passed for single in found.runs] == [True, False] and found.runs[1].worst == "b"
    assert found.layouts == {"a": "x"} and found.layout == found.runs[0].layout
    assert [plan["zero"] for plan in given_plans] == [2, 2] and any("ZeRO 1" in note for note in found.notes)
    assert len({sum(plan["stages"]) for plan in given_plans}) == 1


def test_what_cannot_be_run_is_left_out_and_said(tmp_path, monkeypatch):
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4,
        "n_positions": 128, "vocab_size": 256,
    }  # fmt: skip
    shapes = {
        "transformer.wte.weight": (256, 64),
        "transformer.wpe.weight": (128, 64),
        "transformer.ln_f.weight": (64,),
    }
    for layer in range(2):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.attn.c_attn.weight": (64, 192), f"{block}.attn.c_proj.weight": (64, 64)}
    found_plans = []

    def results(config, plans, processes, seed):
        found_plans.extend(plans)
        return [
            {"loss": 1.0, "expected_loss": 1.0, "gradients": {"a": 0.0}, "layouts": {}, "unseen": []} for _ in plans
        ]

    monkeypatch.setattr(run, "run_plans", results)
    found = run.execute_check(plan_model(tmp_path, config, shapes), Layout(tp=2, pp=2))
    assert found.passed and [(plan["tp"], plan["pp"], plan["dp"]) for plan in found_plans] == [(1, 1, 4)]
    assert any(note.startswith("tp is not run") for note in found.notes)
    assert any("wpe" in note for note in found.notes)


def test_an_encoder_predicts_nothing(tmp_path):
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 256,
    }
    shapes = {"embeddings.word_embeddings.weight": (256, 64), "encoder.layer.0.attention.self.query.weight": (64, 64)}
    with pytest.raises(TersorError, match="next token"):
        run.execute_check(plan_model(tmp_path, config, shapes), Layout(dp=2))


def test_the_error_of_the_first_process_is_told():
    log = "\n".join(
        [
            "[rank1]: RuntimeError: [gloo/transport/tcp/pair.cc:1] Connection reset by peer",
            "[rank0]: Traceback (most recent call last):",
            "[rank0]: ValueError: wpe stands before the blocks",
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: worker failed",
        ]
    )
    assert run._last_words(log) == "ValueError: wpe stands before the blocks"

"""Rules from headers: published models, quantized and factorised ones, families with fused layers, and what is not known."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from header_models import (
    DEEPSEEK_V3,
    LLAMA_8B,
    MIXTRAL,
    TINY_LLAMA,
    deepseek_shapes,
    llama_shapes,
    write_layout,
    write_model,
)
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.sparse.packed import Packed
from tersor.ops.plan_parallel.layout import Layout, Mesh
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.transform.legality import legal_ep, legal_etp, legal_tp
from tersor.ops.plan_parallel.transform.rules import divides, notes, rules
from tersor.ops.plan_parallel.transform.segments import boxes, holds, numbers
from tersor.ops.plan_parallel.transform.sublayers import Context, fused_expert_cuts
from tersor.ops.plan_parallel.transform.tp_plan import published_plan

LAYER = "model.layers.0."
WORDS = "16 does not make 8 equal parts of whole runs of 4, which are stored together"


def of(folder, config, shapes) -> PlanModel:
    return PlanModel(Checkpoint(write_model(folder, config, shapes)))


def legal(answers: dict[int, str]) -> list[int]:
    return [n for n, why in answers.items() if not why]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return of(tmp_path_factory.mktemp("llama") / "m", LLAMA_8B, llama_shapes(LLAMA_8B | {"num_hidden_layers": 32}))


def test_llama(llama):
    found = rules(llama)
    assert found.keys() == llama.checkpoint.tensors.keys()
    for name, role, dim, unit in (
        ("self_attn.q_proj", "column", 0, 128), ("self_attn.k_proj", "column", 0, 128), ("self_attn.o_proj", "row", 1, 128),
        ("mlp.gate_proj", "column", 0, 1), ("mlp.down_proj", "row", 1, 1),
    ):  # fmt: skip
        rule = found[f"{LAYER}{name}.weight"]
        assert (rule.role, rule.dim, rule.segments[0].unit, rule.source) == (role, dim, unit, "tp_plan")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (found[name].role, found[name].dim, found[name].pad, found[name].tied) == ("vocab", 0, 128, False)
    assert found[f"{LAYER}input_layernorm.weight"].role == "replicated"
    assert legal(legal_tp(llama)) == [1, 2, 4, 8, 16, 32]
    assert legal_tp(llama)[3] == "model.layers.0.self_attn.q_proj.weight: 32 heads are not a multiple of 3"
    assert legal_tp(llama)[64] == "model.layers.0.self_attn.q_proj.weight: 32 heads are not a multiple of 64"
    assert legal(legal_ep(llama)) == legal(legal_etp(llama)) == [1] and "no experts" in legal_ep(llama)[2]


def test_more_ranks_than_heads_of_keys(llama):
    rule = rules(llama)[f"{LAYER}self_attn.v_proj.weight"]
    held = [boxes(rule, 32, rank) for rank in range(32)]
    assert held[:4] == [(((0, 128), (0, 4096)),)] * 4 and held[31] == (((896, 1024), (0, 4096)),)


def test_any_integer_that_divides(tmp_path):
    """SmolLM2-135M: nine heads, three of keys, 1536 neurons."""
    config = TINY_LLAMA | {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    }
    model = of(tmp_path / "m", config, llama_shapes(config))
    assert legal(legal_tp(model)) == [1, 3]
    assert legal_tp(model)[2] == "model.layers.0.self_attn.q_proj.weight: 9 heads are not a multiple of 2"
    assert legal_tp(model)[9] == "model.layers.0.mlp.gate_proj.weight: 1536 neurons are not a multiple of 9"


def test_numbered_experts(tmp_path):
    model = of(tmp_path / "m", MIXTRAL, llama_shapes(MIXTRAL | {"num_hidden_layers": 32}))
    found, moe = rules(model), f"{LAYER}block_sparse_moe."
    assert [found[f"{moe}experts.5.{w}.weight"].role for w in ("w1", "w2", "w3")] == ["column", "row", "column"]
    assert (found[f"{moe}experts.5.w1.weight"].expert, found[f"{moe}experts.5.w1.weight"].experts) == (5, 8)
    assert found[f"{moe}gate.weight"].role == "replicated" and not found[f"{moe}gate.weight"].is_expert
    assert legal(legal_ep(model)) == [1, 2, 4, 8] and 7 in legal(legal_etp(model))
    assert legal_ep(model)[3].endswith("block_sparse_moe.experts.0.w1.weight: 8 experts are not a multiple of 3")
    assert legal(legal_tp(model)) == [1, 2, 4, 8, 16, 32]  # the experts are not cut by it
    layout = Layout(tp=4, dp=2, ep=4, etp=2)
    held = [
        sum(numbers(holds(rule, place, layout)) for rule in found.values() if rule.is_expert)
        for place in Mesh(layout).all
    ]
    assert set(held) == {sum(weight.params for name, weight in model.stored.items() if ".experts." in name) // 8}


def test_latent_attention(tmp_path):
    config = DEEPSEEK_V3 | {"num_hidden_layers": 4}
    model = of(tmp_path / "m", config, deepseek_shapes(config))
    found = rules(model)
    for name, role, unit in (("q_b_proj", "column", 192), ("kv_b_proj", "column", 256), ("o_proj", "row", 128)):
        rule = found[f"{LAYER}self_attn.{name}.weight"]
        assert (rule.role, rule.segments[0].unit) == (role, unit)
    for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"):
        assert found[f"{LAYER}self_attn.{name}.weight"].dim is None
    moe = "model.layers.3.mlp."
    assert found[f"{moe}shared_experts.down_proj.weight"].role == "row"
    assert found[f"{moe}gate.e_score_correction_bias"].dim is None and not found[f"{moe}gate.weight"].is_expert
    assert legal(legal_tp(model, 128)) == [1, 2, 4, 8, 16, 32, 64, 128] and len(legal(legal_ep(model))) == 9
    assert not notes(model)


def quantized(folder, tensors, settings, config=TINY_LLAMA) -> PlanModel:
    """Tiny Llama whose down_proj and q_proj of layer 0 are stored as `tensors` say."""
    replaced = {name.rpartition(".")[0] + ".weight" for name in tensors}
    shapes = llama_shapes(config)
    layout = {name: ("BF16", shape) for name, shape in shapes.items() if name not in replaced} | tensors
    return PlanModel(Checkpoint(write_layout(folder, config | {"quantization_config": settings}, layout)))


def packed_settings(group: int, symmetric: bool = False) -> dict:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group, "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def packed_layout(module: str, out: int, inputs: int, group: int) -> dict:
    return {
        f"{module}.weight_packed": ("I32", (out, inputs // 8)),
        f"{module}.weight_scale": ("BF16", (out, inputs // group)),
        f"{module}.weight_zero_point": ("I32", (out // 8, inputs // group)),
        f"{module}.weight_shape": ("I64", (2,)),
    }


def test_packed_words_scales_and_zero_points(tmp_path):
    down, query = f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.q_proj"
    model = quantized(
        tmp_path / "m", packed_layout(down, 64, 128, 32) | packed_layout(query, 64, 64, 32), packed_settings(32)
    )
    found = rules(model)
    for part, extent in (("packed", 16), ("scale", 4), ("zero_point", 4)):
        rule = found[f"{down}.weight_{part}"]
        assert (rule.role, rule.dim, rule.segments[0].stop, rule.weight) == ("row", 1, extent, f"{down}.weight")
        assert boxes(rule, 4, 3)[0][1] == (extent * 3 // 4, extent)
        assert divides(rule, 8)  # sixteen codes, which share a scale with sixteen others
    for part, extent in (("packed", 64), ("scale", 64), ("zero_point", 8)):
        rule = found[f"{query}.weight_{part}"]
        assert (rule.role, rule.dim, rule.shape[0]) == ("column", 0, extent)
        assert boxes(rule, 4, 1)[0][0] == (extent // 4, extent // 2)
    assert found[f"{down}.weight_shape"].dim is None
    assert legal(legal_tp(model)) == [1, 2, 4]


def test_groups_decide_what_is_legal(tmp_path):
    down = f"{LAYER}mlp.down_proj"
    model = quantized(tmp_path / "m", packed_layout(down, 64, 128, 128), packed_settings(128))
    assert legal(legal_tp(model)) == [1]
    assert legal_tp(model)[2].startswith(f"{down}.weight_packed: 16 does not make 2 equal parts of whole runs of 16")
    with pytest.raises(TersorError, match=r"down_proj\.weight_packed"):
        boxes(rules(model)[f"{down}.weight_packed"], 2, 0)


@pytest.mark.parametrize("any_order", [False, True])
def test_gptq(tmp_path, any_order):
    down = f"{LAYER}mlp.down_proj"
    tensors = {
        f"{down}.qweight": ("I32", (16, 64)), f"{down}.qzeros": ("I32", (4, 8)), f"{down}.scales": ("F16", (4, 64)),
        f"{down}.g_idx": ("I32", (128,)),
    }  # fmt: skip
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": any_order, "sym": True}
    found = rules(quantized(tmp_path / "m", tensors, settings))
    assert boxes(found[f"{down}.qweight"], 2, 1) == (((8, 16), (0, 64)),)
    assert boxes(found[f"{down}.g_idx"], 2, 1) == (((64, 128),),)
    scales = ((0, 4), (0, 64)) if any_order else ((2, 4), (0, 64))  # with desc_act a column's group may be anywhere
    assert boxes(found[f"{down}.scales"], 2, 1) == (scales,)
    assert divides(found[f"{down}.qweight"], 8) == ("" if any_order else WORDS)


def test_awq_and_tiles_of_fp8(tmp_path):
    down = f"{LAYER}mlp.down_proj"
    tensors = {
        f"{down}.qweight": ("I32", (128, 8)), f"{down}.qzeros": ("I32", (4, 8)), f"{down}.scales": ("F16", (4, 64)),
    }  # fmt: skip
    found = rules(quantized(tmp_path / "a", tensors, {"quant_method": "awq", "bits": 4, "group_size": 32}))
    assert boxes(found[f"{down}.qweight"], 4, 1) == (((32, 64), (0, 8)),)
    assert boxes(found[f"{down}.qzeros"], 4, 1) == (((1, 2), (0, 8)),)

    config = DEEPSEEK_V3 | {"num_hidden_layers": 4}
    layout = {name: ("BF16", shape) for name, shape in deepseek_shapes(config).items()}
    for name, (_, (out, *inputs)) in list(layout.items()):
        if "proj" in name:
            layout[name] = ("F8_E4M3", (out, *inputs))
            layout[f"{name}_scale_inv"] = ("F32", (-(-out // 128), -(-inputs[0] // 128)))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    model = PlanModel(Checkpoint(write_layout(tmp_path / "f", config | {"quantization_config": settings}, layout)))
    query = f"{LAYER}self_attn.q_b_proj.weight"  # 128 heads of 192, tiles of 128: two heads fill three tiles
    assert boxes(rules(model)[f"{query}_scale_inv"], 64, 1) == (((3, 6), (0, 12)),)
    assert divides(rules(model)[query], 128) and not divides(rules(model)[query], 64)
    assert 64 not in legal(legal_tp(model))  # the shared expert has 16 tiles of neurons
    assert legal(legal_tp(model)) == [1, 2, 4, 8, 16]


def test_factors(tmp_path):
    down, query, up = f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.up_proj"
    tensors = {
        f"{down}.lr_a": ("BF16", (64, 5)), f"{down}.lr_b": ("BF16", (5, 128)),
        f"{query}.lr_a": ("BF16", (64, 5)), f"{query}.lr_b": ("BF16", (5, 64)),
        f"{up}.kron_b": ("BF16", (2, 8, 4)), f"{up}.kron_c": ("BF16", (2, 16, 16)),
    }  # fmt: skip
    folder = tmp_path / "m"
    shapes = {name: ("BF16", shape) for name, shape in llama_shapes(TINY_LLAMA).items()}
    for module in (down, query, up):
        del shapes[f"{module}.weight"]
    write_layout(folder, TINY_LLAMA, shapes | tensors)
    low = {"kind": "low_rank", "rank": 5, "dtype": "BF16", "transposed": False}
    modules = {
        down: low | {"shape": [64, 128]}, query: low | {"shape": [64, 64]},
        up: {"kind": "kronecker", "terms": 2, "shape": [128, 64], "dtype": "BF16", "transposed": False},
    }  # fmt: skip
    (folder / "lowrank.json").write_text(json.dumps({"schema": "tersor.lowrank/1", "modules": modules}))
    found = rules(PlanModel(Checkpoint(folder)))
    assert found[f"{down}.lr_a"].dim is None and boxes(found[f"{down}.lr_b"], 2, 1) == (((0, 5), (64, 128)),)
    assert found[f"{query}.lr_b"].dim is None and boxes(found[f"{query}.lr_a"], 2, 1) == (((32, 64), (0, 5)),)
    assert found[f"{up}.kron_c"].dim is None and boxes(found[f"{up}.kron_b"], 2, 1) == (((0, 2), (4, 8), (0, 4)),)
    assert divides(found[f"{up}.kron_b"], 16)  # eight runs of sixteen rows


class Tiled(Checkpoint):
    """As `formats.sparse.view` shows a checkpoint whose down_proj is packed in blocks of 32 by 64."""

    @property
    def packed(self):
        name = f"{LAYER}mlp.down_proj.weight"
        return {name: Packed(name, "block", "BF16", (64, 128), 64, 128, 16, 1, tile=(32, 64))}


def test_tiles_of_sparse_tensors_stay_whole(tmp_path):
    model = PlanModel(Tiled(write_model(tmp_path / "m", TINY_LLAMA, llama_shapes(TINY_LLAMA))))
    rule = rules(model)[f"{LAYER}mlp.down_proj.weight"]
    assert boxes(rule, 2, 1) == (((0, 64), (64, 128)),)
    assert divides(rule, 4) and legal(legal_tp(model)) == [1, 2]


def fused(folder, family: str, **settings) -> PlanModel:
    """Four heads of 16, queries, keys and values in one matrix `[192, 64]`."""
    config = {
        "model_type": family, "architectures": ["XForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 512, "intermediate_size": 96,
    } | settings  # fmt: skip
    block = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (512, 64),
        f"{block}.attention.query_key_value.weight": (192, 64), f"{block}.attention.query_key_value.bias": (192,),
        f"{block}.attention.dense.weight": (64, 64), f"{block}.attention.dense.bias": (64,),
        f"{block}.mlp.dense_h_to_4h.weight": (96, 64), f"{block}.mlp.dense_4h_to_h.weight": (64, 96),
    }  # fmt: skip
    return of(folder, config, shapes)


@pytest.mark.parametrize(
    ("family", "runs"),
    [
        ("gpt_neox", [(96, 192)]),
        ("bloom", [(96, 192)]),
        ("chatglm", [(96, 192)]),
        ("mpt", [(32, 64), (96, 128), (160, 192)]),
    ],
)
def test_fused_queries_keys_and_values(tmp_path, family, runs):
    found = rules(fused(tmp_path / "m", family))
    for tensor in ("weight", "bias"):
        rule = found[f"{LAYER}attention.query_key_value.{tensor}"]
        assert [box[0] for box in boxes(rule, 2, 1)] == runs
    assert found[f"{LAYER}attention.dense.bias"].dim is None
    assert found[f"{LAYER}attention.dense.bias"].note == "added once, to the sum"


def test_an_unknown_layout_is_never_guessed(tmp_path):
    model = fused(tmp_path / "m", "mystery")
    found = rules(model)
    assert all(found[f"{LAYER}attention.{name}.weight"].dim is None for name in ("query_key_value", "dense"))
    assert found[f"{LAYER}mlp.dense_4h_to_h.weight"].role == "row"
    assert "how q, k and v lie in it is not known" in notes(model)[0]
    assert 3 in legal(legal_tp(model))  # the neurons alone decide


def test_a_norm_over_what_is_cut_prevents_it(tmp_path):
    shapes = llama_shapes(TINY_LLAMA)
    shapes |= {f"{LAYER}mlp.ffn_sub_norm.weight": (128,), f"{LAYER}self_attn.attn_sub_norm.weight": (64,)}
    model = of(tmp_path / "m", TINY_LLAMA, shapes)
    found = rules(model)
    assert found[f"{LAYER}mlp.up_proj.weight"].dim is found[f"{LAYER}self_attn.q_proj.weight"].dim is None
    assert found["model.layers.1.mlp.up_proj.weight"].dim == 0
    assert any("norm over all neurons" in note for note in notes(model))


def test_experts_of_one_tensor_without_a_third_dimension():
    """DBRX: w1, v1 and w2 all [experts * neurons, hidden]."""
    cuts = fused_expert_cuts(dict.fromkeys(("w1", "v1", "w2"), (48, 64)), 4, Context("dbrx", {}, 64, {}))
    assert {name: (cut.role, cut.dim, cut.rows) for name, cut in cuts.items()} == {
        "w1": ("column", 0, 12), "v1": ("column", 0, 12), "w2": ("row", 0, 12),
    }  # fmt: skip


@pytest.mark.parametrize(("family", "dim"), [("llama4", 2), ("other", 1)])
def test_square_experts_are_told_apart_by_family(family, dim):
    shapes = {
        "experts.gate_up_proj": (4, 64, 64),
        "experts.down_proj": (4, 32, 64) if family == "llama4" else (4, 64, 32),
    }
    cuts = fused_expert_cuts(shapes, 4, Context(family, {}, 64, {}))
    assert cuts["experts.gate_up_proj"].dim == dim and cuts["experts.down_proj"].dim == 3 - dim
    square = {"experts.up_proj": (4, 64, 64), "experts.down_proj": (4, 64, 64)}
    assert fused_expert_cuts(square, 4, Context(family, {}, 64, {}))["experts.up_proj"].dim == dim


def test_tied_tables_say_so(tmp_path):
    config = TINY_LLAMA | {"tie_word_embeddings": True}
    rule = rules(of(tmp_path / "m", config, llama_shapes(config)))["model.embed_tokens.weight"]
    assert rule.role == "vocab" and rule.tied


def test_nothing_to_cut(tmp_path):
    config = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 256}
    shapes = {
        "backbone.embeddings.weight": (256, 64),
        "backbone.layers.0.mixer.in_proj.weight": (280, 64), "backbone.layers.0.mixer.out_proj.weight": (64, 128),
    }  # fmt: skip
    model = of(tmp_path / "m", config, shapes)
    assert legal(legal_tp(model)) == [1] and "every rank would hold all" in legal_tp(model)[2]
    assert "mixer of the sequence" in notes(model)[0]


def test_published_plans_are_read_without_torch():
    assert published_plan("llama")["layers.*.mlp.down_proj"] == "rowwise"
    assert published_plan("qwen3_5_moe_text")["layers.*.self_attn.o_proj"] == "rowwise"
    assert published_plan("no-such-model") == published_plan("../llama") == published_plan("") == {}
    code = "import sys, tersor.ops.plan_parallel.transform.legality as l, tersor.ops.plan_parallel.dependencies.collectives\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

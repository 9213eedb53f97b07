"""Experts in another order: the same function, byte by byte the same tensors, whatever the family stores."""

from __future__ import annotations

import json
import random
from pathlib import Path

import header_models as models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.experts.permute import Permuted, check_order, mixtures, router_groups
from tersor.ops.plan_parallel.model import PlanModel
from tiny_models import BASE, MOE, byte_tokenizer

DEEPSEEK = BASE | MOE | {
    "num_hidden_layers": 3, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
GPT_OSS = BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "pad_token_id": 0}
OTHERS = {
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
}


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """folder(name) -> a tiny model with experts, in float32."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in OTHERS:
            return family(name, "float32")
        if name not in made:
            import transformers

            torch.manual_seed(0)
            model_class, config_class, settings = OTHERS[name]
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.08)
            for key, buffer in model.named_buffers():
                if "correction_bias" in key:
                    torch.nn.init.normal_(buffer, std=0.05)
            made[name] = tmp_path_factory.mktemp("experts") / name
            model.save_pretrained(made[name])
            byte_tokenizer().save_pretrained(made[name])
        return made[name]

    return get


def plan_model(path: Path) -> PlanModel:
    return PlanModel(Checkpoint(path))


def any_orders(model: PlanModel, seed: int = 0) -> list[list[int]]:
    """Random ones that keep what the router groups."""
    generator, experts = random.Random(seed), model.facts.experts
    groups = router_groups(model.checkpoint.config)
    size, found = experts // groups, []
    for _ in mixtures(model):
        order = []
        for group in generator.sample(range(groups), groups):
            order += generator.sample(range(group * size, (group + 1) * size), size)
        found.append(order)
    return found


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek", "gpt-oss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_stays(folder, tmp_path, name):
    model = plan_model(folder(name))
    orders = any_orders(model)
    assert any(order != sorted(order) for order in orders)
    Permuted(model, orders).write(tmp_path / "out")
    before, after = logits(folder(name)), logits(tmp_path / "out")
    assert (before - after).abs().max() <= 2e-6 * before.abs().max()
    changed = {
        key for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if not torch.equal(tensor, load_file(folder(name) / "model.safetensors")[key])
    }  # fmt: skip
    assert changed and all("expert" in key or "gate" in key or "router" in key for key in changed)


@pytest.mark.parametrize("name", ["deepseek", "gpt-oss", "mixtral"])
def test_leaving_the_router_behind_changes_the_function(folder, tmp_path, name):
    """The comparison above can fail."""
    model = plan_model(folder(name))
    permuted = Permuted(model, any_orders(model))
    for mixture in permuted.mixtures:
        for key in mixture.router:
            del permuted.moved[key]
    permuted.write(tmp_path / "out")
    before, after = logits(folder(name)), logits(tmp_path / "out")
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_back_gives_the_same_bytes(folder, tmp_path, name):
    model = plan_model(folder(name))
    orders = any_orders(model, 3)
    Permuted(model, orders).write(tmp_path / "there")
    back = [[order.index(expert) for expert in range(len(order))] for order in orders]
    Permuted(plan_model(tmp_path / "there"), back).write(tmp_path / "back")
    first, last = (load_file(path / "model.safetensors") for path in (folder(name), tmp_path / "back"))
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / file).read_bytes() == (folder(name) / file).read_bytes()


def test_numbered_experts_change_their_numbers_and_the_router_its_rows(folder, tmp_path):
    model = plan_model(folder("mixtral"))
    orders = [[2, 0, 3, 1], [0, 1, 2, 3]]
    Permuted(model, orders).write(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder("mixtral"), tmp_path / "out"))
    first = mixtures(model)[0]
    weight = next(name for name in first.numbered if ".experts.0." in name)
    for position, expert in enumerate(orders[0]):
        new, old = (weight.replace(".experts.0.", f".experts.{number}.") for number in (position, expert))
        assert torch.equal(after[new], before[old])
    (router,) = first.router
    assert torch.equal(after[router], before[router][orders[0]])


def test_quantized_experts_take_codes_and_scales_along(tmp_path):
    """Packed codes, scales and zero points of numbered experts: names change, bytes do not."""
    config = models.MIXTRAL | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 128,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
        },
    }  # fmt: skip
    tensors = {}
    for name, shape in models.llama_shapes(config).items():
        if ".experts." in name:
            base = name.removesuffix(".weight")
            tensors[f"{base}.weight_packed"] = torch.randint(0, 2**31 - 1, (shape[0], shape[1] // 8), dtype=torch.int32)
            tensors[f"{base}.weight_scale"] = torch.rand(shape[0], shape[1] // 32, dtype=torch.bfloat16)
            tensors[f"{base}.weight_shape"] = torch.tensor(shape)
        else:
            tensors[name] = torch.randn(shape, dtype=torch.bfloat16)
    source = tmp_path / "q"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    Permuted(plan_model(source), [[1, 0]]).write(tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        swapped = name.replace("experts.0.", "experts.#.").replace("experts.1.", "experts.0.").replace("#", "1")
        wanted = tensor.flip(0) if "moe.gate." in name else tensors[swapped]
        assert torch.equal(after[name], wanted), name
    config["quantization_config"]["config_groups"]["group_0"]["targets"].append("re:.*experts\\.1\\.w1$")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(TersorError, match="single experts apart"):
        Permuted(plan_model(source), [[1, 0]])


def test_shards_and_their_index(folder, tmp_path):
    """Names that change between shards end up where the writer puts them; the index says so."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder("mixtral")).save_pretrained(tmp_path / "in", max_shard_size="200kB")
    model = plan_model(tmp_path / "in")
    assert len(model.checkpoint.shards) > 1
    Permuted(model, any_orders(model)).write(tmp_path / "out")
    assert (logits(tmp_path / "in") - logits(tmp_path / "out")).abs().max() < 1e-5


def test_published_headers(tmp_path):
    config = models.DEEPSEEK_V3 | {"num_hidden_layers": 4, "n_group": 8, "topk_group": 4}
    shapes = models.deepseek_shapes(config)
    shapes |= {
        "model.layers.4.mlp.experts.0.up_proj.weight": (2048, 7168),
        "model.layers.4.mlp.gate.weight": (256, 7168),
    }
    model = plan_model(models.write_model(tmp_path / "v3", config, shapes))
    (mixture,) = mixtures(model)  # three dense blocks before it, a draft layer behind
    assert (mixture.block, mixture.module) == (3, "model.layers.3.mlp.experts")
    assert len(mixture.numbered) == 768 and not mixture.stacked
    assert {name.rpartition(".")[2] for name in mixture.router} == {"weight", "e_score_correction_bias"}
    assert router_groups(config) == 8 and router_groups(models.MIXTRAL) == 1
    assert router_groups({"n_group": 8, "topk_group": 8}) == 1  # all groups are taken: none is chosen
    order = list(range(256))
    order[0], order[32] = order[32], order[0]
    with pytest.raises(TersorError, match="positions 0 to 31 would hold experts of 2 groups"):
        Permuted(model, [order])
    permuted = Permuted(model, [[*range(32, 64), *range(32), *range(64, 256)]])
    assert (
        permuted.source["model.layers.3.mlp.experts.0.up_proj.weight"] == "model.layers.3.mlp.experts.32.up_proj.weight"
    )
    assert (
        permuted.source["model.layers.4.mlp.experts.0.up_proj.weight"] == "model.layers.4.mlp.experts.0.up_proj.weight"
    )
    gate = model.checkpoint.tensors["model.layers.3.mlp.gate.weight"]
    assert permuted.pieces(gate.name)[0] == (gate.offset + 32 * 7168 * 2, 7168 * 2)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"model.layers.0.block_sparse_moe.gate.weight": None}, "no router"),
        ({"model.layers.0.block_sparse_moe.experts.3.w1.weight": None,
          "model.layers.0.block_sparse_moe.experts.3.w2.weight": None,
          "model.layers.0.block_sparse_moe.experts.3.w3.weight": None}, "expert 3 is missing"),
        ({"model.layers.0.block_sparse_moe.experts.4.w1.weight": (8, 8)}, "expert 4 is one too many"),
        ({"model.layers.0.block_sparse_moe.gate.scale": (3, 8)}, "no dimension for 4 experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_reordered_is_named(tmp_path, shapes, words):
    config = models.MIXTRAL | models.TINY_LLAMA | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
    }  # fmt: skip
    given = models.llama_shapes(config) | shapes
    given = {name: shape for name, shape in given.items() if shape is not None}
    model = plan_model(models.write_model(tmp_path / "m", config, given))
    with pytest.raises(TersorError, match=words):
        mixtures(model)


def test_orders_of_another_model_are_refused(folder, tmp_path):
    model = plan_model(folder("mixtral"))
    with pytest.raises(TersorError, match="orders for 1 mixtures of experts, the model has 2"):
        Permuted(model, [[0, 1, 2, 3]])
    with pytest.raises(TersorError, match="no permutation of 4"):
        Permuted(model, [[0, 1, 2, 2], [0, 1, 2, 3]])
    with pytest.raises(TersorError, match="has no experts"):
        mixtures(plan_model(folder("llama")))
    check_order("x", [2, 3, 0, 1], 4, 2)


def test_a_table_that_routes_tokens_is_refused(tmp_path):
    config = models.MIXTRAL | models.TINY_LLAMA | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
    }  # fmt: skip
    layout = {name: ("BF16", shape) for name, shape in models.llama_shapes(config).items()}
    layout["model.layers.0.block_sparse_moe.gate.table"] = ("I64", (4, 8))
    with pytest.raises(TersorError, match="by a table"):
        mixtures(plan_model(models.write_layout(tmp_path / "m", config, layout)))


def test_the_header_says_what_the_source_said(folder, tmp_path):
    Permuted(plan_model(folder("mixtral")), [[3, 2, 1, 0]] * 2).write(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.partial"))

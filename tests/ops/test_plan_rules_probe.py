"""Rules against the models' own code: what belongs to one head or one neuron has to lie on one rank, and ranks that run
their share with nothing but their shards have to add up to the whole. Weights are random, layouts are the families' own."""

from __future__ import annotations

import warnings

import pytest
import torch
from tersor.formats import compressed_tensors, encodings, gptq
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.scheme import Scheme
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.units import find_units
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.transform.parts import Part, _compressed_tensors, _gptq
from tersor.ops.plan_parallel.transform.rules import divides, rules
from tersor.ops.plan_parallel.transform.segments import Rule, boxes
from tersor.ops.plan_parallel.transform.tp_plan import published_plan
from tiny_models import BASE, FAMILIES, GPT2, IMAGE_FAMILIES, NO_KV, byte_tokenizer

SMALL = {"vocab_size": 256, "hidden_size": 64}
FALCON = {key: value for key, value in NO_KV.items() if key != "intermediate_size"}
# family -> (model class, config class, config), besides those of tests/tiny_models.py: fused layers of every kind
FUSED = {
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NO_KV),
    "bloom": ("BloomForCausalLM", "BloomConfig", SMALL | {"n_layer": 2, "n_head": 4}),
    "falcon-40b": ("FalconForCausalLM", "FalconConfig", FALCON | {
        "new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}),
    "falcon-rw": ("FalconForCausalLM", "FalconConfig", FALCON | {"multi_query": False}),
    "starcoder": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    "bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2 | {"multi_query": False}),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", NO_KV),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT2 | {"rotary_dim": 8}),
    "glm": ("GlmForCausalLM", "GlmConfig", BASE | {"head_dim": 16, "pad_token_id": 0}),
    "granite-shared": ("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", BASE | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}),
    "cohere": ("CohereForCausalLM", "CohereConfig", BASE | {"use_qk_norm": True}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", BASE | {"use_qkv_bias": True, "qk_layernorm": True}),
}  # fmt: skip
LATENT = BASE | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1,
}  # fmt: skip
GROWN = {
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", BASE | {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", BASE | {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", BASE | {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
PROBED = {
    name: FAMILIES[name] for name in ("llama-bias", "gemma", "gpt2", "opt", "phi3", "falcon", "bert", "qwen2-moe")
}
PROBED |= {"vit": IMAGE_FAMILIES["vit"]} | FUSED
UNSEPARABLE = {"starcoder", "falcon"}  # one head of keys ties all heads together; the neurons are still proven


def built(classes: tuple[str, str, dict], dtype=torch.float32, **changes):
    import transformers

    model_class, config_class, settings = classes
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, config_class)(**settings | {"num_hidden_layers": 2} | changes)
        model = getattr(transformers, model_class)(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 0.02)
        if "norm" in name or "ln_" in name:
            parameter.data += 1
    return model.to(dtype).eval()


def saved(classes, folder):
    built(classes, torch.bfloat16).save_pretrained(folder)
    if "ViT" not in classes[0]:
        byte_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


def owners(rule: Rule, n: int) -> list[set[int]]:
    found = [set() for _ in range(rule.shape[rule.dim])]
    for rank in range(n):
        for box in boxes(rule, n, rank):
            for place in range(*box[rule.dim]):
                found[place].add(rank)
    return found


@pytest.mark.parametrize("name", PROBED)
def test_heads_and_neurons_lie_on_one_rank(name, tmp_path):
    """The units that a probe of the running model finds, whatever layout the family gave them."""
    checkpoint = saved(PROBED[name], tmp_path / "m")
    found = rules(PlanModel(checkpoint))
    skeleton = Skeleton(DenseView(checkpoint), torch.device("cpu"))
    for kind in ("neurons",) if name in UNSEPARABLE else ("neurons", "heads"):
        checked = 0
        for units in find_units(checkpoint, skeleton, kind)[:3]:
            touched = {slot.name: found[slot.name] for slot in units.slots}
            assert {slot.name: slot.axis for slot in units.slots} == {key: rule.dim for key, rule in touched.items()}
            for n in (2, 4, 8):
                if any(divides(rule, n) for rule in touched.values()):
                    continue
                held = {key: owners(rule, n) for key, rule in touched.items()}
                for unit in range(units.count):
                    ranks = {
                        frozenset().union(*(held[slot.name][place] for place in slot.index[unit].tolist()))
                        for slot in units.slots
                    }
                    assert len(ranks) == 1, f"{units.module} unit {unit} with {n} ranks: {ranks}"
                    assert n > units.count or len(next(iter(ranks))) == 1
                    checked += 1
        assert checked


def shard(rule: Rule, tensor: torch.Tensor, n: int, rank: int, ep: int = 1, ep_rank: int = 0) -> torch.Tensor:
    """As a runtime holds it: the boxes joined along the dimension that is cut."""
    pieces = [tensor[tuple(slice(*run) for run in box)] for box in boxes(rule, n, rank, ep, ep_rank)]
    return torch.cat(pieces, dim=rule.dim if len(pieces) > 1 else 0) if pieces else tensor[:0]


def loaded(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """`module` with the tensors under `prefix`; all have to fit."""
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    module.load_state_dict(mine, strict=True)
    return module


def shards_of(model, folder, n: int) -> list[dict[str, torch.Tensor]]:
    """The state dict of each rank. Biases of row-parallel layers are added once: rank 0 keeps them."""
    model.save_pretrained(folder)
    found, state = rules(PlanModel(Checkpoint(folder))), Checkpoint(folder)
    ranks = []
    for rank in range(n):
        held = {name: shard(rule, state.read(name), n, rank) for name, rule in found.items()}
        for name, rule in found.items():
            if "bias" in name and rule.note.startswith("added once") and rank:
                held[name] = torch.zeros_like(held[name])
            if name.endswith("down_proj_bias") and rank:
                held[name] = torch.zeros_like(held[name])
        ranks.append(held)
    return ranks


def rotary(model, width: int, length: int):
    angles = torch.randn(1, length, width, generator=torch.Generator().manual_seed(3))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("n", [2, 4])
def test_latent_attention_adds_up(n, tmp_path):
    classes = GROWN["deepseek_v3"]
    model = built(classes)
    x, positions = torch.randn(1, 6, 64), rotary(model, 8, 6)
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    whole = model.model.layers[0].self_attn(x, positions, mask)[0]
    total = torch.zeros_like(whole)
    for state in shards_of(model, tmp_path / "m", n):
        small = built(classes, num_attention_heads=4 // n, num_key_value_heads=4 // n)
        part = loaded(small.model.layers[0].self_attn, state, "model.layers.0.self_attn.")
        total += part(x, positions, mask)[0]
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "key"), [("gpt_oss", "intermediate_size"), ("llama4", "intermediate_size")])
def test_fused_experts_add_up(name, key, tmp_path):
    """Experts of one tensor [experts, in, out], gate and up interleaved or one after the other, cut over two ranks."""
    model = built(GROWN[name])
    experts = next(module for path, module in model.named_modules() if path.endswith("layers.1.mlp.experts")
                   or path.endswith("layers.1.feed_forward.experts"))  # fmt: skip
    path = next(path for path, module in model.named_modules() if module is experts)
    tokens = torch.randn(4 * 5, 64)
    routed = (tokens,) if name == "llama4" else (tokens, torch.randint(0, 4, (20, 2)), torch.rand(20, 2))
    whole = experts(*routed)
    total = torch.zeros_like(whole)
    for state in shards_of(model, tmp_path / "m", 2):
        small = built(GROWN[name], **{key: BASE["intermediate_size"] // 2})
        total += loaded(small.get_submodule(path), state, f"{path}.")(*routed)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_experts_of_three_dimensions_are_understood(tmp_path):
    found = rules(PlanModel(saved(GROWN["granitemoe"], tmp_path / "m")))
    first, last = (found[f"model.layers.0.block_sparse_moe.{name}_linear.weight"] for name in ("input", "output"))
    assert (first.dim, last.dim, first.experts) == (1, 2, 4)
    assert [(segment.start, segment.stop) for segment in first.segments] == [(0, 96), (96, 192)]


def test_norms_over_all_heads_are_gathered_for(tmp_path):
    found = rules(PlanModel(saved(GROWN["minimax_m2"], tmp_path / "m")))
    norm = found["model.layers.0.self_attn.q_norm.weight"]
    assert norm.dim is None and "gathered" in norm.note
    assert found["model.layers.0.self_attn.q_proj.weight"].role == "column"


@pytest.mark.parametrize("name", [*FAMILIES, "vit"])
def test_every_tensor_has_a_rule_and_agrees_with_the_published_plan(name, family):
    model = PlanModel(Checkpoint(family(name)))
    found = rules(model)
    assert list(found) == list(model.checkpoint.tensors)
    assert any(rule.role == "row" for rule in found.values())
    for rule in found.values():
        for n in (1, 2):
            held = [boxes(rule, n, rank) for rank in range(n)]
            assert held[0] or rule.role == "vocab"
    block = f"{model.facts.block_prefix}.0."
    for pattern, style in published_plan(model.facts.family).items():
        weight = found.get(f"{block}{pattern.removeprefix('layers.*.')}.weight")
        if weight is not None and style in ("colwise", "rowwise"):
            assert weight.role == {"colwise": "column", "rowwise": "row"}[style], pattern


ENCODED = [
    (compressed_tensors, Scheme(4, "int", False, "group", 32)),
    (compressed_tensors, Scheme(3, "int", True, "group", 32)),
    (compressed_tensors, Scheme(8, "int", True, "channel", activations="int8")),
    (gptq, Scheme(4, "int", False, "group", 32)),
]


@pytest.mark.parametrize(("encoding", "scheme"), ENCODED, ids=lambda value: getattr(value, "__name__", "")[-7:] or None)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_codes_are_shards_of_the_weight(encoding, scheme, dim, tmp_path):
    """What the parts of a rank decode to is the rank's part of what all of them decode to."""
    out, inputs, n = 64, 128, 2
    generator = torch.Generator().manual_seed(0)
    half = 2 ** (scheme.bits - 1)
    codes = torch.randint(-half, half, (out, inputs), generator=generator, dtype=torch.int8)
    zeros = None if scheme.symmetric else torch.randint(1 - half, half, (out, scheme.groups(inputs)), dtype=torch.int8)
    scale = torch.rand(out, scheme.groups(inputs), generator=generator).half() + 0.1
    stored = encoding.encode("m", encodings.QuantizedWeight(codes, scale, zeros), scheme)
    whole = encodings.dequantize(encoding.decode("m", stored.__getitem__, stored, scheme), scheme)
    axes = _gptq("m", scheme, False) if encoding is gptq else _compressed_tensors("m", scheme, stored)
    for rank in range(n):
        mine = {}
        for name, tensor in stored.items():
            along = Part(name, axes[name]).axes.get(dim)
            if along is None:
                mine[name] = tensor
                continue
            extent = (out, inputs)[dim]
            low, high = (along.place(extent * place // n) for place in (rank, rank + 1))
            assert along.fits(extent // n)
            mine[name] = tensor.narrow(along.dim, low, high - low).contiguous()
        expected = whole.chunk(n, dim)[rank]
        if "m.weight_shape" in mine:
            mine["m.weight_shape"] = torch.tensor(expected.shape)
        if "m.g_idx" in mine:
            mine["m.g_idx"] = mine["m.g_idx"] - mine["m.g_idx"].min()
        assert torch.equal(encodings.dequantize(encoding.decode("m", mine.__getitem__, mine, scheme), scheme), expected)

"""The model as Megatron-LM's arguments: sizes from the checkpoint's config, and the switches of its family.

Families that Megatron-LM builds from arguments alone are those of GPT-2 and of Llama: RMSNorm, rotary positions, gated
products, with experts and latent attention. For others the sizes are given and a note says what is left to do.
"""

from __future__ import annotations

from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

LLAMA_LIKE = {
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe",
}  # fmt: skip


def model_options(model: PlanModel, workload: Workload) -> tuple[dict[str, object], list[str]]:
    """Options by name, and notes."""
    config, facts = model.checkpoint.config, model.facts
    attention = facts.attends[0] if facts.attends else None
    longest = max(facts.context or 0, workload.seq_len)
    options: dict[str, object] = {
        "num-layers": facts.layers,
        "hidden-size": facts.hidden,
        "num-attention-heads": attention.heads if attention else config.get("num_attention_heads", 1),
        "seq-length": workload.seq_len,
        "max-position-embeddings": longest,
    }
    if width := _first(config, "intermediate_size", "ffn_dim", "n_inner"):
        options["ffn-hidden-size"] = width
    if attention and attention.latent is None:
        if attention.key_dim * attention.heads != facts.hidden:
            options["kv-channels"] = attention.key_dim
        if attention.kv_heads != attention.heads:
            options |= {"group-query-attention": True, "num-query-groups": attention.kv_heads}
    if not facts.tied:
        options["untie-embeddings-and-output-weights"] = True
    notes = []
    if facts.vocab:
        options["vocab-size"] = facts.vocab
    if facts.family in LLAMA_LIKE:
        options |= _llama(model)
    elif facts.family == "gpt2":
        options |= {
            "position-embedding-type": "learned_absolute",
            "normalization": "LayerNorm",
            "make-vocab-size-divisible-by": 1,
        }
    else:
        notes.append(
            f"MODEL_ARGS has the sizes of {facts.architecture}; its activation, norms and positions are left to you, "
            "for Megatron-LM does not build this family from arguments alone."
        )
    if facts.experts:
        options |= _experts(model)
    if attention and attention.latent:
        options |= _latent(config)
    return options, notes


def _first(config: dict, *keys: str) -> object:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _llama(model: PlanModel) -> dict[str, object]:
    config = model.checkpoint.config
    rope = next((config[key] for key in ("rope_parameters", "rope_scaling") if isinstance(config.get(key), dict)), {})
    options: dict[str, object] = {
        "position-embedding-type": "rope",
        "rotary-base": int(config.get("rope_theta") or rope.get("rope_theta") or 10000),
        "normalization": "RMSNorm",
        "norm-epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "disable-bias-linear": True,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    if (rope.get("rope_type") or rope.get("type")) == "llama3":
        options |= {"use-rope-scaling": True, "rope-scaling-factor": rope.get("factor", 8.0)}
    names = {weight.place.rest for weight in model.stored.values() if weight.place is not None}
    if "self_attn.q_proj.bias" in names:
        options["add-qkv-bias"] = True
    if any(name.endswith(("q_norm.weight", "q_a_layernorm.weight")) for name in names):
        options["qk-layernorm"] = True
    return options


def _experts(model: PlanModel) -> dict[str, object]:
    config, facts = model.checkpoint.config, model.facts
    options: dict[str, object] = {
        "num-experts": facts.experts,
        "moe-router-topk": facts.experts_per_token,
        "moe-grouped-gemm": True,
        "moe-token-dispatcher-type": "alltoall",
    }
    if width := config.get("moe_intermediate_size"):
        options["moe-ffn-hidden-size"] = width
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * (width or 0)
    if shared:
        options["moe-shared-expert-intermediate-size"] = shared
    dense = config.get("first_k_dense_replace") or 0
    if dense:
        options["moe-layer-freq"] = f"([0]*{dense}+[1]*{facts.layers - dense})"
    if config.get("scoring_func") == "sigmoid" or facts.family == "deepseek_v3":
        options |= {"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True}
    if (config.get("n_group") or 1) > 1:
        options |= {"moe-router-num-groups": config["n_group"], "moe-router-group-topk": config.get("topk_group", 1)}
    if config.get("routed_scaling_factor"):
        options["moe-router-topk-scaling-factor"] = config["routed_scaling_factor"]
    return options


def _latent(config: dict) -> dict[str, object]:
    options: dict[str, object] = {
        "multi-latent-attention": True,
        "kv-lora-rank": config["kv_lora_rank"],
        "qk-head-dim": config["qk_nope_head_dim"],
        "qk-pos-emb-head-dim": config["qk_rope_head_dim"],
        "v-head-dim": config["v_head_dim"],
    }
    if config.get("q_lora_rank"):
        options["q-lora-rank"] = config["q_lora_rank"]
    return options

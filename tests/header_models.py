"""Published models as headers only: real names and shapes, real config.json, data that takes no room on disk.

A file's data is a hole (`truncate`), so that hundreds of gigabytes cost kilobytes. Shapes are those of the checkpoints
on the Hub, as far as prediction needs them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tersor.formats.header import build_header, tensor_bytes

Shapes = dict[str, tuple[int, ...]]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
TINY_LLAMA = LLAMA_8B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
LLAMA_405B = LLAMA_8B | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip
MIXTRAL = LLAMA_8B | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": None, "max_position_embeddings": 32768,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
# As on the Hub: what Gemma3TextConfig fills in by itself is not in the file.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "sliding_window": 1024, "max_position_embeddings": 131072,
    },
}  # fmt: skip
GEMMA3_27B = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504,
    "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
    "sliding_window_pattern": 6, "vocab_size": 262208, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip


def llama_shapes(config: dict) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= grouped_attention(f"model.layers.{layer}", config)
        if config.get("num_local_experts"):
            moe = f"model.layers.{layer}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                for name, shape in (("w1", (wide, hidden)), ("w2", (hidden, wide)), ("w3", (wide, hidden))):
                    shapes[f"{moe}.experts.{expert}.{name}.weight"] = shape
        else:
            shapes |= gated_mlp(f"model.layers.{layer}.mlp", hidden, wide)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def gated_mlp(module: str, hidden: int, wide: int) -> Shapes:
    return {
        f"{module}.gate_proj.weight": (wide, hidden),
        f"{module}.up_proj.weight": (wide, hidden),
        f"{module}.down_proj.weight": (hidden, wide),
    }


def grouped_attention(layer: str, config: dict) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head_dim
    return {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (heads * head_dim, hidden),
        f"{layer}.self_attn.k_proj.weight": (kv, hidden),
        f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim),
    }


def deepseek_shapes(config: dict) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank, query_rank, wide = config["kv_lora_rank"], config["q_lora_rank"], config["moe_intermediate_size"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_a_proj.weight": (query_rank, hidden),
            f"{block}.self_attn.q_a_layernorm.weight": (query_rank,),
            f"{block}.self_attn.q_b_proj.weight": (heads * (nope + rotary), query_rank),
            f"{block}.self_attn.kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
            f"{block}.self_attn.kv_a_layernorm.weight": (rank,),
            f"{block}.self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
            f"{block}.self_attn.o_proj.weight": (hidden, heads * value),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= gated_mlp(f"{block}.mlp", hidden, config["intermediate_size"])
            continue
        shapes[f"{block}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        shapes[f"{block}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        shapes |= gated_mlp(f"{block}.mlp.shared_experts", hidden, config["n_shared_experts"] * wide)
        for expert in range(config["n_routed_experts"]):
            shapes |= gated_mlp(f"{block}.mlp.experts.{expert}", hidden, wide)
    return shapes


def gemma3_shapes(config: dict, prefix: str = "model") -> Shapes:
    shapes: Shapes = {
        f"{prefix}.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        f"{prefix}.norm.weight": (config["hidden_size"],),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"{prefix}.layers.{layer}"
        shapes |= grouped_attention(block, config)
        shapes |= {f"{block}.self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
        for name in ("pre", "post"):
            shapes[f"{block}.{name}_feedforward_layernorm.weight"] = (config["hidden_size"],)
        shapes |= gated_mlp(f"{block}.mlp", config["hidden_size"], config["intermediate_size"])
    return shapes


def gemma3_4b_shapes() -> Shapes:
    """With the prefix of the multimodal checkpoint, and one layer of its vision tower."""
    text = GEMMA3_4B["text_config"] | {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
    }  # fmt: skip
    tower = "vision_tower.vision_model.encoder.layers.0"
    return gemma3_shapes(text, "language_model.model") | {
        f"{tower}.self_attn.q_proj.weight": (1152, 1152),
        f"{tower}.mlp.fc1.weight": (4304, 1152),
        "multi_modal_projector.mm_input_projection_weight": (1152, 2560),
    }


def write_model(
    folder: Path, config: dict | None, shapes: Shapes, dtype: str = "BF16", shard_bytes: int | None = None
) -> Path:
    """A checkpoint of these tensors whose data is a hole, cut into shards of about `shard_bytes`."""
    return write_layout(folder, config, {name: (dtype, shape) for name, shape in shapes.items()}, shard_bytes)


def write_layout(
    folder: Path, config: dict | None, layout: dict[str, tuple[str, tuple[int, ...]]], shard_bytes: int | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    shards = list(_split(layout, shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, _ = build_header(shard)
        path = folder / name
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(tensor_bytes(*entry) for entry in shard.values()))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _split(layout: dict, shard_bytes: int | None) -> Iterator[dict]:
    shard, filled = {}, 0
    for name, entry in layout.items():
        nbytes = tensor_bytes(*entry)
        if shard and shard_bytes is not None and filled + nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = entry
        filled += nbytes
    yield shard

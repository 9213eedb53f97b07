"""Tiny seeded models of many families, with a byte-level tokenizer, built from configs."""

from __future__ import annotations

from pathlib import Path

VOCAB = 256
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {"vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 128, "word_embed_proj_dim": 64}  # fmt: skip
NO_KV = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
VIT = BERT | {"image_size": 16, "patch_size": 8, "num_labels": 5}
del VIT["vocab_size"]

# family -> (model class, config class, config)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", BASE),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", BASE | {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", BASE | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", BASE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", BASE | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", BASE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", BASE | {"head_dim": 16}),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", BASE | {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "phi": ("PhiForCausalLM", "PhiConfig", NO_KV),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", BASE | {"pad_token_id": 0}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {k: v for k, v in NO_KV.items() if k != "intermediate_size"}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", BASE | MOE | {"head_dim": 16, "num_experts": 6}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", BASE | MOE | {"num_experts": 6, "shared_expert_intermediate_size": 48},
    ),
    "bert": ("BertModel", "BertConfig", BERT),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"max_position_embeddings": 130}),
}  # fmt: skip

# These read images, so that no calibration text can pass through them.
IMAGE_FAMILIES = {"vit": ("ViTForImageClassification", "ViTConfig", VIT)}


def build(family: str, folder: Path, dtype: str = "bfloat16", **changes) -> Path:
    """Save a tiny model of `family` with a tokenizer and return its folder."""
    import torch
    import transformers

    model_class, config_class, settings = (FAMILIES | IMAGE_FAMILIES)[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings | changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer():
    """One token per byte: any text, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

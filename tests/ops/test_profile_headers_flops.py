"""FLOPs from headers against torch.utils.flop_counter on transformers' own models.

The counter counts matrix products alone, all pairs of query and key whether masked or not, and the head on every token;
`square` and `all_logits` say the same here. What it sees in rotary embeddings (positions times frequencies, as a
product) is taken off: that is not a layer of the model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.facts import facts
from tersor.ops.model.operators import Attend, Linear, Pass, operators, total_flops
from tersor.ops.model.stored import stored_weights
from torch.utils.flop_counter import FlopCounterMode

BATCH, TOKENS = 3, 12
DEEPSEEK = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "max_position_embeddings": 128,
}  # fmt: skip


def counted(folder: Path, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs that torch sees in one forward pass, products in rotary embeddings left out."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    if getattr(config, "num_experts_per_tok", None):
        model.set_experts_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(**inputs)
    rotary = {name: counts for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")}
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in rotary.values())


def predicted(folder: Path, run: Pass) -> float:
    checkpoint = Checkpoint(folder)
    weights = stored_weights(checkpoint)
    return total_flops(operators(facts(checkpoint, weights), weights), run)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}), ("llama-tied", {}), ("qwen2", {}), ("gemma3", {}), ("gpt2", {}), ("opt", {"word_embed_proj_dim": 32}),
        ("phi", {}), ("phi3", {}), ("falcon", {}), ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("mixtral", {}), ("qwen3-moe", {}), ("qwen2-moe", {}), ("bert", {}), ("bert-mlm", {}), ("roberta", {}),
    ],
)  # fmt: skip
def test_text_models(family, name, changes):
    folder = family(name, **changes)
    ids = torch.arange(5, 5 + BATCH * TOKENS).reshape(BATCH, TOKENS)
    run = Pass(BATCH, TOKENS, square=True, all_logits=True)
    assert predicted(folder, run) == counted(folder, {"input_ids": ids})


def test_image_models(family):
    folder = family("vit")
    run = Pass(BATCH, (16 // 8) ** 2 + 1, square=True)
    assert predicted(folder, run) == counted(folder, {"pixel_values": torch.zeros(BATCH, 3, 16, 16)})


@pytest.mark.parametrize("query_rank", [24, None])
def test_latent_attention(tmp_path, query_rank):
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**DEEPSEEK | {"q_lora_rank": query_rank})
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)
    run = Pass(BATCH, TOKENS, square=True, all_logits=True)
    assert predicted(tmp_path, run) == counted(tmp_path, {"input_ids": ids})


def test_a_step_with_a_cache(family):
    """One token after a cache: its query meets all of it."""
    folder = family("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = torch.arange(5, 5 + BATCH * TOKENS).reshape(BATCH, TOKENS)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with counter:
            model(input_ids=ids[:, :1], past_key_values=cache)
    rotary = sum(sum(c.values()) for name, c in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    assert predicted(folder, Pass(BATCH, 1, past=TOKENS)) == counter.get_total_flops() - rotary


def test_the_causal_mask_and_the_window_leave_out_pairs(family):
    """Not `square`: counted one by one on the masks that the model itself makes."""
    folder = family("gemma3")
    checkpoint = Checkpoint(folder)
    weights = stored_weights(checkpoint)
    run = Pass(1, 20)
    for operator in operators(facts(checkpoint, weights), weights):
        if isinstance(operator, Attend):
            window = operator.attention.window or 20
            mask = torch.ones(20, 20).tril().triu(1 - window)
            assert operator.pairs(run) == int(mask.sum())
            assert operator.count == (6 if operator.attention.window else 1)


def test_a_pooler_runs_once_a_sequence(family):
    checkpoint = Checkpoint(family("bert"))
    weights = stored_weights(checkpoint)
    found = {op.name: op for op in operators(facts(checkpoint, weights), weights) if isinstance(op, Linear)}
    assert found["pooler.dense"].flops(Pass(5, 100)) == 2 * 5 * 64 * 64


def test_encoders_with_windows_and_narrow_embeddings(tmp_path):
    """ModernBERT's windows look both ways; Electra's embeddings are widened by a linear layer."""
    common = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    modern = transformers.ModernBertConfig(**common, num_hidden_layers=4, local_attention=8)
    electra = transformers.ElectraConfig(**common, num_hidden_layers=2, embedding_size=32)
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)
    for name, model in (("m", transformers.ModernBertModel(modern)), ("e", transformers.ElectraModel(electra))):
        model.save_pretrained(tmp_path / name)
        whole = predicted(tmp_path / name, Pass(BATCH, TOKENS, square=True))
        assert whole == counted(tmp_path / name, {"input_ids": ids})
    assert predicted(tmp_path / "e", Pass(BATCH, TOKENS)) == whole
    assert predicted(tmp_path / "m", Pass(BATCH, TOKENS)) < predicted(tmp_path / "m", Pass(BATCH, TOKENS, square=True))

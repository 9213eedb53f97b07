"""What autograd keeps of a block: counted at short lengths, true at others."""

from __future__ import annotations

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.activations import count_saved, saved_bytes, training_block
from tersor.ops.model.bare import BareModel

MIB = 2**20


def llama_2_7b():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip


def test_a_layer_of_llama_2_7b_keeps_365_mib_at_2048_tokens():
    (entry,) = saved_bytes(llama_2_7b(), 2048, lengths=(8, 16, 24)).values()
    assert entry["saved_bytes"] == pytest.approx(365 * MIB, rel=0.05)
    assert entry["squared_bytes"] == 0
    assert entry["layers"] == list(range(32))
    assert entry["input_bytes"] == 2048 * 4096 * 2


def test_eager_attention_keeps_scores(family):
    checkpoint = Checkpoint(family("llama"))
    (sdpa,) = saved_bytes(checkpoint, 2048).values()
    (eager,) = saved_bytes(checkpoint, 2048, attention="eager").values()
    heads = checkpoint.config["num_attention_heads"]
    # Scores of the softmax in float32 (4 bytes), and as they multiply the values, in bfloat16 (2).
    assert eager["per_token_squared_bytes"] == heads * (4 + 2)
    assert sdpa["per_token_squared_bytes"] == 0
    assert eager["squared_bytes"] == 2048**2 * heads * 6
    assert (sdpa["attention"], eager["attention"]) == ("sdpa", "eager")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "gemma3", "qwen2-moe", "vit"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_fit_is_what_is_counted_at_other_lengths(name, attention, family):
    checkpoint = Checkpoint(family(name))
    predicted = saved_bytes(checkpoint, 100, attention=attention)
    bare = BareModel(checkpoint, torch.device("cpu"), torch.bfloat16, attention)
    assert [kind.name for kind in bare.kinds()] == list(predicted)
    for kind in bare.kinds():
        index = kind.layers[-1]  # not the one that was counted, where there are several
        with training_block(bare, index) as block:
            counted = count_saved(bare, block, index, 100)
        assert predicted[kind.name]["saved_bytes"] == pytest.approx(counted, rel=0.01)
        assert predicted[kind.name]["fit_error"] < 0.01


def test_kinds_tell_sliding_from_full_attention(family):
    found = saved_bytes(Checkpoint(family("gemma3")), 64)
    assert {name: entry["layers"] for name, entry in found.items()} == {
        "Gemma3DecoderLayer (sliding attention)": [0, 1, 2, 3, 4, 6],
        "Gemma3DecoderLayer (full attention)": [5],
    }


def test_batch_multiplies(family):
    checkpoint = Checkpoint(family("llama"))
    (one,), (four,) = (saved_bytes(checkpoint, 64, batch=batch).values() for batch in (1, 4))
    assert four["saved_bytes"] == 4 * one["saved_bytes"]
    assert four["input_bytes"] == 4 * one["input_bytes"]


def test_lengths_stay_within_the_context(family):
    (entry,) = saved_bytes(Checkpoint(family("gpt2", n_positions=32)), 32).values()
    assert max(length for length, _ in entry["measured"]) == 32


def test_dropout_counts_a_byte_per_number(family):
    """As on a GPU; the mask that a CPU makes is of the dtype of the activations."""
    (with_dropout,) = saved_bytes(Checkpoint(family("gpt2")), 1000).values()
    (without,) = saved_bytes(Checkpoint(family("gpt2", resid_pdrop=0.0)), 1000).values()
    hidden, dropouts = 64, 2
    assert with_dropout["saved_bytes"] - without["saved_bytes"] == 1000 * hidden * dropouts


def test_what_cannot_be_run_is_refused(family, tmp_path):
    import shutil

    with pytest.raises(TersorError, match=r"no config\.json"):
        saved_bytes(Checkpoint(family("llama") / "model.safetensors"), 64)
    copy = tmp_path / "dropped"
    shutil.copytree(family("llama"), copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", '{"drop_mlp_list": [1],', 1))
    with pytest.raises(TersorError, match="parts of some blocks were removed"):
        saved_bytes(Checkpoint(copy), 64)
    (copy / "config.json").write_text(config.replace('"llama"', '"unheard_of"'))
    with pytest.raises(TersorError, match="transformers cannot build"):
        saved_bytes(Checkpoint(copy), 64)
    from transformers import T5Config

    with pytest.raises(TersorError, match=r"an encoder-decoder \(t5\)"):
        saved_bytes(T5Config(), 64)


def test_a_block_without_room_is_refused(family, monkeypatch):
    from tersor.ops.model import bare

    monkeypatch.setattr(bare, "free_bytes", lambda device: 100)
    with pytest.raises(TersorError, match=r"model\.layers\.0 takes \d+ bytes as it is run here, 100 are free"):
        saved_bytes(Checkpoint(family("llama")), 64)

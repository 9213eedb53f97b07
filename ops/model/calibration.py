"""Token windows that a model is calibrated or evaluated on."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.text import SHIPPED, load_text


def load_tokenizer(model: Path):
    """The checkpoint's own tokenizer. Raises TersorError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or what the tokenizer library throws
        raise TersorError(
            f"{model}: no tokenizer that transformers can load ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
            "copy the tokenizer files of the original model into the folder",
        ) from error


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after a text: BOS for Llama and Gemma, [CLS] and [SEP] for BERT."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def cut_windows(tokenizer, text: str, seq_len: int) -> list[list[int]]:
    """Consecutive windows of exactly `seq_len` tokens, each framed as the tokenizer frames a text."""
    before, after = special_tokens(tokenizer)
    body = seq_len - len(before) - len(after)
    if body < 2:
        raise TersorError(f"--seq-len {seq_len} leaves no room for text", "use a longer window")
    tokens = encode(tokenizer, text)
    return [before + tokens[start : start + body] + after for start in range(0, len(tokens) - body + 1, body)]


def load_windows(model: Path, source: str | None, samples: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """`samples` windows `[samples, seq_len]` int64, drawn without replacement by `seed`, in text order.

    `source` is a text (see `load_text`), None for the shipped prose, or `self` for text sampled from the model.
    Raises TersorError when the text is shorter than asked.
    """
    tokenizer = load_tokenizer(model)
    if source == "self":
        return _sample_from_model(model, tokenizer, samples, seq_len, seed)
    windows = cut_windows(tokenizer, load_text(source), seq_len)
    if len(windows) < samples:
        raise TersorError(
            f"{source or SHIPPED} gives {len(windows)} windows of {seq_len} tokens, {samples} were asked for",
            "give a longer text, or lower --samples or --seq-len",
        )
    chosen = sorted(random.Random(seed).sample(range(len(windows)), samples))
    return torch.tensor([windows[index] for index in chosen])


def _sample_from_model(model: Path, tokenizer, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Text the model writes itself, from a random first token. Needs the whole model in memory."""
    from transformers import AutoModelForCausalLM

    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    before, _ = special_tokens(tokenizer)
    first = torch.randint(0, len(tokenizer), (samples, 1), generator=generator)
    prompt = torch.cat([torch.tensor([before], dtype=torch.long).expand(samples, -1), first], dim=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        missing = seq_len - prompt.shape[1]
        return language_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, min_new_tokens=missing,
            max_new_tokens=missing, pad_token_id=0,
        )  # fmt: skip

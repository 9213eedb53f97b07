"""What kind of model a checkpoint is, from config.json and the tensor headers alone: no torch, no transformers.

Families name the same thing differently; the aliases are in one table here. What the tensors tell better than the config
is taken from them: which layers have attention at all, and the rows of the vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.stored import Stored

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
ALIASES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"),
    "sliding_window": ("sliding_window", "window_size", "local_attention"),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"),
}
# What transformers' own config class fills in where a nested text_config keeps silent.
FAMILY_DEFAULTS = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "cohere2": {"sliding_window_pattern": 4},
    "llama": {"num_attention_heads": 32},
    "mixtral": {"num_experts_per_tok": 2},
}
ENCODERS = re.compile(r"bert|^(vit|deit|beit|dinov2|electra|esm|mpnet|siglip|clip|hubert|wav2vec2|ernie|nomic)")
TOWER = re.compile(r"(^|\.)(vision|visual|image|audio|speech|multi_modal|mm_)\w*\.")
# The matrices of attention by the names that families give the module around them.
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
EMBEDDING = re.compile(r"embed_tokens|wte|word_embed|embed_in|tok_emb")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|decoder|vocab_projector)(\.decoder)?\.weight$")
PREDICTS = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|MaskedLM|ForPreTraining")


@dataclass(frozen=True)
class Attention:
    """Self-attention of one layer. `window` is how many tokens back it sees, None for all of them.

    `latent` is (rank, rotary dimensions) of what multi-head latent attention keeps per token instead of keys and values.
    `chunked` windows start anew every `window` tokens (Llama 4). `recurrent` layers keep a state of fixed size instead.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    latent: tuple[int, int] | None = None
    chunked: bool = False
    recurrent: bool = False

    @property
    def kind(self) -> str:
        if self.recurrent:
            return "linear"
        if self.latent:
            return "latent"
        return "full" if self.window is None else "chunked" if self.chunked else "sliding"

    @property
    def cached_numbers(self) -> int:
        """Numbers that one token adds to the cache of this layer."""
        if self.recurrent:
            return 0
        return sum(self.latent) if self.latent else self.kv_heads * (self.key_dim + self.value_dim)

    def seen(self, position: int) -> int:
        """How many tokens the token at `position` (from 0) attends to, itself included."""
        if self.window is None:
            return position + 1
        return position % self.window + 1 if self.chunked else min(position + 1, self.window)

    def pairs(self, new: int, past: int = 0) -> int:
        """Pairs of query and key of `new` tokens after `past`: each sees itself and what the window leaves before it."""
        if self.chunked:
            size = self.window

            def upto(count: int) -> int:
                whole, rest = divmod(count, size)
                return whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2

            return upto(past + new) - upto(past)
        growing = new if self.window is None else max(0, min(new, self.window - past))
        return growing * past + growing * (growing + 1) // 2 + (new - growing) * (self.window or 0)


@dataclass(frozen=True)
class Facts:
    """`attention` is per layer, None for a layer without. `experts` is 0 for a dense model.

    `block_prefix` is the path of the repeated blocks. `head` is the module that turns hidden states into logits, None
    where there is none; when `tied`, it has no tensor of its own.
    """

    family: str
    architecture: str
    layers: int
    hidden: int
    vocab: int | None
    causal: bool
    context: int | None
    attention: tuple[Attention | None, ...]
    experts: int
    experts_per_token: int
    block_prefix: str
    head: str | None
    tied: bool
    tokens_per_image: int | None = None
    cache_bytes_per_number: int = 2

    @property
    def attends(self) -> list[Attention]:
        return [attention for attention in self.attention if attention is not None]


def facts(checkpoint: Checkpoint, weights: dict[str, Stored]) -> Facts:
    """`weights` by dense name. Raises TersorError naming the key that the config lacks."""
    config = checkpoint.require_config("which says what kind of model it is")
    if config.get("is_encoder_decoder"):
        raise TersorError(
            f"{checkpoint.path}: an encoder and a decoder, whose work depends on both lengths",
            "models of one stack can be predicted from headers",
        )
    reader = _Config(checkpoint, config)
    layers, hidden = reader.size("layers"), reader.size("hidden")
    prefix = _blocks(checkpoint, weights, layers)
    family = str(reader.get("model_type") or config.get("model_type") or "unknown")
    listed = config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else family
    attending = {
        weight.place.index
        for weight in weights.values()
        if weight.place
        and weight.place.blocks == prefix
        and not weight.place.numbered
        and len(weight.shape) == 2
        and ATTENTION.search(weight.place.rest)
    }
    kinds = _layer_kinds(reader, layers)
    template = _attention(reader, hidden) if attending else None
    attention = tuple(
        _of_kind(template, kinds[index], reader) if template and index in attending else None for index in range(layers)
    )
    experts = reader.optional("experts") or 0
    if not experts and any(
        weight.place and "experts." in weight.place.rest.replace("shared_experts", "") for weight in weights.values()
    ):
        reader.size("experts")  # which raises
    head, tied, vocab = _head(reader, weights, architecture)
    image, patch = (_area(reader.get(key)) for key in ("image_size", "patch_size"))
    is_image = bool(image and patch) and "vocab_size" not in config
    return Facts(
        family=family,
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        causal=not is_image and _is_causal(family, architecture, config),
        context=reader.optional("context"),
        attention=attention,
        experts=experts,
        experts_per_token=reader.size("experts_per_token") if experts else 0,
        block_prefix=prefix,
        head=head,
        tied=tied,
        tokens_per_image=image // patch + 1 if is_image else None,
        cache_bytes_per_number=_cache_bytes(config),
    )


def _area(side: object) -> int | None:
    """Pixels of a square with this side, or of a rectangle [height, width]."""
    sides = side if isinstance(side, list) and len(side) == 2 else [side, side]
    if not all(isinstance(extent, int) and not isinstance(extent, bool) and extent > 0 for extent in sides):
        return None
    return sides[0] * sides[1]


def _is_causal(family: str, architecture: str, config: dict) -> bool:
    return bool(config.get("is_decoder") or "ForCausalLM" in architecture or not ENCODERS.search(family))


class _Config:
    """The part of a config.json that speaks of the language model, by the aliases above."""

    def __init__(self, checkpoint: Checkpoint, config: dict):
        self.path = checkpoint.path
        self.outer = config
        nested = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
        self.inner = config if nested is None else nested
        self.defaults = FAMILY_DEFAULTS.get(str(self.inner.get("model_type")), {})

    def get(self, key: str) -> object:
        for source in (self.inner, self.outer, self.defaults):
            if source.get(key) is not None:
                return source[key]
        return None

    def optional(self, what: str) -> int | None:
        """Raises TersorError where the key is there but is no size."""
        for key in ALIASES.get(what, (what,)):
            value = self.get(key)
            if value is None or value is False:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise TersorError(f"{self.path / 'config.json'}: {key} is {value!r}", "it should be a whole number")
            return value
        return None

    def size(self, what: str) -> int:
        value = self.optional(what)
        if not value:
            key, *others = ALIASES.get(what, (what,))
            also = f" (nor {', '.join(others)})" if others else ""
            raise TersorError(
                f"{self.path / 'config.json'}: no {key}{also}", f"add {key}: the prediction cannot do without it"
            )
        return value


def _blocks(checkpoint: Checkpoint, weights: dict[str, Stored], layers: int) -> str:
    """Path of the repeated blocks: the longest numbered list outside the towers for images and sound."""
    multimodal = any(key in checkpoint.config for key in ("vision_config", "audio_config"))
    found: dict[str, set[int]] = {}
    for name, weight in weights.items():
        if weight.place and not weight.place.numbered and not (multimodal and TOWER.search(name)):
            found.setdefault(weight.place.blocks, set()).add(weight.place.index)
    inside = {prefix: sum(index < layers for index in indices) for prefix, indices in found.items()}
    prefix = max(inside, key=lambda prefix: (inside[prefix], -len(prefix)), default="")
    have = inside.get(prefix, 0)
    if have < layers:
        shared = "num_hidden_groups" in checkpoint.config
        raise TersorError(
            f"{checkpoint.path}: config.json says {layers} layers, there are tensors of {have}",
            "layers that share their weights (ALBERT) are not predicted"
            if shared
            else "the config.json does not belong to these weights",
        )
    return prefix


def _attention(reader: _Config, hidden: int) -> Attention:
    heads = reader.size("heads")
    rank = reader.optional("kv_lora_rank")
    if rank:
        nope, rotary = reader.size("qk_nope_head_dim"), reader.size("qk_rope_head_dim")
        return Attention(heads, heads, nope + rotary, reader.size("v_head_dim"), latent=(rank, rotary))
    head_dim = reader.optional("head_dim") or reader.optional("d_kv") or hidden // heads
    kv_heads = reader.optional("kv_heads")
    if reader.get("model_type") in ("falcon", "RefinedWebModel", "RefinedWeb"):
        # Falcon-7B's multi_query means one head of keys, whatever the other keys say, except in the newer layout.
        if not reader.get("new_decoder_architecture"):
            kv_heads = 1 if reader.get("multi_query") in (None, True) else heads
    elif kv_heads is None and reader.get("multi_query") is True:
        kv_heads = 1
    return Attention(heads, kv_heads or heads, head_dim, head_dim)


def _of_kind(attention: Attention, kind: str, reader: _Config) -> Attention:
    fields = dict(vars(attention))
    if "linear" in kind or kind in ("mamba", "recurrent", "conv"):
        fields["recurrent"] = True
    elif "chunked" in kind:
        fields |= {"window": reader.size("attention_chunk_size"), "chunked": True}
    elif "sliding" in kind or kind == "local":
        fields["window"] = reader.size("sliding_window")
    return Attention(**fields)


def _layer_kinds(reader: _Config, layers: int) -> list[str]:
    """The kind of attention of each layer, in the words of transformers' `layer_types`."""
    listed = next((reader.get(key) for key in ("layer_types", "attention_layers") if reader.get(key)), None)
    if listed is not None:
        if not isinstance(listed, list) or len(listed) < layers or not all(isinstance(kind, str) for kind in listed):
            raise TersorError(
                f"{reader.path / 'config.json'}: layer_types does not name a kind for each of {layers} layers",
                "the config.json is damaged",
            )
        return listed[:layers]
    if not reader.optional("sliding_window") or reader.get("use_sliding_window") is False:
        return ["full"] * layers
    pattern = reader.optional("sliding_window_pattern")
    if pattern:
        return ["sliding" if (index + 1) % pattern else "full" for index in range(layers)]
    first = reader.optional("max_window_layers") if reader.get("use_sliding_window") else 0
    return ["sliding" if index >= (first or 0) else "full" for index in range(layers)]


def _head(reader: _Config, weights: dict[str, Stored], architecture: str) -> tuple[str | None, bool, int | None]:
    """(module of the output head, whether it shares the embedding's tensor, entries of the vocabulary)"""
    tables = {
        name: weight.shape
        for name, weight in weights.items()
        if weight.place is None and len(weight.shape) == 2 and name.endswith(".weight")
    }
    head = next((name for name in tables if HEAD.search(name)), None)
    embedding = next((name for name in tables if EMBEDDING.search(name)), None)
    vocab = tables[embedding][0] if embedding else reader.optional("vocab_size")
    if head is not None:
        return head.removesuffix(".weight"), False, vocab or tables[head][0]
    predicts = embedding is not None and PREDICTS.search(architecture) is not None
    return ("lm_head" if predicts else None), predicts, vocab


def _cache_bytes(config: dict) -> int:
    """1 where the quantization_config asks for an 8-bit cache."""
    settings = config.get("quantization_config")
    scheme = settings.get("kv_cache_scheme") if isinstance(settings, dict) else None
    return 1 if isinstance(scheme, dict) and scheme.get("num_bits") == 8 else 2

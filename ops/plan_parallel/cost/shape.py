"""What a block is made of, in widths, read from the shapes of its tensors: the terms of the activation formulas."""

from __future__ import annotations

import re
from typing import NamedTuple

from tersor.ops.model.facts import TEXT_CONFIGS, Attention
from tersor.ops.plan_parallel.cost.shares import FUSED
from tersor.ops.plan_parallel.model import Piece, PlanModel

DOWN = re.compile(r"down|(^|[._])w2$|fc2|fc_out|4h_to_h|c_proj|(^|[._])wo$|output\.dense|lin2|output_linear")

LOW_RANK = re.compile(r"_a_proj|_down")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


class BlockShape(NamedTuple):
    """Numbers a token has at each place of a block. `ffn` is the width of the product that enters the last linear layer of
    the feed-forward part, `up` that of what leaves the first ones (twice `ffn` where it is gated). `norms` are the widths of
    norms over the hidden states, `head_norms` of those over queries and keys. `latents` are what comes out of low-rank
    projections in attention, `fused` what queries, keys and values leave their projection as, in one tensor. 0 for what a
    block does not have. `norm` and `activation` are their kinds: `rms`, `layer`, `gemma`; `silu`, `gelu`, `gelu_new`, `relu`.
    """

    hidden: int
    norms: int = 0
    head_norms: int = 0
    attention: Attention | None = None
    ffn: int = 0
    up: int = 0
    shared_ffn: int = 0
    shared_up: int = 0
    experts: int = 0
    active: int = 0
    expert_ffn: int = 0
    expert_up: int = 0
    latents: int = 0
    fused: int = 0
    norm: str = "rms"
    activation: str = "silu"

    @property
    def queries(self) -> int:
        return self.attention.heads * self.attention.key_dim if self.attention else 0

    @property
    def keys(self) -> int:
        if self.attention is None:
            return 0
        heads = self.attention.heads if self.attention.latent else self.attention.kv_heads
        return heads * self.attention.key_dim

    @property
    def values(self) -> int:
        if self.attention is None:
            return 0
        heads = self.attention.heads if self.attention.latent else self.attention.kv_heads
        return heads * self.attention.value_dim

    @property
    def attended(self) -> int:
        """What the scores make of the values, which enters the output projection."""
        return self.attention.heads * self.attention.value_dim if self.attention else 0


def block_shape(model: PlanModel, piece: Piece) -> BlockShape:
    facts = model.facts
    norms = head_norms = latents = fused = 0
    norm = "gemma" if facts.family.startswith("gemma") else "rms"
    widths = {"mlp": [0, 0], "shared experts": [0, 0], "experts": [0, 0]}  # [ffn, up]
    seen_expert: set[str] = set()
    for name in piece.weights:
        weight, kind = model.stored[name], model.kinds[name]
        rest = weight.place.rest
        leaf = rest.removesuffix(".weight")
        if kind == "norms" and name.endswith("bias"):
            norm = "layer"
        elif kind == "norms" and name.endswith("weight"):
            if weight.shape and weight.shape[0] == facts.hidden:
                norms += weight.shape[0]
            elif weight.shape:
                head_norms += 1
        elif kind in widths and len(weight.shape) >= 2 and not name.endswith("bias"):
            if kind == "experts":
                if rest in seen_expert:
                    continue
                seen_expert.add(rest)
            _add_width(widths[kind], leaf, weight.shape[-2:], facts.hidden)
        elif kind == "attention" and len(weight.shape) == 2:
            latents += weight.shape[0] if LOW_RANK.search(leaf) else 0
            fused += weight.shape[0] if FUSED.search(leaf) else 0
    (ffn, up), (shared_ffn, shared_up), (expert_ffn, expert_up) = widths.values()
    return BlockShape(
        hidden=facts.hidden,
        norms=norms,
        head_norms=head_norms,
        attention=facts.attention[piece.index],
        ffn=ffn,
        up=up,
        shared_ffn=shared_ffn,
        shared_up=shared_up,
        experts=facts.experts if expert_ffn else 0,
        active=min(facts.experts_per_token, facts.experts) if expert_ffn else 0,
        expert_ffn=expert_ffn,
        expert_up=expert_up,
        latents=latents,
        fused=fused,
        norm=norm,
        activation=_activation(model),
    )


def _activation(model: PlanModel) -> str:
    config = model.checkpoint.config or {}
    inner = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    named = next((inner[key] for key in ACTIVATIONS if isinstance(inner.get(key), str)), "silu")
    return {"gelu_new": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu"}.get(
        named, "gelu" if "gelu" in named else "silu"
    )


def _add_width(widths: list[int], leaf: str, shape: tuple[int, ...], hidden: int) -> None:
    """Add a matrix of a feed-forward part: `[hidden, ffn]` is the last one, `[ffn or 2 ffn, hidden]` a first one. Fused
    experts may be stored the other way round."""
    first, second = shape
    if DOWN.search(leaf):
        widths[0] += second if first == hidden else first
    else:
        widths[1] += first if second == hidden else second

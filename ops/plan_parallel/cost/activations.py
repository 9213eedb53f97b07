"""Bytes that a block keeps for its backward pass, by the tensors that each implementation keeps.

bf16 between operators, attention fused (only its output and a log-sum-exp for each head are kept). Widths are in numbers
a token; LLaMA-2-7B, in bytes a token over the hidden size h, comes to:

hf            45.66 h  a norm keeps its input in fp32, what it normalised and the input of the next linear layer (8 bytes a
                       number); queries, keys, values, attention's output; gate, up, silu(gate) and their product. Counted
                       with saved_tensors_hooks on the real modules (ops/model/activations.py) and tested against that.
megatron      32.1 h   a norm's input and output; the gated activation is recomputed from its input (fused), so gate|up and
                       the product. With dropout off this is the 34 sbh of Korthikanti et al. (2022) less its masks.
torchtitan    norms as in megatron, keys and values repeated for all heads, activation as in hf; compiled, the silu is
              recomputed as in megatron.

Sequence parallelism comes with tensor parallelism: everything is cut by tp, context parallelism cuts the tokens.
Mixture-of-experts layers keep the router's logits, and for each token and expert it is sent to what an expert keeps; when
experts are cut over etp, the tokens of all those ranks come together, so that inputs and outputs of experts are not cut.

`attention` recomputes attention only. Under fused attention that saves nothing, since its inputs and its output are kept
anyway (measured: Megatron-Bridge, Moonlight-16B 36.618 -> 36.614 GB). For torchtitan it is its selective recomputation
instead, which keeps every second matrix product and attention's output. `full` keeps a block's input only.
"""

from __future__ import annotations

from tersor.ops.plan_parallel.cost.shape import BlockShape
from tersor.ops.plan_parallel.layout import Layout

BF16, FP32 = 2, 4


def kept_per_token(shape: BlockShape, flavour: str, tp: int = 1, etp: int = 1) -> float:
    """Bytes for one token of the micro-batch (of all tensor-parallel ranks together) on one rank, nothing recomputed."""
    return sum(parts_per_token(shape, flavour, tp, etp).values())


def parts_per_token(shape: BlockShape, flavour: str, tp: int = 1, etp: int = 1) -> dict[str, float]:
    parts = {
        "norms": _norms(shape, flavour) / tp,
        "attention": _attention(shape, flavour, tp),
        "mlp": (
            _feed_forward(shape.ffn, shape.up, flavour, shape.activation)
            + _feed_forward(shape.shared_ffn, shape.shared_up, flavour)
        )
        / tp,
    }
    if shape.experts:
        parts["experts"] = _experts(shape, flavour, tp, etp)
    return parts


def _norms(shape: BlockShape, flavour: str) -> float:
    """Input and output of each norm, which is the input of what follows."""
    return shape.norms * _norm_bytes(shape, flavour)


def _norm_bytes(shape: BlockShape, flavour: str) -> float:
    """Of a number that is normalised. Hugging Face's RMS norms keep the input in fp32, and what is normalised besides the
    output, Gemma's in fp32, too."""
    if flavour != "hf" or shape.norm == "layer":
        return 2 * BF16
    return FP32 + 2 * BF16 if shape.norm == "rms" else 2 * FP32 + BF16


def _attention(shape: BlockShape, flavour: str, tp: int) -> float:
    if shape.attention is None:
        return 0.0
    queries, keys, values = shape.queries, shape.keys, shape.values
    if (
        flavour.startswith("torchtitan") and not shape.attention.latent
    ):  # keys and values repeated to the queries' heads
        keys, values = queries, shape.attended
    cut = tp if flavour.startswith("torchtitan") or shape.attention.latent else min(tp, shape.attention.kv_heads)
    norm = 0.0
    if shape.head_norms:
        norm = (queries + keys) * (
            _norm_bytes(shape, flavour) - BF16
        )  # the output is rotated, which keeps it no longer
    if shape.fused and flavour == "hf":  # the values are a view of all three
        norm += BF16 * (shape.fused - values)
    latent = shape.latents * _norm_bytes(shape, flavour)
    log_sum_exp = shape.attention.heads * FP32
    return (BF16 * (queries + shape.attended) + log_sum_exp + norm) / tp + BF16 * (keys + values) / cut + latent / tp


def _feed_forward(ffn: int, up: int, flavour: str, activation: str = "silu") -> float:
    """What enters the last linear layer, and what the activation needs: its input, and where it is not fused its output."""
    if not ffn:
        return 0.0
    tensors = 0.0
    if flavour in ("hf", "torchtitan"):
        if up >= 2 * ffn:
            tensors = 1.0
        elif flavour == "hf":  # relu needs its output only; what gelu_new makes of five steps is kept between them
            tensors = {"relu": -1.0, "gelu_new": 4.0}.get(activation, 0.0)
    return BF16 * (up + ffn + tensors * ffn)


def _experts(shape: BlockShape, flavour: str, tp: int, etp: int) -> float:
    """Each token is there `active` times, on average: its copy, what the expert keeps, and its result, to be weighted."""
    copies = shape.active / tp  # of one token, on a rank; experts share the tokens of all ranks evenly
    inside = _feed_forward(shape.expert_ffn, shape.expert_up, flavour) * copies  # cut by etp, of etp times the tokens
    ends = 2 * BF16 * shape.hidden * copies * etp
    router = (FP32 * shape.experts + BF16 * shape.active) / tp
    return inside + ends + router


def selective_per_token(shape: BlockShape, tp: int = 1) -> float:
    """torchtitan's selective recomputation: a block's input, the output of every second matrix product in the order they
    run (q, v, gate, down of q k v o gate up down), and attention's output with its log-sum-exp."""
    kept = shape.hidden
    if shape.attention is not None:
        kept += shape.queries + shape.values + shape.attended + 2 * shape.attention.heads
    if shape.ffn:
        kept += shape.up - shape.ffn if shape.up >= 2 * shape.ffn else shape.up
        kept += shape.hidden
    if shape.experts:
        kept += shape.active * (shape.expert_up / 2 + shape.hidden) + shape.experts
    return BF16 * kept / tp


def block_bytes(shape: BlockShape, layout: Layout, flavour: str, tokens: float) -> tuple[float, float]:
    """(bytes kept of one micro-batch until its backward pass, bytes that recomputation brings back for a while).

    `tokens` are those of a micro-batch on one context-parallel rank.
    """
    whole = tokens * kept_per_token(shape, flavour, layout.tp, layout.etp)
    if layout.recompute == "full":
        return tokens * BF16 * shape.hidden / layout.tp, whole
    if layout.recompute == "attention" and flavour.startswith("torchtitan"):
        kept = tokens * selective_per_token(shape, layout.tp)
        return min(kept, whole), whole
    return whole, 0.0


def head_bytes(hidden: int, vocab: int, layout: Layout, logit_bytes: float, tokens: float) -> tuple[float, float]:
    """(bytes kept of the last norm, bytes of the logits and their gradient at the peak of the last stage)"""
    return tokens * 2 * BF16 * hidden / layout.tp, tokens * vocab * logit_bytes / layout.tp

"""How long a device computes on a piece for one micro-batch: forward, backward to the inputs, backward to the weights.

Roofline: matrix products take the longer of their arithmetic at the reachable share of the peak and their bytes at the
reachable bandwidth, plus what starting a kernel takes; both backward products make as much arithmetic as the forward one.
Attention is fused and causal; its backward pass makes 2.5 times the arithmetic. What is left (norms, rotations,
activations, residuals) is bound by memory: a multiple of the bytes that the block keeps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tersor.formats.hardware import Hardware
from tersor.ops.model.facts import EMBEDDING
from tersor.ops.model.operators import Attend, Linear, Operator, Pass, operators
from tersor.ops.plan_parallel.cost.activations import kept_per_token
from tersor.ops.plan_parallel.cost.constants import KERNEL_FLOOR_SECONDS, Runtime
from tersor.ops.plan_parallel.cost.measured import Measured, attention_seconds
from tersor.ops.plan_parallel.cost.shape import BlockShape
from tersor.ops.plan_parallel.cost.shares import rule_shares
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import BACK, FRONT, Piece, PlanModel

ATTENTION_BACKWARD_PRODUCTS = 2.5  # five products for the two of the forward pass: the scores are made again


class Seconds(NamedTuple):
    """`again` is what recomputation repeats of the forward pass. `flops` are the model's, forward and backward of the whole
    micro-batch on all ranks together, recomputation not counted."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    again: float = 0.0
    flops: float = 0.0


class Device:
    """Speeds that operators reach on one device under a runtime."""

    def __init__(self, hardware: Hardware, runtime: Runtime, precision: str, measured: Measured | None = None):
        peaks = hardware.peak_flops
        products = hardware.computes_in(precision)
        share = runtime.product_efficiency_fp8 if products == "fp8" else runtime.product_efficiency
        self.products = peaks[products] * (share or runtime.product_efficiency or hardware.compute_efficiency)
        half = hardware.computes_in("bf16")
        self.half_products = peaks[half] * (runtime.product_efficiency or hardware.compute_efficiency)
        self.attention = peaks[half] * runtime.attention_efficiency
        self.bytes = hardware.bytes_per_second
        self.floor = max(hardware.kernel_floor_seconds, KERNEL_FLOOR_SECONDS)
        self.runtime, self.measured = runtime, measured

    def product(self, flops: float, nbytes: float, half: bool = False) -> float:
        return max(flops / (self.half_products if half else self.products), nbytes / self.bytes) + self.floor


def piece_operators(model: PlanModel, piece: Piece) -> list[Operator]:
    """Of one block or of the head; the embedding has none, it is looked up."""
    facts = model.facts
    weights = {name: model.stored[name] for name in piece.weights}
    if piece.kind == FRONT:
        return []
    if piece.kind == BACK:
        if facts.tied:  # a head that reads the embedding's table
            tables = (model.stored[name] for name in model.pieces[0].weights if EMBEDDING.search(name))
            weights |= {f"{facts.head}.weight": table for table in tables if table.shape[:1] == (facts.vocab,)}
        weights = {name: weight for name, weight in weights.items() if model.kinds.get(name) != "draft layers"}
        facts = replace(facts, attention=(), tied=False)
        if not any(len(weight.shape) == 2 for weight in weights.values()):  # no head
            return []
    else:
        facts = replace(facts, attention=(facts.attention[piece.index],), tied=False)
    return operators(facts, weights)


def piece_seconds(
    model: PlanModel,
    piece: Piece,
    found: list[Operator],
    shape: BlockShape | None,
    layout: Layout,
    sequences: int,
    seq_len: int,
    device: Device,
) -> Seconds:
    """Of one micro-batch of `sequences` on one rank. `found` are the piece's operators, `shape` its widths (blocks)."""
    tp, cp, runtime = layout.tp, layout.cp, device.runtime
    run = Pass(sequences, seq_len, all_logits=True)
    tokens = run.tokens / cp
    shares = _by_layer(model, piece, tp)
    forward = into_input = into_weight = attended = products = flops = 0.0
    for operator in found:
        if isinstance(operator, Linear):
            work = operator.count * operator.flops(run)
            flops += 3 * work
            seconds = operator.count * _linear_seconds(operator, shares.get(operator.name), layout, run, tokens, device)
            products += seconds
            forward += seconds
            into_input += seconds
            into_weight += seconds
        elif isinstance(operator, Attend):
            work = operator.flops(run)
            flops += 3 * work  # by convention: a backward pass of twice the forward one, nothing made again
            uneven = 1 + runtime.unbalanced_context * (cp - 1) / cp
            whole = work / device.attention
            if device.measured is not None and device.measured.attention:
                whole = attention_seconds(device.measured, operator.attention, run)
            local = whole / tp / cp * uneven
            attended = local + device.floor
            forward += attended
            into_input += local * ATTENTION_BACKWARD_PRODUCTS / runtime.attention_backward + device.floor
    elementwise = _elementwise_seconds(model, piece, shape, layout, tokens, device)
    forward += elementwise
    into_input += 1.5 * elementwise  # gradients come beside what they are the gradients of
    again = 0.0
    if piece.kind == "block" and layout.recompute == "full":
        again = forward
    elif piece.kind == "block" and layout.recompute == "attention":
        again = attended
        if runtime.flavour.startswith("torchtitan"):
            again = products * selective_share(shape, found) + elementwise
    return Seconds(forward, into_input, into_weight, again, flops)


def _by_layer(model: PlanModel, piece: Piece, tp: int) -> dict[str, float]:
    """Shares by the name that the operator of a weight has."""
    found = {}
    for name, share in rule_shares(model, piece, tp).items():
        found[(model.stored[name].place.rest if piece.kind == "block" else name).removesuffix(".weight")] = share
    return found


def _linear_seconds(
    linear: Linear, share: float | None, layout: Layout, run: Pass, tokens: float, device: Device
) -> float:
    """Forward time of one of the equal linear layers on one rank, which holds `share` of it (None: a tied head)."""
    rows = linear.rows(run) / run.tokens * tokens
    out, inside = linear.shape[-2:]
    if linear.experts:  # the tokens of the ranks that share experts, spread evenly over the experts
        tokens_here = rows * linear.active / layout.tp * layout.etp
        work = 2 * linear.macs * tokens_here / layout.etp
        weights = linear.experts / layout.ep * linear.params / layout.etp
        vectors = tokens_here * (out + inside / layout.etp)
    else:
        share = 1 / layout.tp if share is None else share
        if device.measured is not None and linear.name in device.measured.products:
            return device.measured.products[linear.name] * rows * share + device.floor
        if linear.kind == "router":  # its rows are cut by sequence parallelism in place of its weights
            rows /= layout.tp
        work = 2 * linear.macs * rows * share
        weights = linear.macs * share
        vectors = rows * (out * share + inside)
    return device.product(work, 2 * (weights + vectors), half=linear.kind in ("head", "router"))


def selective_share(shape: BlockShape, found: list[Operator]) -> float:
    """The share of a block's products that torchtitan's selective recomputation repeats: k, o and up of q k v o gate up
    down, every second one."""
    again = shape.hidden * (shape.keys + shape.attended)
    if shape.experts:
        again += shape.active * shape.hidden * shape.expert_up / 2
    else:
        again += shape.hidden * (shape.up - shape.ffn if shape.up >= 2 * shape.ffn else 0)
    total = sum(
        operator.count * operator.macs * (operator.active if operator.experts else 1)
        for operator in found
        if isinstance(operator, Linear)
    )
    return min(1.0, again / total) if total else 0.0


def _elementwise_seconds(
    model: PlanModel, piece: Piece, shape: BlockShape | None, layout: Layout, tokens: float, device: Device
) -> float:
    hidden = model.facts.hidden
    if piece.kind == FRONT:
        return 2 * tokens * 2 * hidden / device.bytes
    if piece.kind == BACK:
        logits = tokens * (model.facts.vocab or 0) * device.runtime.logit_bytes / layout.tp
        return (logits + tokens * 8 * hidden / layout.tp) / device.bytes
    if device.measured is not None:
        return device.measured.elementwise * tokens / layout.tp
    kept = tokens * kept_per_token(shape, device.runtime.flavour, layout.tp, layout.etp)
    return device.runtime.elementwise_passes * kept / device.bytes

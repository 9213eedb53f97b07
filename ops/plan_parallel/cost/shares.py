"""How much of a weight one tensor-parallel rank holds, as a fraction of its numbers: from the rules that cut it, or, where
there is no checkpoint at hand, by its name.

A column or row split leaves 1/tp; keys and values of grouped-query attention are copied once there are more ranks than
heads of theirs; norms, routers and the low-rank down-projections of latent attention are on every rank.
"""

from __future__ import annotations

import re
from math import prod

from tersor.ops.model.facts import Attention
from tersor.ops.model.stored import Stored
from tersor.ops.plan_parallel.model import Piece, PlanModel
from tersor.ops.plan_parallel.transform.parts import parts_of
from tersor.ops.plan_parallel.transform.rules import rules
from tersor.ops.plan_parallel.transform.segments import boxes, numbers

KEYS_VALUES = re.compile(r"(^|[._])([kv]|key|value)(_proj|_lin|_head)?\.")
FUSED = re.compile(r"qkv|query_key_value|Wqkv|c_attn")
LATENT_DOWN = re.compile(r"q_a_proj|kv_a_proj|kv_a_proj_with_mqa|q_down|kv_down|fused_qkv_a")
ROW_BIAS = re.compile(r"(o_proj|out_proj|dense|down_proj|c_proj|fc2|w2|dense_4h_to_h)\.bias$")


def tensor_share(name: str, kind: str, weight: Stored, attention: Attention | None, tp: int) -> float:
    """`kind` is one of ops.model.operators.KINDS. Experts are not asked for here: they are cut over etp."""
    if tp == 1 or kind in ("router", "norms", "other", "image and audio tower"):
        return 1.0
    if kind == "attention" and attention is not None:
        if LATENT_DOWN.search(name) or (len(weight.shape) == 1 and weight.shape[0] <= attention.key_dim):
            return 1.0
        if KEYS_VALUES.search(name):
            return 1 / min(tp, attention.kv_heads)
        if FUSED.search(name) and tp > attention.kv_heads:
            queries, kv = (
                attention.heads * attention.key_dim,
                attention.kv_heads * (attention.key_dim + attention.value_dim),
            )
            return (queries / tp + kv / attention.kv_heads) / (queries + kv)
    if len(weight.shape) == 1 and ROW_BIAS.search(name):
        return 1.0
    return 1 / tp


def rule_shares(model: PlanModel, piece: Piece, tp: int) -> dict[str, float]:
    """By dense weight: the share of its numbers that rank 0 of `tp` holds, which holds most. Experts are left out: they are
    cut over other ranks. Raises TersorError for a degree that a tensor cannot be cut to."""
    found, all_rules, stored = {}, rules(model), parts_of(model)
    for name in piece.weights:
        if model.kinds[name] == "experts":
            continue
        rule = all_rules[stored[name][0].name]
        whole = prod(rule.shape)
        found[name] = numbers(boxes(rule, tp, 0)) / whole if whole and tp > 1 else 1.0
    return found

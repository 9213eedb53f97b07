"""How families lay out queries, keys and values that are one matrix, and experts that are one tensor.

Only what the families' own model code shows is listed; another layout is never guessed, because a wrong one gives shards
that load and compute nonsense. Rows are outputs.
"""

from __future__ import annotations

from typing import NamedTuple

from tersor.ops.plan_parallel.transform.segments import Segment

# [q of all heads | k of all | v of all]
BLOCKS = {
    "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "phi3", "phi4_multimodal", "phi3small", "mpt", "dbrx",
    "modernbert", "modernbert-decoder", "baichuan", "qwen", "openelm",
}  # fmt: skip
# [q k v] of each head
HEADS = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu"}
# [q of the group's heads | k | v] of each head of keys and values
GROUPS = {"internlm2"}
# Four parts, each [q v k] of a quarter of the heads
QUARTERS = {"codegen"}
# Which of them it is depends on a key of the config: (key, its default, layout where it is true, where it is false)
BY_KEY = {
    "gpt_bigcode": (("multi_query", True, "blocks"), "heads"),
    "chatglm": (("multi_query_attention", False, "blocks"), "heads"),
    "falcon": (("new_decoder_architecture", False, "groups"), ("multi_query", True, "blocks"), "heads"),
}
BY_KEY |= dict.fromkeys(("RefinedWeb", "RefinedWebModel"), BY_KEY["falcon"])
GATED_QUERIES = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}  # [q | gate] of each head
INTERLEAVED_EXPERTS = {"gpt_oss"}  # gate, up, gate, up, …
INPUTS_FIRST_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}  # [experts, in, out]


class Heads(NamedTuple):
    """Of one attention: queries, keys and values, and what one of each is wide."""

    queries: int
    kv: int
    key_dim: int
    value_dim: int


def layout_of(family: str, config: dict) -> str | None:
    """blocks, heads, groups or quarters; None where it is not known."""
    for names, layout in ((BLOCKS, "blocks"), (HEADS, "heads"), (GROUPS, "groups"), (QUARTERS, "quarters")):
        if family in names:
            return layout
    if family not in BY_KEY:
        return None
    *keys, otherwise = BY_KEY[family]
    for key, default, layout in keys:
        value = config.get(key)
        if default if value is None else value:
            return layout
    return otherwise


def fused_qkv(family: str, config: dict, heads: Heads, out: int) -> tuple[Segment, ...] | None:
    """Segments of the `out` rows of a fused matrix; None where its layout is not known or does not fit."""
    layout = layout_of(family, config)
    queries, kv, key_dim, value_dim = heads
    if layout is None or out != queries * key_dim + kv * (key_dim + value_dim):
        return None
    if layout == "heads":
        return (Segment(0, out, 2 * key_dim + value_dim, what="heads"),) if queries == kv else None
    if layout == "quarters":
        return (Segment(0, out, out // 4, what="parts"),) if out % 4 == 0 and queries == kv else None
    if layout == "groups":
        group, own = out // kv, queries // kv * key_dim
        return (Segment(0, out, group, kv, ((own, key_dim), (key_dim + value_dim, 0)), "heads of keys and values"),)
    keys, values = queries * key_dim, queries * key_dim + kv * key_dim
    return (
        Segment(0, keys, key_dim, what="heads"),
        Segment(keys, values, key_dim, kv, what="heads of keys"),
        Segment(values, out, value_dim, kv, what="heads of values"),
    )


def halves(start: int, width: int) -> tuple[Segment, Segment]:
    """[gate | up], `width` each."""
    return Segment(start, start + width), Segment(start + width, start + 2 * width)

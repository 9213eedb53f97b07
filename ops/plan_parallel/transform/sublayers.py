"""How the linear layers of one attention, one feed-forward part or one set of experts are cut: column, then row.

Megatron-LM's pattern (Shoeybi et al. 2019): the first layers are cut by outputs, whole heads or single neurons, the last
one by inputs, so that a rank works on its heads or neurons alone and results are summed once. A part is cut as a whole or
not at all: where one of its layers is not understood, every rank holds all of it, and the cuts say why.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import NamedTuple

from tersor.ops.model.facts import Attention
from tersor.ops.plan_parallel.transform.fused import (
    GATED_QUERIES,
    INPUTS_FIRST_EXPERTS,
    INTERLEAVED_EXPERTS,
    Heads,
    fused_qkv,
    halves,
)
from tersor.ops.plan_parallel.transform.segments import Segment

OUT, IN = 0, 1
QUERY = {"q_proj", "query", "q_lin", "wq", "query_proj", "q"}
KEY = {"k_proj", "key", "k_lin", "wk", "key_proj", "k"}
VALUE = {"v_proj", "value", "v_lin", "wv", "value_proj", "v"}
FUSED_QKV = {"query_key_value", "qkv_proj", "c_attn", "Wqkv", "W_pack", "wqkv", "qkv"}
ATTENTION_OUT = {"o_proj", "out_proj", "dense", "c_proj", "out_lin", "wo", "Wo"}
LATENT_UP = {"q_proj", "q_b_proj", "kv_b_proj", "wq_b", "wkv_b"}
LATENT_DOWN = {"q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj", "wq_a", "wkv_a"}
FIRST = {
    "gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3", "v1", "fc_in", "lin1", "wi", "wi_0", "wi_1",
    "intermediate.dense",
}  # fmt: skip
FIRST_FUSED = {"gate_up_proj", "Wi", "input_linear"}  # [gate | up], half the rows each
LAST = {
    "down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2", "fc_out", "lin2", "wo", "Wo", "output_linear", "output.dense",
}  # fmt: skip
HEAD_NORM = re.compile(r"(^|\.)(q|k|query|key)_?(layer)?_?norm(\.|$)|(^|\.)(q_a|kv_a|kv|q)_?(a_)?(layer)?norm(\.|$)")
PLAN_COLUMN = ("colwise", "packed_colwise", "colwise_gather_output")
PLAN_ROW = ("rowwise", "rowwise_split_input")


class Cut(NamedTuple):
    """How a weight is cut: `dim` 0 for outputs and 1 for inputs of a layer `[out, in]`; of the tensor as stored for fused
    experts, which have `rows` of dimension 0 for each expert (0: no fused experts)."""

    role: str = "replicated"
    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    source: str = "replicated"
    note: str = ""
    rows: int = 0


class Context(NamedTuple):
    """What the whole model says: family, config, and roles by module of a block as transformers' plan has them."""

    family: str
    config: dict
    hidden: int
    plan: dict[str, str]


Shapes = dict[str, tuple[int, ...]]  # module of a block -> [out, in]


def whole(modules: Shapes, note: str) -> dict[str, Cut]:
    return {module: Cut(note=note) for module in modules}


def attention_cuts(modules: Shapes, attention: Attention, context: Context, norms: list[str]) -> dict[str, Cut]:
    """`norms` are the modules of norms inside the attention. One over all heads at once is run on gathered heads."""
    levels = zip(*(module.split(".")[:-1] for module in modules), strict=False)
    inside = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    for norm in norms:
        if norm.split(".")[: len(inside)] != inside:
            continue
        if not HEAD_NORM.search(norm) and not norm.lower().endswith("output.layernorm"):
            return whole(modules, f"{norm} is a norm over all heads, so the attention is not cut")
    roles: dict[str, str] = {}
    for module in modules:
        leaf, published = module.rsplit(".", 1)[-1], context.plan.get(module, "")
        if attention.latent and leaf in LATENT_UP:
            roles[module] = "latent"
        elif leaf in LATENT_DOWN or "indexer" in module:
            roles[module] = "down"
        else:
            named = (("q", QUERY), ("k", KEY), ("v", VALUE), ("qkv", FUSED_QKV), ("out", ATTENTION_OUT))
            role = next((role for role, leaves in named if leaf in leaves), None)
            if role is None and published:
                role = "gate" if published in PLAN_COLUMN else "out" if published in PLAN_ROW else "down"
            if role is None:
                return whole(modules, f"{module} is not known, so the attention is not cut")
            roles[module] = role
    by_role = {role: module for module, role in roles.items()}
    last = by_role.get("out")
    if last is None or list(roles.values()).count("out") != 1:
        return whole(modules, "no output projection was found, so the attention is not cut")
    heads = _heads({role: modules[module] for role, module in by_role.items()}, attention, context.family)
    if heads is None:
        return whole(modules, f"{last}: heads do not fit the shapes of its layers, so the attention is not cut")
    cuts = {}
    for module, role in roles.items():
        out, source = modules[module][OUT], "tp_plan" if module in context.plan else "names"
        if role == "down":
            cuts[module] = Cut(source=source, note="what every head reads")
            continue
        if role == "out":
            segments = (Segment(0, modules[module][IN], heads.value_dim, what="heads"),)
            cuts[module] = Cut("row", IN, segments, source)
            continue
        if role == "qkv":
            segments = fused_qkv(context.family, context.config, heads, out)
            if segments is None:
                return whole(modules, f"{module}: how q, k and v lie in it is not known, so the attention is not cut")
        elif role in ("k", "v"):
            segments = (Segment(0, out, out // heads.kv, heads.kv, what="heads of keys and values"),)
        else:
            segments = (Segment(0, out, out // heads.queries, what="heads"),)
        cuts[module] = Cut("column", OUT, segments, source)
    return cuts


def _heads(shapes: Shapes, attention: Attention, family: str) -> Heads | None:
    """By role. Layers of one model may have different heads, so that the shapes decide where config.json does not fit."""
    inputs = shapes["out"][IN]
    if attention.latent:
        queries = attention.heads
        up = [shape[OUT] for role, shape in shapes.items() if role == "latent"]
        if not up or inputs % queries or any(out % queries for out in up):
            return None
        return Heads(queries, queries, attention.key_dim, inputs // queries)
    if "qkv" in shapes:
        found = Heads(attention.heads, attention.kv_heads, attention.key_dim, attention.value_dim)
        return found if inputs == found.queries * found.value_dim else None
    if not {"q", "k", "v"} <= shapes.keys():
        return None
    q, k, v = (shapes[role][OUT] for role in "qkv")
    wider = 2 if family in GATED_QUERIES else 1
    for queries, kv in (
        (attention.heads, attention.kv_heads),
        (q // (wider * attention.key_dim), k // attention.key_dim),
    ):
        if not queries or not kv or queries % kv or q % queries or k % kv or v % kv or inputs % queries:
            continue
        fits = q // queries == wider * (k // kv) and v // kv == inputs // queries
        if fits and all(out % queries == 0 for out in (shapes.get("gate", (0,))[OUT],)):
            return Heads(queries, kv, k // kv, inputs // queries)
    return None


def feed_forward_cuts(modules: Shapes, context: Context, norms: list[str]) -> dict[str, Cut]:
    """A gated or plain feed-forward part, or one expert."""
    if norms:
        return whole(modules, f"{norms[0]} is a norm over all neurons, so the layers around it are not cut")
    names = {module: _short(module) for module in modules}
    roles = {}
    for module, leaf in names.items():
        published = context.plan.get(module, "")
        if (
            leaf in FIRST or leaf in FIRST_FUSED or (leaf == "w2" and "c_proj" in names.values())
        ):  # Qwen's w1, w2, c_proj
            roles[module] = "first"
        elif leaf in LAST:
            roles[module] = "last"
        elif published in PLAN_COLUMN or published in PLAN_ROW:
            roles[module] = "first" if published in PLAN_COLUMN else "last"
        else:
            return whole(modules, f"{module} is not known, so the layers beside it are not cut")
    last = [module for module, role in roles.items() if role == "last"]
    if len(last) != 1 or len(roles) < 2:
        return whole(modules, "no pair of a first and a last layer")
    width = modules[last[0]][IN]
    cuts = {}
    for module, role in roles.items():
        out, source = modules[module][OUT], "tp_plan" if module in context.plan else "names"
        if role == "last":
            cuts[module] = Cut("row", IN, (Segment(0, width, what="neurons"),), source)
        elif out == width:
            cuts[module] = Cut("column", OUT, (Segment(0, out, what="neurons"),), source)
        elif out == 2 * width and (names[module] in FIRST_FUSED or context.family == "chatglm"):
            cuts[module] = Cut("column", OUT, halves(0, width), source)
        else:
            return whole(modules, f"{module}: {out} outputs for {width} inputs of {last[0]}, which is not known")
    return cuts


def _short(module: str) -> str:
    """The last word, or two where the last alone says nothing (BERT's intermediate.dense)."""
    words = module.split(".")
    return ".".join(words[-2:]) if words[-1] == "dense" else words[-1]


def fused_expert_cuts(tensors: Shapes, experts: int, context: Context) -> dict[str, Cut]:
    """Tensors that hold all experts of a layer, by name within the block: `[experts, …]` or `[experts * rows, …]`.

    Biases (`gate_up_proj_bias` `[experts, out]`) included. Expert parallelism deals out dimension 0; where the rest is not
    understood expert tensor parallelism is not possible.
    """
    matrices = {name: shape for name, shape in tensors.items() if len(shape) == 3 or _is_flat(shape, experts, context)}
    found = {_expert_leaf(name): shape for name, shape in matrices.items()}
    rows = {name: shape[0] // experts for name, shape in tensors.items()}
    uncut = {name: Cut("replicated", source="names", rows=rows[name]) for name in tensors}
    last = next((leaf for leaf in found if leaf in LAST), None)
    first = [leaf for leaf in found if leaf in FIRST or leaf in FIRST_FUSED]
    if last is None or not first or len(first) + 1 != len(found):
        return {
            name: cut._replace(note="which sides of the experts are neurons is not known")
            for name, cut in uncut.items()
        }
    if all(len(shape) == 2 for shape in found.values()):
        return _flat(tensors, found, rows, uncut)
    if any(len(shape) != 3 for shape in found.values()):
        return uncut
    straight = _sides(found, first, last, context.hidden, 1, 2)
    turned = _sides(found, first, last, context.hidden, 2, 1)
    if straight and turned:  # as wide as the hidden states: the family says which side is which
        straight, turned = (None, turned) if context.family in INPUTS_FIRST_EXPERTS else (straight, None)
    width = straight or turned
    if width is None:
        return {
            name: cut._replace(note="which sides of the experts are neurons is not known")
            for name, cut in uncut.items()
        }
    out, inputs = (1, 2) if straight else (2, 1)
    cuts = {}
    for name, shape in tensors.items():
        leaf, is_bias = _expert_leaf(name), name not in matrices
        if leaf == last:
            neurons = (Segment(0, width, what="neurons"),)
            cuts[name] = uncut[name] if is_bias else uncut[name]._replace(role="row", dim=inputs, segments=neurons)
        else:
            dim = 1 if is_bias else out
            cuts[name] = uncut[name]._replace(
                role="column", dim=dim, segments=_gate_up(leaf, shape[dim], width, context)
            )
    return cuts


def _gate_up(leaf: str, out: int, width: int, context: Context) -> tuple[Segment, ...]:
    if out == width:
        return (Segment(0, out, what="neurons"),)
    return (Segment(0, out, 2, what="neurons"),) if context.family in INTERLEAVED_EXPERTS else halves(0, width)


def _expert_leaf(name: str) -> str:
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return leaf.removesuffix("_bias") if leaf.endswith("_bias") else leaf


def _is_flat(shape: tuple[int, ...], experts: int, context: Context) -> bool:
    return len(shape) == 2 and shape[0] > experts and shape[0] % experts == 0 and shape[1] == context.hidden


def _flat(tensors: Shapes, found: Shapes, rows: dict[str, int], uncut: dict[str, Cut]) -> dict[str, Cut]:
    """DBRX: w1, v1 and w2 all `[experts * neurons, hidden]`."""
    if len(set(found.values())) != 1:
        return uncut
    return {
        name: uncut[name]._replace(
            role="row" if _expert_leaf(name) in LAST else "column",
            dim=0,
            segments=(Segment(0, rows[name], what="neurons"),),
        )
        if len(shape) == 2 and shape in found.values()
        else uncut[name]
        for name, shape in tensors.items()
    }


def _sides(found: Shapes, first: list[str], last: str, hidden: int, out: int, inputs: int) -> int | None:
    """Neurons of an expert, where outputs are dimension `out` and inputs `inputs`; None where the shapes say otherwise."""
    width = found[last][inputs]
    if found[last][out] != hidden or any(found[leaf][inputs] != hidden for leaf in first):
        return None
    fits = all(found[leaf][out] == width * (2 if leaf in FIRST_FUSED else 1) for leaf in first)
    return width if fits else None

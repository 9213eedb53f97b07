"""A rule for every stored tensor of a checkpoint: how tensor and expert parallelism cut it.

Sources in order: transformers' own plan for the family, names and shapes, and where neither is sure a copy on every rank,
with a note that says why. Codes, scales, zero points and factors follow the weight that they stand for.
"""

from __future__ import annotations

import re
from functools import cache
from math import lcm
from weakref import WeakKeyDictionary

from tersor.ops.model.facts import ATTENTION
from tersor.ops.model.operators import NORM
from tersor.ops.model.stored import EXPERT, Stored
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.transform.parts import Along, Part, parts_of
from tersor.ops.plan_parallel.transform.segments import (
    VOCABULARY_MULTIPLE,
    Rule,
    Segment,
    divides,
    max_split,
)
from tersor.ops.plan_parallel.transform.sublayers import (
    Context,
    Cut,
    attention_cuts,
    feed_forward_cuts,
    fused_expert_cuts,
)
from tersor.ops.plan_parallel.transform.tp_plan import published_plan

__all__ = ["Rule", "Segment", "divides", "max_split", "notes", "rules"]

NOT_VOCABULARY = re.compile(r"position|wpe|token_type|per_layer|(^|\.)transform\.|project", re.IGNORECASE)
HEAD_BIAS = re.compile(r"(lm_head|decoder|predictions|vocab_projector|embed_out|output)\.bias$|final_logits_bias$")
# Parts of a block that mix a sequence in ways of their own; no rank can do a share of them by these rules.
OTHER_MIXERS = re.compile(
    r"(^|\.)(mamba|mixer|linear_attn|ssm|conv|recurrent|rwkv|indexer|cross\w*attn|cross_attention)(\.|$)"
)
UNCUT = Cut()
MIXER = Cut(note="a mixer of the sequence other than attention, which these rules do not cut")
QUERY_KEY_NORM = re.compile(r"^[qk]_(layer)?norm$")
ALL_HEADS = "a norm over all heads: they are gathered for it"
_KNOWN: WeakKeyDictionary[PlanModel, dict[str, Rule]] = WeakKeyDictionary()


@cache
def is_other_mixer(rest: str) -> bool:
    return OTHER_MIXERS.search(rest) is not None and "indexer" not in rest


def rules(model: PlanModel) -> dict[str, Rule]:
    """By stored tensor, in the order of the checkpoint. Every tensor has one."""
    if model not in _KNOWN:
        _KNOWN[model] = _rules(model)
    return _KNOWN[model]


def _rules(model: PlanModel) -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    parts = parts_of(model)
    cuts = _cuts(model)
    counted = _experts_by_block(model)
    made: dict[tuple, tuple] = {}
    for name, weight in model.stored.items():
        cut = cuts.get(name, UNCUT)
        expert, experts, place = None, 0, weight.place
        if cut is UNCUT and place is not None and is_other_mixer(place.rest):
            cut = MIXER
        if place is not None and (place.numbered or cut.rows):
            experts = counted.get(place[:2], 0)
            expert = _expert_index(name) if place.numbered else None
        for part in parts[name]:
            info = model.checkpoint.tensors[part.name]
            found[part.name] = _rule(part, info.shape, parts[name], name, weight, cut, expert, experts, made, model)
    for name, info in model.checkpoint.tensors.items():  # buffers that no encoding speaks of
        if name not in found:
            found[name] = Rule(name, info.shape, note="belongs to no weight")
    return {name: found[name] for name in model.checkpoint.tensors}


@cache
def _expert_index(name: str) -> int:
    return int(EXPERT.search(name)[0])


def _experts_by_block(model: PlanModel) -> dict[tuple[str, int], int]:
    """How many experts each block has: pruning may leave fewer than config.json says."""
    counted: dict[tuple[str, int], int] = {}
    for name, weight in model.stored.items():
        place = weight.place
        if place is not None and place.numbered:
            counted[place[:2]] = max(counted.get(place[:2], 0), _expert_index(name) + 1)
        elif place is not None and _is_fused(model, name):
            rows = weight.shape[0]  # one for each expert, or in 2-D tensors several
            counted[place[:2]] = rows if len(weight.shape) == 3 else counted.get(place[:2], model.facts.experts)
    return counted


def _is_fused(model: PlanModel, name: str) -> bool:
    """Whether a tensor holds all experts of its layer."""
    weight, experts = model.stored[name], model.facts.experts
    return (
        experts > 0
        and model.kinds[name] == "experts"
        and not weight.place.numbered
        and len(weight.shape) >= 2
        and weight.shape[0] % experts == 0
    )


def _rule(
    part: Part, shape: tuple[int, ...], siblings: tuple[Part, ...], name: str, weight: Stored, cut: Cut,
    expert: int | None, experts: int, made: dict, model: PlanModel,
) -> Rule:  # fmt: skip
    """The cut of a weight, carried over to one of the tensors that store it."""
    along = part.axes.get(cut.dim)
    dim, segments, pad, blocked = None, (), 0, ""
    if along is not None:
        key = (cut.role, cut.segments, along, weight.shape[cut.dim], len(siblings) > 1 and weight.scheme)
        if key not in made:
            granule = lcm(*(other.axes[cut.dim].granule for other in siblings if cut.dim in other.axes))
            made[key] = _carried(cut, along, granule, weight.shape[cut.dim])
        segments, pad, blocked = made[key]
        dim = None if blocked else along.dim
    tied = cut.role == "vocab" and model.facts.tied and len(weight.shape) == 2
    return Rule(
        part.name, shape, cut.role, dim, segments, expert, experts, cut.rows or 1, pad, tied, name, cut.source, cut.note,
        blocked,
    )  # fmt: skip


def _carried(cut: Cut, along: Along, granule: int, extent: int) -> tuple[tuple[Segment, ...], int, str]:
    """(segments, padding, why not) in the coordinates of a stored tensor: runs of `granule` numbers of the weight stay
    together, because a word, a scale or a tile speaks of all of them."""
    if cut.role == "vocab":
        pad = VOCABULARY_MULTIPLE * along.words
        if VOCABULARY_MULTIPLE % granule or pad % along.granule:
            return (), 0, f"{VOCABULARY_MULTIPLE} rows are not whole groups of {granule} that are stored together"
        return (), pad // along.granule, ""
    found = []
    for segment in cut.segments:
        edges = [segment.start, segment.stop]
        if segment.inside:
            edges.append(segment.start + segment.inside[0][0])
        for edge in edges:
            if edge % granule and edge != extent:
                return (), 0, f"a part ends at {edge}, inside a group of {granule} that is stored together"
        unit = lcm(segment.unit, granule)
        inside = tuple(
            (along.place(size), along.place(lcm(one, granule)) if one else 0) for size, one in segment.inside
        )
        what = segment.what if unit == segment.unit else ""
        found.append(
            Segment(
                along.place(segment.start), along.place(segment.stop), along.place(unit), segment.groups, inside, what
            )
        )
    return tuple(found), 0, ""


def _cuts(model: PlanModel) -> dict[str, Cut]:
    """By weight; those that are missing are held whole by every rank."""
    found: dict[str, Cut] = {}
    blocks: dict[int, list[str]] = {}
    for name, weight in model.stored.items():
        place = weight.place
        inside = place is not None and place.blocks == model.facts.block_prefix
        if not inside or place.index >= model.facts.layers:
            found |= _vocabulary(model, name, weight)
        if inside:
            blocks.setdefault(place.index, []).append(name)
    config = model.checkpoint.config or {}
    nested = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), {})
    context = Context(model.facts.family, config | nested, model.facts.hidden, _plan(model))
    known: dict[tuple, dict[str, Cut]] = {}
    for index, names in blocks.items():
        attention = model.facts.attention[min(index, model.facts.layers - 1)]
        for group, members in _groups(model, names).items():
            shapes = {rest: model.stored[name].shape for rest, name in members.items()}
            seen = attention if group[0] == "attention" else None
            key = (group[:2], seen, tuple(shapes.items()))  # without the expert: all are alike
            if key not in known:
                known[key] = _group_cuts(group, shapes, attention, context, model.facts.experts)
            found |= {members[rest]: cut for rest, cut in known[key].items()}
    return found


def _plan(model: PlanModel) -> dict[str, str]:
    """transformers' plan by module within a block."""
    config = model.checkpoint.config or {}
    plan = published_plan(model.facts.family) or published_plan(str(config.get("model_type", "")))
    return {module.partition(".*.")[2]: style for module, style in plan.items() if module.startswith("layers.*.")}


def _groups(model: PlanModel, names: list[str]) -> dict[tuple, dict[str, str]]:
    """The tensors of a block by the part that they belong to: (attention | mlp | experts, where, expert) -> {name within
    the block: name}. What belongs to none is left out."""
    found: dict[tuple, dict[str, str]] = {}
    for name in names:
        place, kind = model.stored[name].place, model.kinds[name]
        module = place.rest.rpartition(".")[0]
        if is_other_mixer(place.rest):
            continue
        if place.numbered:
            key = ("mlp", module.rpartition(".")[0], _expert_index(name))
        elif kind == "router" or ("experts" in place.rest and ATTENTION.search(place.rest)):  # or mixtures of heads
            continue
        elif kind == "experts":
            where, named, _ = module.partition("experts")
            key = ("experts", where if named else module.rpartition(".")[0], None)
        elif _in_attention(place.rest, kind):
            key = ("attention", place.rest.split(".")[0], None)
        else:
            parent = module.rpartition(".")[0]
            key = ("mlp", "" if module in ("intermediate.dense", "output.dense") else parent, None)
        found.setdefault(key, {})[place.rest] = name
    return found


def _in_attention(rest: str, kind: str) -> bool:
    """Norms beside an attention, `self_attn_layer_norm`, are not in it."""
    return ATTENTION.search(rest.split(".")[0]) is not None and (kind == "attention" or rest.count(".") > 1)


def _group_cuts(group: tuple, shapes: dict, attention, context: Context, experts: int) -> dict[str, Cut]:
    """By name within the block, biases and what belongs to single heads included."""
    kind, where = group[:2]
    if kind == "experts":
        return fused_expert_cuts({rest: shape for rest, shape in shapes.items() if len(shape) > 1}, experts, context)
    matrices = {}
    norms = []
    for rest, shape in shapes.items():
        module, _, leaf = rest.rpartition(".")
        if leaf == "weight" and NORM.search(module.rsplit(".", 1)[-1]):
            norms.append(module)
        elif leaf == "weight" and len(shape) == 2:
            matrices[module] = shape
        elif leaf == "weight" and ".norms." in module:  # StableLM has a norm for each head
            norms.append(module)
    if kind == "attention":
        if attention is None or attention.recurrent:
            return {}
        cuts = attention_cuts(matrices, attention, context, norms)
    elif not where:  # straight in the block, among other things
        known = {module: shape for module, shape in matrices.items() if _is_feed_forward(module)}
        cuts = feed_forward_cuts(known, context, [])
    else:
        inner = [norm for norm in norms if norm.startswith(where + ".")]
        cuts = feed_forward_cuts(matrices, context, inner)
    return _with_vectors(cuts, shapes, kind == "attention")


def _is_feed_forward(module: str) -> bool:
    return module in ("fc1", "fc2", "intermediate.dense", "output.dense")


def _with_vectors(cuts: dict[str, Cut], shapes: dict, heads: bool) -> dict[str, Cut]:
    """Cuts by tensor name: a bias follows the outputs of its layer, a row-parallel one is added once to the sum."""
    last = next((cut for cut in cuts.values() if cut.role == "row"), None)
    found = {}
    for rest, shape in shapes.items():
        module, _, leaf = rest.rpartition(".")
        cut = cuts.get(module)
        if cut is not None and leaf in ("weight", "bias"):
            if leaf == "bias" and cut.role != "column":
                cut = Cut(source=cut.source, note="added once, to the sum" if cut.role == "row" else cut.note)
            found[rest] = cut
        elif heads and last is not None:
            found |= _of_heads(rest, shape, cuts, last.segments[0])
    return found


def _of_heads(rest: str, shape: tuple[int, ...], cuts: dict[str, Cut], last: Segment) -> dict[str, Cut]:
    """What has an entry for each head: attention sinks `[heads]`, norms of queries and of keys `[heads, head_dim]`. A norm
    `[heads * head_dim]` takes its mean over all heads, so that it is run on gathered ones."""
    queries = last.stop // last.unit
    kv = next((s.groups for cut in cuts.values() for s in cut.segments if s.groups is not None), queries)
    words = ("", *rest.split("."))
    if words[-1] == "sinks" and shape == (queries,):
        return {rest: Cut("column", 0, (Segment(0, queries, what="heads"),), "names")}
    if words[-1] != "weight" or not QUERY_KEY_NORM.search(words[-2]):
        return {}
    if len(shape) == 2 and words[-2][0] == "q" and shape[0] == queries:
        return {rest: Cut("column", 0, (Segment(0, queries, what="heads"),), "names")}
    if len(shape) == 2 and words[-2][0] == "k" and shape[0] == kv:
        return {rest: Cut("column", 0, (Segment(0, kv, 1, kv, what="heads of keys and values"),), "names")}
    outputs = {segments[-1].stop for cut in cuts.values() if cut.role == "column" and (segments := cut.segments)}
    if len(shape) == 1 and queries > 1 and shape[0] in outputs and shape[0] > last.unit:
        return {rest: Cut(source="names", note=ALL_HEADS)}
    return {}


def _vocabulary(model: PlanModel, name: str, weight: Stored) -> dict[str, Cut]:
    """The embedding table, the head, and its bias."""
    if not weight.shape or weight.shape[0] != model.facts.vocab or NOT_VOCABULARY.search(name):
        return {}
    matrix = len(weight.shape) == 2 and model.kinds[name] in ("embedding", "head", "draft layers", "other")
    if (matrix and name.endswith(".weight")) or (len(weight.shape) == 1 and HEAD_BIAS.search(name)):
        return {name: Cut("vocab", 0, source="names")}
    return {}


def notes(model: PlanModel) -> list[str]:
    """What every rank holds whole although it is a matrix of a block, and why: one line for each reason."""
    found: dict[str, list[str]] = {}
    for rule in rules(model).values():
        if rule.role == "replicated" and rule.note and len(rule.shape) > 1 and rule.source == "replicated":
            found.setdefault(rule.note, []).append(rule.tensor)
    return [f"{len(names)} tensors, for example {names[0]}: {why}" for why, names in found.items()]

"""The operators of one block with their annotations, for the search that decides along which dimension each is cut.

Names: b sequences, s tokens (t: those that are attended to), e hidden, g heads of keys and values, q heads of queries for
each of them, d and v their dimensions, f neurons, x experts, l numbers of a latent. With more ranks than heads of keys and
values `g` counts the copies, so that it still divides. A part whose layout is not known (`transform.rules`) has dimensions
that must stay whole. Biases are operators of their own: they are added, so they may be partial like the sums they are added to.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tersor.ops.plan_parallel.model import Piece, PlanModel
from tersor.ops.plan_parallel.transform.annotation import Annotation, parse
from tersor.ops.plan_parallel.transform.parts import IN, OUT, parts_of
from tersor.ops.plan_parallel.transform.rules import rules

NORM = "b s e^, e^ -> b s e^"
ADD = "b s e, b s e -> b s e"
ROUTER = "b s e+, x^ e+ -> b s x^"
EXPERTS_UP = "b s e+, x f e+ -> b s x f"
EXPERTS_DOWN = "b s x+ f+, b s x+, x e f+ -> b s e"


class Node(NamedTuple):
    """`inputs` and `outputs` name tensors; those of `weights` are parameters. `flops` are those of a forward pass over all
    tokens, `width` of the sizes is that of the whole model."""

    name: str
    annotation: Annotation
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, int]
    weights: frozenset[str] = frozenset()
    flops: float = 0.0

    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """Of inputs and outputs."""
        return tuple(
            tuple(self.annotation.shape(dims, self.sizes) for dims in side)
            for side in (self.annotation.inputs, self.annotation.outputs)
        )


class _Block:
    """Collects nodes; every layer is one, with its bias where the model has one."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes, self.nodes = sizes, []

    def add(
        self, name: str, text: str, inputs: str, output: str, flops: float = 0.0, adds: bool = False, **sizes
    ) -> str:
        names = tuple(inputs.split())
        weights = frozenset(word for word in names if word.startswith("w."))
        self.nodes.append(Node(name, parse(text, adds), names, (output,), self.sizes | sizes, weights, flops))
        return output

    def linear(self, name: str, reads: str, inputs: str, outputs: str, bias: bool, **sizes) -> str:
        """`inputs` and `outputs` are the last dimension on either side."""
        known = self.sizes | sizes
        numbers = [prod(known[word.strip("()+^")] for word in side.split()) for side in (inputs, outputs)]
        flops = 2 * known["b"] * known["s"] * prod(numbers)
        weight = f"b s {_summed(inputs)}, {outputs} {_summed(inputs)} -> b s {outputs}"
        output = self.add(name, weight, f"{reads} w.{name}", f"{name}.out", flops, **sizes)
        if bias:
            added = f"b s {outputs}, {outputs} -> b s {outputs}"
            output = self.add(f"{name}.bias", added, f"{output} w.{name}.bias", f"{name}.sum", adds=True, **sizes)
        return output


def _summed(dimension: str) -> str:
    """`(g q v^)` to `(g+ q+ v+)`: sums may be cut at the outermost name, the others keep their order below it."""
    words = dimension.strip("()").split()
    marked = [word if word.endswith("^") else f"{word}+" for word in words]
    return marked[0] if len(marked) == 1 else f"({' '.join(marked)})"


class Feed(NamedTuple):
    """A feed-forward part. `cut`: whether its neurons may be dealt out."""

    width: int
    gated: bool
    biased: bool
    cut: bool


class Structure(NamedTuple):
    """What a block is made of. `attention`: whether its heads may be dealt out."""

    attention: bool
    attention_bias: bool
    feeds: tuple[Feed, ...]
    experts: int
    expert_width: int


def structure(model: PlanModel, piece: Piece) -> Structure:
    """From the shapes of a block's tensors and what the rules understand of them."""
    attention = attention_bias = False
    experts = expert_width = 0
    feeds: dict[str, dict] = {}
    for name in piece.weights:
        weight, kind = model.stored[name], model.kinds[name]
        rule = rules(model)[parts_of(model)[name][0].name]
        module, _, leaf = weight.place.rest.rpartition(".")
        if rule.is_expert:
            experts = rule.experts
            if rule.role == "row" and len(weight.shape) > 1:
                expert_width = (
                    weight.shape[IN] if weight.place.numbered else rule.segments[0].stop if rule.segments else 0
                )
        elif kind == "attention":
            attention |= rule.role == "row"
            attention_bias |= leaf == "bias"
        elif kind in ("mlp", "shared experts"):
            parent = "" if module in ("intermediate.dense", "output.dense") else module.rpartition(".")[0]
            feed = feeds.setdefault(parent, {"width": 0, "first": 0, "biased": False, "numbers": 0})
            feed["biased"] |= leaf == "bias"
            if len(weight.shape) == 2:
                feed["numbers"] += weight.params
                feed["width"] += weight.shape[IN] if rule.role == "row" else 0
                feed["first"] += weight.shape[OUT] if rule.role == "column" else 0
    found = []
    for feed in feeds.values():
        if width := feed["width"]:
            found.append(Feed(width, feed["first"] == 2 * width, feed["biased"], True))
        elif width := feed["numbers"] // (2 * model.facts.hidden):  # not understood: as much work, and never cut
            found.append(Feed(width, False, feed["biased"], False))
    return Structure(attention, attention_bias, tuple(found), experts, expert_width)


def block_operators(model: PlanModel, piece: Piece, sequences: int, tokens: int, ranks: int = 1) -> tuple[Node, ...]:
    """Of a block that reads tensor `x` and writes the output of the last node. `ranks` that it is to be cut over."""
    facts, attention = model.facts, model.facts.attention[piece.index]
    found = structure(model, piece)
    block = _Block({"b": sequences, "s": tokens, "t": tokens, "e": facts.hidden})
    stream = "x"
    if attention is not None and not attention.recurrent:
        read = block.add("attention.norm", NORM, f"{stream} w.attention.norm", "attention.in")
        done = _attention(block, attention, found.attention, read, found.attention_bias, ranks)
        stream = block.add("attention.residual", ADD, f"{stream} {done}", "attention.done", adds=True)
    read = block.add("mlp.norm", NORM, f"{stream} w.mlp.norm", "mlp.in")
    for index, feed in enumerate(found.feeds):
        name = f"mlp{index or ''}"
        done = _feed_forward(block, name, read, feed)
        stream = block.add(f"{name}.residual", ADD, f"{stream} {done}", f"{name}.done", adds=True)
    if found.expert_width:
        share = min(facts.experts_per_token, found.experts) / found.experts
        done = _experts(block, read, found.experts, found.expert_width, share)
        stream = block.add("experts.residual", ADD, f"{stream} {done}", "experts.done", adds=True)
    return tuple(block.nodes)


def _attention(block: _Block, attention, cut: bool, read: str, biased: bool, ranks: int) -> str:
    heads = attention.heads if attention.latent else attention.kv_heads
    groups = heads if heads % ranks == 0 else max(heads, ranks) if ranks % heads == 0 and cut else heads
    sizes = {"g": groups, "q": max(1, attention.heads // groups), "d": attention.key_dim, "v": attention.value_dim}
    mark = "" if cut else "^"
    queries, keys, values = f"(g{mark} q d^)", f"(g{mark} d^)", f"(g{mark} v^)"
    result = f"(g{mark} q v^)"
    if attention.latent:
        rank, rotary = attention.latent
        down = block.linear("kv_down", read, "e", "l", False, l=rank + rotary)
        latent = block.add("kv_norm", "b s l^, l^ -> b s l^", f"{down} w.kv_norm", "latent", l=rank + rotary)
        k = block.linear("keys", latent, "l", keys, False, l=rank + rotary, **sizes)
        v = block.linear("values", latent, "l", values, False, l=rank + rotary, **sizes)
    else:
        k = block.linear("keys", read, "e", keys, biased, **sizes)
        v = block.linear("values", read, "e", values, biased, **sizes)
    q = block.linear("queries", read, "e", queries, biased, **sizes)
    pairs = block.sizes["b"] * block.sizes["s"] * block.sizes["t"]
    flops = pairs * attention.heads * (attention.key_dim + attention.value_dim)  # half of them are masked
    text = f"b s {queries}, b t^ {keys}, b t^ {values} -> b s {result}"
    scored = block.add("scores and values", text, f"{q} {k} {v}", "attended", flops, **sizes)
    return block.linear("output", scored, result, "e", biased, **sizes)


def _feed_forward(block: _Block, name: str, read: str, feed: Feed) -> str:
    neurons, gated, biased, cut = feed
    f = "f" if cut else "f^"
    up = block.linear(f"{name}.up", read, "e", f, biased, f=neurons)
    if gated:
        gate = block.linear(f"{name}.gate", read, "e", f, biased, f=neurons)
        up = block.add(f"{name}.product", f"b s {f}, b s {f} -> b s {f}", f"{gate} {up}", f"{name}.act", f=neurons)
    else:
        up = block.add(f"{name}.activation", f"b s {f} -> b s {f}", up, f"{name}.act", f=neurons)
    return block.linear(f"{name}.down", up, f, "e", biased, f=neurons)


def _experts(block: _Block, read: str, experts: int, width: int, share: float) -> str:
    """Written as if every token went to every expert; `share` of the work is done."""
    sizes = {"x": experts, "f": width}
    gates = block.add("router", ROUTER, f"{read} w.router", "gates", x=experts)
    flops = 2 * block.sizes["b"] * block.sizes["s"] * block.sizes["e"] * experts * width * share
    up = block.add("experts.up", EXPERTS_UP, f"{read} w.experts.up", "experts.neurons", 2 * flops, **sizes)
    return block.add("experts.down", EXPERTS_DOWN, f"{up} {gates} w.experts.down", "experts.out", flops, **sizes)

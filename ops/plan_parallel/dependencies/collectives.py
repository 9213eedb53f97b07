"""The collectives that tensor, context and expert parallelism put into one piece of a model, for one micro-batch.

Where they come from: a layer cut by outputs needs its whole input on every rank, one cut by inputs leaves partial sums
(Megatron-LM, Shoeybi et al. 2019). With sequence parallelism (Korthikanti et al. 2022) what lies between the cut parts is
split along the sequence, so that the all-reduce becomes an all-gather before and a reduce-scatter after, and backward the
other way round, plus an all-gather of the saved input for the weights' gradients, which hides behind a product. Context
parallelism passes keys and values round a ring; expert parallelism sends each token to its experts and back. `nbytes` is
always the full buffer: what is gathered, reduced or scattered in all, what a rank holds before an all-to-all, or the message.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import BACK, FRONT, Piece, PlanModel
from tersor.ops.plan_parallel.transform.parts import parts_of
from tersor.ops.plan_parallel.transform.rules import ALL_HEADS, Rule, is_other_mixer, rules

FORWARD, BACKWARD = "forward", "backward"
LOSS_REDUCTIONS = 3  # over a split vocabulary: the largest logit, the sum of exponentials, the logit of the target


class Collective(NamedTuple):
    """`count` equal ones of a micro-batch, among the ranks of one axis. `overlappable`: nothing waits for it at once."""

    name: str
    axis: str
    nbytes: float
    count: int
    phase: str
    overlappable: bool = False


class Cutting(NamedTuple):
    """What of a piece tensor and expert parallelism touch.

    `attention` and `feed_forward`: parts (an MLP, shared experts) that are cut over tp; `copied` parts mix the
    sequence and are computed whole by every tp rank, on all tokens. `gathered_norms`: numbers a token of queries and keys that a norm over all heads needs.
    `experts`: routed experts of the block.
    """

    attention: int = 0
    feed_forward: int = 0
    copied: int = 0
    gathered_norms: int = 0
    experts: int = 0


_KNOWN: WeakKeyDictionary[PlanModel, dict[int, Cutting]] = WeakKeyDictionary()


def block_collectives(
    model: PlanModel, piece: Piece, layout: Layout, tokens: float, sequence_parallel: bool = True, nbytes: int = 2
) -> list[Collective]:
    """Of one piece and micro-batch of `tokens` (micro_batch * seq_len, before context parallelism cuts them), in training.

    A forward pass alone, as in serving, has those of phase forward. Recomputing a block runs them once more. Activations
    take `nbytes` a number. Data parallelism and what passes between stages is not in it.
    """
    local = tokens / layout.cp
    hidden = local * model.facts.hidden * nbytes
    if piece.kind == FRONT:
        return _embedding(model, piece, layout, hidden, sequence_parallel)
    if piece.kind == BACK:
        return _head(model, layout, hidden, local, sequence_parallel)
    cutting = _cutting(model, piece)
    found = [
        *_tensor_parallel(cutting, layout, hidden, local * nbytes, sequence_parallel),
        *_context_parallel(model, piece, layout, local, nbytes),
        *_expert_parallel(model, cutting, layout, hidden, sequence_parallel),
    ]
    return [collective for collective in found if collective.count and collective.nbytes]


def tied_embedding_gradient(model: PlanModel, layout: Layout, gradient_bytes: int) -> float:
    """Bytes of the all-reduce, once a step, between the first and the last stage where both hold the embedding's table."""
    if layout.pp == 1 or not model.facts.tied:
        return 0.0
    tables = [rule for rule in rules(model).values() if rule.tied]
    return sum(prod(model.stored[rule.weight].shape) for rule in tables) / layout.tp * gradient_bytes


def _between(sequence_parallel: bool, hidden: float, times: int) -> list[Collective]:
    """Around `times` parts of which each is a column-parallel and then a row-parallel layer."""
    if not sequence_parallel:
        return [
            Collective("all_reduce", "tp", hidden, times, FORWARD),
            Collective("all_reduce", "tp", hidden, times, BACKWARD),
        ]
    return [
        Collective("all_gather", "tp", hidden, times, FORWARD),
        Collective("reduce_scatter", "tp", hidden, times, FORWARD),
        Collective("all_gather", "tp", hidden, times, BACKWARD),  # of the gradient of the part's output
        Collective("reduce_scatter", "tp", hidden, times, BACKWARD),  # of the gradient of its input
        Collective("all_gather", "tp", hidden, times, BACKWARD, overlappable=True),  # of the saved input
    ]


def _tensor_parallel(
    cutting: Cutting, layout: Layout, hidden: float, token_bytes: float, sequence_parallel: bool
) -> list[Collective]:
    if layout.tp == 1:
        return []
    found = _between(sequence_parallel, hidden, cutting.attention + cutting.feed_forward)
    if sequence_parallel and cutting.copied:  # all tokens are needed, and every rank has all results
        found += [Collective("all_gather", "tp", hidden, cutting.copied, phase) for phase in (FORWARD, BACKWARD)]
    if cutting.gathered_norms:
        width = cutting.gathered_norms * token_bytes
        found += [
            Collective("all_gather", "tp", width, 1, FORWARD),
            Collective("reduce_scatter", "tp", width, 1, BACKWARD),
        ]
    return found


def _context_parallel(model: PlanModel, piece: Piece, layout: Layout, local: float, nbytes: int) -> list[Collective]:
    """A ring: each rank passes on the keys and values it has, cp - 1 times; backward these and their gradients."""
    attention = model.facts.attention[piece.index]
    if layout.cp == 1 or attention is None or attention.recurrent:
        return []
    cut = layout.tp if _cutting(model, piece).attention else 1
    kv_heads = attention.heads if attention.latent else attention.kv_heads
    message = local * max(1, kv_heads // cut) * (attention.key_dim + attention.value_dim) * nbytes
    return [
        Collective("send", "cp", message, layout.cp - 1, FORWARD, overlappable=True),
        Collective("send", "cp", 2 * message, layout.cp - 1, BACKWARD, overlappable=True),
    ]


def _expert_parallel(
    model: PlanModel, cutting: Cutting, layout: Layout, hidden: float, sequence_parallel: bool
) -> list[Collective]:
    """Tokens are split over tp ranks before they are sent, so that none is sent twice; without sequence parallelism the
    results have to be put together again."""
    if not cutting.experts:
        return []
    own = hidden / layout.tp
    active = min(model.facts.experts_per_token, cutting.experts)
    found = []
    for phase in (FORWARD, BACKWARD):
        if layout.ep > 1:
            found.append(Collective("all_to_all", "ep", own * active, 2, phase))  # there and back
        if layout.etp > 1:
            inside = own * layout.etp * (active if layout.ep > 1 else 1)
            found.append(Collective("all_gather", "etp", inside, 1, phase))
            found.append(Collective("reduce_scatter", "etp", inside, 1, phase))
        if not sequence_parallel and layout.tp > 1:
            found.append(Collective("all_gather", "tp", hidden, 1, phase))
    return found


def _embedding(
    model: PlanModel, piece: Piece, layout: Layout, hidden: float, sequence_parallel: bool
) -> list[Collective]:
    """Each rank looks up the tokens that are in its part of the vocabulary."""
    cut = any(_rule(model, name).role == "vocab" for name in piece.weights)
    if layout.tp == 1 or not cut:
        return []
    if not sequence_parallel:
        return [Collective("all_reduce", "tp", hidden, 1, FORWARD)]
    return [
        Collective("reduce_scatter", "tp", hidden, 1, FORWARD),
        Collective("all_gather", "tp", hidden, 1, BACKWARD),
    ]


def _head(model: PlanModel, layout: Layout, hidden: float, local: float, sequence_parallel: bool) -> list[Collective]:
    """Logits stay split over the vocabulary; the loss reduces one float32 number a token and reduction."""
    if layout.tp == 1 or model.facts.head is None:
        return []
    loss = [Collective("all_reduce", "tp", 4 * local, LOSS_REDUCTIONS, FORWARD)]
    if not sequence_parallel:
        return [*loss, Collective("all_reduce", "tp", hidden, 1, BACKWARD)]
    return [
        Collective("all_gather", "tp", hidden, 1, FORWARD),
        *loss,
        Collective("reduce_scatter", "tp", hidden, 1, BACKWARD),
        Collective("all_gather", "tp", hidden, 1, BACKWARD, overlappable=True),
    ]


def _cutting(model: PlanModel, piece: Piece) -> Cutting:
    known = _KNOWN.setdefault(model, {})
    signature = model.signatures[piece.index + 1]
    if signature not in known:
        known[signature] = _count(model, piece)
    return known[signature]


def _rule(model: PlanModel, weight: str) -> Rule:
    """Of the first of the tensors that store a weight: all have its role."""
    return rules(model)[parts_of(model)[weight][0].name]


def _count(model: PlanModel, piece: Piece) -> Cutting:
    """A part is cut where it has a row-parallel matrix, a copy where its matrices are on every rank."""
    attention, feed_forward, experts, gathered = 0, 0, 0, 0
    copied: set[str] = set()
    for name in piece.weights:
        rule, kind = _rule(model, name), model.kinds[name]
        if rule.is_expert:
            experts = rule.experts
            continue
        if rule.note == ALL_HEADS:
            gathered += rule.shape[0]
        if len(model.stored[name].shape) != 2 or kind in ("router", "norms", "embedding"):
            continue
        rest = model.stored[name].place.rest
        if rule.role == "row":
            attention += kind == "attention"
            feed_forward += kind != "attention"
        elif rule.source == "replicated" and (kind == "attention" or is_other_mixer(rest)):
            copied.add(rest.split(".")[0])
    return Cutting(attention, feed_forward, len(copied), gathered, experts)

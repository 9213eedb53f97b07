"""The operators of a model's forward pass, read from its tensor headers: what each computes and which bytes it moves.

Counted are matrix products: 2 * tokens * weights of a linear layer, of which mixture-of-experts layers use what is routed
to, and attention's scores and values, 2 * heads * (key + value dimensions) for each pair of query and key. `square`
counts every pair of a sequence, masked or not, which is what torch.utils.flop_counter sees; otherwise only those that
the causal mask and the window leave. Norms, rotations and activations have no FLOPs here, only bytes (norms).
Latent attention (MLA) is counted as its prefill runs, with keys and values expanded, and in a step that adds one token
as engines run it: queries are taken into the latent space, so that the cache is read as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.ops.model.facts import ATTENTION, EMBEDDING, TOWER, Attention, Facts
from tersor.ops.model.stored import SPARSE, Stored

ACTIVATION_BYTES = 2  # of a number between operators, whatever the weights are stored in
KINDS = (
    "attention", "router", "experts", "shared experts", "mlp", "norms", "embedding", "head", "draft layers",
    "image and audio tower", "other",
)  # fmt: skip
NORM = re.compile(r"norm|(^|[._])ln([._\d]|$)", re.IGNORECASE)
TABLE = re.compile(r"embed|wte|wpe|position|token_type|relative|rotary", re.IGNORECASE)
ONCE = re.compile(r"pooler|classifier|(^|\.)score\.")  # read one vector of a sequence
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp64": "fp32"}


@dataclass(frozen=True)
class Pass:
    """One run of the model: `batch` sequences of `new` tokens each, after `past` tokens that are in the cache.

    `all_logits`: the head runs on every new token, as transformers does by default, not only on the last of a sequence.
    """

    batch: int
    new: int
    past: int = 0
    square: bool = False
    all_logits: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.new


@dataclass(frozen=True)
class Linear:
    """`count` equal linear layers `[out, in]`. Numbers are those of one, for experts those of one expert.

    `precision` is what it is multiplied in, which is bf16 for weights that are only stored in fewer bits; `unpacks`
    says that they are. `experts` is how many the layer has, `active` how many of them a token is sent to.
    `per` says how often it runs: for each `token` or `patch` of an image, for each token with a `logit`, or once a
    `sequence`.
    """

    name: str
    kind: str
    count: int
    shape: tuple[int, ...]
    macs: int
    params: int
    weight_bytes: float
    label: str
    precision: str
    unpacks: bool = False
    experts: int = 0
    active: float = 0
    per: str = "token"
    scheme: Scheme | None = None
    speedup: float = 1.0  # of the arithmetic, where half of it is left out (2:4)

    def rows(self, run: Pass) -> int:
        if self.per == "sequence" or (self.per == "logit" and not run.all_logits):
            return run.batch
        return run.tokens - run.batch if self.per == "patch" else run.tokens  # no patch stands behind the class token

    def flops(self, run: Pass) -> float:
        return 2 * self.macs * self.rows(run) * (self.active if self.experts else 1)

    def bytes(self, run: Pass) -> float:
        """Weights that are touched, once, and vectors in and out."""
        rows = self.rows(run)
        vectors = rows * (self.active if self.experts else 1) * sum(self.shape[-2:]) * ACTIVATION_BYTES
        return self.touched(rows) * self.weight_bytes + vectors

    def touched(self, rows: int) -> float:
        """How many experts `rows` tokens need at least once, if each picks `active` of them evenly; 1 without experts."""
        if not self.experts:
            return 1.0
        return self.experts * (1 - (1 - self.active / self.experts) ** rows)


@dataclass(frozen=True)
class Attend:
    """Scores and values of `count` equal layers; `cache_bytes` is what one number takes in the cache."""

    attention: Attention
    count: int
    causal: bool
    cache_bytes: int = 2
    name: str = "attention"
    kind: str = "attention"

    def _absorbed(self, run: Pass) -> bool:
        return self.attention.latent is not None and run.new == 1 and run.past > 0

    def pairs(self, run: Pass) -> int:
        """Pairs of query and key in one sequence."""
        if self.attention.recurrent:
            return 0
        if run.square or not self.causal:
            seen = run.past + run.new
            return run.new * (seen if run.square else min(seen, self.attention.window or seen))
        return self.attention.pairs(run.new, run.past)

    def flops(self, run: Pass) -> float:
        spec = self.attention
        width = 2 * spec.latent[0] + spec.latent[1] if self._absorbed(run) else spec.key_dim + spec.value_dim
        return 2 * run.batch * spec.heads * width * self.pairs(run)

    def bytes(self, run: Pass) -> float:
        """The cache that is in sight, and queries and results; new keys and values are written and read."""
        spec = self.attention
        last = run.past + run.new - 1
        seen = spec.seen(last) if self.causal else run.new
        if run.new > 1:
            seen = run.new + min(run.past, seen)
        cache = 0 if spec.recurrent else seen * spec.cached_numbers * self.cache_bytes
        if spec.latent and not self._absorbed(run):
            cache = seen * spec.heads * (spec.key_dim + spec.value_dim) * ACTIVATION_BYTES
        vectors = run.new * spec.heads * (spec.key_dim + spec.value_dim) * ACTIVATION_BYTES
        return run.batch * (cache + vectors)

    @property
    def precision(self) -> str:
        return "bf16"


@dataclass(frozen=True)
class Norm:
    """`count` equal norms over `width` numbers of each token: no product, only a read and a write."""

    count: int
    width: int
    name: str = "norms"
    kind: str = "norms"
    precision: str = "bf16"

    def flops(self, run: Pass) -> float:
        return 0.0

    def bytes(self, run: Pass) -> float:
        return 2 * run.tokens * self.width * ACTIVATION_BYTES


Operator = Linear | Attend | Norm


def kind_of(name: str, weight: Stored, facts: Facts | None) -> str:
    """Which part of a model a tensor belongs to, one of KINDS."""
    place = weight.place
    if place is not None and (facts is None or place.blocks == facts.block_prefix):
        if facts is not None and place.index >= facts.layers:
            return "draft layers"
        return _kind_inside(place.rest, len(weight.shape), facts is not None and facts.experts > 0)
    if TOWER.search(name):
        return "image and audio tower"
    if facts is not None and facts.head and name.startswith(facts.head + "."):
        return "head"
    if NORM.search(name.rpartition(".")[0].rsplit(".", 1)[-1]):
        return "norms"
    if TABLE.search(name) and not (len(weight.shape) == 2 and "project" in name):
        return "embedding"
    return "head" if re.search(r"lm_head|embed_out|predictions", name) or ONCE.search(name) else "other"


@cache
def _kind_inside(rest: str, dimensions: int, has_experts: bool) -> str:
    """`rest` is the name within a block."""
    module = rest.rpartition(".")[0]
    leaf = module.rsplit(".", 1)[-1]
    if dimensions < 2 and NORM.search(leaf):
        return "norms"
    if "shared_expert" in module:
        return "router" if leaf == "shared_expert_gate" else "shared experts"
    if re.search(r"\bexperts\b", rest):
        return "experts"
    if leaf in ("gate", "router", "wg") or module.endswith("router.layer"):
        return "router"
    if dimensions == 2 and TABLE.search(leaf):
        return "embedding"
    if ATTENTION.search(rest):
        return "attention" if dimensions < 4 else "other"  # GPT-2 stores its causal mask
    return "experts" if dimensions == 3 and has_experts else "mlp"


def operators(facts: Facts, weights: dict[str, Stored]) -> list[Operator]:
    """What one forward pass runs, equal layers put together. Raises TersorError where there is nothing to run."""
    linears: dict[tuple, Linear] = {}
    experts: dict[tuple, list[int]] = {}
    norms: dict[int, int] = {}
    for name, weight in weights.items():
        dimensions = len(weight.shape)
        if dimensions == 0 or not (name.endswith("weight") or (".experts." in name and not name.endswith("bias"))):
            continue  # biases and buffers; fused experts are named without a .weight
        kind = kind_of(name, weight, facts)
        if kind in ("draft layers", "image and audio tower"):
            continue
        inside = weight.place is not None and weight.place.blocks == facts.block_prefix
        if dimensions == 1:
            if kind == "norms":
                norms[weight.shape[0]] = norms.get(weight.shape[0], 0) + 1
        elif kind == "experts":
            _gather(experts, weight, facts)
        elif dimensions == 2 and kind not in ("embedding", "norms"):
            suffix = (weight.place.rest if inside else name).removesuffix(".weight")
            _add(linears, _linear(suffix, kind, weight, _how_often(name, kind, facts)))
        elif dimensions == 4 and facts.tokens_per_image and not inside:  # cuts an image into patches
            patches = weight._replace(shape=(weight.shape[0], weight.macs // weight.shape[0]))
            _add(linears, _linear(name.removesuffix(".weight"), "embedding", patches, "patch"))
    _add_experts(linears, experts, facts)
    if not linears:
        raise TersorError("no linear layer was found among the tensors", "this is not a model that can be profiled")
    found: list[Operator] = list(linears.values())
    if facts.tied:
        found.append(_tied_head(facts, weights))
    kinds = Counter(facts.attends)
    for attention, count in kinds.items():
        name = "scores and values" if len(kinds) == 1 else f"scores and values ({attention.kind})"
        found.append(Attend(attention, count, facts.causal, facts.cache_bytes_per_number, name))
    found += [Norm(count, width) for width, count in norms.items()]
    return sorted(found, key=lambda operator: KINDS.index(operator.kind))


def _how_often(name: str, kind: str, facts: Facts) -> str:
    if ONCE.search(name) and kind == "head":
        return "sequence"
    return "logit" if kind == "head" and facts.causal else "token"


def _gather(experts: dict[tuple, list[int]], weight: Stored, facts: Facts) -> None:
    """Add a tensor to the experts of its block: [how many, macs, params, bytes] by block, name, shape and storage."""
    _, index, name, numbered = weight.place
    shape, count = weight.shape, 1
    if not numbered:  # all experts in one tensor: its first dimension is theirs, or theirs times the rows
        shape = shape[1:] if len(shape) > 2 else (shape[0] // facts.experts, shape[1])
        count = facts.experts
    entry = experts.setdefault((index, name, shape, weight.label, weight.scheme), [0, 0, 0, 0])
    entry[0] += count
    entry[1] += weight.macs
    entry[2] += weight.params
    entry[3] += weight.nbytes


def _add_experts(linears: dict[tuple, Linear], experts: dict[tuple, list[int]], facts: Facts) -> None:
    totals: Counter = Counter()
    for (index, name, *_), (count, *_) in experts.items():
        totals[index, name] += count
    for (index, name, shape, label, scheme), (count, macs, params, nbytes) in experts.items():
        stored = Stored(shape, params // count, nbytes / count, label, scheme, macs // count)
        total = totals[index, name]  # experts that are stored in different ways share the tokens
        active = min(facts.experts_per_token, total) * count / total
        _add(
            linears,
            replace(_linear(name.removesuffix(".weight"), "experts", stored, "token"), experts=count, active=active),
        )


def _tied_head(facts: Facts, weights: dict[str, Stored]) -> Linear:
    """The head that reads the embedding's own table."""
    table = next(
        weight for name, weight in weights.items() if EMBEDDING.search(name) and weight.shape[:1] == (facts.vocab,)
    )
    head = _linear(f"{facts.head} (tied)", "head", table, "logit" if facts.causal else "token")
    return replace(head, params=0)


def _linear(name: str, kind: str, weight: Stored, per: str) -> Linear:
    precision, unpacks = precision_of(weight)
    return Linear(
        name, kind, 1, weight.shape, weight.macs, weight.params, weight.nbytes, weight.label, precision, unpacks,
        per=per, scheme=weight.scheme,
    )  # fmt: skip


def precision_of(weight: Stored) -> tuple[str, bool]:
    """(what the products are made in, whether the weights are unpacked for that)"""
    if weight.scheme is None:
        kind = weight.label.removesuffix(SPARSE)
        return PRECISIONS.get(kind, "bf16"), weight.label not in PRECISIONS
    activations = weight.scheme.activations
    if activations is None:
        return "bf16", True
    return ("int8" if activations == "int8" else "fp8"), False


def _add(layers: dict[tuple, Linear], linear: Linear) -> None:
    """Equal layers of different blocks become one entry that counts them."""
    key = linear.name, linear.shape, linear.label, linear.scheme, linear.weight_bytes, linear.experts
    known = layers.get(key)
    layers[key] = linear if known is None else replace(known, count=known.count + 1)


def active_params(found: list[Operator]) -> float:
    """Weights that one token is multiplied with, tied heads included."""
    return sum(
        operator.count * operator.macs * (operator.active if operator.experts else 1)
        for operator in found
        if isinstance(operator, Linear) and operator.per in ("token", "logit")
    )


def total_flops(found: list[Operator], run: Pass) -> float:
    return sum(operator.count * operator.flops(run) for operator in found)

"""All losses on logits of one step, in one pass over the student's logits, a chunk of tokens at a time.

Heads that are a product go through kernels/linear_divergence; for others the model's own code makes each chunk of logits,
and the same kernel on rows gives losses and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.kernels.divergence import KINDS, divergence_rows_, top_k_divergence_rows_
from tersor.kernels.linear_divergence import (
    CPU_BUDGET,
    GPU_BUDGET,
    linear_divergence,
    linear_top_k,
    linear_top_k_divergence,
)
from tersor.ops.distill.losses.heads import Head
from tersor.ops.distill.losses.parse import Term
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_REST = 1e-7  # of probability outside the top entries: what rounding of float32 leaves of it


@dataclass
class TopK:
    """The highest entries of a teacher's distribution: `indices` int `[B, T, k]`, `values` `[B, T, k]` log-probabilities
    at `temperature`, `log_rest` `[B, T]` the logarithm of what is left for all others (None: what `values` leave)."""

    indices: Tensor
    values: Tensor
    log_rest: Tensor | None = None
    temperature: float = 1.0


@dataclass
class LogitTargets:
    """What a teacher gives: final hidden states `[B, T, H]` and the head that reads them, or its top entries."""

    hidden: Tensor | None = None
    head: Head | None = None
    top_k: TopK | None = None


@dataclass
class LogitLosses:
    """`terms` on logits and text. `k`: how many entries top-k-kl looks at when the teacher has all of them. `common`: how
    many first vocabulary entries both models have (None: as many as the shorter one's)."""

    terms: list[Term]
    temperature: float = 1.0
    k: int = 64
    common: int | None = None
    budget_bytes: int | None = None

    def __call__(
        self, hidden: Tensor, head: Head, ids: Tensor, keep: Tensor, teacher: LogitTargets | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum over the tokens of `keep` `[B, T]`, and the sum of each loss by name, without its weight.

        `hidden` `[B, T, H]`: what the student's head reads. `ids` int64 `[B, T]`. top-k-kl, and every divergence where the
        teacher gives its top entries alone, compares k + 1 buckets, the last of which is all other tokens.
        """
        labels = torch.full_like(ids, -1)
        labels[:, :-1] = ids[:, 1:]
        rows = _Rows(self, head, hidden[keep], labels[keep])
        dense, top = self._split(teacher)
        total, parts = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32)), {}
        if dense:
            loss, sums = rows.dense(_weights(dense), teacher, keep)
            total, parts = total + loss, parts | {term.name: sums[term.kind] for term in dense}
        if top:
            loss, sums = rows.top_k(_weights(top), self.top_entries(teacher, keep, rows.common))
            total, parts = total + loss, parts | {term.name: sums[term.kind] for term in top}
        return total, {term.name: parts[term.name] for term in self.terms}

    def _split(self, teacher: LogitTargets | None) -> tuple[list[Term], list[Term]]:
        """Terms on all logits, and those on top entries. What needs no teacher goes with either."""
        if teacher is not None and teacher.top_k is not None:
            return [], self.terms
        top = [term for term in self.terms if term.name == "top-k-kl"]
        dense = [term for term in self.terms if term not in top]
        return ([], self.terms) if top and all(term.needs == "text" for term in dense) else (dense, top)

    def parameter(self, name: str, default: float) -> float:
        return next((term.parameter for term in self.terms if term.name == name), default)

    @torch.no_grad()
    def top_entries(self, teacher: LogitTargets, keep: Tensor, rows: int | None = None):
        """`indices` and `values` `[n, k]`, `log_rest` `[n]` or None, of the n kept tokens at the temperature of the losses.

        The first `rows` entries of the vocabulary count (left out: `common`)."""
        if teacher.top_k is None:
            head, hidden = teacher.head, teacher.hidden[keep]
            lengths = [rows or self.common, head.rows if head.linear else None]
            rows = min((length for length in lengths if length is not None), default=None)
            k = self.k if rows is None else min(self.k, rows)
            if not head.direct:
                return _own_top_k(head, hidden, k, self.temperature, rows, self.budget_bytes)
            x, weight, bias = _operands(head, hidden)
            with torch.autocast(x.device.type, enabled=False):
                return linear_top_k(x, weight, k, bias, self.temperature, rows, self.budget_bytes)
        given = teacher.top_k
        indices, values = given.indices[keep].long(), given.values[keep].float()
        if given.temperature != self.temperature:  # what the others sum to at another temperature is not known
            return indices, values * (given.temperature / self.temperature), None
        if given.log_rest is not None:
            return indices, values, given.log_rest[keep].float()
        return indices, values, (1 - values.exp().sum(-1)).clamp(min=LEAST_REST).log()


def _weights(terms: list[Term]) -> dict[str, float]:
    """By the kernel's names; kl and top-k-kl are one where the teacher gives its top entries alone."""
    weights: dict[str, float] = {}
    for term in terms:
        weights[term.kind] = weights.get(term.kind, 0.0) + term.weight
    return weights


class _Rows:
    """The student's side: hidden states `[n, H]` of kept tokens, their labels and the head."""

    def __init__(self, losses: LogitLosses, head: Head, hidden: Tensor, labels: Tensor):
        self.losses, self.head, self.hidden, self.labels = losses, head, hidden, labels
        rows = head.rows if head.linear else losses.common
        self.common = rows if losses.common is None else min(rows, losses.common)
        self.options = {
            "temperature": losses.temperature,
            "beta": losses.parameter("js", 0.5),
            "balance": losses.parameter("bd-kd", 2 / 3),
        }

    def dense(self, weights: dict[str, float], teacher: LogitTargets | None, keep: Tensor):
        labels = self.labels if "next_token" in weights else None
        alone = set(weights) == {"next_token"}
        common = self.losses.common
        if not alone and (teacher is None or teacher.hidden is None):
            raise TersorError("the losses on logits have no teacher", "add --teacher CHECKPOINT, or use --loss next")
        states = None if alone else teacher.hidden[keep].detach()
        if self.head.direct and (alone or teacher.head.direct):
            x, weight, bias = _operands(self.head, self.hidden)
            other = (None, None, None) if alone else _operands(teacher.head, states, common)
            with torch.autocast(x.device.type, enabled=False):
                return linear_divergence(
                    x, weight, *(t if t is None else t.detach() for t in other[:2]), weights, labels=labels, bias=bias,
                    teacher_bias=None if other[2] is None else other[2].detach(), count=1.0,
                    budget_bytes=self.losses.budget_bytes, **self.options,
                )  # fmt: skip

        def score(logits, part):
            with torch.no_grad():
                teacher_logits = None if alone else teacher.head.logits(states[part])[:, :common].to(logits.dtype)
            label = None if labels is None else labels[part]
            teacher_logits = teacher_logits if teacher_logits is None else teacher_logits.contiguous()
            return divergence_rows_(logits, teacher_logits, label, weights, **self.options)

        return self._own(score, weights)

    def top_k(self, weights: dict[str, float], top: tuple[Tensor, Tensor, Tensor | None]):
        labels = self.labels if "next_token" in weights else None
        top = top if self.common is None else within(*top, self.common)
        if self.head.direct:
            x, weight, bias = _operands(self.head, self.hidden)
            with torch.autocast(x.device.type, enabled=False):
                return linear_top_k_divergence(
                    x, weight, *top, weights, labels=labels, bias=bias, count=1.0,
                    budget_bytes=self.losses.budget_bytes, **self.options,
                )  # fmt: skip

        def score(logits, part):
            label = None if labels is None else labels[part]
            chosen = (None if tensor is None else tensor[part] for tensor in top)
            return top_k_divergence_rows_(logits, *chosen, label, weights, **self.options)

        return self._own(score, weights)

    def _own(self, score, weights: dict[str, float]):
        scales = torch.tensor([weights.get(kind, 0.0) for kind in KINDS], dtype=torch.float64)
        loss, sums = _OwnHead.apply(
            self.hidden, self.head, score, scales.to(self.hidden.device), self.losses.budget_bytes,
            torch.is_grad_enabled(), *self.head.parameters(),
        )  # fmt: skip
        return loss, {kind: sums[KINDS.index(kind)] for kind in weights}


class _OwnHead(torch.autograd.Function):
    """Losses on logits that the model's own code makes. `score(logits, rows)` gives losses `[6, n]` and overwrites the
    logits by the gradient of their weighted sum; the way from there to the head's parameters is autograd's."""

    @staticmethod
    def forward(ctx, hidden, head, score, scales, budget, wanted, *parameters):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(len(KINDS), dtype=torch.float64, device=hidden.device)
        inputs = [hidden, *parameters]
        grads = [torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, wide), device=t.device) for t in inputs]
        for part in _parts(head, hidden, budget):
            with torch.set_grad_enabled(wanted):
                x = hidden[part].detach().requires_grad_(wanted)
                logits = head.logits(x)
            rows = logits.detach().to(wide, copy=True).contiguous()
            sums += score(rows, part).double().sum(1)
            if wanted:
                found = torch.autograd.grad(logits, [x, *parameters], rows.to(logits.dtype), allow_unused=True)
                grads[0][part] = found[0].to(wide)
                for total, gradient in zip(grads[1:], found[1:], strict=True):
                    if gradient is not None:
                        total += gradient
        ctx.grads = [gradient.to(t.dtype) for gradient, t in zip(grads, inputs, strict=True)]
        ctx.mark_non_differentiable(sums)
        return (sums * scales).sum().to(wide), sums

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        grads, ctx.grads = ctx.grads, None
        first, *rest = (gradient.mul_(upstream) for gradient in grads)
        return first, None, None, None, None, None, *rest


def _parts(head: Head, hidden: Tensor, budget: int | None) -> list[slice]:
    """Chunks of tokens that keep two sets of logits within the budget. A head of unknown size is asked with one token."""
    with torch.no_grad():
        vocabulary = head.rows if head.linear else head.logits(hidden[:1]).shape[-1]
    budget = budget or (CPU_BUDGET if hidden.device.type == "cpu" else GPU_BUDGET)
    step = max(1, budget // (8 * vocabulary))
    return [slice(first, first + step) for first in range(0, len(hidden), step)]


def _own_top_k(head, hidden, k, temperature, rows, budget):
    """`linear_top_k` with logits that the model's own code makes."""
    found = []
    for part in _parts(head, hidden, budget):
        logits = head.logits(hidden[part])[:, :rows].float() / temperature
        total = logits.logsumexp(1, keepdim=True)
        values, indices = logits.topk(min(k, logits.shape[1]), 1)
        rest = logits.scatter(1, indices, float("-inf")).logsumexp(1)
        found.append((indices, values - total, rest - total[:, 0]))
    return tuple(torch.cat(kind) for kind in zip(*found, strict=True))


def _operands(head: Head, hidden: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (times the head's factor), weight and bias in one dtype: on a GPU that of autocast, where it is on."""
    weight, bias = head.weight[:rows], None if head.bias is None else head.bias[:rows]
    kind = hidden.device.type
    if kind != "cpu":
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    return hidden, weight, bias


def within(indices: Tensor, values: Tensor, log_rest: Tensor | None, rows: int):
    """Top entries `[n, k]` of a vocabulary of which only the first `rows` count. An entry beyond gives its place to a token
    that is not among them, with what a token outside the top entries has on average (without `log_rest`: with the least
    value there)."""
    beyond = indices >= rows
    if not bool(beyond.any()):
        return indices, values, log_rest
    k = indices.shape[1]
    if 2 * k > rows:
        raise TersorError(f"the top {k} of a common vocabulary of {rows}", "give fewer: --top-k")
    taken = (indices[:, None, :] == torch.arange(2 * k, device=indices.device)[None, :, None]).any(-1)  # [n, 2k]
    free = taken.int().argsort(stable=True, dim=1)[:, :k]  # at least k of the first 2k ids are free
    if log_rest is None:
        other = values.masked_fill(beyond, float("inf")).amin(1)
    else:
        other = log_rest.clamp(min=-80.0) - torch.tensor(float(rows - k), device=values.device).log()
    return torch.where(beyond, free, indices), torch.where(beyond, other[:, None].to(values.dtype), values), log_rest

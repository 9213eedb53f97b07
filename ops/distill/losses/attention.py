"""Attention relations: which tokens resemble each other in the student's queries, keys and values, and the teacher's.

MiniLMv2 (arXiv:2012.15828): with A one of Q, K, V of a layer in relation heads, R = softmax(A A^T / sqrt(d)), d the width of
a relation head, the loss is KL(R_teacher | R_student), mean over the relation heads and over Q, K and V, sum over tokens.
Widths may differ: only the number of relation heads is common. It is the greatest common divisor of both numbers of heads,
for K and V of their own; neighbouring heads are joined. In causal models a token is compared with those up to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tersor.ops.distill.losses.layer_map import Pairs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BUDGET = 32 << 20  # bytes of one chunk of relations, student's or teacher's
KINDS = ("q", "k", "v")


def relation_heads(x: Tensor, count: int) -> Tensor:
    """`[B, T, heads, d]` as `[B, count, T, heads / count * d]`: neighbouring heads joined."""
    return x.flatten(2).unflatten(2, (count, -1)).transpose(1, 2)


def reference_relations(student: Tensor, teacher: Tensor, causal: bool) -> Tensor:
    """The definition: losses `[B, T]` of `[B, heads, T, d]`, which autograd differentiates. Heads must be equally many."""
    logs = []
    for x in (student, teacher):
        relation = x @ x.mT / math.sqrt(x.shape[-1])
        if causal:
            later = torch.ones(relation.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            relation = relation.masked_fill(later, -1e9)
        logs.append(relation.log_softmax(-1))
    return (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean(1)


class _Relations(torch.autograd.Function):
    """The same, summed over kept tokens, some rows of the relations at a time; gradients come with the forward pass."""

    @staticmethod
    def forward(ctx, student, teacher, keep, causal, budget):
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        s, t = student.to(wide), teacher.to(wide)
        batch, heads, length, _ = s.shape
        step = max(1, budget // (batch * heads * length * s.element_size()))
        scale = 1 / math.sqrt(s.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device=s.device)
        gradient = torch.zeros_like(s) if ctx.needs_input_grad[0] else None
        for first in range(0, length, step):
            part = slice(first, min(first + step, length))
            seen = slice(0, part.stop if causal else length)
            log_p = (s[:, :, part] @ s[:, :, seen].mT).mul_(scale)
            log_q = (t[:, :, part] @ t[:, :, seen].mT).div_(math.sqrt(t.shape[-1]))
            if causal:
                later = torch.ones(log_p.shape[-2:], dtype=torch.bool, device=s.device).triu(first + 1)
                log_p, log_q = log_p.masked_fill_(later, -math.inf), log_q.masked_fill_(later, -math.inf)
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
            q = log_q.exp()
            gap = log_q.sub_(log_p)
            if causal:
                gap.masked_fill_(later, 0.0)
            weight = keep[:, None, part].to(wide) / heads
            total += (torch.linalg.vecdot(q, gap) * weight).sum(dtype=torch.float64)
            if gradient is not None:
                pull = (log_p.exp_() - q).mul_(weight[..., None]).mul_(scale)
                gradient[:, :, part] += pull @ s[:, :, seen]
                gradient[:, :, seen] += pull.mT @ s[:, :, part]
        ctx.gradient = None if gradient is None else gradient.to(student.dtype)
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradient, ctx.gradient = ctx.gradient, None
        return None if gradient is None else gradient.mul_(upstream), None, None, None, None


def relation_loss(student: Tensor, teacher: Tensor, keep: Tensor, causal: bool, budget_bytes: int = BUDGET) -> Tensor:
    """Sum over the tokens of `keep` `[B, T]` of the relation loss of `[B, T, heads, d]` (one of Q, K, V of a layer)."""
    count = math.gcd(student.shape[2], teacher.shape[2])
    with torch.autocast(student.device.type, enabled=False):
        return _Relations.apply(
            relation_heads(student, count), relation_heads(teacher.detach(), count), keep, causal, budget_bytes
        )


class AttentionLoss(nn.Module):
    """Mean over Q, K, V and `pairs` of the relation losses."""

    def __init__(self, pairs: Pairs, causal: bool):
        super().__init__()
        self.pairs, self.causal = pairs, causal

    def forward(
        self, student: Mapping[int, Mapping[str, Tensor]], teacher: Mapping[int, Mapping[str, Tensor]], keep: Tensor
    ) -> Tensor:
        """Sum over kept tokens; `student[block]["q"]` `[B, T, heads, d]`."""
        losses = [
            relation_loss(student[s][kind], teacher[t][kind], keep, self.causal)
            for s, t in self.pairs
            for kind in KINDS
        ]
        return sum(losses) / len(losses)

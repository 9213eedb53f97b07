"""The terms of `--loss` as one number, and what they need of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from tersor.ops.distill.losses.attention import AttentionLoss
from tersor.ops.distill.losses.heads import Head
from tersor.ops.distill.losses.hidden import HiddenLoss
from tersor.ops.distill.losses.layer_map import LayerMap
from tersor.ops.distill.losses.logits import LogitLosses, LogitTargets
from tersor.ops.distill.losses.parse import Term
from torch import Tensor, nn


@dataclass
class States:
    """What one side gives for a micro-batch: block outputs `[B, T, H]` and attention inputs `[B, T, heads, d]` by block."""

    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """What the terms look at: the teacher's logits, and (student block, teacher block) whose outputs, or whose queries,
    keys and values, are compared."""

    logits: bool
    outputs: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int], ...]


def compared(terms: list[Term], layers: LayerMap | None) -> Compared:
    """`layers`: for hidden and attention."""
    by_name = {term.name: term for term in terms}
    attention = by_name.get("attention")
    return Compared(
        any(term.needs == "logits" for term in terms),
        layers.outputs if "hidden" in by_name else (),
        layers.attention[-int(attention.parameter) :] if attention else (),
    )


class Objective(nn.Module):
    """Weighted sum of all terms over kept tokens.

    Its parameters are those of the projection between unequal widths: to be trained with the student's, not exported.
    `widths`: hidden size of student and teacher, for the hidden term. `layers`: for hidden and attention.
    """

    def __init__(
        self,
        terms: list[Term],
        *,
        temperature: float = 1.0,
        top_k: int = 64,
        common: int | None = None,
        layers: LayerMap | None = None,
        widths: tuple[int, int] | None = None,
        causal: bool = True,
        seed: int = 0,
        budget_bytes: int | None = None,
    ):
        super().__init__()
        self.terms = {term.name: term for term in terms}
        self.compared = compared(terms, layers)
        on_logits = [term for term in terms if term.kind is not None]
        self.logits = LogitLosses(on_logits, temperature, top_k, common, budget_bytes) if on_logits else None
        self.hidden: HiddenLoss | None = None
        self.attention: AttentionLoss | None = None
        if term := self.terms.get("hidden"):
            self.hidden = HiddenLoss(self.compared.outputs, *widths, exponent=term.parameter, seed=seed)
        if "attention" in self.terms:
            self.attention = AttentionLoss(self.compared.attention, causal)

    def forward(
        self,
        ids: Tensor,
        keep: Tensor,
        hidden: Tensor | None = None,
        head: Head | None = None,
        teacher: LogitTargets | None = None,
        student_states: States | None = None,
        teacher_states: States | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, a sum over the tokens of `keep` `[B, T]` (never the last one of a sequence), and the
        sum of each term by name, without its weight. `hidden` `[B, T, H]`: what the student's `head` reads."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=ids.device)
        if self.logits is not None:
            total, parts = self.logits(hidden, head, ids, keep, teacher)
        if self.hidden is not None:
            loss = self.hidden(student_states.blocks, teacher_states.blocks, keep)
            total, parts["hidden"] = total + self.terms["hidden"].weight * loss, loss.detach()
        if self.attention is not None:
            loss = self.attention(student_states.attention, teacher_states.attention, keep)
            total, parts["attention"] = total + self.terms["attention"].weight * loss, loss.detach()
        return total, {name: parts[name] for name in self.terms}

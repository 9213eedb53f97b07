"""Which degrees of tensor and expert parallelism divide a model, and where one does not, the tensor and the numbers."""

from __future__ import annotations

from collections.abc import Iterable

from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.transform.rules import rules
from tersor.ops.plan_parallel.transform.segments import Rule, divides

NO_EXPERTS = "the model has no experts"


def legal_tp(model: PlanModel, most: int = 64) -> dict[int, str]:
    """Degree of tensor parallelism from 1 to `most` -> empty, or why not: the tensor and the numbers.

    A degree that divides but leaves every rank with all of the blocks' layers is not legal either.
    """
    found = [rule for rule in rules(model).values() if not rule.is_expert]
    legal = _legal(found, most)
    if not any(rule.dim is not None and rule.role != "vocab" for rule in found):
        why = "no layer inside the blocks is known to be cut by tensor parallelism: every rank would hold all of them"
        legal |= {n: legal[n] or why for n in range(2, most + 1)}
    return legal


def legal_etp(model: PlanModel, most: int = 64) -> dict[int, str]:
    """The same for cutting inside each expert."""
    found = [rule for rule in rules(model).values() if rule.is_expert]
    if not found:
        return {n: "" if n == 1 else NO_EXPERTS for n in range(1, most + 1)}
    legal = _legal(found, most)
    uncut = next((rule for rule in found if _is_whole_matrix(rule)), None)
    if uncut is not None:
        legal |= {n: legal[n] or f"{uncut.tensor}: {uncut.note or 'it is not cut'}" for n in range(2, most + 1)}
    return legal


def legal_ep(model: PlanModel, most: int = 256) -> dict[int, str]:
    """The same for dealing out whole experts."""
    layers: dict[int, Rule] = {}
    for rule in rules(model).values():
        if rule.is_expert:
            layers.setdefault(rule.experts, rule)
    if not layers:
        return {n: "" if n == 1 else NO_EXPERTS for n in range(1, most + 1)}
    result = {}
    for n in range(1, most + 1):
        bad = next((rule for experts, rule in layers.items() if experts % n), None)
        result[n] = "" if bad is None else f"{bad.tensor}: {bad.experts} experts are not a multiple of {n}"
    return result


def _is_whole_matrix(rule: Rule) -> bool:
    """Of an expert, in which nothing is cut although it is no vector for each expert."""
    return rule.role == "replicated" and len(rule.shape) > 1 and not rule.tensor.endswith("bias")


def _legal(found: Iterable[Rule], most: int) -> dict[int, str]:
    kinds: dict[tuple, Rule] = {}
    for rule in found:
        kinds.setdefault((rule.segments, rule.role, rule.blocked), rule)
    result = {}
    for n in range(1, most + 1):
        why = ((rule, text) for rule in kinds.values() if (text := divides(rule, n)))
        result[n] = next((f"{rule.tensor}: {text}" for rule, text in why), "")
    return result

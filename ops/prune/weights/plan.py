"""Which tensors get a mask, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.patterns import Pattern, parse_pattern
from tersor.ops.model.selection import Linear, check_policy, load_policy, policy_for, select
from tersor.ops.prune.plan import Action, Plan, keep, share_of
from tersor.ops.prune.request import Request

if TYPE_CHECKING:
    from tersor.ops.model.collected import Collected

DATA_FREE = ("magnitude", "random")


@dataclass
class Masks:
    """`sparsity` by tensor name; the allocation may change it before the work begins."""

    pattern: Pattern
    linears: dict[str, Linear] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)  # those whose sparsity the policy says
    allocation: dict = field(default_factory=dict)  # what the report says of it
    collected: Collected | None = None  # statistics from a file, with --stats


def needs_text(request: Request) -> bool:
    return request.stats is None and (request.method not in DATA_FREE or request.allocate in ("owl", "rd"))


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for a pattern that a width does not admit, or when nothing is selected."""
    pattern = parse_pattern(request.pattern)
    if pattern.kind == "n:m":
        _check_fixed(request, pattern)
    selection = select(checkpoint, request.include, request.exclude)
    masks = Masks(pattern)
    result = Plan(details=masks)
    policy = load_policy(request.policy)
    result.warnings += check_policy(policy, checkpoint, selection)
    if needs_text(request):
        checkpoint.require_config(f"which --method {request.method} needs to run the model")
    for name in checkpoint.tensors:
        linear = selection.linears.get(name)
        if linear is None:
            result.actions[name] = keep(checkpoint, name, selection.why_kept(name))
            continue
        settings = policy_for(policy, name)
        share = share_of(settings, name, request.sparsity)
        if settings.get("keep"):
            result.actions[name] = keep(checkpoint, name, "kept dense by the policy")
            continue
        misfit = pattern.misfit(linear.shape)
        if misfit:
            raise TersorError(
                f"{name}: --pattern {request.pattern} does not fit, {misfit}",
                "choose another pattern, or leave the tensor out with --exclude",
            )
        masks.linears[name] = linear
        masks.sparsity[name] = share
        if "sparsity" in settings:
            masks.fixed.add(name)
        info = checkpoint.tensors[name]
        result.actions[name] = Action("mask", "linear layer in a block", {name: (info.dtype, info.shape)})
    if not masks.linears:
        raise TersorError(f"{checkpoint.path}: no tensor is left to prune", "check --include, --exclude and --policy")
    return result


def _check_fixed(request: Request, pattern: Pattern) -> None:
    if request.rounds > 1 or request.allocate != "uniform":
        raise TersorError(
            f"--pattern {request.pattern} fixes the share of zeros of every layer",
            "leave --rounds and --allocate out, or use --pattern unstructured",
        )

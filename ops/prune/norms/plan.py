"""Which norms may be folded. From headers this is a guess by shape and name; the model's own code decides in `decide`."""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES
from tersor.ops.model.initial import FOLDED, folded_names
from tersor.ops.model.selection import NOT_LINEAR, compile_patterns
from tersor.ops.prune.plan import Action, Plan, keep
from tersor.ops.prune.request import Request

LOADERS = (
    "transformers warns of the tensors that are left out and sets them to the neutral value; loaders such as vLLM's may "
    "refuse: write them with --keep-shape"
)


@dataclass
class Reader:
    """A linear layer that takes a norm's gain, by checkpoint names."""

    weight: str
    bias: str | None
    transposed: bool  # stored as [in, out]


@dataclass
class Fold:
    """One norm that can go. `divided`: its bias stays, divided by the gain, since not every reader has one."""

    gain: str
    bias: str | None
    offset: float  # the norm multiplies by offset + gain
    readers: list[Reader]
    divided: bool = False
    droppable: bool = True  # whether loaders fill in the neutral value themselves


@dataclass
class Details:
    folds: list[Fold] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # tensor of a norm -> why it stays


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for a checkpoint without a config or without anything that could be a norm."""
    checkpoint.require_config("which says how the norms are used")
    wanted = chosen(checkpoint, request)
    steps = Plan(details=Details())
    for name, info in checkpoint.tensors.items():
        module = name.rpartition(".")[0].rsplit(".", 1)[-1]
        if len(info.shape) == 1 and info.dtype in FLOAT_DTYPES and NOT_LINEAR.search(module.lower()) and name in wanted:
            outputs = {name: (info.dtype, info.shape)} if request.keep_shape else {}
            steps.actions[name] = Action("fold", "if the model's code shows that linear layers alone read it", outputs)
        else:
            steps.actions[name] = keep(checkpoint, name, "not a norm")
    if all(action.action == "keep" for action in steps.actions.values()):
        raise TersorError(f"{checkpoint.path}: no norm is left to fold", "check --include and --exclude")
    if not request.keep_shape:
        steps.warnings.append(LOADERS)
    return steps


def chosen(checkpoint: Checkpoint, request: Request) -> set[str]:
    """Tensors that the patterns allow to be folded. Raises TersorError for a pattern that matches nothing."""
    included = compile_patterns(request.include, "--include")
    excluded = compile_patterns(request.exclude, "--exclude")
    for patterns, option in ((included, "--include"), (excluded, "--exclude")):
        for pattern in patterns:
            if not any(pattern.search(name) for name in checkpoint.tensors):
                raise TersorError(
                    f"{option} {pattern.pattern!r} matches no tensor of {checkpoint.path}",
                    f"names look like {next(iter(checkpoint.tensors), '(none)')!r}",
                )
    return {
        name
        for name in checkpoint.tensors
        if (not included or any(pattern.search(name) for pattern in included))
        and not any(pattern.search(name) for pattern in excluded)
    }


def assemble(checkpoint: Checkpoint, request: Request, details: Details) -> Plan:
    """What becomes of every tensor, now that it is known which norms can go."""
    steps = Plan(details=details)
    norms: dict[str, Action] = {}
    readers: dict[str, str] = {}
    missing: list[str] = []
    for fold in details.folds:
        for reader in fold.readers:
            readers[reader.weight] = f"takes the gain of {fold.gain}"
            if fold.bias and not fold.divided:
                readers[reader.bias] = f"takes the bias of {fold.bias}"
        into = ", ".join(reader.weight for reader in fold.readers[:3])
        into += f" and {len(fold.readers) - 3} more" if len(fold.readers) > 3 else ""
        for name in (fold.gain, fold.bias):
            if name is None:
                continue
            info = checkpoint.tensors[name]
            same = {name: (info.dtype, info.shape)}
            if fold.divided and name == fold.bias:
                norms[name] = Action(
                    "fold", "divided by the gain: not every linear layer that reads it has a bias", same
                )
            elif request.keep_shape or not fold.droppable:
                why = "" if request.keep_shape else "; transformers would not set it so by itself"
                norms[name] = Action("fold", f"neutral now, folded into {into}{why}", same)
            else:
                norms[name] = Action("drop", f"folded into {into}", {})
                missing.append(name)
    for name, info in checkpoint.tensors.items():
        if name in norms:
            steps.actions[name] = norms[name]
        elif name in readers:
            steps.actions[name] = Action("fold", readers[name], {name: (info.dtype, info.shape)})
        else:
            steps.actions[name] = keep(checkpoint, name, details.kept.get(name, "reads no norm that could be folded"))
    if missing:
        steps.config[FOLDED] = folded_names(checkpoint.config) + missing
        steps.warnings.append(LOADERS)
    return steps

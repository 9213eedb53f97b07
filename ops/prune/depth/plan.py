"""What goes and what becomes of the rest, for `--remove layers`, `attention` and `mlp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.selection import compile_patterns
from tersor.ops.prune.plan import Action, Plan, keep
from tersor.ops.prune.request import Request

if TYPE_CHECKING:
    from tersor.ops.model.branches import Branch
    from tersor.ops.model.skeleton import Skeleton
    from tersor.ops.prune.depth.renumber import Numbering

CALIBRATED = ("cosine", "knapsack")


@dataclass
class Candidate:
    """A block, or a branch of a block, that can be removed."""

    index: int
    names: list[str]  # its checkpoint tensors
    silent: list[str]  # those whose zeros silence it
    size: int  # parameters
    branch: Branch | None = None  # None: the whole block


@dataclass
class Depth:
    """`count` of the candidates go, by block number. `quality` is what measuring them gave."""

    checkpoint: Checkpoint
    request: Request
    skeleton: Skeleton
    numbers: Numbering
    candidates: dict[int, Candidate]
    count: int
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return "block" if self.request.remove == "layers" else self.request.remove

    def plan(self, chosen: list[int], reason: str) -> Plan:
        """The plan that removes the candidates `chosen`."""
        plan = Plan(details=self)
        layers = self.request.remove == "layers"
        gone = {name for index in chosen for name in self.candidates[index].names}
        silent = {name for index in chosen for name in self.candidates[index].silent}
        for name, info in self.checkpoint.tensors.items():
            block, entry = self.numbers.block(name), (info.dtype, info.shape)
            if self.request.keep_shape and name in silent:
                plan.actions[name] = Action("mask", f"zeros silence {self.what} {block}: {reason}", {name: entry})
            elif name in gone and not self.request.keep_shape:
                plan.actions[name] = Action("drop", f"{self.what} {block} goes: {reason}", {})
            elif self.request.keep_shape or not layers or block is None or self._moved(block, chosen) == block:
                plan.actions[name] = keep(self.checkpoint, name, "stays as it is")
            else:
                new = self._moved(block, chosen)
                outputs = {self.numbers.renamed(name, new): entry}
                plan.actions[name] = Action("move", f"block {block} becomes block {new}", outputs)
        if self.request.keep_shape:
            return plan
        plan.config = self._layers_config(chosen) if layers else self._lists(chosen)
        if not layers:
            plan.warnings.append(
                "transformers by itself makes up new weights for the deleted branches; tersor and LLM-Drop read the lists of "
                "them in config.json, and --keep-shape writes zeros instead, for any loader"
            )
        return plan

    @staticmethod
    def _moved(block: int, chosen: list[int]) -> int:
        return block - sum(index < block for index in chosen)

    def _layers_config(self, chosen: list[int]) -> dict[str, Any]:
        """Number of blocks, per-layer lists, and lists of blocks or tensors that this toolkit writes."""
        from tersor.ops.model.initial import FOLDED, folded_names
        from tersor.ops.model.skeleton import DROP_LISTS
        from tersor.ops.prune.depth.renumber import renumbered_config

        kept = [index for index in range(len(self.skeleton.blocks)) if index not in chosen]
        changes = renumbered_config(self.skeleton, kept)
        config = self.checkpoint.config
        for key in DROP_LISTS.values():
            if config.get(key):
                changes[key] = [kept.index(index) for index in config[key] if index in kept]
        if config.get(FOLDED):
            blocks = {name: self.numbers.block(name) for name in folded_names(config)}
            changes[FOLDED] = [
                name if block is None else self.numbers.renamed(name, self._moved(block, chosen))
                for name, block in blocks.items()
                if block not in chosen
            ]
        return changes

    def _lists(self, chosen: list[int]) -> dict[str, Any]:
        from tersor.ops.model.skeleton import DROP_LISTS, drop_lists

        lists = drop_lists(self.checkpoint.config)
        lists[self.request.remove] = sorted([*lists[self.request.remove], *chosen])
        return {key: lists[kind] for kind, key in DROP_LISTS.items()}


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for what the model lacks, or when nothing or everything would go.

    Which candidates go is only known here for `even`; for the other methods evenly spaced ones stand in until the text has
    been read.
    """
    depth = survey(checkpoint, request)
    order = list(depth.candidates)
    if request.method == "even":
        return depth.plan([order[place] for place in _spaced(depth)], "evenly spaced")
    stand_in = [order[int((place + 0.5) * len(order) / depth.count)] for place in range(depth.count)]
    result = depth.plan(stand_in, f"stands in for what {request.method} will choose")
    result.warnings.append(
        f"--method {request.method} chooses by the calibration text which {depth.count} of {len(order)} go; evenly spaced "
        "ones stand in for them here"
    )
    return result


def survey(checkpoint: Checkpoint, request: Request) -> Depth:
    """What can be removed and how much of it goes."""
    import torch
    from tersor.formats.dense import DenseView
    from tersor.ops.model.skeleton import Skeleton
    from tersor.ops.prune.depth.renumber import numbering

    _check_options(request)
    checkpoint.require_config("which says what model this is")
    skeleton = Skeleton(DenseView(checkpoint), torch.device("cpu"))
    reads = skeleton.model.base_model.main_input_name
    if request.method in CALIBRATED and reads != "input_ids":
        raise TersorError(
            f"{checkpoint.path}: a {type(skeleton.model).__name__} reads {reads}, and a text cannot calibrate it",
            "use --method even, which needs none",
        )
    numbers = numbering(skeleton)
    depth = Depth(checkpoint, request, skeleton, numbers, _candidates(checkpoint, request, skeleton, numbers), 0)
    if not depth.candidates:
        raise TersorError(
            f"{checkpoint.path}: no {depth.what} is left to remove",
            "check --include and --exclude, and its config.json",
        )
    depth.count = round(request.sparsity * len(depth.candidates))
    _check_count(depth)
    return depth


def _check_options(request: Request) -> None:
    if request.allocate != "uniform" or request.rounds != 1 or request.policy is not None:
        raise TersorError(
            f"--remove {request.remove} takes whole {'blocks' if request.remove == 'layers' else 'branches'} at once",
            "leave --allocate, --rounds and --policy out",
        )


def _candidates(
    checkpoint: Checkpoint, request: Request, skeleton: Skeleton, numbers: Numbering
) -> dict[int, Candidate]:
    from tersor.ops.model.branches import find_all_branches, only_branch, passes_through
    from tersor.ops.model.skeleton import drop_lists

    of_block: dict[int, list[str]] = {index: [] for index in range(len(skeleton.blocks))}
    for name in checkpoint.tensors:
        of_block.setdefault(numbers.block(name), []).append(name)
    indices = [index for index in range(len(skeleton.blocks)) if _is_named(request, checkpoint, of_block[index])]
    found: dict[int, Candidate] = {}
    if request.remove == "layers":
        branches = find_all_branches(skeleton, indices) if request.keep_shape else {}
        if branches and not passes_through(skeleton, indices[0], branches[indices[0]]):
            raise TersorError(
                f"{skeleton.block_name(indices[0])}: with both branches silent it still changes what it is given",
                "zeros cannot stand for a removed block here: leave --keep-shape out",
            )
        for index in indices:
            silent = [
                name for branch in branches.get(index, []) for name in _sources(skeleton, index, branch.projections)
            ]
            found[index] = _candidate(checkpoint, index, of_block[index], silent)
        return found
    done = drop_lists(checkpoint.config)[request.remove]
    indices = [index for index in indices if index not in done]
    for index, branches in find_all_branches(skeleton, indices).items():
        branch = only_branch(skeleton, branches, request.remove, index)
        silent = _sources(skeleton, index, branch.projections)
        found[index] = _candidate(checkpoint, index, _sources(skeleton, index, branch.parameters), silent, branch)
    return found


def _candidate(checkpoint: Checkpoint, index: int, names: list[str], silent: list[str], branch=None) -> Candidate:
    return Candidate(index, names, silent, sum(checkpoint.tensors[name].params for name in names), branch)


def _sources(skeleton: Skeleton, index: int, parameters: frozenset[str]) -> list[str]:
    """The checkpoint tensors of some parameters of a block."""
    prefix = skeleton.block_name(index)
    return [source for name in sorted(parameters) for source in skeleton.by_parameter.get(f"{prefix}.{name}", [])]


def _is_named(request: Request, checkpoint: Checkpoint, names: list[str]) -> bool:
    """Whether --include and --exclude leave a block with these tensors among the candidates."""
    included, excluded = compile_patterns(request.include, "--include"), compile_patterns(request.exclude, "--exclude")
    for pattern in [*included, *excluded]:
        if not any(pattern.search(name) for name in checkpoint.tensors):
            raise TersorError(
                f"{pattern.pattern!r} matches no tensor of {checkpoint.path}",
                f"names look like {next(iter(checkpoint.tensors), '(none)')!r}",
            )
    matches = [any(pattern.search(name) for name in names) for pattern in included]
    return (not included or any(matches)) and not any(p.search(name) for p in excluded for name in names)


def _check_count(depth: Depth) -> None:
    from tersor.ops.model.skeleton import drop_lists

    total, share, what = len(depth.candidates), depth.request.sparsity, depth.what
    if depth.count == 0:
        raise TersorError(
            f"--sparsity {share:g} of {total} {what}s rounds to none", f"{1 / total:.3g} removes one of them"
        )
    gone = drop_lists(depth.checkpoint.config).get(depth.request.remove, [])
    if len(gone) + depth.count >= len(depth.skeleton.blocks):
        raise TersorError(f"--sparsity {share:g} of {total} {what}s leaves the model none of them", "lower --sparsity")
    if depth.request.method == "even":
        _spaced(depth)


def _spaced(depth: Depth) -> list[int]:
    from tersor.ops.model.block_importance import evenly_spaced

    total = len(depth.candidates)
    try:
        return evenly_spaced(total, depth.count)
    except ValueError as error:
        raise TersorError(
            f"--method even keeps the first and the last of {total} {depth.what}s, and {depth.count} are to go",
            "lower --sparsity, or use --method cosine",
        ) from error

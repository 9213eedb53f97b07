"""What becomes of every tensor when a sub-network of an elastic checkpoint is sliced out: `--extract CONFIG`.

Neurons and heads are cut as `--remove neurons` and `heads` cut them, blocks go as with `--remove layers`; only which ones
stay is not chosen here, the first ones of each order do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.elastic import FILE, WIDTHS, Nesting, SubNetwork, read_elastic, resolve
from tersor.formats.errors import TersorError
from tersor.ops.prune.plan import Action, Plan
from tersor.ops.prune.request import Request

METHOD = "prefix"
TARGET = "extract"
SAYS_ITSELF = "--extract says itself what stays"


def check(request: Request) -> None:
    """Raises TersorError for options that have no part in this; the others get the values that the report shows."""
    if (
        request.remove not in ("weights", TARGET)
        or request.method not in (None, METHOD)
        or request.sparsity is not None
    ):
        raise TersorError(SAYS_ITSELF, "leave --remove, --method and --sparsity out")
    if request.allocate != "uniform" or request.rounds != 1 or request.multiple_of != 1 or request.merge:
        raise TersorError(SAYS_ITSELF, "leave --allocate, --rounds, --multiple-of and --merge out")
    if request.pattern != "unstructured" or request.include or request.exclude or request.policy:
        raise TersorError(SAYS_ITSELF, "leave --pattern, --include, --exclude and --policy out")
    if request.stats is not None or request.calib is not None:
        raise TersorError("--extract reads no text", "leave --stats and --calib out")
    request.remove, request.method = TARGET, METHOD


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for a checkpoint that is not elastic, or a sub-network that its config.json cannot describe."""
    checkpoint.require_config("which --extract needs to run the model")
    nesting = read_elastic(checkpoint)
    if nesting is None:
        raise TersorError(
            f"{checkpoint.path}: has no {FILE}, so nothing says which parts of it work alone",
            "train it with tersor distill --elastic, or use --remove neurons, heads or layers",
        )
    network = resolve(request.extract, nesting, checkpoint.path)
    request.extract = network.describe()  # so that another file of the same name is another run
    import torch
    from tersor.formats.dense import DenseView
    from tersor.ops.model.skeleton import Skeleton

    skeleton = Skeleton(DenseView(checkpoint), torch.device("cpu"))
    return _Extraction(checkpoint, request, nesting, network, skeleton).plan()


class _Extraction:
    def __init__(self, checkpoint: Checkpoint, request: Request, nesting: Nesting, network: SubNetwork, skeleton):
        self.checkpoint, self.request, self.nesting, self.network = checkpoint, request, nesting, network
        self.skeleton = skeleton
        if len(nesting.blocks) != len(skeleton.blocks):
            raise self._stale(f"{len(nesting.blocks)} blocks, the model has {len(skeleton.blocks)}")
        self.kept = nesting.kept_blocks(network.depth)
        self.kinds = {group.module: group.kind for group in nesting.groups}

    def plan(self) -> Plan:
        from tersor.ops.prune.width.cut import Details
        from tersor.ops.prune.width.plan import lay_out

        groups = {kind: self._units(kind) for kind in WIDTHS}
        reduced = [group for found in groups.values() for group in found]
        result = Plan(details=Details(TARGET, [], {}, self.skeleton, False, False, blocks=self.kept))
        details = result.details
        details.units = [group for group in reduced if group.block in self.kept]
        details.choice = {group.module: self._first(group) for group in details.units}
        result.actions = lay_out(self.checkpoint, self.request, details)
        configs = [] if self.request.keep_shape else [self._width_config(kind, groups[kind]) for kind in WIDTHS]
        if len(self.kept) < len(self.skeleton.blocks):
            depth = self._depth_plan()
            configs.append(depth.config)
            for name, action in depth.actions.items():
                result.actions[name] = _both(result.actions[name], action)
                if action.action == "mask":
                    details.silent.add(name)
        result.config = merged(self.checkpoint.config, configs, self.checkpoint)
        result.warnings = self._warnings()
        return result

    def _units(self, kind: str) -> list:
        """Units of a kind, of all blocks, if some of a block that stays go. Raises TersorError where they are not those
        of elastic.json, or where blocks keep different numbers and the shapes are to change."""
        from tersor.ops.model.units import find_units

        listed = {group.module: group.count for group in self.nesting.groups if group.kind == kind}
        if not listed:
            if any(share not in (0, 1) for share in self.network.shares(kind)):
                raise TersorError(
                    f"{self.checkpoint.path}: its {kind} are not nested, {FILE} lists none",
                    f"leave {kind} out of --extract",
                )
            return []
        if all(share in (0, 1) for share in self.network.shares(kind)):
            return []
        found = find_units(self.checkpoint, self.skeleton, kind)
        for group in found:
            if listed.get(group.module) != group.count:
                raise self._stale(f"{listed.get(group.module, 'no')} {kind} in {group.module}, the model {group.count}")
        if not self.request.keep_shape:
            self._check_even(kind, found)
        return found

    def _stale(self, what: str) -> TersorError:
        return TersorError(
            f"{self.checkpoint.path}: {FILE} is of another model: it has {what}", "take the folder that distill wrote"
        )

    def _count(self, group) -> int:
        return self.nesting.kept_units(group.count, self.network.shares(self.kinds[group.module])[group.block])

    def _first(self, group):
        import torch

        return torch.arange(self._count(group))

    def _check_even(self, kind: str, groups: list) -> None:
        first: dict[int, Any] = {}
        for group in groups:
            if group.block not in self.kept:
                continue
            other = first.setdefault(group.count, group)
            if self._count(other) != self._count(group):
                raise TersorError(
                    f"{self._count(other)} of {other.count} {kind} stay in block {other.block} and {self._count(group)} in "
                    f"block {group.block}, and config.json has one number for all blocks",
                    f"write zeros with --keep-shape, or give one share for all blocks, {kind}=0.5",
                )

    def _width_config(self, kind: str, groups: list) -> dict[str, Any]:
        """The entries of config.json for narrower blocks, as if all of them stayed."""
        if not groups:
            return {}
        from tersor.ops.prune.width.cut import Details
        from tersor.ops.prune.width.plan import changed_config, lay_out

        kept = {group.count: self._count(group) for group in groups if group.block in self.kept}
        details = Details(kind, groups, kept, self.skeleton, False, False)
        if all(count == number for count, number in kept.items()):
            return {}
        actions = lay_out(self.checkpoint, self.request, details)
        return changed_config(self.checkpoint, details, Plan(actions, details=details))

    def _depth_plan(self) -> Plan:
        from tersor.ops.prune.depth.plan import survey

        total = len(self.skeleton.blocks)
        request = replace(self.request, remove="layers", sparsity=1 - len(self.kept) / total)
        depth = survey(self.checkpoint, request)
        gone = [block for block in range(total) if block not in self.kept]
        return depth.plan(gone, f"{len(self.kept)} of {total} blocks stay")

    def _warnings(self) -> list[str]:
        network, options = self.network, self.nesting.options
        asked = {"depth": {network.depth}} | {
            kind: {share for share in network.shares(kind) if share} for kind in WIDTHS
        }
        unknown = [f"{key} {share:g}" for key, shares in asked.items() for share in sorted(shares - set(options[key]))]
        return [f"not trained at {', '.join(unknown)}: {FILE} has other shares"] if unknown else []


def _both(width: Action, depth: Action) -> Action:
    """One action for a tensor that may be sliced and may move or go with its block."""
    if depth.action != "move":
        return width if depth.action == "keep" else depth
    ((_, entry),) = width.outputs.items()
    ((name, _),) = depth.outputs.items()
    if width.action == "keep":
        return Action("move", depth.reason, {name: entry})
    return Action(width.action, f"{width.reason}; {depth.reason}", {name: entry})


def merged(raw: dict, changes: list[dict], checkpoint: Checkpoint) -> dict[str, Any]:
    """Changes of config.json that were found one by one, together. Raises TersorError when two change one entry."""
    result: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            if key not in result or result[key] == raw.get(key):
                result[key] = value
            elif isinstance(value, dict) and isinstance(result[key], dict) and isinstance(raw.get(key), dict):
                inner = raw[key]
                mine = [
                    {k: v for k, v in found.items() if k not in inner or inner[k] != v}
                    for found in (result[key], value)
                ]
                result[key] = {**inner, **merged(inner, mine, checkpoint)}
            elif value not in (raw.get(key), result[key]):
                raise TersorError(
                    f"{checkpoint.path}: both fewer blocks and narrower ones change {key!r} of config.json",
                    "extract the width first, and remove layers after it",
                )
    return result

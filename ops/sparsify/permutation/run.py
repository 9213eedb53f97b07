"""Permutations of a whole model: found block by block, each for the importance of the layers that are to be masked.

A block is filled once. The order of its channels is chosen, its weights are permuted, and what it computes on random
activations must be what it computed before; where it is not, its permutations are dropped and the report says so.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.fold import Fold
from tersor.ops.model.patterns import Pattern
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.units import Slot, probe_pass
from tersor.ops.sparsify.permutation.groups import KINDS, Group, find_groups
from tersor.ops.sparsify.permutation.search import Face, best_order, face, kept_by
from torch import nn

Importance = Callable[[str, torch.Tensor], torch.Tensor]
TOLERANCE = 1e-4
STREAM = "stream"
STREAM_PROFILES = 16384  # rows of all layers that the order of the hidden channels is chosen by


def magnitude(name: str, weight: torch.Tensor) -> torch.Tensor:
    """|w| `[out, in]`."""
    return weight.float().abs()


@dataclass
class Kept:
    """Importance that the pattern keeps in some layers, before and after, and all that there is."""

    before: float = 0.0
    after: float = 0.0
    total: float = 0.0

    def add(self, other: Kept) -> None:
        self.before, self.after = self.before + other.before, self.after + other.after
        self.total += other.total

    def shares(self) -> dict[str, float]:
        return {"before": self.before / self.total, "after": self.after / self.total} if self.total else {}


@dataclass
class Permutations:
    """What moves, and what it is good for."""

    fold: Fold = field(default_factory=Fold)
    layers: dict[str, Kept] = field(default_factory=dict)  # weight that will be masked -> its importance
    groups: list[tuple[Group, list[str]]] = field(default_factory=list)  # and the masked weights that they bear upon
    reasons: list[str] = field(default_factory=list)
    squared: bool = False
    seconds: float = 0.0

    @property
    def names(self) -> set[str]:
        """The tensors that `apply` changes."""
        return self.fold.names

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Tensor `name`, in the shape and dtype it is stored in, as the permuted model holds it: exact."""
        return self.fold.apply(name, tensor)

    def report(self) -> dict:
        """Shares of the importance that the pattern keeps; for tiles, which are chosen by it, of its square."""
        everything, kinds = Kept(), {}
        for found in self.layers.values():
            everything.add(found)
        entries = []
        for group, names in self.groups:
            mine = Kept()
            for name in names:
                mine.add(self.layers.get(name, Kept()))
            kind = kinds.setdefault(group.kind, [0, 0, Kept()])
            kind[0], kind[1] = kind[0] + 1, kind[1] + group.units.count
            kind[2].add(mine)
            entries.append(
                {"module": group.units.module, "kind": group.kind, "channels": group.units.count,
                 "moved": any(slot.name in self.names for slot in group.units.slots), "kept": mine.shares()}
            )  # fmt: skip
        return {
            "measure": "squared importance" if self.squared else "importance",
            "kept": everything.shares(),
            "kinds": {
                kind: {"groups": count, "channels": channels, "kept": found.shares()}
                for kind, (count, channels, found) in kinds.items()
            },
            "groups": entries,
            "tensors": len(self.names),
            "reasons": self.reasons,
            "seconds": self.seconds,
        }


def find_permutations(
    view: DenseView,
    pattern: Pattern,
    sparsity: float,
    linears: Collection[str],
    device: torch.device,
    importance: Importance = magnitude,
    groups: tuple[str, ...] = KINDS,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    seed: int = 0,
    skeleton: Skeleton | None = None,
) -> Permutations:
    """Orders of neurons, values and (on request) the stream under which `pattern` keeps more of `linears`.

    importance(name, weight `[out, in]` as the unpermuted model has it) -> scores `[out, in]` as `keep_mask` takes them.
    A model that has no such channels, or cannot be run, gives permutations that move nothing, with the reasons.
    """
    began = time.perf_counter()
    result = Permutations(squared=pattern.kind == "tile")
    try:
        _Finder(view, pattern, sparsity, set(linears), device, importance, groups, progress, seed, result).run(skeleton)
    except TersorError as error:
        result.fold = Fold()
        result.layers = {name: Kept(found.before, found.before, found.total) for name, found in result.layers.items()}
        result.reasons.append(str(error))
    result.seconds = time.perf_counter() - began
    return result


class _Finder:
    def __init__(self, view, pattern, sparsity, linears, device, importance, kinds, progress, seed, result):
        self.view, self.pattern, self.sparsity, self.linears = view, pattern, sparsity, linears
        self.device, self.importance, self.kinds, self.progress, self.seed = device, importance, kinds, progress, seed
        self.result: Permutations = result
        self.shapes = {name: entry.shape for name, entry in view.tensors.items()}
        self.stream: torch.Tensor | None = None

    def run(self, skeleton: Skeleton | None) -> None:
        if self.pattern.kind == "unstructured":
            raise TersorError("an unstructured mask keeps the same weights in any order", "a pattern has places")
        if self.view.is_quantized or self.view.is_factorised:
            raise TersorError(
                "the weights are stored as codes or factors, whose groups and ranks do not move with single channels",
                "permute before quantizing",
            )
        self.skeleton = skeleton = skeleton or Skeleton(self.view, self.device)
        found, reasons = find_groups(skeleton, tuple(kind for kind in KINDS if kind in self.kinds))
        self.result.reasons += reasons
        self.passed = probe_pass(skeleton)
        if STREAM in self.kinds:
            self._stream()
        by_block: dict[int, list[Group]] = {}
        for group in found:
            if self._useful(group):
                by_block.setdefault(group.units.block, []).append(group)
        count = len(skeleton.blocks)
        for index in range(count):
            self.progress("permutations", index, count)
            self._block(index, by_block.get(index, []))
        self.progress("permutations", count, count)
        for name in sorted(self.linears - self.result.layers.keys()):  # outside the blocks
            if len(self.shapes[name]) == 2:
                self._measure(name, self._scores(name, self.view.read(name)))

    def _useful(self, group: Group) -> bool:
        """Whether the order of these channels has any effect on a layer that is to be masked."""
        return any(
            slot.name in self.linears and self._width(slot, len(self.shapes[slot.name])) > 1
            for slot in group.units.slots
        )

    def _width(self, slot: Slot, dimensions: int) -> int:
        if dimensions != 2:
            return 1
        axis = self._axis(slot)
        if self.pattern.kind == "n:m":
            return self.pattern.m if axis else 1
        return self.pattern.columns if axis else self.pattern.rows

    def _axis(self, slot: Slot) -> int:
        """Axis of the slot in the weight `[out, in]`."""
        return 1 - slot.axis if slot.name in self.transposed else slot.axis

    @functools.cached_property
    def transposed(self) -> set[str]:
        """Weights stored `[in, out]`."""
        modules = dict(self.skeleton.model.named_modules())
        return {
            name
            for name, source in self.skeleton.sources.items()
            if source.parameter.endswith(".weight")
            and type(modules.get(source.parameter.removesuffix(".weight"))).__name__ == "Conv1D"
        }

    def _scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Importance `[out, in]` of a stored tensor."""
        matrix = weight.T if name in self.transposed else weight
        return self.importance(name, matrix).detach().float().cpu()

    def _folded(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        if name in self.transposed:
            return self.result.apply(name, scores.T).T
        return self.result.apply(name, scores)

    def _measure(self, name: str, scores: torch.Tensor) -> None:
        """Note what the pattern keeps of a layer before and after all that is folded by now."""
        if self.pattern.misfit(tuple(scores.shape)):
            return
        total = float((scores.square() if self.result.squared else scores).sum(dtype=torch.float64))
        before = kept_by(scores, self.pattern, self.sparsity)
        after = before
        if name in self.result.names:
            after = kept_by(self._folded(name, scores), self.pattern, self.sparsity)
        self.result.layers[name] = Kept(before, after, total)

    def _faces(self, group: Group, scores: dict[str, torch.Tensor]) -> list[Face]:
        slots = [slot for slot in group.units.slots if slot.name in scores]
        found = [face(self._folded(slot.name, scores[slot.name]), self._axis(slot), slot.index, self.pattern)
                 for slot in slots]  # fmt: skip
        return [item for item in found if item is not None]

    @torch.no_grad()
    def _block(self, index: int, groups: list[Group]) -> None:
        masked = [name for name in self.skeleton.checkpoint_names(index) if name in self.linears]
        if not masked and not groups and self.stream is None:
            return
        with self.skeleton.filled(index) as block:
            parameters = filled_parameters(self.skeleton, index, block)
            done: list[tuple[Group, list[str]]] = []
            for group in groups:
                names = [slot.name for slot in group.units.slots if slot.name in self.linears]
                names = [name for name in dict.fromkeys(names) if len(self.shapes[name]) == 2]
                scores = {name: self._scores(name, parameters[name]) for name in names}
                faces = self._faces(group, scores)
                if faces:
                    order = best_order(faces, self.pattern, self.sparsity, group.classes, self.seed)
                    self.result.fold.add(group.units, order, self.shapes)
                for name in names:
                    self._measure(name, scores[name])
                done.append((group, [name for name in names if name in self.result.layers]))
            for name in masked:
                if name not in self.result.layers:
                    self._measure(name, self._scores(name, parameters[name]))
            self.result.groups += done
            wrong = self._differs(index, block, parameters)
        if wrong is None:
            return
        if self.stream is not None:
            raise TersorError(wrong, "leave the stream out")
        moved = {slot.name for group in groups for slot in group.units.slots}
        self.result.fold.remove(moved)
        for name in moved & self.result.layers.keys():
            self.result.layers[name].after = self.result.layers[name].before
        self.result.reasons.append(wrong)

    def _differs(self, index: int, block: nn.Module, parameters: dict[str, nn.Parameter]) -> str | None:
        """Permutes the filled block and compares what it computes."""
        mine = [name for name in parameters if name in self.result.names]
        if not mine:
            return None
        shape = _first(self.passed).shape
        x = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(self.skeleton.device)
        expected = self.passed.apply(index, block, 0, x)
        for name in mine:
            parameters[name].copy_(self.result.apply(name, parameters[name]))
        if self.stream is not None:
            x, expected = x[..., self.stream], expected[..., self.stream]
        found = self.passed.apply(index, block, 0, x)
        return _compare(expected, found, self.skeleton.block_name(index))

    def _stream(self) -> None:
        """One order of the hidden channels for the whole model, from a sample of the rows of all masked layers."""
        from tersor.ops.model.stream import stream_units

        try:
            units = stream_units(self.view.checkpoint, self.skeleton)
        except TersorError as error:
            self.result.reasons.append(str(error))
            return
        group = Group(STREAM, units, torch.zeros(units.count, dtype=torch.long))
        slots = [slot for slot in units.slots
                 if slot.name in self.linears and self._width(slot, len(self.shapes[slot.name])) > 1]  # fmt: skip
        most = max(16, STREAM_PROFILES // max(1, len(slots)))
        faces = []
        for number, slot in enumerate(slots):
            self.progress("stream", number, len(slots))
            found = self._faces(Group(STREAM, _only(units, slot), group.classes),
                                {slot.name: self._scores(slot.name, self.view.read(slot.name))})  # fmt: skip
            for item in found:
                rows = torch.linspace(0, len(item.values) - 1, min(most, len(item.values))).long()
                faces.append(Face(item.values[rows].contiguous(), item.index, item.width))
        if not faces:
            return
        order = best_order(faces, self.pattern, self.sparsity, group.classes, self.seed)
        names = list(dict.fromkeys(slot.name for slot in slots))
        self.result.fold.add(units, order, self.shapes)
        for name in names:
            self._measure(name, self._scores(name, self.view.read(name)))
        kept = [self.result.layers.pop(name) for name in names if name in self.result.layers]
        wrong = None
        if sum(item.after - item.before for item in kept) <= 0:
            wrong = "no order of the hidden channels keeps more in all layers together"
        wrong = wrong or self._shell_differs(order)
        if wrong is not None:
            self.result.fold = Fold()
            self.result.reasons.append(wrong)
            return
        self.stream = order.to(self.skeleton.device)
        self.result.groups.append((group, names))

    @torch.no_grad()
    def _shell_differs(self, order: torch.Tensor) -> str | None:
        """Permutes what lies outside the blocks, compares embeddings and logits, and puts it back."""
        from tersor.ops.model.skeleton import assign

        skeleton, before = self.skeleton, _first(self.passed)
        order = order.to(before.device)
        x = torch.randn(before.shape, generator=torch.Generator().manual_seed(1)).to(before.device)
        tail = _tail(self.passed, x)
        inside, kept = skeleton.block_prefix + ".", {}
        for name in sorted(self.result.names):
            parameter = skeleton.sources[name].parameter
            if not parameter.startswith(inside) and parameter not in kept:
                kept[parameter] = skeleton.model.get_parameter(parameter).data
                assign(skeleton.model, parameter, self.result.apply(name, kept[parameter]))
        skeleton.model.tie_weights()
        try:
            permuted = probe_pass(skeleton)
            wrong = _compare(before[..., order], _first(permuted), "the embeddings")
            if wrong is None and tail is not None:
                expected, states = tail
                found, _ = _tail(permuted, x[..., order].contiguous())
                wrong = _compare(expected[..., order] if states else expected, found, "the output head")
        finally:
            for parameter, value in kept.items():
                assign(skeleton.model, parameter, value)
            skeleton.model.tie_weights()
        return wrong


def filled_parameters(skeleton: Skeleton, index: int, block: nn.Module) -> dict[str, nn.Parameter]:
    """Checkpoint name -> parameter of a filled block, in the stored orientation."""
    prefix = skeleton.block_name(index) + "."
    own = dict(block.named_parameters())
    found = {name: layer.weight for name, layer in skeleton.linears(index).items()}
    for name in skeleton.checkpoint_names(index):
        parameter = skeleton.sources[name].parameter.removeprefix(prefix)
        if name not in found and skeleton.sources[name].expert is None and parameter in own:
            found[name] = own[parameter]
    return found


def _only(units, slot: Slot):
    return replace(units, slots=[slot])


def _first(run: BlockPass) -> torch.Tensor:
    hidden = run.hidden.take(0)
    run.hidden.put(0, hidden)
    return hidden


def _tail(run: BlockPass, x: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """Logits that the model makes of `x` after its last block, or its final states where it makes none; and whether these
    are states. None for images."""
    if run.input_name != "input_ids":
        return None
    kept = run.hidden.take(0)
    run.hidden.put(0, x)
    try:
        return torch.cat([logits for _, logits in run.logits(0)], 1), False
    except TersorError:  # a bare encoder
        return run.final_states(0, x), True
    finally:
        run.hidden.put(0, kept)


def _compare(expected: torch.Tensor, found: torch.Tensor, where: str) -> str | None:
    difference, scale = (expected - found).abs().max(), expected.abs().max()
    if bool(difference <= TOLERANCE * scale):
        return None
    return f"{where}: permuted it computes something else (by {float(difference / scale):.2g} of its largest value)"

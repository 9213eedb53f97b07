"""Units sorted by importance, once: a permutation that leaves the function as it is and makes sub-networks prefixes.

Once-for-All (Cai et al., ICLR 2020) sorts channels so that a smaller width keeps the first ones. Here these are the
neurons of every FFN or expert and the KV heads of every attention, with all that belongs to them (`model/units.py`).
Importance of a unit is the norm of its activation times that of the column that reads it, over calibration text; without
text, the norm of its weights. Blocks are ranked by how far they turn the residual stream, the first and the last ahead of
all others; without text, such that those that stay lie as evenly as they can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.elastic import WIDTHS, Nesting, SortedUnits, read_elastic
from tersor.formats.errors import TersorError
from tersor.formats.sparse import view as sparse
from tersor.ops.model import unit_scores
from tersor.ops.model.block_importance import MeanCosine
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite
from tersor.ops.model.fold import Fold
from tersor.ops.model.gradients import block_parameters
from tersor.ops.model.resize import build_meta, quiet, set_keys, shapes_of
from tersor.ops.model.skeleton import Skeleton, weight_matrix
from tersor.ops.model.statistics import InputStatistics, is_starved
from tersor.ops.model.stream import explicit_head_size
from tersor.ops.model.units import Units, find_units, probe_pass
from torch import nn

Progress = Callable[[str, int, int], None]
TOLERANCE = 1e-4
METHODS = ("activation", "magnitude")


@dataclass
class Order:
    """`units` by kind, the `nesting` without options, and the `fold` that sorts the tensors.

    `reasons`: why a kind of units is left out. `returns_tuple`: what the model's own code expects of its blocks.
    """

    skeleton: Skeleton
    units: dict[str, list[Units]]
    nesting: Nesting
    fold: Fold = field(default_factory=Fold)
    reasons: list[str] = field(default_factory=list)
    returns_tuple: bool = False


class SortedCheckpoint(Checkpoint):
    """A checkpoint whose units are sorted while its tensors are read."""

    def __init__(self, checkpoint: Checkpoint, fold: Fold):
        self.path, self.config = checkpoint.path, checkpoint.config
        self.shards, self.tensors = checkpoint.shards, checkpoint.tensors
        self._unsorted, self._fold = checkpoint, fold

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        if name not in self._fold.names:
            return self._unsorted.read(name, rows)
        tensor = self._fold.apply(name, self._unsorted.read(name))
        return tensor if rows is None else tensor[rows[0] : rows[1]].clone()

    def map(self, name: str) -> torch.Tensor:
        return self.read(name) if name in self._fold.names else self._unsorted.map(name)


def sort_units(
    view: DenseView,
    device: torch.device,
    windows: torch.Tensor | None = None,
    nesting: Nesting | None = None,
    progress: Progress = lambda *_: None,
    heads_as_zeros: bool = False,
) -> Order:
    """The order of the units of `view`, by the activations of `windows` `[windows, seq_len]` or by magnitude without.

    A checkpoint that is sorted already (it has an elastic.json) stays so; `nesting` is an order found before, for the same
    checkpoint. Heads are left out where config.json has no number for their size, unless `heads_as_zeros`: with fewer of
    them each would become wider, and a sub-network could be extracted with zeros only.

    Raises TersorError for weights that cannot be permuted, and for a `nesting` of another model.
    """
    checkpoint = view.checkpoint
    sparse.refuse(checkpoint, "and patterns do not move with single units")
    if view.is_quantized or view.is_factorised:
        raise TersorError(
            f"{checkpoint.path}: its weights are codes or factors, whose groups and ranks do not move with single units",
            "train the dense model with --elastic, extract, then quantize",
        )
    skeleton = Skeleton(view, device)
    already = read_elastic(checkpoint)
    known = already or nesting
    if known is None:
        units, reasons = _find(checkpoint, skeleton, heads_as_zeros)
        return _Sorter(view, skeleton, units, reasons, windows, progress).order()
    units, reasons = _find(checkpoint, skeleton, any(group.kind == "heads" for group in known.groups))
    _check_same(checkpoint, skeleton, units, known)
    orders = {group.module: torch.tensor(group.order) for group in known.groups}
    units = {kind: [group for group in found if group.module in orders] for kind, found in units.items()}
    units = {kind: found for kind, found in units.items() if found}
    order = Order(skeleton, units, known, reasons=reasons, returns_tuple=probe_pass(skeleton).returns_tuple)
    if already is None:
        order.fold = _folded([group for found in units.values() for group in found], orders, view)
    return order


def _find(checkpoint: Checkpoint, skeleton: Skeleton, heads_as_zeros: bool) -> tuple[dict[str, list[Units]], list[str]]:
    units, reasons = {}, []
    for kind in WIDTHS:
        try:
            units[kind] = find_units(checkpoint, skeleton, kind)
        except TersorError as error:
            reasons.append(f"{kind}: {error}")
    if "heads" in units and not heads_as_zeros and not _says_head_size(skeleton):
        del units["heads"]
        reasons.append("heads: config.json cannot say that there are fewer, their size is hidden size / heads")
    return units, reasons


def _check_same(checkpoint: Checkpoint, skeleton: Skeleton, units: dict[str, list[Units]], nesting: Nesting) -> None:
    found = {(group.module, kind, group.count) for kind, groups in units.items() for group in groups}
    listed = {(group.module, group.kind, group.count) for group in nesting.groups}
    if len(nesting.blocks) != len(skeleton.blocks) or not listed <= found:
        other = next(iter(sorted(listed - found)), None)
        what = f"{other[0]} with {other[2]} {other[1]}" if other else f"{len(nesting.blocks)} blocks"
        raise TersorError(
            f"{checkpoint.path}: its elastic.json is of another model: {what} is not in this one",
            "remove elastic.json, and the units are sorted anew",
        )


def _says_head_size(skeleton: Skeleton) -> bool:
    """Whether another head size in config.json gives other shapes."""
    checkpoint = skeleton.view.checkpoint
    found = explicit_head_size(skeleton)
    if not found:
        return False
    wider = set_keys(checkpoint.config, {key: 2 * size for key, size in found.items()})
    with quiet():
        try:
            return shapes_of(build_meta(checkpoint, wider)) != shapes_of(build_meta(checkpoint, checkpoint.config))
        except TersorError:
            return False


def _folded(groups: list[Units], orders: dict[str, torch.Tensor], view: DenseView) -> Fold:
    fold, shapes = Fold(), {name: entry.shape for name, entry in view.tensors.items()}
    for group in groups:
        fold.add(group, orders[group.module], shapes)
    return fold


class _Sorter:
    """One pass over the blocks: scores, orders, and the proof that what is sorted computes the same."""

    def __init__(self, view, skeleton, units, reasons, windows, progress):
        self.view, self.skeleton, self.progress = view, skeleton, progress
        self.units: dict[str, list[Units]] = units
        self.reasons: list[str] = reasons
        self.probe = probe_pass(skeleton)
        self.run = None if windows is None else BlockPass(skeleton, windows)
        self.orders: dict[str, torch.Tensor] = {}
        self.turned: dict[int, float] = {}  # block -> 1 - cos between what enters and what leaves it

    def order(self) -> Order:
        count = len(self.skeleton.blocks)
        for index in range(count):
            self.progress("order", index, count)
            self._block(index)
        self.progress("order", count, count)
        if self.run is not None:
            self.run.pool.close()
        blocks = rank_blocks(count, self.turned)
        groups = [
            SortedUnits(group.module, kind, group.block, group.count, tuple(self.orders[group.module].tolist()))
            for kind, found in self.units.items()
            for group in found
        ]
        nesting = Nesting(METHODS[self.run is None], {}, tuple(blocks), groups)
        fold = _folded([group for found in self.units.values() for group in found], self.orders, self.view)
        return Order(self.skeleton, self.units, nesting, fold, self.reasons, self.probe.returns_tuple)

    @torch.no_grad()
    def _block(self, index: int) -> None:
        mine = {kind: [group for group in found if group.block == index] for kind, found in self.units.items()}
        groups = [group for found in mine.values() for group in found]
        with self.skeleton.filled(index) as block:
            parameters = block_parameters(self.skeleton, index, block)
            for name, parameter in parameters.items():
                check_finite(parameter, name, self.view.checkpoint)
            scores = self._by_magnitude(groups, parameters) if self.run is None else self._by_text(index, block, groups)
            for group in groups:
                self.orders[group.module] = torch.argsort(scores[group.module], descending=True, stable=True)
            for kind, found in mine.items():
                wrong = self._differs(index, block, parameters, found)
                if wrong is not None:
                    del self.units[kind]
                    self.reasons.append(f"{kind}: {wrong}")

    def _by_magnitude(self, groups: list[Units], parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        result = {}
        for group in groups:
            moments = unit_scores.Moments(group.count)
            for slot in group.slots:
                moments.add(slot.of_units(parameters[slot.name].detach().cpu()))
            result[group.module] = unit_scores.magnitude(moments)
        return result

    def _by_text(self, index: int, block: nn.Module, groups: list[Units]) -> dict[str, torch.Tensor]:
        """Sends the text through the block. An expert that few tokens reached is ranked by its columns alone."""
        readers = {group.readers[0]: group for group in groups}
        layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in readers}
        result: dict[str, torch.Tensor] = {}

        def ready(name: str, statistics: InputStatistics | None) -> None:
            group = readers[name]
            places = group.slot(name).index
            columns = weight_matrix(layers[name]).float().square().sum(0).cpu()[places]
            squares = torch.ones_like(columns)
            if not is_starved(statistics):
                squares = (statistics.column_norms.cpu().square() / statistics.tokens)[places]
            result[group.module] = unit_scores.activation(squares, columns)

        before = [self._peek(batch).clone() for batch in range(len(self.run.hidden))]  # some models add in place
        for name in self.run.run_staged(index, block, layers, {"column_norms"}, ready):
            ready(name, None)
        turned = MeanCosine()
        for batch, hidden in enumerate(before):
            turned.add(hidden, self._peek(batch))
        self.turned[index] = turned.score
        return result

    def _peek(self, batch: int) -> torch.Tensor:
        hidden = self.run.hidden.take(batch)
        self.run.hidden.put(batch, hidden)
        return hidden

    def _differs(self, index: int, block: nn.Module, parameters: dict, groups: list[Units]) -> str | None:
        """Sorts the filled block and compares what it computes; heads that know their number (ALiBi) must not move."""
        fold = _folded(groups, self.orders, self.view)
        shape = self.probe.hidden.take(0).shape
        x = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(self.skeleton.device)
        expected = self.probe.apply(index, block, 0, x)
        for name in fold.names:
            parameters[name].copy_(fold.apply(name, parameters[name]))
        found = self.probe.apply(index, block, 0, x)
        difference, scale = (expected - found).abs().max(), expected.abs().max()
        if bool(difference <= TOLERANCE * scale):
            return None
        return f"{self.skeleton.block_name(index)} computes something else when they change places"


def rank_blocks(count: int, turned: dict[int, float]) -> list[int]:
    """All blocks, the most important first, the first and the last block ahead of all others: the rest by `turned`, the
    highest first, or, where that is empty, such that the first ones of the list lie as evenly as can be."""
    ranked = [0, count - 1] if count > 1 else [0]
    if turned:
        return ranked + sorted(set(range(count)) - set(ranked), key=lambda block: (-turned[block], block))
    while len(ranked) < count:
        before, after = max(pairwise(sorted(ranked)), key=lambda gap: gap[1] - gap[0])
        ranked.append((before + after) // 2)
    return ranked

"""One layer after another: read, permute, mask, count its zeros and choose a format, or pack it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.sparse.elements import from_elements, to_elements
from tersor.formats.sparse.packed import Packed
from tersor.formats.sparse.view import zero_points
from tersor.ops.model.copy import check_finite
from tersor.ops.model.patterns import keep_mask, parse_pattern
from tersor.ops.model.tile_costs import DENSE, TileCosts
from tersor.ops.sparsify.importance import Importance
from tersor.ops.sparsify.request import Request
from tersor.ops.sparsify.selection import Candidate, break_even, candidates, choose, plan_entry, timed
from tersor.ops.sparsify.targets import Target, Targets, repacked

if TYPE_CHECKING:
    from tersor.ops.sparsify.permutation.run import Permutations

Progress = Callable[[str, int, int], None]
FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NEGATIVE_ZERO = {32: -(1 << 31), 16: -(1 << 15), 8: 128}  # its bits as an element


@dataclass
class Choice:
    """What becomes of a target: how it is packed, or None where it stays dense, and what the report says of it."""

    packed: Packed | None
    reason: str
    numbers: dict
    entry: dict = field(default_factory=dict)  # of plan.json


class Packer:
    """Works on one target at a time. `elements` gives the same twice, so that what was counted is what is packed."""

    def __init__(self, checkpoint: Checkpoint, targets: Targets, request: Request, device: torch.device):
        self.checkpoint, self.targets, self.request, self.device = checkpoint, targets.found, request, device
        linears = [target.linear for target in self.targets.values()]
        self.importance = Importance(request.stats, checkpoint, linears, device)
        self.permutations: Permutations | None = None
        self.costs: TileCosts | None = None
        self.warnings: list[str] = []
        self.negative_zeros = 0

    def permute(self, progress: Progress) -> None:
        """Find the permutations of channels under which the pattern keeps the most."""
        request = self.request
        pattern = None if request.pattern is None else parse_pattern(request.pattern)
        if pattern is None or pattern.kind == "unstructured" or not request.permute:
            return
        if self.checkpoint.config is None:
            self.warnings.append("without a config.json no channels can be permuted: give the whole folder")
            return
        alike = [target for target in self.targets.values() if target.pattern == pattern]
        if alike:
            from tersor.ops.sparsify.permutation.run import find_permutations

            self.permutations = find_permutations(
                DenseView(self.checkpoint),
                pattern,
                alike[0].sparsity,
                [target.name for target in alike],
                self.device,
                importance=self.importance,
                progress=progress,
            )
            for name in sorted(self.permutations.names & self.checkpoint.packed.keys() - self.targets.keys()):
                self.targets[name] = repacked(self.checkpoint.packed[name])

    def measure(self, progress: Progress) -> None:
        """Time the kernels on this device where a format is to be chosen by time; else take what is known of it."""
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        shapes = {target.linear.shape for target in self.targets.values() if target.format.goal == "time"}
        if shapes:

            def step(done: int, total: int) -> None:
                progress("timing kernels", done, total)

            self.costs = TileCosts.measure(self.device, dtype, sorted(shapes), [self.request.tokens], progress=step)
        else:
            self.costs = TileCosts.cached(self.device, dtype)

    def _costs(self, target: Target) -> TileCosts | None:
        """What is known of the kernels' times for a layer; they were measured with float weights, so not for codes."""
        floats = target.template.dtype in ("BF16", "F16", "F32")
        known = floats and self.costs is not None
        return (
            self.costs if known and self.costs.knows((DENSE, None), target.linear.shape, self.request.tokens) else None
        )

    def permuted(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return stored if self.permutations is None else self.permutations.apply(name, stored)

    def elements(self, target: Target) -> tuple[torch.Tensor, dict]:
        """Elements `[out, in]` of a target, permuted and masked, and what masking did to it."""
        stored = self.checkpoint.read(target.stored)
        check_finite(stored, target.stored, self.checkpoint)
        numbers: dict = {}
        if target.pattern is None:
            stored = self.permuted(target.stored, stored)
        else:
            stored, numbers = self._masked(target, stored)
        if self.request.positive_zeros and target.template.dtype in FLOATS:
            stored = torch.where(stored.float() == 0, torch.zeros((), dtype=stored.dtype), stored)
        return to_elements(target.template, stored, zero_points(target.template, self.checkpoint)), numbers

    def _masked(self, target: Target, stored: torch.Tensor) -> tuple[torch.Tensor, dict]:
        def turned(matrix: torch.Tensor) -> torch.Tensor:
            return matrix.T if target.linear.transposed else matrix

        # Statistics count the columns as they were, so importance is judged before channels move, and moves with them.
        importance = turned(self.importance(target.name, turned(stored).float()))
        importance, stored = self.permuted(target.name, importance), self.permuted(target.name, stored)
        importance, weight = turned(importance).contiguous(), turned(stored).float()
        keep = keep_mask(torch.where(weight == 0, -1.0, importance), target.pattern, target.sparsity)
        total, norm = float(importance.sum(dtype=torch.float64)), float(weight.square().sum(dtype=torch.float64))
        lost = float(weight[~keep].square().sum(dtype=torch.float64))
        numbers = {
            "kept_importance": float(importance[keep].sum(dtype=torch.float64)) / total if total else 1.0,
            "error": {"relative_mse": lost / norm if norm else 0.0},
        }
        return torch.where(turned(keep), stored, torch.zeros((), dtype=stored.dtype)).contiguous(), numbers

    def stored(self, target: Target, elements: torch.Tensor) -> torch.Tensor:
        """The tensor that the elements came from."""
        return from_elements(target.template, elements, zero_points(target.template, self.checkpoint))

    def choose(self, target: Target) -> Choice:
        """Raises TersorError for a format that was asked for by name and would not make the layer smaller."""
        elements, numbers = self.elements(target)
        template, format = target.template, target.format
        nonzero = elements != 0
        zeros = 1 - int(torch.count_nonzero(nonzero)) / max(nonzero.numel(), 1)
        numbers["sparsity"] = zeros
        if template.in_words and not torch.equal(self.stored(target, elements), self.checkpoint.read(target.stored)):
            return Choice(None, "kept: unused bits of its words are not zero", numbers)
        if template.dtype in FLOATS:
            self.negative_zeros += int(torch.count_nonzero(elements == NEGATIVE_ZERO[template.bits]))
        found = candidates(
            nonzero, template.bits, template.stored_nbytes, template.dtype, template.in_words,
            None if format.name is None else [format.name], [] if format.tile is None else [format.tile],
        )  # fmt: skip
        if format.name is not None:
            found = [one for one in found if one.format == DENSE or one.tile == format.tile]
        tokens = [self.request.tokens]
        costs = self._costs(target)
        if costs is not None:
            found = timed(found, costs, target.linear.shape, tokens)
        goal = "size" if costs is None else format.goal or "size"
        best = choose(found, goal)
        entry = plan_entry(found, best, costs, tokens, goal)
        if best.format == DENSE:
            if format.name is not None:
                raise self._too_few(target, zeros, found)
            why = "no format is smaller" if goal == "size" else "the dense kernel is faster"
            return Choice(None, f"kept: {zeros:.1%} zeros, {why}", numbers, entry)
        packed = replace(template, format=best.format, tile=best.tile, count=best.count)
        reason = f"{best.name}, {zeros:.1%} zeros"
        if best.tile is not None:
            reason += f", {best.coverage:.1%} of the tiles stored"
        return Choice(packed, reason, numbers, entry)

    def _too_few(self, target: Target, zeros: float, found: list[Candidate]) -> TersorError:
        format, template = target.format, target.template
        leave = "leave it out with --exclude, or use --format auto, which keeps such a layer as it is"
        tried = next((one for one in found if one.format == format.name), None)
        if tried is None:
            reason = {
                "sparse-24-bitmask": "a group of four neighbouring inputs holds more than two weights that are not zero",
                "tiled-csl": f"its values have {template.bits} bits, and Tiled-CSL is for 16",
            }.get(format.name, "it does not fit")
            return TersorError(f"{target.name}: --format {format}: {reason}", leave)
        needed = break_even(template.bits, template.columns, format.name, format.tile)
        have = (
            f"{zeros:.1%} zeros" if format.tile is None else f"{1 - tried.coverage:.1%} empty tiles ({zeros:.1%} zeros)"
        )
        return TersorError(
            f"{target.name}: {have}, too few for --format {format}: {tried.nbytes} bytes in place of "
            f"{template.stored_nbytes}; it pays from {needed:.1%} on",
            leave,
        )

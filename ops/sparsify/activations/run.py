"""Thresholds for the inputs of linear layers: training-free activation sparsity as in TEAL (arXiv 2408.14690).

One block after another: magnitudes of the inputs are counted on the whole calibration text, the zeros are spread over the
layers on a part of it, and the text goes on through the block with its thresholds, so that later blocks are calibrated on
what they will get. Unlike TEAL's evaluation, which leaves the first half of each window dense, every token is treated alike.

All experts of a block that play the same role (all `gate_proj`, say) have one threshold in common: few tokens reach each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from tersor.formats.activation_thresholds import Threshold, description
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite
from tersor.ops.model.input_thresholds import InputCounts, applied, hooked, stored_bytes, traffic
from tersor.ops.model.memory import parking_space
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.spill import SpillPool
from tersor.ops.sparsify.activations.allocate import Allocation, allocate
from tersor.ops.sparsify.activations.thresholds import MagnitudeHistogram, magnitude_counts
from torch import nn

SEARCH_TOKENS = 512  # on which the zeros are spread: a block runs some 75 times on them
SEARCH_WINDOW = 256
EXPERT = re.compile(r"\.experts\.\d+\.")
Progress = Callable[[str, int, int], None]


@dataclass
class Calibration:
    """What `calibrate` found. `skipped` are the layers without a threshold, with the reason."""

    target: float
    tensors: dict[str, Threshold] = field(default_factory=dict)
    blocks: list[dict] = field(default_factory=list)
    traffic: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def description(self) -> dict:
        """The content of `activation_sparsity.json`."""
        return description(self.target, self.tensors)

    def report(self) -> dict:
        """What the report says. Errors of a block's output are ||change||^2 / ||output||^2, mean over tokens."""
        errors = {
            key: sum(block[key] for block in self.blocks) / len(self.blocks)
            for key in ("output_error", "uniform_output_error")
        }
        return {
            "target": self.target,
            **self.traffic,
            "layers": len(self.tensors),
            "mean_block_output_error": errors["output_error"],
            "mean_block_output_error_if_uniform": errors["uniform_output_error"],
            "blocks": self.blocks,
        }


def calibrate(
    view: DenseView,
    target: float,
    windows: torch.Tensor,
    device: torch.device,
    max_memory_bytes: int | None,
    names: Collection[str],
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Thresholds that zero the share `target` of the inputs of the layers `names`, averaged over their weight bytes.

    `windows` `[n, seq_len]` are tokens; 8,192 of them are plenty. Thresholds that the checkpoint has already play no part.
    Raises TersorError for a target outside (0, 1), no tokens, a model that does not write text, or no layer to work on.
    """
    if not 0 < target < 1:
        raise TersorError(
            f"an activation sparsity of {target} was asked for", "choose a number between 0 and 1, say 0.5"
        )
    if windows.numel() == 0:
        raise TersorError("no calibration tokens", "give a longer text, or raise --samples")
    skeleton = Skeleton(view, device, thresholds={})
    if not skeleton.model.can_generate():
        raise TersorError(
            f"a {type(skeleton.model).__name__} does not write text token by token, which is where "
            "activation sparsity saves reads",
            "leave --activations out",
        )
    found = Calibration(target)
    pool = SpillPool(parking_space(max_memory_bytes, skeleton))
    run, search = BlockPass(skeleton, windows, pool), BlockPass(skeleton, _search_windows(windows))
    counts: dict[str, InputCounts] = {}
    for index in range(len(run)):
        progress("activation thresholds", index, len(run))
        with skeleton.filled(index) as block:
            linears = skeleton.linears(index)
            layers = {name: layer for name, layer in linears.items() if name in names}
            thresholds = _Block(run, search, index, block, layers).calibrate(found) if layers else {}
            with applied(linears, thresholds, counts):
                run.run(index, block)
            with applied(linears, thresholds):
                search.run(index, block)
        for name, share in _shares(thresholds, counts).items():
            found.tensors[name] = Threshold(thresholds[name], share)
    progress("activation thresholds", len(run), len(run))
    if not found.tensors:
        raise TersorError(
            f"--activations: none of {len(names)} layers is a linear layer of a block that a token reached",
            "see --include and --exclude, or raise --samples",
        )
    found.skipped |= {name: "outside the repeated blocks" for name in names if name not in counts}
    found.traffic = traffic(skeleton, counts, windows.numel())
    found.warnings += pool.warnings()
    pool.close()
    return found


def _shares(thresholds: Collection[str], counts: Mapping[str, InputCounts]) -> dict[str, float]:
    """Share of the inputs that were zero by layer; of an expert that no token reached that of the others of its role."""
    roles: dict[str, list[int]] = {}
    for name in thresholds:
        seen, both = counts[name], roles.setdefault(_role(name), [0, 0])
        both[0], both[1] = both[0] + seen.zeros, both[1] + seen.numbers
    found = {}
    for name in thresholds:
        zeros, numbers = (counts[name].zeros, counts[name].numbers) if counts[name].numbers else roles[_role(name)]
        found[name] = zeros / numbers
    return found


def _role(name: str) -> str:
    """One name for all experts that share a threshold."""
    return EXPERT.sub(".experts.*.", name)


def _search_windows(windows: torch.Tensor) -> torch.Tensor:
    """The beginnings of evenly spaced windows, SEARCH_TOKENS in all."""
    length = min(SEARCH_WINDOW, windows.shape[1])
    count = min(max(1, SEARCH_TOKENS // length), len(windows))
    chosen = [index * len(windows) // count for index in range(count)]
    return windows[chosen, :length]


class _Block:
    """The search for the thresholds of one filled block. Layers are in units that share a threshold, by a name."""

    def __init__(self, run: BlockPass, search: BlockPass, index: int, block: nn.Module, layers: dict[str, nn.Module]):
        self.run, self.search, self.index, self.block, self.layers = run, search, index, block, layers
        view = run.skeleton.view
        for name, layer in layers.items():
            check_finite(layer.weight, view.stored_names(name)[0], view.checkpoint)
        self.unit_of = {name: _role(name) for name in layers}
        self.histograms: dict[str, MagnitudeHistogram] = {}
        self.vectors = dict.fromkeys(layers, 0)

    def calibrate(self, found: Calibration) -> dict[str, float]:
        """Thresholds by layer; adds to the reports of `found`."""
        self._count()
        reached = [name for name in self.layers if self.unit_of[name] in self.histograms]
        found.skipped |= {name: "no token reached it" for name in self.layers if name not in reached}
        if not reached:
            return {}
        nbytes, sizes = stored_bytes(self.run.skeleton), dict.fromkeys(self.histograms, 0.0)
        for name in reached:  # bytes that a token reads: of experts those it is sent to
            sizes[self.unit_of[name]] += nbytes[name] * self.vectors[name] / self.run.windows.numel()
        start = {unit: histogram.zeros for unit, histogram in self.histograms.items()}
        self.exact = self.search.probe(self.index, self.block)
        chosen = allocate(sizes, start, found.target, self._error)
        found.blocks.append(self._report(chosen))
        return self._thresholds(chosen.levels)

    def _count(self) -> None:
        """Send the whole text through the block and count the magnitudes that arrive at each unit."""
        last: list = [None, None]  # layers that read the same tensor follow each other

        def watch(name: str, x: torch.Tensor) -> None:
            if last[0] is not x:
                last[:] = x, magnitude_counts(x)
            self.histograms.setdefault(self.unit_of[name], MagnitudeHistogram()).add_counts(last[1], x.numel())
            self.vectors[name] += x.numel() // x.shape[-1]

        hidden = self.run.hidden
        with hooked(self.layers, watch):
            for batch in range(len(hidden)):
                x = hidden.take(batch)
                self.run.apply(self.index, self.block, batch, x)
                hidden.put(batch, x)

    def _thresholds(self, levels: Mapping[str, float]) -> dict[str, float]:
        of_unit = {unit: self.histograms[unit].threshold(level) for unit, level in levels.items()}
        return {name: of_unit[unit] for name, unit in self.unit_of.items() if unit in of_unit}

    def _error(self, levels: Mapping[str, float]) -> float:
        """Mean over tokens of ||change of the block's output||^2 / ||output||^2."""
        with applied(self.layers, self._thresholds(levels)):
            output = self.search.probe(self.index, self.block)
        change, exact = ((x.float().square().sum(-1)) for x in (output - self.exact, self.exact))
        return float((change / exact.clamp_min(torch.finfo(torch.float32).tiny)).mean())

    def _report(self, chosen: Allocation) -> dict:
        return {
            "block": self.run.skeleton.block_name(self.index),
            "output_error": chosen.error,
            "uniform_output_error": chosen.uniform_error,
            "levels": chosen.levels,
        }

"""The loop that rewrites a model block by block while the calibration text passes through it.

A finished block is journalled as a unit. On --resume its weights are read back from the unfinished output and the text
is sent through them, which gives the very activations of the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.statistics import InputStatistics
from torch import nn


class BlockRewriter:
    """Rewrites the layers named in `names`; a subclass says how, by `rewrite`, and everything else is copied."""

    needs: Set[str] = frozenset()

    def __init__(self, checkpoint: Checkpoint, names: Collection[str], writer: CheckpointWriter, run: BlockPass):
        self.checkpoint, self.names, self.writer, self.run = checkpoint, names, writer, run
        self.skeleton = run.skeleton
        self.written: set[str] = set()

    def rewrite(self, name: str, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        """Put the new weight into `layer` and write it. Returns the report's numbers.

        `statistics` is None for a layer that no token reached.
        """
        raise NotImplementedError

    def stored(self, name: str) -> torch.Tensor:
        """The weight `[out, in]` that an interrupted run has written."""
        weight = self.writer.read(name)
        return weight.T if is_transposed(self.checkpoint, name) else weight

    def stored_dtype(self, name: str) -> torch.dtype:
        return getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[name].dtype])

    def outside(self, name: str) -> dict | None:
        """Rewrite a layer that no block holds. Returns the report's numbers, by name."""
        raise NotImplementedError

    def rewrite_all(self, progress: Callable[[str, int, int], None]) -> None:
        """Every block, then what lies outside them."""
        for index in range(len(self.run)):
            progress("blocks", index, len(self.run))
            unit = self.skeleton.block_name(index)
            if unit in self.writer.journal.done:
                self._replay(index)
            else:
                self._block(index, unit)
        progress("blocks", len(self.run), len(self.run))
        self._remainder()

    def _block(self, index: int, unit: str) -> None:
        numbers: dict[str, dict] = {}
        with self.skeleton.filled(index) as block:
            layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in self.names}
            for name, layer in layers.items():
                check_finite(layer.weight, name, self.checkpoint)
            changed = self.block(index, block, layers, numbers)
            for name in self.skeleton.checkpoint_names(index):
                if name in changed:
                    self.writer.write(name, changed[name])
                elif name not in self.names:
                    copy_tensor(self.checkpoint, name, self.writer)
                self.written.add(name)
        self.writer.finish(unit, numbers)

    def block(
        self, index: int, block: nn.Module, layers: dict[str, nn.Module], numbers: dict[str, dict]
    ) -> dict[str, torch.Tensor]:
        """Rewrite the layers of a filled block, each when its inputs are complete. Returns other tensors that changed."""

        def ready(name: str, statistics: InputStatistics) -> None:
            numbers[name] = self.rewrite(name, layers[name], statistics)

        for name in self.run.run_staged(index, block, layers, self.needs, ready):
            numbers[name] = self.rewrite(name, layers[name], None)
        return {}

    def _replay(self, index: int) -> None:
        """Send the text through a block that an interrupted run has finished."""
        with self.skeleton.filled(index) as block:
            layers = self.skeleton.linears(index)
            for name in self.skeleton.checkpoint_names(index):
                self.written.add(name)
                if name in self.names:
                    set_weight(layers[name], self.stored(name).to(self.skeleton.dtype))
                elif self.skeleton.sources[name].expert is None:
                    self.load(index, block, name, self.writer.read(name))
            self.run.run(index, block)

    def load(self, index: int, block: nn.Module, name: str, value: torch.Tensor) -> None:
        """Put a stored tensor into its parameter of a filled block."""
        parameter = self.skeleton.sources[name].parameter.removeprefix(self.skeleton.block_name(index) + ".")
        block.get_parameter(parameter).copy_(value.to(self.skeleton.dtype))

    def _remainder(self) -> None:
        """What no block holds: tables, heads, final norm; layers outside the blocks that were asked for."""
        for name in self.checkpoint.tensors:
            if name in self.written or name in self.writer.journal.done:
                continue
            numbers = None
            if name in self.names:
                numbers = self.outside(name)
            else:
                copy_tensor(self.checkpoint, name, self.writer)
            self.writer.finish(name, numbers)


def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Put `weight` `[out, in]` into a Linear or a Conv1D."""
    stored = weight if isinstance(layer, nn.Linear) else weight.T.contiguous()
    layer.weight = nn.Parameter(stored, requires_grad=False)

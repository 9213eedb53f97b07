"""What a target is given to work with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.collected import Collected
from tersor.ops.model.memory import parking_space
from tersor.ops.model.selection import Linear
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.spill import SpillPool
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import Progress


@dataclass
class Job:
    """One run: its input, its request, and the calibration text and model, which are made when first asked for."""

    checkpoint: Checkpoint
    request: Request
    device: torch.device
    progress: Progress

    def collected(self, linears: Collection[Linear], needs: Collection[str]) -> Collected:
        """The statistics that --stats names, checked for these layers."""
        lighter = self.request.repair and self.request.method != "sparsegpt"
        instead = ", or use --no-repair, which needs norms only" if lighter else ""
        return Collected(self.request.stats, self.checkpoint, linears, needs, self.device, instead)

    @cached_property
    def windows(self) -> torch.Tensor:
        """Calibration tokens `[samples, seq_len]`."""
        request = self.request
        return load_windows(self.checkpoint.path, request.calib, request.samples, request.seq_len, request.seed)

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(DenseView(self.checkpoint), self.device)

    def block_pass(self, spill_folder: Path | None = None) -> BlockPass:
        """The calibration windows before the first block."""
        space = parking_space(self.request.max_memory_bytes, self.skeleton)
        return BlockPass(self.skeleton, self.windows, SpillPool(space, spill_folder))

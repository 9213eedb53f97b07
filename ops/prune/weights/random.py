"""Any weights go: the control that every other method has to beat."""

from __future__ import annotations

import zlib

import torch
from tersor.ops.prune.weights.by_score import ByScore


class Random(ByScore):
    def __init__(self, seed: int = 0):
        self.seed = seed

    def scores(self, weight: torch.Tensor, statistics, name: str) -> torch.Tensor:
        """Drawn on the CPU from the seed and the tensor's name, so that neither device nor order matters."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)

"""What several commands need: a model loaded block by block, calibration, statistics, and models that run as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    keep_packed: bool | None = None,
) -> torch.nn.Module:
    """The transformers model of any checkpoint that tersor writes, in evaluation mode: see `tersor.ops.model.runtime`."""
    from tersor.ops.model.runtime import load as load_model

    return load_model(path, device, dtype, keep_packed)

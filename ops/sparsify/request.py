"""What `tersor sparsify` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Request:
    """Everything that decides the output of one sparsify run.

    `pattern` None packs the zeros that are there. `format` is one of formats.sparse.packed.FORMATS, `auto` (the smallest
    for each layer) or `fastest` (by the kernels' times measured on this device at `tokens` tokens). `stats` weighs the
    importance of a weight by its input's norm. `activations` is the share of inputs that thresholds zero at run time.
    """

    model: str
    output: Path
    pattern: str | None = None
    format: str = "auto"
    sparsity: float | None = None
    permute: bool = True
    positive_zeros: bool = False
    tokens: int = 1
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    policy: Path | None = None
    stats: Path | None = None
    activations: float | None = None
    calib: str | None = None
    samples: int = 16
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"
    max_memory_bytes: int | None = None
    force: bool = False
    resume: bool = False

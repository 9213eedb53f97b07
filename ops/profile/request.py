"""What `tersor profile` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Workload:
    """What is served: `batch` sequences at once, `prompt` tokens read and `generate` tokens written by each.

    `trials` is how many answers are sampled from one prompt (test-time scaling).
    """

    batch: int = 1
    prompt: int = 512
    generate: int = 128
    trials: int = 1


@dataclass
class Request:
    models: list[str]
    output: Path | None = None
    hardware: str = "h100"
    workload: Workload = field(default_factory=Workload)
    measure: bool = False
    sparse_crossover: bool = False
    sensitivity: bool = False
    collect: list[str] = field(default_factory=list)
    suggest: str | None = None
    method: str = "rtn"  # of quantize, which is going to execute the suggestion
    memory_trace: str | None = None  # a file, or `synthetic`
    calib: str | None = None
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"
    max_memory_bytes: int | None = None
    force: bool = False

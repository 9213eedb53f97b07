"""What `tersor distill` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Request:
    """Everything that decides the output of one run of distill.

    student: a checkpoint. `config` is a config.json of a smaller model that starts from the teacher's weights, in place of
    a student. teacher: a checkpoint, or logits that `cache_teacher` wrote; None trains without one, on text alone.
    `loss` is `kl`, or terms with weights as in `kl=1,hidden=0.5`. `batch` sequences of `seq_len` tokens a step in all, over
    every process and micro-batch. `train`: which parameters (all, scales, norms). `layer_map`: `student:teacher` pairs.
    """

    student: str | None
    output: Path
    teacher: str | None = None
    config: Path | None = None
    data: str | None = None
    steps: int = 200
    batch: int = 4
    micro_batch: int | None = None
    seq_len: int = 256
    loss: str = "kl"
    temperature: float = 1.0
    layer_map: str | None = None
    optimizer: str = "adamw"
    lr: float | None = None
    warmup: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    train: str = "all"
    quantized: str = "qat"
    keep_zeros: bool = True
    lisa: int = 0
    lisa_every: int = 20
    elastic: bool = False
    teacher_mode: str = "auto"
    cache_teacher: Path | None = None
    top_k: int = 64
    nested: bool = True
    recompute: bool = False
    replay: Path | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    seed: int = 0
    save_every: int = 0
    log_dir: Path | None = None
    device: str = "auto"
    max_memory_bytes: int | None = None
    force: bool = False
    resume: bool = False

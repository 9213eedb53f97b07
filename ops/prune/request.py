"""What `prune` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# --remove -> (package that does it, its methods, the default first)
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weights": ("weights", ("sparsegpt", "wanda", "magnitude", "ria", "random")),
    "neurons": ("width", ("activation", "saliency", "taylor", "magnitude", "random")),
    "heads": ("width", ("activation", "saliency", "taylor", "magnitude", "random")),
    "channels": ("width", ("activation", "saliency", "taylor", "magnitude", "random")),
    "vocab": ("vocab", ("frequency",)),
    "layers": ("depth", ("cosine", "knapsack", "even")),
    "attention": ("depth", ("cosine", "knapsack", "even")),
    "mlp": ("depth", ("cosine", "knapsack", "even")),
    "ranks": ("ranks", ("whitened", "svd", "kronecker")),
    "experts": ("experts", ("frequency", "merge", "random")),
    "norms": ("norms", ("fold",)),
}
ALLOCATIONS = ("uniform", "erk", "owl", "rd")


@dataclass
class Request:
    """Everything that decides the output of one prune run."""

    model: str
    output: Path
    remove: str = "weights"
    method: str | None = None  # None: the target's default
    sparsity: float | None = None  # share of what is removed; None: half, or what the pattern fixes
    pattern: str = "unstructured"
    allocate: str = "uniform"
    rounds: int = 1
    multiple_of: int = 1
    repair: bool = True  # refit what is left, or the layer that reads it
    keep_shape: bool = False
    merge: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    policy: Path | None = None
    stats: Path | None = None  # statistics of `profile --collect`, in place of a calibration run
    calib: str | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    damping: float = 0.01
    device: str = "auto"
    max_memory_bytes: int | None = None
    force: bool = False
    resume: bool = False
    extract: str | None = None  # a sub-network of an elastic checkpoint: then `remove` has no part in it

"""What `tersor plan-parallel` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.hardware import PRECISIONS

MODES = ("train", "serve")
OPTIMIZERS = ("adamw", "adamw8bit", "apollo", "apollo-mini", "lion", "sgd")
RUNTIMES = {
    "train": ("any", "megatron", "torchtitan", "deepspeed", "fsdp2", "huggingface"),
    "serve": ("any", "vllm", "huggingface"),
}
OBJECTIVES = ("throughput", "latency")
CONVENTIONS = ("megatron", "torchtitan", "deepspeed", "paper")
TIERS = ("gpu", "cpu", "nvme")
SHARD_FORMATS = ("rank", "dcp")


@dataclass(frozen=True)
class Workload:
    """Training: `global_batch` sequences of `seq_len` tokens a step with `optimizer`, `tokens` in all (None: not asked).

    `precision` is what products are made in; weights and gradients are kept in `weight_bytes` and `gradient_bytes` a
    number, a float32 master copy beside them where `master`. Serving: `prompt` tokens read and `generate` written by each
    request, `rate` requests a second in all (None: as many as go), objective `latency` or `throughput`, time to the
    first token at most `ttft_seconds`, between tokens at most `tpot_seconds` (None: no limit). `batch`: sequences that a
    plan has a data-parallel rank serve at once (None: not planned).
    """

    mode: str = "train"
    global_batch: int = 256
    seq_len: int = 4096
    optimizer: str = "adamw"
    tokens: int | None = None
    precision: str = "bf16"
    weight_bytes: int = 2
    gradient_bytes: int = 4
    master: bool = True
    prompt: int = 1024
    generate: int = 256
    rate: float | None = None
    objective: str = "throughput"
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    batch: int | None = None

    def __post_init__(self):
        known = (("mode", MODES), ("optimizer", OPTIMIZERS), ("objective", OBJECTIVES), ("precision", PRECISIONS))
        for name, choices in known:
            _require(f"--{name}", getattr(self, name), choices)


@dataclass
class Request:
    """`fix` (as in `tp=8,zero=1`) and the YAML file `pin` are choices of the user; the planner fills in the rest."""

    model: str
    output: Path
    cluster: str
    workload: Workload = field(default_factory=Workload)
    fix: list[str] = field(default_factory=list)
    pin: Path | None = None
    why_not: list[str] = field(default_factory=list)
    runtime: str = "any"  # that has to be able to run the plan
    top: int = 5
    tiers: tuple[str, ...] = ("gpu",)
    convention: str = "megatron"  # what is kept beside the weights: megatron, torchtitan, paper, deepspeed
    calibrate: Path | None = None  # nccl-tests results
    measured: Path | None = None  # report of `profile --measure`
    routing: Path | None = None  # counts of consecutive experts, for --experts
    map_ranks: bool = False
    shard: bool = False
    shard_format: str = "rank"  # rank, dcp
    source_plan: Path | None = None  # --from
    execute_check: int = 0  # processes
    seed: int = 0
    force: bool = False

    def __post_init__(self):
        _require("--for", self.runtime, RUNTIMES[self.workload.mode])
        _require("--convention", self.convention, CONVENTIONS)
        _require("--shard-format", self.shard_format, SHARD_FORMATS)
        for tier in self.tiers:
            _require("--tiers", tier, TIERS)


def parse_tokens(text: str | None) -> int | None:
    """Tokens of `15e12` or `200B`. Raises TersorError for what is no number."""
    if text is None:
        return None
    factor = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower(), 0)
    try:
        found = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        found = 0.0
    if not 1 <= found < 1e18:
        raise TersorError(f"--tokens {text!r} is no number of tokens", "write it like 15e12 or 200B")
    return round(found)


def _require(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TersorError(f"{option} {value!r} is not known", f"one of {', '.join(known)}")

"""A cost model of a few made-up formulas, for tests of the search: plausible, different for every layout, quick."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from tersor.ops.plan_parallel.layout import OFFLOAD, RECOMPUTE, Layout

GB = 1e9


class Memory(NamedTuple):
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    margin: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class Stage(NamedTuple):
    blocks: int
    forward_seconds: float
    backward_seconds: float
    memory: Memory


@dataclass(frozen=True)
class Estimate:
    fits: bool
    step_seconds: float
    stages: tuple[Stage, ...]
    parts: dict[str, float]
    peak_bytes: float
    short_bytes: float
    bound_by: str = "compute"
    explain: tuple[str, ...] = ()
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    micro_batches: int = 1


@dataclass
class StubCosts:
    """`noise` makes every layout a little different, by `seed`; `tightness` is how near lower bounds come to estimates."""

    limit: float = 80 * GB
    state_gigabytes: float = 800.0
    activation_gigabytes: float = 64.0
    work: float = 100.0
    global_batch: int = 64
    noise: float = 0.2
    tightness: float = 0.7
    seed: int = 0
    asked: list[Layout] = field(default_factory=list)

    def _random(self, layout: Layout, what: str) -> float:
        """Between 0 and 1; the same for layouts that differ only in what they give for memory."""
        key = layout.tp, layout.pp, layout.dp, layout.cp, layout.ep, layout.etp, layout.micro_batch, layout.schedule
        text = f"{self.seed} {what} {key} {layout.chunks} {layout.zero} {layout.replicate}"
        return zlib.crc32(text.encode()) / 2**32

    def estimate(self, layout: Layout, exact: bool = False) -> Estimate:
        self.asked.append(layout)
        micro_batches = layout.micro_batches(self.global_batch)
        parts = {
            "compute": self.work / layout.world * (1 + 0.3 * RECOMPUTE.index(layout.recompute) / 2),
            "tp": 0.02 * (layout.tp - 1) * self.work / layout.world,
            "dp": 0.01 * self.state_gigabytes / (layout.tp * layout.pp) * (1.5 if layout.zero == 3 else 1) / 10,
            "offload": 0.5 * OFFLOAD.index(layout.offload) * (2 if layout.tier == "nvme" else 1),
        }
        share = (layout.pp - 1) / micro_batches / layout.chunks * (0.2 if "zb" in layout.schedule else 1)
        parts["bubble"] = share * parts["compute"]
        seconds = sum(parts.values()) * (1 + self.noise * self._random(layout, "seconds"))
        cut = layout.shard_ranks
        weights = self.state_gigabytes / 8 / (layout.tp * layout.pp) / (cut if layout.zero == 3 else 1)
        gradients = 2 * self.state_gigabytes / 8 / (layout.tp * layout.pp) / (cut if layout.zero >= 2 else 1)
        optimizer = 5 * self.state_gigabytes / 8 / (layout.tp * layout.pp) / (cut if layout.zero >= 1 else 1)
        if layout.offload != "none":
            optimizer = 0.0
        if layout.offload == "states":
            weights = gradients = 0.0
        kept = (1.0, 0.7, 0.1)[RECOMPUTE.index(layout.recompute)]
        activations = self.activation_gigabytes * kept * layout.micro_batch / (layout.tp * layout.cp)
        factor = GB * (1 + self.noise * self._random(layout, "bytes"))
        memory = Memory(*(factor * value for value in (weights, gradients, optimizer, activations)), margin=GB)
        stages = tuple(
            Stage(1, seconds / 3, 2 * seconds / 3, Memory(*(value * (1 - 0.01 * stage) for value in memory)))
            for stage in range(layout.pp * layout.chunks)
        )
        short = max(0.0, memory.total - self.limit)
        return Estimate(not short, seconds, stages, parts, memory.total, short, micro_batches=micro_batches)

    def lower_bound(self, layout: Layout) -> tuple[float, float]:
        estimate = self.estimate(layout)
        self.asked.pop()
        loose = [1 - (1 - self.tightness) * self._random(layout, what) for what in ("loose seconds", "loose bytes")]
        return estimate.step_seconds * loose[0], estimate.peak_bytes * loose[1]

"""Memory of the ranks of a pipeline at their peak."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tersor.ops.plan_parallel.layout import Layout


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak. `activations` are those of all micro-batches in flight, `buffers` what is there beside
    them: weights gathered for the block at hand, what recomputation brings back, workspaces; `margin` is what the
    allocator is expected to lose."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    margin: float

    @property
    def total(self) -> float:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers + self.margin
        )

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer


@lru_cache(maxsize=65536)
def in_flight(schedule: str, pp: int, chunks: int, micro_batches: int) -> tuple[float, ...]:
    """Micro-batches whose activations each pipeline rank holds at most, in worth of all its chunks.

    GPipe holds all; 1F1B as many as there are ranks from this one on; interleaved 2 (p - i - 1) + (v - 1) p + 1 chunks
    (Megatron-LM); the zero-bubble schedules as 1F1B's first rank at most, zbv on all ranks alike (Qi et al. 2023).
    """
    if schedule == "gpipe":
        return (float(micro_batches),) * pp
    if schedule == "interleaved":
        most = micro_batches * chunks
        return tuple(min(most, 2 * (pp - rank - 1) + (chunks - 1) * pp + 1) / chunks for rank in range(pp))
    if schedule == "zbv":
        return (float(min(micro_batches, pp)),) * pp
    if schedule == "zb-h1":
        return (float(min(micro_batches, pp)),) * pp
    return tuple(float(min(micro_batches, pp - rank)) for rank in range(pp))


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Blocks of each stage when nothing says otherwise. What does not divide goes to the middle: the first stage has the
    embedding besides, the last one the head."""
    each, left = divmod(layers, stages)
    start = (stages - left) // 2
    return tuple(each + (start <= stage < start + left) for stage in range(stages))


def gathered_buffers(layout: Layout, block_numbers: float) -> float:
    """Weights of two blocks in 16 bits (the one at hand, the next on its way) and the gradients of one, where they are kept
    elsewhere (ZeRO 3, or on the host); the gradients of one where only these are cut."""
    if layout.zero == 3 or layout.offload == "states":
        return block_numbers * (2 * 2 + 4)
    return block_numbers * 4 if layout.zero == 2 else 0.0

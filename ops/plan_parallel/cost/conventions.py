"""What training keeps beside each weight, in bytes a number, by the convention of the runtime that trains.

megatron    bf16 weights, fp32 gradients, fp32 master and Adam moments: 18, with the distributed optimizer 6 + 12/d
            (Megatron-LM docs/user-guide, "Distributed Optimizer"); the workload may ask for other widths
paper       2 + 2 + K with K = 12 for Adam in mixed precision (Rajbhandari et al., "ZeRO", SC 2020, section 3.1)
deepspeed   fp16 weights and gradients, and 16 of optimizer states, an fp32 gradient among them: the estimators of
            deepspeed.runtime.zero give 2 + 18/d for stage 2 and 18/d + 4 of the largest layer for stage 3
torchtitan  fp32 weights, gradients and moments, cut by FSDP2 (16/d); products use a bf16 copy of the layer at hand
"""

from __future__ import annotations

from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.request import Workload

CONVENTIONS = ("megatron", "torchtitan", "paper", "deepspeed")
QUANTIZED_MOMENT = 1 + 4 / 256  # bytes of a moment in 8 bits, with one fp32 scale for every 256 numbers
APOLLO_RANK = 256  # Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024; mini is rank 1
# Bytes of states for a number, the master copy not counted: Adam's two moments in fp32, Lion's one, none for SGD.
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * QUANTIZED_MOMENT, "apollo": 8.0, "apollo-mini": 8.0, "lion": 4.0, "sgd": 0.0}
LOW_RANK = {"apollo": APOLLO_RANK, "apollo-mini": 1}


class Kept(NamedTuple):
    """Bytes a number that one rank keeps when nothing is cut. `moments` of the optimizer apart, since they depend on the
    optimizer; `copy` are unsharded weights that ZeRO 2 leaves where the runtime computes from a copy."""

    weights: float
    gradients: float
    master: float
    moments: float
    copy: float = 0.0

    @property
    def optimizer(self) -> float:
        return self.master + self.moments


def kept(convention: str, workload: Workload, zero: int = 0) -> Kept:
    """Raises TersorError for a convention or an optimizer that is not known."""
    if workload.optimizer not in MOMENTS:
        raise TersorError(f"optimizer {workload.optimizer!r} is not known", f"known are {', '.join(MOMENTS)}")
    moments = MOMENTS[workload.optimizer]
    if convention == "megatron":
        master = 4.0 if workload.master and workload.weight_bytes < 4 else 0.0
        return Kept(workload.weight_bytes, workload.gradient_bytes, master, moments)
    if convention == "paper":
        return Kept(2.0, 2.0, 4.0, moments)
    if convention == "deepspeed":  # at stage 3 gradients only exist in the buffer of the largest layer
        return Kept(2.0, 0.0 if zero == 3 else 2.0, 8.0, moments)
    if convention == "torchtitan":
        return Kept(4.0, 4.0, 0.0, moments, copy=2.0)
    raise TersorError(f"convention {convention!r} is not known", f"known are {', '.join(CONVENTIONS)}")


class States(NamedTuple):
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: States) -> States:
        return States(self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer)


def state_bytes(numbers: float, with_moments: float, held: Kept, zero: int, ranks: int) -> States:
    """Of `numbers` weights that ZeRO stage `zero` cuts over `ranks`. `with_moments` is how many moments of each kind the
    optimizer keeps for them, which low-rank optimizers make fewer."""
    share = 1.0 / ranks
    weights = numbers * held.weights * (share if zero == 3 or (held.copy and zero == 2) else 1.0)
    if held.copy and zero == 2:
        weights += numbers * held.copy
    gradients = numbers * held.gradients * (share if zero >= 2 else 1.0)
    optimizer = (numbers * held.master + with_moments * held.moments) * (share if zero >= 1 else 1.0)
    return States(weights, gradients, optimizer)

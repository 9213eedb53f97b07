"""What a teacher tells of a micro-batch, and what a run may ask of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.losses.logits import LogitTargets
from tersor.ops.distill.losses.objective import States
from torch import Tensor


@dataclass(frozen=True)
class Wanted:
    """What the losses of a run look at: logits, outputs of these blocks, queries, keys and values of these blocks."""

    logits: bool = True
    blocks: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def check(self, path: Path, count: int) -> None:
        """Raises TersorError for a block that a teacher of `count` blocks does not have."""
        for index in (*self.blocks, *self.attention):
            if not 0 <= index < count:
                raise TersorError(f"{path}: has no block {index}", f"its blocks are 0 to {count - 1}: see --layer-map")


@dataclass
class Targets(LogitTargets, States):
    """A teacher's side of the losses for ids `[B, T]`, without gradients; None or empty for what was not wanted.

    `hidden` `[B, T, H]`: what the `head` reads. Cached logits come as `top_k` instead. `blocks`: outputs `[B, T, H]` by
    block; `attention`: "q", "k", "v" `[B, T, heads, d]` by block.
    """


class Teacher(Protocol):
    """`mode`: in-process, streamed or cached. `vocabulary`: how many logits it gives, None where they were not wanted;
    `blocks` and `hidden_size` are 0 for cached logits. `fingerprint`: of its checkpoint."""

    mode: str
    fingerprint: str
    vocabulary: int | None
    blocks: int
    hidden_size: int

    def targets(self, step: int, ids: Tensor) -> Targets:
        """For a micro-batch: some rows of what the data gives for `step`, int64 `[B, T]`."""


def probe_ids(model: torch.nn.Module) -> Tensor:
    """A few tokens `[1, 3]` that any vocabulary has; low ones may be padding."""
    table = model.get_input_embeddings().weight
    return (torch.arange(5, 8) % len(table))[None].to(table.device)


def rows_of(step_ids: Tensor, ids: Tensor) -> list[int]:
    """Which rows of `step_ids` `[n, T]` the micro-batch `ids` `[B, T]` holds. Equal windows have equal targets.

    Raises ValueError when a row is none of them.
    """
    same = (ids.cpu()[:, None] == step_ids.cpu()[None]).all(-1)
    if not bool(same.any(1).all()):
        raise ValueError("a row of the micro-batch is none of the step's windows")
    return same.to(torch.uint8).argmax(1).tolist()

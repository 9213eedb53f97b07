"""How a model is cut over the devices of a cluster: degrees, and which rank holds what.

Ranks count as Megatron-LM counts them by default: tensor parallel fastest, then context, then data, and pipeline slowest.
Inside one pipeline stage the same ranks are cut a second time for the experts: expert tensor parallel fastest, then expert
parallel, then the data parallelism that is left to experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from tersor.formats.errors import TersorError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv")
RECOMPUTE = ("none", "attention", "full")
OFFLOAD = ("none", "optimizer", "states")
AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")


def write_stages(stages: tuple[int, ...]) -> str:
    """`7+8x6+7`: the blocks of each stage, equal neighbours put together."""
    runs = ((blocks, len(list(run))) for blocks, run in groupby(stages))
    return "+".join(f"{blocks}x{count}" if count > 1 else str(blocks) for blocks, count in runs)


def read_stages(text: str) -> tuple[int, ...]:
    """The reverse. Raises ValueError for anything else."""
    found: list[int] = []
    for part in text.split("+"):
        blocks, times, count = part.partition("x")
        if len(count) > 6:
            raise ValueError(text)
        found += [int(blocks)] * (int(count) if times else 1)
    return tuple(found)


@dataclass(frozen=True, order=True)
class Layout:
    """Degrees and choices of one plan.

    `dp` data-parallel ranks fall into `replicate` groups that hold the same shards (HSDP); `zero` is the ZeRO stage, whose
    shards lie over `shard_ranks`. `micro_batch` is in sequences. `chunks` are the model chunks of a pipeline rank: 1, more
    for interleaved, 2 for zbv. `stages` says how many blocks each of the `pp * chunks` stages has, in model order; empty
    for an even cut. `recompute` `attention` runs only the attention again, `full` whole blocks. `offload` keeps optimizer
    states, or these and weights and gradients, on the host or a disk (`tier`: cpu, nvme).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    replicate: int = 1
    zero: int = 0
    micro_batch: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    stages: tuple[int, ...] = ()
    recompute: str = "none"
    offload: str = "none"
    tier: str = "cpu"

    def __post_init__(self):
        for name in ("tp", "pp", "dp", "cp", "ep", "etp", "replicate", "micro_batch", "chunks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TersorError(f"{name} is {value!r}", "degrees are whole numbers from 1 on")
        for name, known in (("schedule", SCHEDULES), ("recompute", RECOMPUTE), ("offload", OFFLOAD)):
            if getattr(self, name) not in known:
                raise TersorError(f"{name} {getattr(self, name)!r} is not known", f"known are {', '.join(known)}")
        if self.zero not in (0, 1, 2, 3):
            raise TersorError(f"zero is {self.zero!r}", "ZeRO has stages 0 to 3")
        if self.dp % self.replicate:
            raise TersorError(f"replicate={self.replicate} does not divide dp={self.dp}", "give a divisor")
        inside = self.dp * self.cp * self.tp
        if inside % (self.ep * self.etp):
            raise TersorError(
                f"ep={self.ep} times etp={self.etp} does not divide the {inside} ranks of a stage (dp*cp*tp)",
                "experts are cut over the ranks of one stage",
            )
        if self.stages and len(self.stages) != self.pp * self.chunks:
            raise TersorError(
                f"{len(self.stages)} stages are given, pp={self.pp} with {self.chunks} chunks has {self.pp * self.chunks}",
                "give the blocks of every stage",
            )

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def edp(self) -> int:
        """Ranks that hold the same slice of the same expert, before ZeRO."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def shard_ranks(self) -> int:
        """Ranks that ZeRO cuts dense weights over: context-parallel ranks hold the same weights."""
        return self.dp // self.replicate * self.cp

    def micro_batches(self, global_batch: int) -> int:
        """Of one step and pipeline. Raises TersorError where the global batch does not divide."""
        per_micro_step = self.dp * self.micro_batch
        if global_batch % per_micro_step:
            raise TersorError(
                f"a global batch of {global_batch} is not a multiple of dp={self.dp} times micro_batch={self.micro_batch}",
                f"use a multiple of {per_micro_step}, or other degrees",
            )
        return global_batch // per_micro_step

    def stage_of_chunk(self, rank: int, chunk: int) -> int:
        """Which stage, in model order, is chunk `chunk` of pipeline rank `rank`: round and round, for zbv there and back."""
        if self.schedule == "zbv" and chunk % 2:
            return (chunk + 1) * self.pp - 1 - rank
        return chunk * self.pp + rank

    def rank_of_stage(self, stage: int) -> tuple[int, int]:
        """(pipeline rank, chunk) that holds a stage."""
        chunk, place = divmod(stage, self.pp)
        return (self.pp - 1 - place if self.schedule == "zbv" and chunk % 2 else place), chunk

    def describe(self) -> str:
        """As a user writes it for --why-not: what differs from the defaults."""
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                parts.append(f"{entry.name}={write_stages(value) if isinstance(value, tuple) else value}")
        return ",".join(parts) or "one device"


class Coordinates(NamedTuple):
    """Where a rank stands, for dense tensors (`dp cp tp`) and for experts (`edp ep etp`)."""

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Mesh:
    """The ranks of a layout."""

    layout: Layout

    def coordinates(self, rank: int) -> Coordinates:
        layout = self.layout
        pp, inside = divmod(rank, layout.dp * layout.cp * layout.tp)
        rest, tp = divmod(inside, layout.tp)
        dp, cp = divmod(rest, layout.cp)
        rest, etp = divmod(inside, layout.etp)
        edp, ep = divmod(rest, layout.ep)
        return Coordinates(pp, dp, cp, tp, edp, ep, etp)

    @cached_property
    def all(self) -> tuple[Coordinates, ...]:
        return tuple(self.coordinates(rank) for rank in range(self.layout.world))

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The ranks that differ only on `axis`, in the order of that axis; for `edp ep etp` among the experts' axes.

        `shard` are the ranks that ZeRO cuts dense weights over: data-parallel ranks of one replica, and context ranks.
        """
        keys = EXPERT_AXES if axis in EXPERT_AXES[1:] else AXES
        found: dict[tuple, list[int]] = {}
        per_replica = self.layout.dp // self.layout.replicate
        for rank, place in enumerate(self.all):
            if axis == "shard":
                key = (place.pp, place.dp // per_replica, place.tp)
            else:
                key = tuple(getattr(place, name) for name in keys if name != axis)
            found.setdefault(key, []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

"""A pipeline schedule as a grid of blocks: built, and run on a clock that knows how long each block takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.schedule import check
from tersor.ops.plan_parallel.schedule.builders import BUILDERS, require

Seconds = float | Sequence[float]


class Action(NamedTuple):
    """One thing a rank does. `kind` is F, BW, or B and W where the backward is taken apart; `stage` is in model order."""

    kind: str
    micro: int
    stage: int


class Block(NamedTuple):
    """An action with its time, in seconds from the start of the step."""

    rank: int
    kind: str
    micro: int
    stage: int
    start: float
    end: float


@dataclass(frozen=True)
class Grid:
    """Per pipeline rank its actions, in order."""

    schedule: str
    pp: int
    chunks: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return self.pp * self.chunks

    @cached_property
    def _ranks_of_stages(self) -> tuple[int, ...]:
        layout = Layout(pp=self.pp, schedule=self.schedule, chunks=self.chunks)
        return tuple(layout.rank_of_stage(stage)[0] for stage in range(self.stages))

    def rank_of(self, stage: int) -> int:
        return self._ranks_of_stages[stage]

    @cached_property
    def in_flight(self) -> tuple[float, ...]:
        """Peak per rank of micro-batches whose activations are held, in stages' worth: a chunk counts 1 / chunks.

        It hangs on the order alone, for a rank does one thing at a time.
        """
        return tuple(count / self.chunks for count in self.peak([1] * self.stages))

    def peak(self, sizes: Sequence[float], kept: float = 1) -> tuple[float, ...]:
        """Largest sum per rank of what stages hold, `sizes[stage]` for a micro-batch from its forward to its backward.

        `kept` is the share of it that a weight gradient still needs once the gradient of the input is made.
        """
        freed = {"F": -1, "BW": 1, "B": 1 - kept, "W": kept}
        found = []
        for actions in self.ranks:
            held = highest = 0
            for action in actions:
                held -= freed[action.kind] * sizes[action.stage]
                highest = max(highest, held)
            found.append(highest)
        return tuple(found)

    @cached_property
    def _program(self) -> list[tuple[int, str, int, int, int, int]]:
        """The actions in an order they can be run in: rank, kind, micro-batch, stage, then the earlier entry of another
        stage that it waits for and the boundary between stages that is crossed, -1 where there is none."""
        place: dict[tuple[str, int, int], int] = {}
        program = []
        for index, (rank, action) in enumerate(check.topological(self)):
            kind, micro, stage = action
            place["B" if kind == "BW" else kind, micro, stage] = index
            source = boundary = -1
            if kind == "F" and stage:
                source, boundary = place["F", micro, stage - 1], stage - 1
            elif kind in ("B", "BW") and stage + 1 < self.stages:
                source, boundary = place["B", micro, stage + 1], stage
            if boundary >= 0 and self.rank_of(boundary) == self.rank_of(boundary + 1):
                boundary = -1
            program.append((rank, kind, micro, stage, source, boundary))
        return program


@dataclass(frozen=True)
class Timeline:
    """A step on the clock. `busy` seconds and `bubble_share` (idle share of the step) are per rank, so is `in_flight`."""

    grid: Grid
    seconds: float
    blocks: list[Block]
    busy: tuple[float, ...]

    @property
    def bubble_share(self) -> tuple[float, ...]:
        return tuple(1 - busy / self.seconds if self.seconds else 0.0 for busy in self.busy)

    @property
    def in_flight(self) -> tuple[float, ...]:
        return self.grid.in_flight

    def held(self, sizes: Sequence[float] | None = None, kept: float = 1.0) -> list[list[tuple[float, float]]]:
        """Per rank what is held from a time on, [(seconds, amount), ...]: stages' worth, or with `sizes` as in
        `Grid.peak`."""
        sizes = sizes or [1 / self.grid.chunks] * self.grid.stages
        freed = {"BW": 1.0, "B": 1 - kept, "W": kept}
        changes: list[list[tuple[float, float]]] = [[] for _ in range(self.grid.pp)]
        for block in self.blocks:
            if block.kind == "F":
                changes[block.rank].append((block.start, sizes[block.stage]))
            elif freed[block.kind]:
                changes[block.rank].append((block.end, -freed[block.kind] * sizes[block.stage]))
        curves = []
        for steps in changes:
            amount, curve = 0.0, [(0.0, 0.0)]
            for time, change in sorted(steps, key=lambda step: (step[0], step[1])):  # what is freed goes first
                amount += change
                if curve[-1][0] == time:
                    curve.pop()
                curve.append((time, max(amount, 0.0)))
            if curve[-1][0] < self.seconds:
                curve.append((self.seconds, curve[-1][1]))
            curves.append(curve)
        return curves


@lru_cache(maxsize=64)
def build(schedule: str, pp: int, micro_batches: int, chunks: int = 1) -> Grid:
    """The grid of a schedule. Raises TersorError where it cannot be: `builders.why_not` says so beforehand."""
    require(schedule, pp, micro_batches, chunks)
    layout = Layout(pp=pp, schedule=schedule, chunks=chunks)
    ranks = []
    for rank in range(pp):
        stages = [layout.stage_of_chunk(rank, chunk) for chunk in range(chunks)]
        order = BUILDERS[schedule](rank, pp, micro_batches, chunks)
        ranks.append(tuple(Action(kind, micro, stages[chunk]) for kind, micro, chunk in order))
    return Grid(schedule, pp, chunks, micro_batches, tuple(ranks))


def simulate(
    grid: Grid,
    forward: Seconds,
    backward_input: Seconds,
    backward_weight: Seconds,
    send_seconds: Seconds = 0.0,
) -> Timeline:
    """Run `grid`. Times are for one micro-batch: one number, or one per stage (`send_seconds`: one per boundary between
    stages). A whole backward takes the time of both its parts.

    What a stage makes reaches the next one `send_seconds` after it is done; meanwhile both ranks go on with what they can
    do. Nothing is sent between stages of one rank. Raises TersorError on a deadlock.
    """
    stages = grid.stages
    forward = _each(forward, stages, "forward")
    inputs = _each(backward_input, stages, "backward_input")
    weights = _each(backward_weight, stages, "backward_weight")
    sends = [*_each(send_seconds, stages - 1, "send_seconds"), 0.0]  # the last one, [-1], is no boundary
    takes = {"F": forward, "B": inputs, "W": weights, "BW": [a + b for a, b in zip(inputs, weights, strict=True)]}
    free, busy = [0.0] * grid.pp, [0.0] * grid.pp
    ends: list[float] = []
    blocks = []
    for rank, kind, micro, stage, source, boundary in grid._program:
        start = free[rank]
        if source >= 0:
            start = max(start, ends[source] + sends[boundary])
        end = start + takes[kind][stage]
        busy[rank] += takes[kind][stage]
        free[rank] = end
        ends.append(end)
        blocks.append(Block(rank, kind, micro, stage, start, end))
    return Timeline(grid, max(free), blocks, tuple(busy))


def _each(given: Seconds, count: int, what: str) -> list[float]:
    values = [float(given)] * count if isinstance(given, (int, float)) else [float(value) for value in given]
    if len(values) != count:
        raise TersorError(f"{what} has {len(values)} times, the schedule needs {count}", "give one number, or one each")
    return values

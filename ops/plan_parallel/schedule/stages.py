"""How many blocks each pipeline stage has: the cut whose slowest stage is fastest, among those that fit in memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import frexp, ldexp

from tersor.formats.errors import TersorError

BITS = 60  # of the whole number that the longest piece takes: times are counted so, for sums to be exact
SAME = 30  # bits in which times of stages must agree to be the same


def balance(
    piece_seconds: Sequence[float],
    piece_bytes: Sequence[float] | Sequence[tuple[float, float]],
    stages: int,
    memory_limits: Sequence[float] | float | None = None,
    in_flight: Sequence[float] | None = None,
    least: int = 1,
    least_at_ends: int = 0,
) -> tuple[int, ...]:
    """Blocks of each stage. Pieces are the model's, in its order: embedding, blocks, head; the first stage has the
    embedding besides its blocks and the last one the head.

    `piece_bytes` are what a piece takes all the time, or (all the time, for each micro-batch in flight); a stage takes
    the first and `in_flight[stage]` times the second (1 where `in_flight` is not given), `memory_limits` bytes at most.
    Stages have `least` blocks at least, the first and the last `least_at_ends`: a stage may be the embedding or the head
    alone. Of cuts with the same slowest stage the most even one is taken, then the one with fewer blocks in front, where
    1F1B holds more. Raises TersorError where there is no cut, or none that fits.
    """
    blocks = len(piece_seconds) - 2
    if blocks < 0 or len(piece_bytes) != len(piece_seconds):
        raise ValueError(f"{len(piece_seconds)} times and {len(piece_bytes)} sizes: give embedding, blocks and head")
    lows = [least_at_ends if stage in (0, stages - 1) else least for stage in range(stages)]
    if stages < 1 or sum(lows) > blocks:
        raise TersorError(
            f"{blocks} blocks are too few for {stages} stages", "use less pipeline parallelism, or fewer chunks"
        )
    cut = _Cut(piece_seconds, piece_bytes, stages, memory_limits, in_flight, lows)
    slowest = cut.fastest()
    if slowest is None:
        raise TersorError(
            f"no cut of {blocks} blocks over {stages} stages fits in memory; {cut.tightest()}",
            "use more pipeline or tensor parallelism, recompute activations, or shard the states further",
        )
    return cut.most_even(slowest + (slowest >> SAME))


class _Cut:
    """Stages are runs of blocks: run (i, j) of stage s has blocks i to j - 1. Times are whole numbers."""

    def __init__(self, seconds, sizes, stages, limits, in_flight, lows):
        if min(seconds) < 0:
            raise ValueError("times of pieces must not be negative")
        shift = BITS - frexp(max(seconds))[1]
        grains = [int(ldexp(value, shift)) for value in seconds]
        pairs = [size if isinstance(size, tuple) else (size, 0.0) for size in sizes]
        self.stages, self.blocks, self.lows = stages, len(seconds) - 2, lows
        self.in_flight = in_flight or [1.0] * stages
        limits = [limits] * stages if isinstance(limits, (int, float)) else limits
        self.limits = limits
        if len(self.in_flight) != stages or (limits is not None and len(limits) != stages):
            raise ValueError(f"in_flight and memory_limits need one number for each of {stages} stages")
        self.time = [0, *accumulate(grains[1:-1])]
        self.fixed, self.moving = ([0.0, *accumulate(pair[at] for pair in pairs[1:-1])] for at in (0, 1))
        self.ends = [[0] * stages, [(0.0, 0.0)] * stages]  # extra time and bytes of the first and last stage
        for stage, piece in ((0, 0), (stages - 1, -1)):
            self.ends[0][stage] += grains[piece]
            self.ends[1][stage] = tuple(a + b for a, b in zip(self.ends[1][stage], pairs[piece], strict=True))
        self.room = [self._reach(stage) for stage in range(stages)]
        self.any_start = [
            0 < stage < stages - 1 and lows[stage] <= 1 and all(end > first for first, end in enumerate(room[:-1]))
            for stage, room in enumerate(self.room)
        ]  # a stage that may begin anywhere, for one block fits wherever it is

    def cost(self, stage: int, first: int, last: int) -> int:
        return self.time[last] - self.time[first] + self.ends[0][stage]

    def nbytes(self, stage: int, first: int, last: int) -> float:
        fixed, moving = self.ends[1][stage]
        moving += self.moving[last] - self.moving[first]
        return fixed + self.fixed[last] - self.fixed[first] + self.in_flight[stage] * moving

    def _reach(self, stage: int) -> list[int]:
        """For each first block the last end of a run that memory lets be; before it where not even an empty one fits."""
        if self.limits is None:
            return [self.blocks] * (self.blocks + 1)
        taken = [fixed + self.in_flight[stage] * moving for fixed, moving in zip(self.fixed, self.moving, strict=True)]
        free = self.limits[stage] - self.nbytes(stage, 0, 0)
        return [bisect_right(taken, start + free) - 1 for start in taken]

    def runs(self, stage: int, first: int, cap: int) -> range:
        """Ends of the runs of a stage from `first` on that take `cap` at most and fit."""
        end = bisect_right(self.time, cap - self.ends[0][stage] + self.time[first]) - 1
        return range(first + self.lows[stage], min(end, self.room[stage][first]) + 1)

    def reached(self, cap: int) -> list[int] | None:
        """Which places between blocks each stage may begin at, as the bits of a number; None where the blocks cannot be
        cut within `cap`. Places that leave later stages more than they can take, or too little, are left out."""
        found, places = [], 1
        for stage in range(self.stages):
            found.append(places)
            after = 0
            run = places // (places & -places)
            if self.any_start[stage] and not run & (run + 1):  # places without a gap lead to places without one
                first, last = (places & -places).bit_length() - 1, places.bit_length() - 1
                start, stop = self.runs(stage, first, cap).start, self.runs(stage, last, cap).stop
                after = (1 << max(start, stop)) - (1 << start)
                places = 0
            while places:
                first = (places & -places).bit_length() - 1
                places &= places - 1
                if runs := self.runs(stage, first, cap):
                    after |= (1 << runs.stop) - (1 << runs.start)
            left = self.time[-1] - (self.stages - stage - 1) * cap + sum(self.ends[0][stage + 1 :])
            places = after >> (early := bisect_left(self.time, left)) << early
            places &= (2 << self.blocks - sum(self.lows[stage + 1 :])) - 1
            if not places:
                return None
        return found if places >> self.blocks & 1 else None  # blocks that take no time may be left over

    def possible(self, cap: int) -> bool:
        return self.reached(cap) is not None

    def fastest(self) -> int | None:
        """The least time of the slowest stage, None where nothing fits. It is the time of some run, so those are searched."""
        most = self.cost(0, 0, self.blocks) + self.cost(self.stages - 1, 0, self.blocks)
        if not self.possible(most):
            return None
        longest = max((after - before for before, after in pairwise(self.time)), default=0)
        least = max((self.time[-1] + sum(self.ends[0]) + self.stages - 1) // self.stages, longest)
        inner = {b - a for at, a in enumerate(self.time) for b in self.time[at:]}
        times = inner if self.stages > 2 else set()
        for stage in {0, self.stages - 1}:
            times |= {time + self.ends[0][stage] for time in inner}
        candidates = sorted(time for time in times if time >= least)
        return candidates[bisect_left(candidates, True, key=self.possible)]

    def most_even(self, cap: int) -> tuple[int, ...]:
        """Among cuts within `cap` the one of least squares; of equal ones, the one with fewer blocks in front.

        From the last stage to the first, for each place the best way to go on.
        """
        best: dict[int, tuple[int, int]] = {self.blocks: (0, 0)}  # place -> squares from there on, end of the next run
        ways, reached = [], self.reached(cap)
        for stage in reversed(range(self.stages)):
            found: dict[int, tuple[int, int]] = {}
            for first in (place for place in range(self.blocks + 1) if reached[stage] >> place & 1):
                options = [
                    (self.cost(stage, first, last) ** 2 + best[last][0], last)
                    for last in self.runs(stage, first, cap) if last in best
                ]  # fmt: skip
                if options:
                    found[first] = min(options)
            best = found
            ways.append(found)
        places = [0]
        for way in reversed(ways):
            places.append(way[places[-1]][1])
        return tuple(after - before for before, after in pairwise(places))

    def tightest(self) -> str:
        """Which stage is first to have no room even for the least it must hold, or that all have together."""
        for stage in range(self.stages):
            runs = range(self.blocks - self.lows[stage] + 1)
            least = min(self.nbytes(stage, first, first + self.lows[stage]) for first in runs)
            if least > self.limits[stage]:
                return f"stage {stage} needs {least:,.0f} bytes for the least it must hold, and has {self.limits[stage]:,.0f}"
        return "the stages together have too little room"

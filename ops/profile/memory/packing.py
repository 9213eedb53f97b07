"""Offline placement of a trace's blocks: dynamic storage allocation, NP-hard, so the best of several packings.

STWeaver / STAlloc (arXiv 2507.16274) plans a training step's memory from a recorded trace. Here its split-and-fuse and
its groups by phase compete with first fit by size, lifetime and area, with best fit on the skyline, and with best fit in
the order of time. What is no first fit already is pressed down, and blocks at the peak are moved while that helps. No
placement can beat the most bytes that are alive at once, which tells how far from the best possible the result may be.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from tersor.formats.memory_trace import Block, Trace
from tersor.ops.profile.memory import packing_loops as loops

ALIGNMENT = 512  # bytes, what PyTorch's kernels may count on
NEAR_ENOUGH = 0.001  # of the bound: what is left is not worth looking further
# Pairs of blocks to look at, and most blocks for a method: a plan for 100,000 events shall take seconds, not minutes.
BUDGET = 2 * 10**10
QUADRATIC, FIRST_FIT, ANY = 20_000, 150_000, 1 << 62
FEW, WINDOWS_OF_A_BLOCK = 500, 8  # see Problem.windows
MOST_SWAPS = 400
FULL_ENOUGH = 0.7  # STWeaver: a group whose blocks fill less of its rectangle is dissolved


@dataclass
class Packing:
    """`offsets` in bytes, one per block of the trace. `tried` is the peak that each method reached; methods after one that
    came near enough to the bound are not tried. `resident_bytes` of it all are there from before the first release to the
    end, and lie at the bottom."""

    offsets: list[int]
    peak_bytes: int
    lower_bound_bytes: int
    method: str
    resident_bytes: int = 0
    tried: dict[str, int] = field(default_factory=dict)


@dataclass
class Problem:
    """Blocks that share one region, as int64 arrays `[blocks]`. `phase_start` and `phase_end` count runs of phases."""

    start: np.ndarray
    end: np.ndarray
    size: np.ndarray
    phase_start: np.ndarray
    phase_end: np.ndarray

    @property
    def bound(self) -> int:
        return live_peak(self.start, self.end, self.size)

    @functools.cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levels of windows of time for loops.first_fit: as fine as they can be while a block is in few of a level."""
        last = int(self.end.max())
        width, window, sizes = [], [0], []
        for parts in (1, 4, 16, 64, 256, 1024) if self.size.size > FEW else (1,):
            wide = last // parts + 1
            lowest, highest = np.maximum(0, self.start // wide - 1), (self.end - 1) // wide
            if parts > 1 and int((highest - lowest + 1).sum()) > WINDOWS_OF_A_BLOCK * self.size.size:
                break
            change = np.zeros(last // wide + 2, np.int64)
            np.add.at(change, lowest, 1)
            np.add.at(change, highest + 1, -1)
            width.append(wide)
            window.append(window[-1] + change.size - 1)
            sizes.append(np.cumsum(change)[:-1])
        begin = np.concatenate(([0], np.cumsum(np.concatenate(sizes))))
        return np.array(width, np.int64), np.array(window, np.int64), begin


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def live_peak(start: np.ndarray, end: np.ndarray, size: np.ndarray) -> int:
    """The most bytes alive at once."""
    return int(live_bytes(start, end, size).max(initial=0))


def live_bytes(start: np.ndarray, end: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bytes alive after each event."""
    change = np.zeros(int(end.max(initial=0)) + 1, np.int64)
    np.add.at(change, start, size)
    np.add.at(change, end, -size)
    return np.cumsum(change)[:-1]


def pack(trace: Trace) -> Packing:
    """Place every block of `trace`. Each stream has a region of its own: what one stream freed another may not write
    without waiting for it, which a plan by event order cannot promise."""
    phase_of = _phases(trace)
    streams: dict[int, list[int]] = {}
    for index, block in enumerate(trace.blocks):
        if block.bytes:
            streams.setdefault(block.stream, []).append(index)
    offsets = [0] * len(trace.blocks)
    peak = bound = residents = 0
    tried: dict[str, int] | None = None
    methods: dict[str, int] = {}
    for stream in sorted(streams):
        rows = streams[stream]
        found, method, of_method, floor = _pack_region([trace.blocks[row] for row in rows], phase_of)
        top = 0
        for row, offset in zip(rows, found, strict=True):
            offsets[row] = peak + int(offset)
            top = max(top, int(offset) + align(trace.blocks[row].bytes))
        peak += top
        residents += floor
        bound += _bound([trace.blocks[row] for row in rows])
        methods[method] = methods.get(method, 0) + top
        if tried is None:
            tried = of_method
        else:  # methods that all regions came to
            tried = {name: total + of_method[name] for name, total in tried.items() if name in of_method}
    check(trace, offsets)
    return Packing(offsets, peak, bound, max(methods, key=methods.get, default="none"), residents, tried or {})


def static_then_dynamic(trace: Trace) -> int | None:
    """Peak of a plan that holds for other steps too: None without dynamic blocks, or with too many blocks.

    Blocks of fixed size are planned as if there were no others; dynamic ones, in the order they come, go to the lowest
    address that is free for as long as they live, as in STWeaver, where lifetimes are known and sizes are not.
    """
    peak = 0
    for stream in sorted({block.stream for block in trace.blocks}):
        blocks = [block for block in trace.blocks if block.stream == stream and block.bytes]
        static = [block for block in blocks if not block.dynamic]
        dynamic = [block for block in blocks if block.dynamic]
        offsets = pack(Trace(static, trace.events)).offsets
        order = [*np.argsort(offsets, kind="stable"), *range(len(static), len(blocks))]
        blocks = static + dynamic
        if len(blocks) > FIRST_FIT:
            return None
        start, end, size = (np.array([getattr(b, key) for b in blocks], np.int64) for key in ("start", "end", "bytes"))
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if blocks:
            peak += _first_fit(Problem(start, end, size, start, end), np.array(order, np.int64))[1]
    return peak if any(block.dynamic for block in trace.blocks) else None


def check(trace: Trace, offsets: list[int]) -> None:
    """Sweep over time with what is alive sorted by address; raise RuntimeError when two blocks share an address."""
    starts = {block.start: (block, offset) for block, offset in zip(trace.blocks, offsets, strict=True) if block.bytes}
    ends = {block.end: offset for block, offset in starts.values() if block.end < trace.events}
    alive: list[tuple[int, int, str]] = []  # (offset, first address behind, id)
    for event in range(trace.events):
        if event in starts:
            block, offset = starts[event]
            at = bisect_left(alive, (offset,))
            taken = (offset, offset + block.bytes, block.id)
            overlaps = (at and alive[at - 1][1] > offset) or (at < len(alive) and alive[at][0] < taken[1])
            if offset < 0 or offset % ALIGNMENT or overlaps:
                raise RuntimeError(f"block {block.id!r} of event {event} has no room at offset {offset}")
            alive.insert(at, taken)
        elif event in ends:
            del alive[bisect_left(alive, (ends[event],))]


def _bound(blocks: list[Block]) -> int:
    start, end = (np.array([getattr(block, key) for block in blocks], np.int64) for key in ("start", "end"))
    return live_peak(start, end, np.array([align(block.bytes) for block in blocks], np.int64))


def _phases(trace: Trace) -> np.ndarray:
    """Which run of equal phases each event, and the end, belongs to; an event without a phase continues the last."""
    names = {block.start: block.phase for block in trace.blocks if block.phase}
    runs, run, current = np.empty(trace.events + 1, np.int64), 0, ""
    for event in range(trace.events + 1):
        name = names.get(event, current)
        if name != current:
            run, current = run + 1, name
        runs[event] = run
    return runs


def _pack_region(blocks: list[Block], phase_of: np.ndarray) -> tuple[np.ndarray, str, dict[str, int], int]:
    """Offsets of blocks that share a region, the method that found them, the peaks of all, the bytes of residents."""
    first_free = min(block.end for block in blocks)
    last = max(block.end for block in blocks)
    # What is there before anything is freed, and to the end, meets every other block: at the bottom it is in no one's way.
    resident = np.array([block.start < first_free and block.end == last for block in blocks])
    size = np.array([align(block.bytes) for block in blocks], np.int64)
    offsets = np.zeros(len(blocks), np.int64)
    offsets[resident] = np.cumsum(size[resident]) - size[resident]
    floor = int(size[resident].sum())
    moving = np.flatnonzero(~resident)
    if not moving.size:
        return offsets, "one after the other", {"one after the other": floor}, floor
    start, end = (np.array([getattr(blocks[row], key) for row in moving], np.int64) for key in ("start", "end"))
    problem = Problem(start, end, size[moving], phase_of[start], phase_of[end])
    best, method, tried = best_of(problem)
    offsets[moving] = best + floor
    return offsets, method, {name: peak + floor for name, peak in tried.items()}, floor


def best_of(problem: Problem) -> tuple[np.ndarray, str, dict[str, int]]:
    """Every method in turn until one comes near enough to the bound; then local swaps on the best."""
    bound, tried, best, found, method, looked_at = problem.bound, {}, None, 0, "", 0
    enough = bound + int(NEAR_ENOUGH * bound)
    for name, (place, most_blocks) in METHODS.items():
        if problem.size.size > most_blocks or looked_at > BUDGET:
            continue
        offsets = place(problem)
        if offsets is None:
            continue
        peak = int((offsets + problem.size).max())
        if most_blocks < ANY:
            looked_at += problem.size.size**2
        if peak > enough and problem.size.size <= FIRST_FIT and not name.startswith("first fit"):
            offsets, peak = _press_down(problem, offsets)
            looked_at += problem.size.size**2
        tried[name] = peak
        if best is None or peak < found:
            best, found, method = offsets, peak, name
        if found <= enough:
            return best, method, tried
    offsets, peak = local_swaps(problem, best, found, enough)
    tried["local swaps"] = peak
    return (offsets, f"{method}, local swaps", tried) if peak < found else (best, method, tried)


def local_swaps(problem: Problem, offsets: np.ndarray, peak: int, enough: int) -> tuple[np.ndarray, int]:
    """Move a block at the peak, in the order of a first fit, before one that is in its way; keep what is no worse."""
    start, end, size = problem.start, problem.end, problem.size
    order = np.argsort(offsets, kind="stable")
    random = Random(0)  # the same plan in every run
    for _ in range(min(MOST_SWAPS, BUDGET // (10 * size.size**2))):
        at = int(np.argmax((offsets + size)[order]))
        block = order[at]
        below = order[:at]
        in_the_way = np.flatnonzero((start[below] < end[block]) & (start[block] < end[below]))
        if peak <= enough or not in_the_way.size:
            break
        to = int(in_the_way[random.randrange(in_the_way.size)])
        trial_order = np.concatenate((order[:to], [block], order[to:at], order[at + 1 :]))
        trial, reached = _first_fit(problem, trial_order)
        if reached <= peak:
            order, offsets, peak = trial_order, trial, reached
    return offsets, peak


def _first_fit(problem: Problem, order: np.ndarray) -> tuple[np.ndarray, int]:
    offsets = np.zeros_like(problem.size)
    peak = loops.first_fit(order, problem.start, problem.end, problem.size, offsets, *problem.windows)
    return offsets, int(peak)


def _press_down(problem: Problem, offsets: np.ndarray) -> tuple[np.ndarray, int]:
    """First fit in the order of `offsets` puts no block higher than it is."""
    return _first_fit(problem, np.argsort(offsets, kind="stable"))


def by_size(problem: Problem) -> np.ndarray:
    return _first_fit(problem, np.lexsort((problem.start, -problem.size)))[0]


def by_lifetime(problem: Problem) -> np.ndarray:
    return _first_fit(problem, np.lexsort((problem.start, -problem.size, problem.start - problem.end)))[0]


def by_area(problem: Problem) -> np.ndarray:
    area = problem.size.astype(np.float64) * (problem.end - problem.start)
    return _first_fit(problem, np.lexsort((problem.start, -area)))[0]


def skyline_best_fit(problem: Problem) -> np.ndarray:
    offsets = np.zeros_like(problem.size)
    order = np.lexsort((problem.start, -problem.size, problem.start - problem.end))
    loops.skyline(order, problem.start, problem.end, problem.size, offsets)
    return offsets


def split_and_fuse(problem: Problem) -> np.ndarray:
    offsets = np.zeros_like(problem.size)
    order = np.lexsort((problem.start, -problem.size))
    loops.split_and_fuse(order, problem.start, problem.end, problem.size, offsets)
    return offsets


def in_time_order(problem: Problem) -> np.ndarray:
    """Best fit as the events come, knowing nothing of the future: in n log n, for traces that are too long for others."""
    offsets = np.zeros_like(problem.size)
    events = [(int(at), 1, row) for row, at in enumerate(problem.start)]
    events += [(int(at), 0, row) for row, at in enumerate(problem.end)]
    holes: list[tuple[int, int]] = []  # (bytes, address), below the top
    by_start: dict[int, int] = {}  # address → bytes, of holes
    by_end: dict[int, int] = {}  # address behind → bytes
    top = 0

    def remove(address: int, nbytes: int) -> None:
        del holes[bisect_left(holes, (nbytes, address))], by_start[address], by_end[address + nbytes]

    def add(address: int, nbytes: int) -> None:
        insort(holes, (nbytes, address))
        by_start[address] = by_end[address + nbytes] = nbytes

    for _, begins, row in sorted(events):
        size = int(problem.size[row])
        if begins:
            at = bisect_left(holes, (size, 0))
            if at < len(holes):
                hole, address = holes[at]
                remove(address, hole)
                if hole > size:
                    add(address + size, hole - size)
            else:
                address, top = top, top + size
            offsets[row] = address
            continue
        address = int(offsets[row])
        if (before := by_end.get(address)) is not None:
            remove(address - before, before)
            address, size = address - before, size + before
        if (after := by_start.get(address + size)) is not None:
            remove(address + size, after)
            size += after
        if address + size == top:
            top = address
        else:
            add(address, size)
    return offsets


def grouped(problem: Problem) -> np.ndarray | None:
    """Blocks that are born in one phase and die in one become a rectangle; rectangles and the rest are placed by area."""
    order = np.lexsort((problem.phase_end, problem.phase_start))
    same = (np.diff(problem.phase_start[order]) == 0) & (np.diff(problem.phase_end[order]) == 0)
    groups = np.split(order, np.flatnonzero(~same) + 1)
    if len(groups) == 1 or len(groups) == order.size:
        return None
    rectangles, inside = [], np.zeros_like(problem.size)
    for members in groups:
        start, end, size = problem.start[members], problem.end[members], problem.size[members]
        part = Problem(start, end, size, start, end)
        offsets = by_size(part)
        height, span = int((offsets + size).max()), int(end.max() - start.min())
        if members.size > 1 and float((size * (end - start).astype(np.float64)).sum()) >= FULL_ENOUGH * height * span:
            rectangles.append((members, int(start.min()), int(end.max()), height))
            inside[members] = offsets
        else:
            rectangles += [(np.array([row]), *(int(v) for v in _row(problem, row))) for row in members]
    start, end, size = (np.array([one[k] for one in rectangles], np.int64) for k in (1, 2, 3))
    base = by_area(Problem(start, end, size, start, end))
    for (members, *_), offset in zip(rectangles, base, strict=True):
        inside[members] += offset
    return inside


def _row(problem: Problem, row: int) -> tuple[int, int, int]:
    return problem.start[row], problem.end[row], problem.size[row]


# Name → (packer, most blocks that it is used for). A packer returns offsets `[blocks]`, or None where it does not apply.
METHODS: dict[str, tuple[Callable[[Problem], np.ndarray | None], int]] = {
    "best fit in time order": (in_time_order, ANY),
    "groups by phase": (grouped, FIRST_FIT),
    "first fit by size": (by_size, FIRST_FIT),
    "first fit by lifetime": (by_lifetime, FIRST_FIT),
    "first fit by area": (by_area, FIRST_FIT),
    "split and fuse": (split_and_fuse, QUADRATIC),
    "skyline best fit": (skyline_best_fit, QUADRATIC),
}

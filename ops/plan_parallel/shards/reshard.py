"""Moving tensors from any boxes to any other boxes, in bounded memory, hashed on the way.

A tensor is walked in panels of rows of about PANEL_BYTES. A panel reads the rows it needs of every part that holds some,
puts every target's rows together from them and writes those: files are read and written in contiguous runs whichever way
tensors are cut, and columns are gathered in memory only. Where a target's rows lie in one piece in what was read they are
written from there. Rows longer than a panel are walked one by one, each as a tensor of one dimension less. Memory is some
panels for each thread, whatever the size of model and tensors. No torch: numpy moves bytes, whatever their type.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tersor.formats import linear_hash
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.header import DTYPE_BYTES
from tersor.formats.output import disk_errors
from tersor.ops.plan_parallel.shards.intersect import Box, overlaps

PANEL_BYTES = 8 << 20
THREADS = 4  # some wait for the disk
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Part(NamedTuple):
    """A box that lies from index `at` on in a tensor of `shape` whose data begins at byte `offset` of `file`."""

    box: Box
    file: Path
    offset: int
    shape: tuple[int, ...]
    at: tuple[int, ...]


class Move(NamedTuple):
    """One logical tensor: `sources` tile it, `targets` are all there is to write; equal boxes among them are replicas.

    Boxes of targets are equal or disjoint, and whatever lies in a target's tensor belongs to one of its boxes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Part, ...]
    targets: tuple[Part, ...]


class Panel(NamedTuple):
    """Rows [start, stop) of `move` below the indices `prefix`, with the parts (less their prefix) that have some of them."""

    move: Move
    prefix: tuple[int, ...]
    start: int
    stop: int
    sources: list[tuple[Part, int]]  # with their numbers in the move
    targets: list[tuple[Part, int]]


def run(
    moves: Iterator[Move] | Sequence[Move], progress: Callable[[int], None] = lambda nbytes: None, threads: int = 0
) -> dict[str, dict[Box, linear_hash.Hash]]:
    """Move all; the hash of every distinct target box by tensor. Raises TersorError when a file cannot be read or written.

    progress: called with the bytes of the logical tensors that were moved since the last call.
    """
    hashes: dict[str, dict[Box, linear_hash.Hash]] = defaultdict(dict)
    panels = (panel for move in moves for panel in _panels(move, PANEL_BYTES))
    lock, failed = threading.Lock(), []

    def work() -> None:
        arena = Arena()
        try:
            while True:
                with lock:
                    panel = None if failed else next(panels, None)
                if panel is None:
                    return
                found, nbytes = _move_panel(panel, arena)
                with lock:
                    sums = hashes[panel.move.name]
                    for box, value in found.items():
                        sums[box] = linear_hash.add(sums.get(box, linear_hash.ZERO), value)
                    progress(nbytes)
        except BaseException as error:  # raised again below, in the thread that asked
            failed.append(error)

    count = threads or min(THREADS, 2 * (os.cpu_count() or 1))
    workers = [threading.Thread(target=work, daemon=True) for _ in range(count - 1)]
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return hashes


class Arena:
    """Memory of one thread, used again for every panel: fresh pages would cost more than the copies."""

    def __init__(self):
        self._block = np.empty(0, np.uint8)
        self._used = 0

    def reset(self, nbytes: int) -> None:
        """Forget what was taken, and have room for `nbytes` in all."""
        self._used = 0
        if len(self._block) < nbytes:
            self._block = np.empty(0, np.uint8)  # before the next is made
            self._block = np.empty(nbytes, np.uint8)

    def take(self, shape: Sequence[int], itemsize: int) -> np.ndarray:
        nbytes = prod(shape) * itemsize
        block = self._block[self._used : self._used + nbytes]
        self._used += -(-nbytes // 64) * 64
        return block.view(UNSIGNED[itemsize]).reshape(shape)


def _panels(move: Move, panel_bytes: int) -> Iterator[Panel]:
    numbered = [list(enumerate(parts)) for parts in (move.sources, move.targets)]
    sources, targets = ([(part, number) for number, part in parts] for parts in numbered)
    size = DTYPE_BYTES[move.dtype]
    yield from _walk(move, (), move.shape, sources, targets, size, panel_bytes)


def _walk(move, prefix, shape, sources, targets, size, panel_bytes) -> Iterator[Panel]:
    if not shape:  # a scalar is a row of one
        sources, targets = ([(_as_row(part), number) for part, number in parts] for parts in (sources, targets))
        yield Panel(move, prefix, 0, 1, sources, targets)
        return
    row_bytes = prod(shape[1:]) * size
    if not row_bytes or not shape[0]:
        return
    if row_bytes > panel_bytes and len(shape) > 1:
        for index, (held, wanted) in enumerate(_sweep(sources, targets, [(i, i + 1) for i in range(shape[0])])):
            inner = ([(_inside(part, index, size), number) for part, number in parts] for parts in (held, wanted))
            yield from _walk(move, (*prefix, index), shape[1:], *inner, size, panel_bytes)
        return
    step = max(1, panel_bytes // row_bytes)
    bounds = [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    for (start, stop), (held, wanted) in zip(bounds, _sweep(sources, targets, bounds), strict=True):
        yield Panel(move, prefix, start, stop, held, wanted)


def _as_row(part: Part) -> Part:
    return Part(((0, 1),), part.file, part.offset, (1,), (0,))


def _inside(part: Part, index: int, size: int) -> Part:
    """A part at one index of its first dimension, as a part of a tensor of one dimension less."""
    row = part.at[0] + index - part.box[0][0]
    offset = part.offset + row * prod(part.shape[1:]) * size
    return Part(part.box[1:], part.file, offset, part.shape[1:], part.at[1:])


def _sweep(sources, targets, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[list, list]]:
    """For each of the ascending row ranges the sources and the targets that have some of it."""
    waiting = [sorted(parts, key=lambda entry: entry[0].box[0][0], reverse=True) for parts in (sources, targets)]
    active: list[list] = [[], []]
    for start, stop in bounds:
        for side in (0, 1):
            active[side] = [entry for entry in active[side] if entry[0].box[0][1] > start]
            while waiting[side] and waiting[side][-1][0].box[0][0] < stop:
                entry = waiting[side].pop()
                if entry[0].box[0][1] > start:
                    active[side].append(entry)
        yield list(active[0]), list(active[1])


class Lines(NamedTuple):
    """Rows [first, last) of a file's tensor: what is read or written at once. Boxes are cut to the panel."""

    file: Path
    offset: int  # of the first of these rows
    shape: tuple[int, ...]  # of these rows
    boxes: tuple[Box, ...]
    at: tuple[tuple[int, ...], ...]  # of the boxes within these rows
    numbers: tuple[int, ...]  # of the parts


def _lines(panel: Panel, parts: list[tuple[Part, int]], size: int) -> list[Lines]:
    """Parts of the same rows of the same tensor come together."""
    found: dict[tuple, list] = defaultdict(list)
    for part, number in parts:
        (low, high), *rest = part.box
        start, stop = max(low, panel.start), min(high, panel.stop)
        row = part.at[0] + start - low
        key = (part.file, part.offset + row * prod(part.shape[1:]) * size, stop - start, part.shape[1:])
        found[key].append((((start, stop), *rest), (0, *part.at[1:]), number))
    return [
        Lines(file, offset, (count, *inner), *(tuple(column) for column in zip(*entries, strict=True)))
        for (file, offset, count, inner), entries in found.items()
    ]


def _move_panel(panel: Panel, arena: Arena) -> tuple[dict[Box, linear_hash.Hash], int]:
    """Hashes of what was moved by box of the targets, and its bytes."""
    move = panel.move
    size = DTYPE_BYTES[move.dtype]
    reads, writes = (_lines(panel, parts, size) for parts in (panel.sources, panel.targets))
    replicas: dict[tuple, list[Lines]] = defaultdict(list)
    for lines in writes:
        replicas[lines[2:5]].append(lines)
    wanted = [prod(lines.shape) * size + 64 for lines in (*reads, *(same[0] for same in replicas.values()))]
    arena.reset(sum(wanted))

    held: list[tuple[Box, np.ndarray]] = []
    for lines in reads:
        data = arena.take(lines.shape, size)
        Checkpoint.read_bytes(lines.file, lines.offset, memoryview(data.reshape(-1).view(np.uint8)))
        held += [(box, data[_within(box, box, at)]) for box, at in zip(lines.boxes, lines.at, strict=True)]

    hashed: dict[Box, linear_hash.Hash] = {}
    done: set[Box] = set()
    moved = 0
    for same in replicas.values():
        lines = same[0]
        atoms = list(overlaps([box for box, _ in held], lines.boxes))
        whole = len(atoms) == 1 and atoms[0][2] == lines.boxes[0] and len(lines.boxes) == 1
        for source, target, box in atoms:
            if lines.boxes[target] in done:  # a replica that stands beside other boxes
                continue
            data = held[source][1][_within(box, held[source][0])]
            inside = tuple((index, index + 1) for index in panel.prefix)
            full = (*inside, *box) if move.shape else ()
            value = linear_hash.of_box(data.reshape(()) if not full else data[(None,) * len(inside)], full, move.shape)
            key = move.targets[lines.numbers[target]].box
            hashed[key] = linear_hash.add(hashed.get(key, linear_hash.ZERO), value)
            moved += data.nbytes
        done.update(lines.boxes)
        straight = whole and held[atoms[0][0]][1][_within(atoms[0][2], held[atoms[0][0]][0])]
        if whole and straight.flags.c_contiguous:
            out = straight
        else:
            out = arena.take(lines.shape, size)
            for source, target, box in atoms:
                there, data = held[source]
                out[_within(box, lines.boxes[target], lines.at[target])] = data[_within(box, there)]
        raw = memoryview(out.reshape(-1).view(np.uint8))
        for lines in same:
            _write(lines.file, lines.offset, raw)
    return hashed, moved


def _within(box: Box, outer: Box, at: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    """Where `box` lies in an array that holds `outer` from index `at` on."""
    begins = at or (0,) * len(box)
    return tuple(
        slice(start - low + begin, stop - low + begin)
        for (start, stop), (low, _), begin in zip(box, outer, begins, strict=True)
    )


def _write(file: Path, offset: int, data: memoryview) -> None:
    with disk_errors(file), open(file, "r+b", buffering=0) as stream:
        done = 0
        while done < len(data):
            done += os.pwrite(stream.fileno(), data[done:], offset + done)
        # Nothing reads it again: the disk can begin now, and has little left to do when the files are flushed.
        os.posix_fadvise(stream.fileno(), offset, len(data), os.POSIX_FADV_DONTNEED)


def hash_part(part: Part, dtype: str, shape: tuple[int, ...], arena: Arena) -> linear_hash.Hash:
    """Of the box as it lies in the file, read in panels."""
    move = Move("", dtype, shape, (part,), ())
    size = DTYPE_BYTES[dtype]
    total = linear_hash.ZERO
    for panel in _panels(move, PANEL_BYTES):
        for lines in _lines(panel, panel.sources, size):
            arena.reset(prod(lines.shape) * size + 64)
            data = arena.take(lines.shape, size)
            Checkpoint.read_bytes(lines.file, lines.offset, memoryview(data.reshape(-1).view(np.uint8)))
            inside = tuple((index, index + 1) for index in panel.prefix)
            box = lines.boxes[0]
            data = data[_within(box, box, lines.at[0])]
            full = (*inside, *box) if shape else ()
            data = data[(None,) * len(inside)] if shape else data.reshape(())
            total = linear_hash.add(total, linear_hash.of_box(data, full, shape))
    return total

"""Boxes: what two sets of them have in common, found by a sweep, and whether one set tiles a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

Box = tuple[tuple[int, int], ...]


def volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, extent) for extent in shape)


def common(first: Box, second: Box) -> Box | None:
    """The elements in both, None where there is none."""
    found = []
    for (start, stop), (other_start, other_stop) in zip(first, second, strict=True):
        start, stop = max(start, other_start), min(stop, other_stop)
        if start >= stop:
            return None
        found.append((start, stop))
    return tuple(found)


def overlaps(first: Sequence[Box], second: Sequence[Box]) -> Iterator[tuple[int, int, Box]]:
    """(i, j, what first[i] and second[j] have in common) wherever that is not empty.

    A sweep along the dimension that is cut most: O(n log n + pairs that meet on it). Boxes of no dimension hold one element.
    """
    if not first or not second:
        return
    if not first[0]:
        yield from ((i, j, ()) for i in range(len(first)) for j in range(len(second)))
        return
    along = _most_cut([*first, *second])
    events = sorted(
        (box[along][0], side, number)
        for side, boxes in enumerate((first, second))
        for number, box in enumerate(boxes)
        if box[along][0] < box[along][1]
    )
    open_boxes: tuple[list[int], list[int]] = ([], [])
    sets = (first, second)
    for start, side, number in events:
        other = 1 - side
        still = [there for there in open_boxes[other] if sets[other][there][along][1] > start]
        open_boxes[other][:] = still
        for there in still:
            box = common(sets[side][number], sets[other][there])
            if box is not None:
                yield (number, there, box) if side == 0 else (there, number, box)
        open_boxes[side].append(number)


def _most_cut(boxes: Sequence[Box]) -> int:
    return max(range(len(boxes[0])), key=lambda dimension: len({box[dimension] for box in boxes}))


def meeting(boxes: Sequence[Box]) -> list[tuple[int, int, Box]]:
    """Pairs i < j of `boxes` that have elements in common."""
    return sorted((i, j, box) for i, j, box in overlaps(boxes, boxes) if i < j)


def refine(boxes: Sequence[Box]) -> dict[Box, tuple[Box, ...]]:
    """Each distinct box as parts, such that parts of different boxes are equal or disjoint.

    Mostly a box is its only part: ranks hold the same box or have nothing in common.
    """
    distinct = list(dict.fromkeys(boxes))
    cuts: dict[int, list[set[int]]] = {}
    # Cuts pass on: a part of one box that another cuts may reach into a third. Boxes that meet share all their cuts.
    for i, j, _ in (pairs := meeting(distinct)):
        for number in (i, j):
            cuts.setdefault(number, [set(side) for side in distinct[number]])
    changed = bool(pairs)
    while changed:
        changed = False
        for i, j, shared in pairs:
            for dimension, (start, stop) in enumerate(shared):
                union = {cut for number in (i, j) for cut in cuts[number][dimension] if start <= cut <= stop}
                for number in (i, j):
                    if not union <= cuts[number][dimension]:
                        cuts[number][dimension] |= union
                        changed = True
    return {
        box: tuple(_grid([sorted(marks) for marks in cuts[number]])) if number in cuts else (box,)
        for number, box in enumerate(distinct)
    }


def _grid(marks: Sequence[Sequence[int]]) -> list[Box]:
    boxes: list[Box] = [()]
    for cuts in marks:
        boxes = [(*box, side) for box in boxes for side in pairwise(cuts)]
    return boxes


def tiling_problem(boxes: Sequence[Box], shape: Sequence[int]) -> str:
    """Why the distinct ones of `boxes` do not hold every element of a tensor exactly once; '' where they do."""
    distinct = list(dict.fromkeys(boxes))
    for box in distinct:
        if len(box) != len(shape) or any(stop > extent for (_, stop), extent in zip(box, shape, strict=True)):
            return f"box {show(box)} reaches out of its shape {list(shape)}"
    if not distinct:
        return "no box of it is there" if prod(shape) else ""
    pairs = meeting(distinct)
    if pairs:
        i, j, box = pairs[0]
        return f"boxes {show(distinct[i])} and {show(distinct[j])} both hold {show(box)}"
    missing = prod(shape) - sum(volume(box) for box in distinct)
    return (
        f"{missing} of {prod(shape)} elements are in no box, for example {show(_hole(distinct, shape))}"
        if missing
        else ""
    )


def _hole(boxes: Sequence[Box], shape: Sequence[int]) -> Box:
    """A box that none of `boxes` touches, given that there is one."""
    left = [whole(shape)]
    for box in boxes:
        left = [part for piece in left for part in subtract(piece, box)]
    return left[0]


def subtract(box: Box, other: Box) -> list[Box]:
    """`box` without `other`, in disjoint boxes."""
    shared = common(box, other)
    if shared is None:
        return [box]
    found, rest = [], list(box)
    for dimension, (start, stop) in enumerate(shared):
        low, high = rest[dimension]
        for side in ((low, start), (stop, high)):
            if side[0] < side[1]:
                found.append((*rest[:dimension], side, *rest[dimension + 1 :]))
        rest[dimension] = (start, stop)
    return found


def show(box: Box) -> str:
    """As numpy would index it."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"

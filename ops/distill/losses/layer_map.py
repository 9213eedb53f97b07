"""Which block of the teacher a block of the student should follow.

A student's block s stands for a run of the teacher's blocks, the first of which makes the attention it is compared with
and the last one the output, which is what the student's next block has to work with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.report import Report

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerMap:
    """(student block, teacher block) pairs whose outputs, and whose attention, are compared. `source`: for the report."""

    outputs: Pairs
    attention: Pairs
    source: str

    def describe(self) -> str:
        """A sentence for the report."""
        return f"layer map {self.source}: {', '.join(f'{s}:{t}' for s, t in self.outputs)}"


def layer_map(spec: str | None, student_blocks: int, teacher_blocks: int, kept: list[int] | None = None) -> LayerMap:
    """The map that `spec` ("0:0,1:3") gives; without it that of a student whose blocks are `kept` of the teacher's; else
    an even one, as in TinyBERT (arXiv:1909.10351). Raises TersorError for a spec that does not fit."""
    if spec is not None:
        pairs = _explicit(spec, student_blocks, teacher_blocks)
        return LayerMap(pairs, pairs, "as given")
    if kept is not None and len(kept) == student_blocks:
        ends = [*(index - 1 for index in kept[1:]), teacher_blocks - 1]
        return LayerMap(tuple(enumerate(ends)), tuple(enumerate(kept)), "of the blocks that prune kept")
    even = tuple((index, ((index + 1) * teacher_blocks - 1) // student_blocks) for index in range(student_blocks))
    return LayerMap(even, even, "one to one" if student_blocks == teacher_blocks else "even")


def _explicit(spec: str, student_blocks: int, teacher_blocks: int) -> Pairs:
    pairs: dict[int, int] = {}
    for part in spec.split(","):
        left, colon, right = (piece.strip() for piece in part.partition(":"))
        if not colon or not (left.isdecimal() and right.isdecimal()):
            raise TersorError(
                f"--layer-map {spec}: {part.strip()!r} is no pair", "write student:teacher, as in 0:0,1:3"
            )
        student, teacher = int(left), int(right)
        for whose, index, count in (("student", student, student_blocks), ("teacher", teacher, teacher_blocks)):
            if index >= count:
                raise TersorError(
                    f"--layer-map {spec}: the {whose} has no block {index}", f"its blocks are 0 to {count - 1}"
                )
        if student in pairs:
            raise TersorError(
                f"--layer-map {spec}: student block {student} is there twice", "give it one teacher block"
            )
        pairs[student] = teacher
    return tuple(sorted(pairs.items()))


def kept_blocks(student: Path, student_blocks: int, teacher: str | None, teacher_blocks: int) -> list[int] | None:
    """Which of the teacher's blocks a student still has, as the reports of its life tell; None where they do not.

    `teacher`: the fingerprint of the teacher's checkpoint, which says at what point of that life it stood.
    """
    try:
        steps = Report.history_of(student)
    except TersorError:
        return None  # a report that cannot be read only costs the better map
    starts = [index for index, step in enumerate(steps) if teacher and step["input"].get("fingerprint") == teacher]
    for start in [*starts, *range(len(steps))]:
        blocks = list(range(teacher_blocks))
        for step in steps[start:]:
            blocks = _after(step, blocks)
        if len(blocks) == student_blocks < teacher_blocks:
            return blocks
    return None


def _after(step: dict, blocks: list[int]) -> list[int]:
    """What a step of the history leaves of `blocks`; nothing where it cannot have been applied to them."""
    quality = step.get("quality") or {}
    if step["command"] != "prune" or quality.get("removed") != "layers" or step["args"].get("keep_shape"):
        return blocks
    gone = set(quality.get("removed_from_blocks") or ())
    if not gone <= set(range(len(blocks))):
        return []
    return [block for index, block in enumerate(blocks) if index not in gone]

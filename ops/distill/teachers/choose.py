"""Which way to run a teacher: whole in memory where it fits beside the student, else block by block, or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.report import resident_bytes
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.teacher_logits import is_teacher_logits
from tersor.formats.units import size
from tersor.ops.distill.data import TrainingData
from tersor.ops.distill.teachers.cached import Cached
from tersor.ops.distill.teachers.in_process import InProcess
from tersor.ops.distill.teachers.streamed import Streamed
from tersor.ops.distill.teachers.targets import Teacher, Wanted
from tersor.ops.model.bare import free_bytes
from tersor.ops.model.device import pick_device

MODES = ("auto", "in-process", "streamed", "cached")
SLACK = 1.1  # activations of a forward pass, and what an allocator wastes


@dataclass(frozen=True)
class Choice:
    """`why`: a sentence for the report."""

    mode: str
    why: str


def choose(
    teacher: str, mode: str = "auto", device: str = "auto", student_bytes: int = 0, max_memory_bytes: int | None = None
) -> Choice:
    """The mode for `teacher`, a checkpoint or a file of cached logits.

    `student_bytes`: what the student is still going to take (weights, gradients, optimizer, activations). Raises TersorError
    for a mode that does not fit the teacher.
    """
    if mode not in MODES:
        raise TersorError(f"--teacher-mode {mode}: no such mode", f"one of {', '.join(MODES)}")
    path = locate(teacher)
    is_cache = is_teacher_logits(path)
    if is_cache and mode in ("in-process", "streamed"):
        raise TersorError(f"{path}: holds cached logits, which --teacher-mode {mode} cannot run", "leave the mode out")
    if mode == "cached" and not is_cache:
        raise TersorError(
            f"{path}: is no file of cached logits", "write one with --cache-teacher FILE and give it as --teacher"
        )
    if is_cache:
        return Choice("cached", f"cached: {path.name} holds the teacher's logits")
    if mode != "auto":
        return Choice(mode, f"{mode}: as --teacher-mode says")
    place = pick_device(device)
    needed, room = int(teacher_bytes(path, place) * SLACK), free_bytes(place)
    if max_memory_bytes is not None:
        room = min(room, max_memory_bytes - resident_bytes())
    fits = needed + student_bytes <= room
    chosen = "in-process" if fits else "streamed"
    student = f" and the student {size(student_bytes)}" if student_bytes else ""
    return Choice(
        chosen,
        f"{chosen}: the teacher takes {size(needed)}{student}, {'within' if fits else 'more than'} the {size(max(room, 0))} "
        f"that {'--max-memory leaves' if max_memory_bytes is not None else 'are free'}",
    )


def teacher_bytes(path: Path, device: torch.device) -> int:
    """Weights of the model in memory: float32 on a CPU; on a GPU as they are stored."""
    checkpoint = open_checkpoint(path)
    if device.type != "cpu":
        return checkpoint.raw.nbytes
    return 4 * sum(prod(entry.shape) for entry in DenseView(checkpoint).tensors.values())


def open_teacher(
    teacher: str,
    choice: Choice,
    wanted: Wanted,
    data: TrainingData,
    device: str = "auto",
    max_memory_bytes: int | None = None,
    student_bytes: int = 0,
) -> Teacher:
    """The teacher in the mode of `choice`, the other arguments as for `choose`. `data` is what this process sees of it.

    Raises TersorError where the teacher does not fit the run.
    """
    path = locate(teacher)
    if choice.mode == "cached":
        return Cached(path, wanted, data)
    if choice.mode == "streamed":
        opened = Streamed(path, wanted, data, device, max_memory_bytes, student_bytes)
    else:
        opened = InProcess(path, wanted, device)
    data.require_vocabulary(opened.embeddings, path)
    return opened

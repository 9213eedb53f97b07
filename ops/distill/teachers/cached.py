"""Targets from a file of top-k logits, and the file from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tersor.formats.errors import TersorError
from tersor.formats.teacher_logits import LogitsFacts, TeacherLogits, TeacherLogitsWriter
from tersor.ops.distill.data import TrainingData
from tersor.ops.distill.losses.logits import LogitLosses, TopK
from tersor.ops.distill.teachers.targets import Targets, Teacher, Wanted, rows_of
from torch import Tensor


class Cached:
    """Reads the rows of a micro-batch when it is asked."""

    mode = "cached"
    blocks = hidden_size = 0

    def __init__(self, path: Path, wanted: Wanted, data: TrainingData):
        """Raises TersorError when the file was made for another run, or lacks what is wanted."""
        if wanted.blocks or wanted.attention:
            raise TersorError(
                f"{path}: holds logits only, and a loss compares what is inside the teacher",
                "give the teacher's checkpoint as --teacher, or leave hidden and attention out of --loss",
            )
        self.file, self.data = TeacherLogits(path), data
        facts = data.facts()
        self.file.belongs_to(facts)
        self.file.require(data.used(), facts)
        self.fingerprint, self.vocabulary = self.file.facts.teacher, self.file.facts.vocabulary

    def targets(self, step: int, ids: Tensor) -> Targets:
        windows = self.data.indices(step)
        chosen = [windows[row] for row in rows_of(self.data.ids(step), ids)]
        indices, logs, rest = (part.to(ids.device) for part in self.file.read(chosen))
        return Targets(top_k=TopK(indices, logs, rest, self.file.facts.temperature))


def write_cache(
    teacher: Teacher,
    data: TrainingData,
    path: Path,
    k: int,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> LogitsFacts:
    """Write the `k` most probable tokens of each position of the windows that the steps of `data` take.

    `vocabulary`: only so many first entries of the teacher count, those that the student has too. One step is in
    memory at a time. Raises TersorError when the file exists or cannot be written.
    """
    if teacher.vocabulary is None:
        raise ValueError("a teacher that was not asked for logits")
    vocabulary = min(teacher.vocabulary, vocabulary or teacher.vocabulary)
    if not 1 <= k <= vocabulary:
        raise TersorError(f"--top-k {k}: teacher and student have {vocabulary} entries in common", "choose fewer")
    run = data.facts()
    facts = LogitsFacts(teacher.fingerprint, k=k, temperature=float(temperature), vocabulary=vocabulary, **run)
    used = data.used()
    losses = LogitLosses([], facts.temperature, k, vocabulary)
    with TeacherLogitsWriter(path, facts, used, force) as writer:
        for step in range(data.steps):
            progress("teacher", len(used) - len(writer.missing), len(used))
            rows = {window: row for row, window in enumerate(data.indices(step)) if window in writer.missing}
            if not rows:
                continue
            targets = teacher.targets(step, data.ids(step)[list(rows.values())])
            everything = torch.ones(targets.hidden.shape[:2], dtype=torch.bool, device=targets.hidden.device)
            parts = [part.unflatten(0, everything.shape) for part in losses.top_entries(targets, everything)]
            for place, window in enumerate(rows):
                writer.write(window, *(part[place] for part in parts))
        progress("teacher", len(used), len(used))
    return facts

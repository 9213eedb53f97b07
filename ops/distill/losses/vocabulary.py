"""How much of two vocabularies is common: the same token strings under the same ids, padded to different lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tersor.formats.errors import TersorError

FEW = 0.01  # reserved tokens in the middle that were renamed do not make another vocabulary


@dataclass(frozen=True)
class Alignment:
    """Rows `[0, common)` of both output heads mean the same; `checked` says whether tokenizers were compared."""

    common: int
    student_rows: int
    teacher_rows: int
    checked: bool
    renamed: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        return self.common == self.student_rows == self.teacher_rows

    def describe(self) -> str:
        """A sentence for the report."""
        if self.whole:
            text = f"student and teacher have the same {self.common} vocabulary entries"
        else:
            text = (
                f"the first {self.common} vocabulary entries are compared, which student ({self.student_rows}) and teacher "
                f"({self.teacher_rows}) have in common; both are renormalised over them"
            )
        if self.renamed:
            ids = ", ".join(str(index) for index in self.renamed[:5])
            text += f"; {len(self.renamed)} of them have other names (ids {ids}{', ...' * (len(self.renamed) > 5)})"
        return text if self.checked else text + "; their tokenizers could not be compared"


def align(
    student_tokens: Mapping[str, int] | None,
    teacher_tokens: Mapping[str, int] | None,
    student_rows: int,
    teacher_rows: int,
) -> Alignment:
    """The common part of two vocabularies, from the tokenizers' strings by id and the lengths of the output heads.

    Rows that no token of either names are padding, and common. Tokens may differ at the end (added ones), and in up to
    1 % of ids before (renamed reserved ones). Raises TersorError where less than half of the smaller one is common.
    """
    rows = min(student_rows, teacher_rows)
    if student_tokens is None or teacher_tokens is None:
        return Alignment(rows, student_rows, teacher_rows, checked=False)
    student, teacher = (
        {index: token for token, index in tokens.items() if index < rows} for tokens in (student_tokens, teacher_tokens)
    )
    named = student.keys() | teacher.keys()
    # An id that only one tokenizer names is a token here and padding there: it differs.
    same = {index for index in student.keys() & teacher.keys() if student[index] == teacher[index]}
    last = _last_common(sorted(named), same)
    if last < min(len(student), len(teacher)) // 2:
        raise TersorError(
            f"the vocabularies of student and teacher agree in {len(same)} of {len(named)} tokens",
            "logits of different tokens cannot be compared: take a teacher with the student's tokenizer",
        )
    inside = sorted(index for index in named - same if index < last)
    after = sorted(index for index in named if index > last)
    common = after[0] if after else rows
    return Alignment(common, student_rows, teacher_rows, checked=True, renamed=tuple(inside))


def _last_common(named: list[int], same: set[int]) -> int:
    """The last id in `same` up to which few differ; -1 where there is none."""
    last, differ = -1, 0
    for index in named:
        if index not in same:
            differ += 1
        elif differ <= FEW * (index + 1):
            last = index
    return last


def tokens_of(folder: Path) -> dict[str, int] | None:
    """Token strings and ids of a checkpoint's tokenizer; None where it has none that transformers can load."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except Exception:  # whatever the many tokenizers raise: then there is nothing to compare
        return None

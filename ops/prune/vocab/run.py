"""Counts the tokens of the calibration text, cuts the vocabulary to the most frequent, and renumbers it everywhere."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.calibration import encode, load_tokenizer
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.text import load_text
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.vocab.plan import Details, assemble
from tersor.ops.prune.vocab.token_ids import map_ids

PIECE_CHARACTERS = 1 << 16
PANEL_ROWS = 8192
# Other forms of the same vocabulary. They are left out: tokenizer.json holds all of it.
OTHER_FORMS = {
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model",
}  # fmt: skip


def decide(job: Job, plan: Plan) -> Plan:
    """Choose the tokens by their frequency in the text; prove that the new tokenizer writes the same text."""
    details: Details = plan.details
    if details.room == details.rows:
        return plan
    tokenizer = load_tokenizer(job.checkpoint.path)
    pieces = list(texts(job, tokenizer))
    counts: Counter = Counter()
    for number, piece in enumerate(pieces):
        job.progress("tokens", number, len(pieces))
        counts.update(encode(tokenizer, piece))
    details.kept = details.choose(counts)
    details.files = new_files(job.checkpoint, details)
    steps = assemble(job.checkpoint, details)
    numbers = details.numbers
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**details.files, "config.json": {**job.checkpoint.config, **steps.config}}.items():
            (Path(folder) / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        if (special := job.checkpoint.path / "special_tokens_map.json").is_file():
            shutil.copyfile(special, Path(folder) / special.name)
        after = _compare(job, details, pieces, tokenizer, load_tokenizer(Path(folder)))
    before, characters = sum(counts.values()), sum(map(len, pieces))
    lost = sum(count for number, count in counts.items() if number not in numbers)
    details.quality = {
        "rows_before": details.rows,
        "rows_after": details.room,
        "config_key": ".".join(details.paths[0]),
        "tokens_that_must_stay": len(details.essential),
        "tokens_of_the_text": len(counts),
        "tokens_of_the_text_removed": sum(number not in numbers for number in counts),
        "share_of_the_text_removed": lost / before if before else 0.0,
        "tokens_per_character_before": before / characters,
        "tokens_per_character_after": after / characters,
        "saved_bytes": job.checkpoint.nbytes - steps.nbytes,
    }
    if lost:
        steps.warnings.append(
            f"{details.quality['tokens_of_the_text_removed']} tokens of the calibration text had to go, "
            f"{lost / before:.2%} of it is written with shorter ones"
        )
    left = [file.name for file in job.checkpoint.side_files() if is_other_form(file.name)]
    if left:
        steps.warnings.append(f"{', '.join(left)} left out: tokenizer.json holds the whole vocabulary")
    return steps


def is_other_form(name: str) -> bool:
    return name in OTHER_FORMS or name.endswith(".tiktoken")


def texts(job: Job, tokenizer) -> Iterator[str]:
    """The whole calibration text, cut at line ends."""
    if job.request.calib == "self":
        for window in job.windows:
            yield tokenizer.decode(window.tolist(), skip_special_tokens=True)
        return
    piece = ""
    for line in load_text(job.request.calib).splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece


def new_files(checkpoint: Checkpoint, details: Details) -> dict[str, dict]:
    """Every JSON file beside the weights that speaks of token ids, with the new ones."""
    numbers = details.numbers
    files = {"tokenizer.json": details.vocabulary.rewritten(numbers)}
    files |= {name: map_ids(content, numbers) for name, content in details.settings.items()}
    added = checkpoint.path / "added_tokens.json"
    if added.is_file():
        try:
            files[added.name] = {
                token: numbers[number] for token, number in json.loads(added.read_text("utf-8")).items()
            }
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise TersorError(f"{added}: does not fit tokenizer.json ({error!r})", "remove the file") from error
    return files


def _compare(job: Job, details: Details, pieces: list[str], old, new) -> int:
    """Tokens of the text in the new vocabulary. Raises TersorError unless it reads the same as before."""
    for number, place in details.numbers.items():
        token = details.vocabulary.tokens.get(number)
        if token is not None and new.convert_tokens_to_ids(token) != place:
            raise TersorError(
                f"{job.checkpoint.path}: token {token!r} is {new.convert_tokens_to_ids(token)} instead of {place} in the "
                "new tokenizer.json",
                "this tokenizer cannot be cut",
            )
    total = 0
    for piece in pieces:
        ids, before = encode(new, piece), encode(old, piece)
        total += len(ids)
        if _decoded(new, ids) != _decoded(old, before):
            raise TersorError(
                f"{job.checkpoint.path}: the text does not read the same after the cut", "lower --sparsity"
            )
    return total


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write the tensors and the tokenizer's files."""
    details: Details = plan.details
    for count, (name, action) in enumerate(plan.actions.items()):
        job.progress("write", count, len(plan.actions))
        if name in writer.journal.done:
            continue
        if action.action == "keep":
            copy_tensor(job.checkpoint, name, writer)
        else:
            cut(job.checkpoint, name, details.kept, details.axes[name], writer)
        writer.finish(name, None)
    job.progress("write", len(plan.actions), len(plan.actions))
    for name, content in details.files.items():
        writer.add_json(name, content)
    if details.files:
        for file in job.checkpoint.side_files():
            if is_other_form(file.name):
                writer.leave_out(file.relative_to(job.checkpoint.path).as_posix())
    return {"vocab": details.quality} if details.quality else {}


def cut(checkpoint: Checkpoint, name: str, kept: list[int], axis: int, writer: CheckpointWriter) -> None:
    """Write the kept entries of a tensor, a panel of rows at a time. Raises TersorError for NaN or Inf."""
    chosen = torch.tensor(kept)
    if axis:
        tensor = checkpoint.read(name)
        check_finite(tensor, name, checkpoint)
        writer.write(name, tensor.index_select(axis, chosen))
        return
    rows, offset = checkpoint.tensors[name].shape[0], 0
    for start in range(0, rows, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, rows)
        panel = checkpoint.read(name, (start, stop))
        check_finite(panel, name, checkpoint)
        part = panel[chosen[(chosen >= start) & (chosen < stop)] - start].contiguous()
        data = memoryview(part.reshape(-1).view(torch.uint8).numpy())
        writer.write_bytes(name, offset, data)
        offset += len(data)

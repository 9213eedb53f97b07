"""A teacher's most probable next tokens on disk: what `distill --cache-teacher` writes once and later runs read.

One safetensors file. `windows` I64 `[rows]`: which windows of the text these are, ascending. For each of their positions
the k highest entries: `indices` `[rows, seq_len, k]`, U16 where the vocabulary allows it and else I32, most probable first;
`log_probabilities` F16 `[rows, seq_len, k]` at the temperature of the metadata; `log_rest` F16 `[rows, seq_len]`, the
logarithm of what all other entries sum to. F16 is within 2^-11 of a value (BF16 within 2^-8, and no logarithm of a
probability needs its range): an entry's probability p is off by a factor of 1 + |ln p| / 2048 at most.

A window is stored once, however many epochs see it: what a teacher says of it does not depend on the step. `__metadata__`
says whose logits these are and of which windows; a run is checked against it. The number of rows is known beforehand, so
the file is laid out first and rows are written as they come; it gets its name when it is complete and on disk.
torch is imported where tensors are handled.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import read_header, tensor_bytes
from tersor.formats.output import disk_errors, reserve

if TYPE_CHECKING:
    import torch

SCHEMA = "tersor.teacher-logits/1"
RELATIVE_ERROR = 2.0**-11  # of F16, half a unit in the last place
SMALLEST = -65504.0  # the lowest finite number of F16; e to that is no probability anyone tells from 0
AGAIN = "write it again: tersor distill STUDENT --teacher TEACHER --cache-teacher FILE"


@dataclass(frozen=True)
class LogitsFacts:
    """Whose logits, of which windows: `teacher` and `tokenizer` are fingerprints, `text` and `tokens` hashes, `windows` how
    many the text has. `batch`, `steps` and `seed` decided which of them were taken. `vocabulary`: entries that count."""

    teacher: str
    tokenizer: str
    text: str
    tokens: str
    windows: int
    seq_len: int
    batch: int
    steps: int
    seed: int
    k: int
    temperature: float
    vocabulary: int


def index_dtype(vocabulary: int) -> str:
    return "U16" if vocabulary <= 1 << 16 else "I32"


def bytes_per_token(k: int, vocabulary: int) -> int:
    """k indices, k log-probabilities and the rest: 258 bytes for k = 64 and up to 65,536 entries."""
    return tensor_bytes(index_dtype(vocabulary), (k,)) + tensor_bytes("F16", (k + 1,))


def file_bytes(facts: LogitsFacts, rows: int) -> int:
    """Size of the file of so many windows."""
    return len(_header(facts, rows)) + rows * (8 + facts.seq_len * bytes_per_token(facts.k, facts.vocabulary))


def _layout(facts: LogitsFacts, rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    top = (rows, facts.seq_len, facts.k)
    return {
        "windows": ("I64", (rows,)),
        "indices": (index_dtype(facts.vocabulary), top),
        "log_probabilities": ("F16", top),
        "log_rest": ("F16", top[:2]),
    }


def _header(facts: LogitsFacts, rows: int) -> bytes:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(facts).items()}
    entries: dict[str, dict] = {"__metadata__": {"schema": SCHEMA, **metadata}}
    end = 0
    for name, (dtype, shape) in _layout(facts, rows).items():
        start, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


class TeacherLogitsWriter:
    """Writes `path` whole or not at all; use as a context manager."""

    def __init__(self, path: Path, facts: LogitsFacts, windows: Sequence[int], force: bool = False):
        """`windows`: the numbers of those that will come, ascending. Raises TersorError for a file that exists (unless
        `force`), one that another run is writing, and a disk that is too small."""
        self.path, self.partial = Path(path), Path(path).with_name(Path(path).name + ".partial")
        if self.path.is_dir() or (self.path.exists() and not force):
            what = "is a folder" if self.path.is_dir() else "exists"
            raise TersorError(f"{self.path}: {what}", "choose another file, read this one, or replace it with --force")
        self.facts = facts
        self._row = {window: row for row, window in enumerate(windows)}
        self._missing = set(self._row)
        header, self._place = _header(facts, len(windows)), {}
        end = len(header)
        for name, (dtype, shape) in _layout(facts, len(windows)).items():
            row_bytes = tensor_bytes(dtype, shape[1:])
            self._place[name] = end, row_bytes
            end += shape[0] * row_bytes
        with disk_errors(self.partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._reserve(end)
            self._put(0, header)
            self._put(self._place["windows"][0], b"".join(window.to_bytes(8, "little") for window in windows))
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TersorError(
                f"{self.path}: another run is writing it", "wait for it, or choose another file"
            ) from error

    def _reserve(self, size: int) -> None:
        """The space of the whole file, so that a disk that is too small is noticed before the teacher has run."""
        with disk_errors(self.partial):
            os.ftruncate(self._file, 0)
            try:
                reserve(self._file, size)
            except OSError:
                self.partial.unlink(missing_ok=True)
                raise

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        done = 0
        with disk_errors(self.partial):
            while done < len(data):
                done += os.pwrite(self._file, data[done:], offset + done)

    @property
    def missing(self) -> set[int]:
        """Windows that are still to come."""
        return self._missing

    def write(
        self, window: int, indices: torch.Tensor, log_probabilities: torch.Tensor, log_rest: torch.Tensor
    ) -> None:
        """One window: `indices` and `log_probabilities` `[seq_len, k]`, `log_rest` `[seq_len]`. Rounded here.

        Raises TersorError for NaN.
        """
        import torch

        top = (self.facts.seq_len, self.facts.k)
        if (tuple(indices.shape), tuple(log_probabilities.shape), tuple(log_rest.shape)) != (top, top, top[:1]):
            raise ValueError(f"window {window}: not {list(top)} entries")
        whole = indices.detach().cpu().to(torch.uint16 if index_dtype(self.facts.vocabulary) == "U16" else torch.int32)
        logs = log_probabilities.detach().cpu().float().clamp(SMALLEST, 0.0)
        rest = log_rest.detach().cpu().float().clamp(max=0.0)
        if bool(logs.isnan().any() | rest.isnan().any()):
            raise TersorError(
                f"{self.path}: the teacher's logits are NaN in window {window} of the text",
                "try it: tersor evaluate TEACHER",
            )
        parts = {"indices": whole, "log_probabilities": logs.half(), "log_rest": rest.half()}
        for name, tensor in parts.items():
            start, row_bytes = self._place[name]
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            self._put(start + self._row[window] * row_bytes, memoryview(raw))
        self._missing.discard(window)

    def __enter__(self) -> TeacherLogitsWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """The file gets its name; after an error it is removed."""
        try:
            if kind is not None:
                self.partial.unlink(missing_ok=True)
                return
            if self._missing:
                self.partial.unlink(missing_ok=True)
                raise ValueError(f"{len(self._missing)} windows were not written, for example {min(self._missing)}")
            with disk_errors(self.partial):
                os.fsync(self._file)
                os.replace(self.partial, self.path)
        finally:
            os.close(self._file)


def is_teacher_logits(path: str | Path) -> bool:
    """Whether this is a file that `TeacherLogitsWriter` wrote, and not a checkpoint."""
    if not Path(path).is_file():
        return False
    try:
        return read_header(Path(path))[1].get("schema", "").startswith("tersor.teacher-logits/")
    except TersorError:
        return False


class TeacherLogits:
    """A file of cached logits, opened: headers at once, windows when asked for."""

    def __init__(self, path: str | Path):
        """Raises TersorError for a file that is damaged or holds something else."""
        self.path = Path(path)
        if not self.path.is_file():
            raise TersorError(f"{self.path}: no such file", AGAIN)
        metadata = read_header(self.path)[1]
        if metadata.get("schema") != SCHEMA:
            raise TersorError(f"{self.path}: holds {metadata.get('schema', 'no schema')}, not {SCHEMA}", AGAIN)
        self.facts = self._facts(metadata)
        self.file = Checkpoint(self.path)
        rows = self.file.tensors["windows"].shape[0] if "windows" in self.file.tensors else 0
        for name, entry in _layout(self.facts, rows).items():
            info = self.file.tensors.get(name)
            if info is None:
                raise TersorError(f"{self.path}: tensor {name!r} is missing", AGAIN)
            if (info.dtype, info.shape) != entry:
                raise TersorError(
                    f"{self.path}: {name!r} is {info.dtype} {list(info.shape)}, its metadata says {entry[0]} {list(entry[1])}",
                    AGAIN,
                )
        windows = self.file.read("windows").tolist()
        if windows != sorted(set(windows)) or (windows and not 0 <= windows[0] <= windows[-1] < self.facts.windows):
            raise TersorError(f"{self.path}: 'windows' does not ascend within 0 … {self.facts.windows - 1}", AGAIN)
        self._row = {window: row for row, window in enumerate(windows)}

    def _facts(self, metadata: dict[str, str]) -> LogitsFacts:
        values = {}
        for field in fields(LogitsFacts):
            text = metadata.get(field.name)
            if text is None:
                raise TersorError(f"{self.path}: its metadata has no {field.name!r}", AGAIN)
            values[field.name] = text if field.type == "str" else self._number(field.name, text, field.type)
        if values["k"] > values["vocabulary"]:
            raise TersorError(f"{self.path}: top {values['k']} of {values['vocabulary']} entries", AGAIN)
        return LogitsFacts(**values)

    def _number(self, key: str, text: str, kind: str) -> int | float:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        lowest = {"seed": None, "temperature": 0}.get(key, 1)
        good = type(value) is int or (kind == "float" and type(value) is float and value == value)
        if not good or (lowest is not None and (value < lowest or value <= 0)):
            raise TersorError(f"{self.path}: its metadata has {key!r} = {text[:80]!r}", AGAIN)
        return value

    def belongs_to(self, run: dict) -> None:
        """Raises TersorError unless these are logits of windows of the text of a run.

        `run` has text, tokenizer, tokens, windows and seq_len of its data.
        """
        facts = self.facts
        if run["tokenizer"] != facts.tokenizer:
            raise TersorError(f"{self.path}: made with another tokenizer than this run's", self._way_out("student"))
        if run["text"] != facts.text:
            raise TersorError(f"{self.path}: made of another text than --data of this run", self._way_out("--data"))
        if run["seq_len"] != facts.seq_len:
            raise TersorError(
                f"{self.path}: made with --seq-len {facts.seq_len}, this run has {run['seq_len']}",
                self._way_out(f"--seq-len {facts.seq_len}"),
            )
        if (run["tokens"], run["windows"]) != (facts.tokens, facts.windows):
            raise TersorError(
                f"{self.path}: made when the tokenizer split the same text otherwise",
                "its library is another: " + AGAIN,
            )

    @staticmethod
    def _way_out(what: str) -> str:
        return f"give the {what} it was made with, or " + AGAIN

    def require(self, windows: Sequence[int], run: dict) -> None:
        """Raises TersorError unless all of `windows` are there; `run` has the batch, steps and seed that chose them."""
        missing = [window for window in windows if window not in self._row]
        if not missing:
            return
        made, now = (
            f"--seed {seed} --batch {batch} --steps {steps}"
            for seed, batch, steps in (
                (self.facts.seed, self.facts.batch, self.facts.steps),
                (run["seed"], run["batch"], run["steps"]),
            )
        )
        if run["seed"] == self.facts.seed:
            out = f"lower --steps to {self.facts.steps * self.facts.batch // run['batch']}"
        else:
            out = f"give --seed {self.facts.seed}"
        raise TersorError(
            f"{self.path}: lacks {len(missing)} of the {len(windows)} windows of this run (made with {made}, this run has {now})",
            f"{out}, or " + AGAIN,
        )

    def read(self, windows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """indices int32 and log_probabilities float32 `[n, seq_len, k]`, log_rest float32 `[n, seq_len]`.

        Reads the rows of these windows only. Raises TersorError for numbers that no teacher gives.
        """
        import torch

        parts = []
        for window in windows:
            row = self._row[window]
            indices, logs, rest = (
                self.file.read(name, (row, row + 1)) for name in ("indices", "log_probabilities", "log_rest")
            )
            indices, logs, rest = indices.to(torch.int32), logs.float(), rest.float()
            if int(indices.min()) < 0 or int(indices.max()) >= self.facts.vocabulary:
                raise self._damaged("indices", window, f"a token outside of 0 … {self.facts.vocabulary - 1}")
            if not bool((torch.isfinite(logs) & (logs <= 0)).all()):
                raise self._damaged("log_probabilities", window, "what is no logarithm of a probability")
            if not bool((rest <= 0).all()):  # NaN is not
                raise self._damaged("log_rest", window, "what is no logarithm of a probability")
            parts.append((indices, logs, rest))
        return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))

    def _damaged(self, name: str, window: int, what: str) -> TersorError:
        return TersorError(f"{self.path}: {name!r} holds {what} in window {window}", "the file is damaged: " + AGAIN)

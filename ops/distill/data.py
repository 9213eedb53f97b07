"""Token windows to train on: which ones each step takes, and which of their positions count.

A step is the same whatever the number of processes and micro-batches, and whenever a run was interrupted: epochs are
permutations drawn from the seed and their number alone, one after the other without a gap, so that a batch may hold the
end of one and the beginning of the next.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from functools import lru_cache
from pathlib import Path

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.calibration import cut_windows, load_tokenizer, special_tokens
from tersor.ops.model.text import SHIPPED, load_text


class TrainingData:
    """Batches of windows of a text, cut as calibration cuts them.

    `windows` int64 `[windows, seq_len]`, in text order. `keep` bool `[seq_len]`: whether position t, which predicts token
    t + 1, counts; the last one never does, nor do predictions of the special tokens around a text.
    """

    def __init__(self, model: Path, source: str | None, seq_len: int, batch: int, steps: int, seed: int = 0):
        """`model` is the folder of the tokenizer, `source` a text (see `load_text`) or None for the shipped prose, `batch`
        windows a step over all processes. Raises TersorError for a text shorter than one batch."""
        tokenizer = load_tokenizer(model)
        text = load_text(source)
        windows = cut_windows(tokenizer, text, seq_len)
        if len(windows) < batch:
            raise TersorError(
                f"{source or SHIPPED} gives {len(windows)} windows of {seq_len} tokens, one batch takes {batch}: "
                "the data is shorter than one batch",
                "give a longer text, or lower --batch or --seq-len",
            )
        self.windows = torch.tensor(windows)
        self.source, self.seq_len, self.batch, self.steps, self.seed = source, seq_len, batch, steps, seed
        before, after = special_tokens(tokenizer)
        position = torch.arange(seq_len)
        self.keep = (position >= len(before) - 1) & (position < seq_len - len(after) - 1)
        self.text = _digest(text.encode("utf-8", "surrogatepass"))
        self.tokenizer = tokenizer_fingerprint(tokenizer)
        self._slice = slice(0, batch)

    @property
    def rows(self) -> int:
        """Windows a step of this process: all of the batch, or the part of it that `part` gave."""
        return self._slice.stop - self._slice.start

    @property
    def epochs(self) -> float:
        """How often the steps see the text."""
        return self.steps * self.batch / len(self.windows)

    def part(self, rank: int, ranks: int) -> TrainingData:
        """The same data, of which `indices` and `ids` are the share of one process: consecutive rows of each batch.

        Raises TersorError when there are more processes than rows.
        """
        if ranks > self.batch:
            raise TersorError(
                f"{ranks} processes share a batch of {self.batch} windows: some would have none",
                f"raise --batch to {ranks} or more, or start fewer processes",
            )
        mine = copy.copy(self)
        mine._slice = slice(self.batch * rank // ranks, self.batch * (rank + 1) // ranks)
        return mine

    def indices(self, step: int) -> list[int]:
        """Numbers of the windows of `step`, which may lie past the last one."""
        places = range(step * self.batch + self._slice.start, step * self.batch + self._slice.stop)
        count = len(self.windows)
        return [_epoch(count, self.seed, place // count)[place % count] for place in places]

    def ids(self, step: int) -> torch.Tensor:
        """Tokens of `step`, int64 `[rows, seq_len]`."""
        return self.windows[self.indices(step)]

    def kept(self, ids: torch.Tensor) -> torch.Tensor:
        """`keep` for a micro-batch `[B, seq_len]`, on its device."""
        return self.keep.to(ids.device).expand(len(ids), -1)

    def used(self) -> list[int]:
        """Numbers of the windows that the steps take, each once, in text order; those of all processes."""
        count = len(self.windows)
        if self.steps * self.batch >= count:
            return list(range(count))
        return sorted(_epoch(count, self.seed, 0)[: self.steps * self.batch])

    def facts(self) -> dict:
        """What decides the windows and their order; part of the key of a run."""
        tokens = _digest(memoryview(self.windows.to(torch.int32).numpy()))
        return {
            "text": self.text, "tokenizer": self.tokenizer, "tokens": tokens, "windows": len(self.windows),
            "seq_len": self.seq_len, "batch": self.batch, "steps": self.steps, "seed": self.seed,
        }  # fmt: skip

    def require_vocabulary(self, embeddings: int, path: Path) -> None:
        """Raises TersorError when a model has too few embeddings for the tokens of the text."""
        highest = int(self.windows.max())
        if highest >= embeddings:
            raise TersorError(
                f"{path}: has {embeddings} embeddings, the text needs token {highest}",
                "student and teacher must share a tokenizer",
            )


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of the token strings with their numbers, and of what frames a text."""
    content = [sorted(tokenizer.get_vocab().items()), special_tokens(tokenizer)]
    return _digest(json.dumps(content, ensure_ascii=True).encode())


@lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    """The order of windows in an epoch. Of Python's generator only `random()` is promised to stay as it is."""
    generator = random.Random(f"{seed}/{epoch}")
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

"""Calibration statistics on disk: what `profile --collect` saves and `prune --stats` and `quantize --stats` read.

One safetensors file. For a linear layer with checkpoint name NAME, in float32: `NAME.squares` `[in]`, the sum of squares of
each input; `NAME.hessian` `[in (in + 1) / 2]`, the upper triangle of X^T X / tokens row by row; `NAME.tokens` int64 `[1]`.
Layers that read the same input are stored once: `__metadata__` maps the others to the one that has the tensors. For an
experts module with name NAME: `NAME.counts` int64 `[experts]`, and `NAME.transitions` int64 `[experts before, experts]`,
how often a token went from an expert of the mixture before to one of this. `__metadata__` also says whose statistics
these are (fingerprint), of which text, and which kinds there are.

Tensors are written as they come, behind a header of reserved length: which layers share an input is only known once the
model has run. torch is imported where tensors are handled.
"""

from __future__ import annotations

import json
import os
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import read_header, tensor_bytes

if TYPE_CHECKING:
    import torch

SCHEMA = "tersor.stats/1"
FILE_NAME = "stats.safetensors"
KINDS = ("norms", "hessian", "routing")
KEYS = ("schema", "fingerprint", "calibration", "samples", "seq_len", "seed", "kinds", "aliases", "unreached")
AGAIN = "collect them again: tersor profile MODEL --collect norms,hessian -o DIR"


class StatisticsWriter:
    """Writes `path` whole or not at all; use as a context manager."""

    def __init__(self, path: Path, shapes: dict[str, int], modules: dict[str, int], facts: dict):
        """`shapes` has the inputs of every layer that may come, `modules` the experts of every mixture.

        `facts` are the keys fingerprint, calibration, samples, seq_len, seed and kinds of the metadata.
        """
        self.path, self.partial = Path(path), Path(path).with_name(Path(path).name + ".partial")
        self.facts, self.kinds = facts, tuple(facts["kinds"])
        self.aliases: dict[str, str] = {}
        self.unreached: list[str] = []
        self._entries: dict[str, dict] = {}
        self._end = 0
        self._reserved = self._most_header_bytes(shapes, modules)
        try:
            self._stream = open(self.partial, "wb")  # noqa: SIM115 - closed by __exit__
            self._stream.seek(8 + self._reserved)
        except OSError as error:
            raise TersorError(f"{self.partial}: {error.strerror}", "choose a folder that can be written to") from error

    def _most_header_bytes(self, shapes: dict[str, int], modules: dict[str, int]) -> int:
        """No header is longer than one with every tensor there, at the largest offset, and every layer an alias too."""
        end = 10**17
        entries = {
            f"{name}.{part}": {"dtype": "F32", "shape": [end, end], "data_offsets": [end, end]}
            for name in (*shapes, *modules)
            for part in ("squares", "hessian", "tokens")
        }
        longest = max(shapes, key=len, default="")
        metadata = self._metadata(dict.fromkeys(shapes, longest), list(shapes))
        raw = _dump({"__metadata__": metadata, **entries})
        return len(raw) + -len(raw) % 8

    def _metadata(self, aliases: dict[str, str], unreached: list[str]) -> dict[str, str]:
        """Strings only, as the format demands: lists and objects as JSON."""
        values = {"schema": SCHEMA, **self.facts, "aliases": aliases, "unreached": unreached}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    def add(
        self, name: str, tokens: int, squares: torch.Tensor | None = None, hessian: torch.Tensor | None = None
    ) -> None:
        """The statistics of one layer: `squares` `[in]`, `hessian` `[in, in]`, of which the upper triangle counts."""
        import torch

        if squares is not None:
            self._put(f"{name}.squares", squares.detach().to("cpu", torch.float32))
        if hessian is not None:
            self._begin(f"{name}.hessian", "F32", (len(hessian) * (len(hessian) + 1) // 2,))
            for row in range(len(hessian)):
                self._write(hessian[row, row:].detach().to("cpu", torch.float32))
        self._put(f"{name}.tokens", torch.tensor([tokens], dtype=torch.int64))

    def share(self, name: str, owner: str) -> None:
        """Layer `name` reads the very input of layer `owner`."""
        self.aliases[name] = owner

    def miss(self, name: str) -> None:
        """No token reached layer `name` (an expert)."""
        self.unreached.append(name)

    def add_routing(self, module: str, counts: torch.Tensor, transitions: torch.Tensor | None) -> None:
        """`counts` `[experts]`; `transitions` `[experts before, experts]` where a mixture came before."""
        self._put(f"{module}.counts", counts.cpu().long())
        if transitions is not None:
            self._put(f"{module}.transitions", transitions.cpu().long())

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self._begin(name, "I64" if "int" in str(tensor.dtype) else "F32", tuple(tensor.shape))
        self._write(tensor)

    def _begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        end = self._end + tensor_bytes(dtype, shape)
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._end, end]}
        self._end = end

    def _write(self, tensor: torch.Tensor) -> None:
        import torch

        try:
            self._stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        except OSError as error:
            raise TersorError(
                f"{self.partial}: {error.strerror}", "free some space or choose another folder"
            ) from error

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """The header goes to the front and the file gets its name; after an error it is removed."""
        if kind is not None:
            self._stream.close()
            self.partial.unlink(missing_ok=True)
            return
        raw = _dump({"__metadata__": self._metadata(self.aliases, self.unreached), **self._entries})
        self._stream.seek(0)
        self._stream.write(self._reserved.to_bytes(8, "little") + raw.ljust(self._reserved))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self.partial, self.path)


class Statistics:
    """A statistics file, opened: headers at once, the numbers of a layer when asked for."""

    def __init__(self, path: str | Path):
        """Raises TersorError for a file that is damaged or no statistics file."""
        self.path = Path(path)
        if self.path.is_dir():
            self.path /= FILE_NAME
        if not self.path.is_file():
            raise TersorError(f"{self.path}: no such file", f"give a {FILE_NAME}; {AGAIN}")
        metadata = read_header(self.path)[1]
        if metadata.get("schema") != SCHEMA:
            found = metadata.get("schema", "no schema")
            raise TersorError(f"{self.path}: holds {found}, not {SCHEMA}", AGAIN)
        missing = [key for key in KEYS if key not in metadata]
        if missing:
            raise TersorError(f"{self.path}: its metadata has no {missing[0]!r}", AGAIN)
        self.file = Checkpoint(self.path)
        self.fingerprint, self.calibration = metadata["fingerprint"], metadata["calibration"]
        self.kinds: list[str] = self._parse(metadata, "kinds", list)
        self.aliases: dict[str, str] = self._parse(metadata, "aliases", dict)
        self.unreached: list[str] = self._parse(metadata, "unreached", list)
        self.samples, self.seq_len, self.seed = (
            self._parse(metadata, key, int) for key in ("samples", "seq_len", "seed")
        )

    def _parse(self, metadata: dict[str, str], key: str, kind: type):
        try:
            value = json.loads(metadata[key])
        except ValueError:
            value = None
        parts = {**value} if isinstance(value, dict) else dict.fromkeys(value if isinstance(value, list) else [], "")
        if type(value) is not kind or not all(isinstance(part, str) for pair in parts.items() for part in pair):
            raise TersorError(f"{self.path}: its metadata has {key!r} = {metadata[key][:80]!r}", AGAIN)
        return value

    def digest(self) -> str:
        """A hash of the header and of samples of the numbers."""
        return self.file.fingerprint()

    def belongs_to(self, checkpoint: Checkpoint) -> None:
        """Raises TersorError when these are the statistics of another checkpoint."""
        found = checkpoint.fingerprint()
        if found != self.fingerprint:
            raise TersorError(
                f"{self.path}: statistics of another checkpoint ({self.fingerprint}), {checkpoint.path} is {found}",
                f"give the checkpoint that they were collected from, or {AGAIN}",
            )

    def owner(self, name: str) -> str:
        """The layer that holds the numbers of layer `name`."""
        return self.aliases.get(name, name)

    def check(self, name: str, inputs: int, kind: str) -> None:
        """From headers: raises TersorError unless layer `name` has statistics `kind` of so many inputs, or saw no token."""
        if name in self.unreached:
            return
        owner = self.owner(name)
        part, shape = ("squares", (inputs,)) if kind == "norms" else ("hessian", (inputs * (inputs + 1) // 2,))
        for tensor, dtype, expected in ((f"{owner}.{part}", "F32", shape), (f"{owner}.tokens", "I64", (1,))):
            info = self.file.tensors.get(tensor)
            if info is None:
                raise TersorError(f"{self.path}: has no {kind} of {name} (tensor {tensor!r} is missing)", AGAIN)
            if info.dtype != dtype or info.shape != expected:
                raise TersorError(
                    f"{self.path}: {tensor!r} is {info.dtype} {list(info.shape)}, {name} needs {dtype} {list(expected)}",
                    AGAIN,
                )

    def has(self, name: str, kind: str) -> bool:
        return f"{self.owner(name)}.{'squares' if kind == 'norms' else 'hessian'}" in self.file.tensors

    def tokens(self, name: str) -> int:
        """How many tokens reached the layer."""
        return 0 if name in self.unreached else int(self.file.read(f"{self.owner(name)}.tokens")[0])

    def squares(self, name: str) -> torch.Tensor:
        """Sums of squares `[in]`."""
        return self._finite(f"{self.owner(name)}.squares")

    def hessian(self, name: str) -> torch.Tensor:
        """X^T X / tokens `[in, in]`."""
        import torch

        packed = self._finite(f"{self.owner(name)}.hessian")
        size = (isqrt(8 * len(packed) + 1) - 1) // 2
        full, start = torch.zeros(size, size), 0
        for row in range(size):
            full[row, row:] = packed[start : start + size - row]
            start += size - row
        return full.triu_().add_(full.triu(1).T) if size else full

    def _finite(self, name: str) -> torch.Tensor:
        import torch

        tensor = self.file.read(name)
        if not bool(torch.isfinite(tensor).all()):
            raise TersorError(f"{self.path}: {name!r} holds NaN or Inf", AGAIN)
        return tensor

    def routing(self) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """Counts and transitions of every mixture of experts, by module."""
        found = {}
        for name in self.file.tensors:
            if name.endswith(".counts"):
                before = f"{name.removesuffix('.counts')}.transitions"
                transitions = self.file.read(before) if before in self.file.tensors else None
                found[name.removesuffix(".counts")] = (self.file.read(name), transitions)
        return found


def _dump(value: dict) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")

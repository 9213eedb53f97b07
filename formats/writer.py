"""Writing a checkpoint: the layout is fixed first, tensors arrive in any order, and the name appears only at the end.

Everything goes to `OUT.partial/`, which is renamed to OUT when it is complete and on disk: a kill at any moment leaves
OUT absent or whole. Because every tensor's place is known from the start, a resumed run writes the same bytes as one
that was never interrupted, and a disk that is too small is noticed before the work begins.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import INDEX_NAME, Checkpoint
from tersor.formats.header import SAFETENSORS_DTYPES, TORCH_DTYPES, build_header, tensor_bytes
from tersor.formats.journal import Journal
from tersor.formats.output import commit, disk_errors, partial_path, reserve

if TYPE_CHECKING:
    import torch

Layout = dict[str, tuple[str, tuple[int, ...]]]
MAX_SHARD_BYTES = 5_000_000_000
SECONDS_BETWEEN_FLUSHES = 5.0
COPY_BYTES = 8 << 20


class CheckpointWriter:
    """A new checkpoint under construction."""

    def __init__(
        self, out: Path, layout: Layout, key: dict, resume: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
    ):
        """Reserve space for `layout` (name -> dtype string, shape) in `OUT.partial/`.

        `key` identifies the run for `resume`. Raises TersorError when the disk is too small.
        """
        self.out, self.partial = Path(out), partial_path(Path(out))
        self.layout = layout
        with disk_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self.partial / "journal.jsonl", key, resume)
            if not resume:  # only now, under the lock: the files may be those of a run that is still going
                self._clear()
        self._lock = threading.Lock()
        self._own_files: set[str] = set()
        self._flushed = time.monotonic()
        self._place: dict[str, tuple[int, int]] = {}  # name -> (file descriptor, offset)
        self._descriptors: list[int] = []
        try:
            self._write_headers(_assign_shards(layout, max_shard_bytes))
        except BaseException:
            self.abort(keep=resume)
            raise

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.journal.path:
                path.unlink()

    def _write_headers(self, shards: list[Layout]) -> None:
        names = shard_names(len(shards))
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        for file, shard in zip(names, shards, strict=True):
            header, offsets = build_header(shard)
            size = len(header) + sum(tensor_bytes(*entry) for entry in shard.values())
            with disk_errors(self.partial / file):
                descriptor = os.open(self.partial / file, os.O_RDWR | os.O_CREAT, 0o644)
                self._descriptors.append(descriptor)
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, 0)
                    reserve(descriptor, size)
                os.pwrite(descriptor, header, 0)
            self._place |= {name: (descriptor, offset) for name, offset in offsets.items()}
        if len(shards) > 1:
            total = sum(tensor_bytes(*entry) for entry in self.layout.values())
            self.add_json(
                INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            )

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place. Its dtype and shape must be those of the layout."""
        import torch

        dtype, shape = self.layout[name]
        given = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        if (given, tuple(tensor.shape)) != (dtype, tuple(shape)):
            raise ValueError(f"{name}: layout says {dtype} {list(shape)}, got {given} {list(tensor.shape)}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_bytes(name, 0, memoryview(raw.numpy()))

    def write_bytes(self, name: str, start: int, data: memoryview | bytes) -> None:
        """Put raw bytes at byte `start` of a tensor. Safe to call from several threads."""
        descriptor, offset = self._place[name]
        with disk_errors(self.partial):
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done : done + (64 << 20)], offset + start + done)

    def read(self, name: str) -> torch.Tensor:
        """A tensor that an interrupted run has written."""
        import torch

        dtype, shape = self.layout[name]
        descriptor, offset = self._place[name]
        buffer = torch.empty(tensor_bytes(dtype, shape), dtype=torch.uint8)
        view, done = memoryview(buffer.numpy()), 0
        while done < len(view):
            done += os.preadv(descriptor, [view[done:]], offset + done)
        return buffer.view(getattr(torch, TORCH_DTYPES[dtype])).reshape(shape)

    def finish(self, unit: str, data: object) -> None:
        """Note in the journal that `unit` is written; made durable together with the data every few seconds."""
        with self._lock:
            self.journal.mark(unit, data)
            if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
                self.flush()

    def flush(self) -> None:
        """Force data, then the journal that speaks of it, to disk."""
        with disk_errors(self.partial):
            for descriptor in self._descriptors:
                os.fdatasync(descriptor)
            self.journal.flush()
        self._flushed = time.monotonic()

    def add_json(self, name: str, value: dict) -> None:
        """Write a side file; it stands in for the input's of that name."""
        self._own_files.add(name)
        with disk_errors(self.partial / name):
            (self.partial / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def leave_out(self, name: str) -> None:
        """Do not copy this side file of the input."""
        self._own_files.add(name)

    def copy_side_files(self, source: Checkpoint) -> None:
        """Copy what the input has beside its weights, except for files that were written or left out."""
        for file in source.side_files():
            if file.relative_to(source.path).as_posix() in self._own_files:
                continue
            target = self.partial / file.relative_to(source.path)
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def commit(self) -> None:
        """Put everything on disk and give it its name."""
        self.flush()
        self._close()
        commit(self.partial, self.out, remove=self.partial / "journal.jsonl")

    def _close(self) -> None:
        self.journal.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def abort(self, keep: bool) -> None:
        """Stop without a result. `keep` leaves the partial folder for --resume."""
        try:
            if keep:
                self.flush()
        finally:
            self._close()
        if not keep:
            shutil.rmtree(self.partial, ignore_errors=True)


@contextmanager
def writing(writer: CheckpointWriter):
    """Keep the partial output when the user interrupts, so that --resume can go on; remove it on any failure."""
    try:
        yield writer
    except BaseException as error:
        writer.abort(keep=isinstance(error, KeyboardInterrupt))
        raise


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _assign_shards(layout: Layout, max_shard_bytes: int) -> list[Layout]:
    shards: list[Layout] = [{}]
    room = max_shard_bytes
    for name, entry in layout.items():
        nbytes = tensor_bytes(*entry)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = entry
        room -= nbytes
    return shards

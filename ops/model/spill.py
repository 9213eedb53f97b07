"""Activations that wait: kept in memory up to a cap, on disk past it.

A waiting tensor is not copied or wrapped: its storage is emptied in place and refilled before it is used again, so the
model's own code, which holds references to it somewhere in a paused forward pass, never notices.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import torch
from tersor.formats.units import size
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST_BYTES = 1 << 16


class SpillPool:
    """Parks storages; past `max_bytes` parked in memory, the next ones go to a file in `folder`."""

    def __init__(self, max_bytes: int | None, folder: Path | None = None):
        self.max_bytes = max_bytes
        self.resident_bytes = 0
        self.spilled_bytes = 0
        self.peak_spilled_bytes = 0
        self._folder = folder
        self._file = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @property
    def active(self) -> bool:
        return self.max_bytes is not None

    def warnings(self) -> list[str]:
        """What the report says of it."""
        spilled = f"{size(self.peak_spilled_bytes)} of activations went to disk to respect --max-memory"
        return [spilled] if self.peak_spilled_bytes else []

    def park(self, storages: list[torch.UntypedStorage]) -> list[tuple[torch.UntypedStorage, int, int]]:
        """Let `storages` wait. Returns what `restore` needs: storage, bytes, place in the file (-1: in memory)."""
        parked = []
        for storage in storages:
            nbytes = storage.nbytes()
            if self.max_bytes is None or self.resident_bytes + nbytes <= self.max_bytes:
                self.resident_bytes += nbytes
                parked.append((storage, nbytes, -1))
                continue
            place = self._write(storage, nbytes)
            storage.resize_(0)
            parked.append((storage, nbytes, place))
        return parked

    def restore(self, parked: list[tuple[torch.UntypedStorage, int, int]]) -> None:
        for storage, nbytes, place in parked:
            if place < 0:
                self.resident_bytes -= nbytes
                continue
            storage.resize_(nbytes)
            view, done = _bytes_of(storage), 0
            while done < nbytes:
                done += os.preadv(self._file.fileno(), [view[done:]], place + done)
            self.spilled_bytes -= nbytes
            self._free.setdefault(nbytes, []).append(place)

    def _write(self, storage: torch.UntypedStorage, nbytes: int) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the pool
        free = self._free.get(nbytes)
        place = free.pop() if free else self._end
        self._end = max(self._end, place + nbytes)
        view, done = _bytes_of(storage), 0
        while done < nbytes:
            done += os.pwrite(self._file.fileno(), view[done : done + (64 << 20)], place + done)
        self.spilled_bytes += nbytes
        self.peak_spilled_bytes = max(self.peak_spilled_bytes, self.spilled_bytes)
        return place

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory. Not through numpy(), which would forbid resizing the storage for good."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class LiveTensors(TorchDispatchMode):
    """Notes every CPU storage that an operation returns, weakly, so that those still alive at a pause can be parked."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() >= SMALLEST_BYTES:
            self.storages[storage._cdata] = StorageWeakRef(storage)

    def alive(self, keep: set[int]) -> list[torch.UntypedStorage]:
        """Storages noted since the last call that still exist and are not in `keep` (by `_cdata`)."""
        found = []
        for key, reference in self.storages.items():
            if key not in keep and not reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                if storage is not None and storage.nbytes() >= SMALLEST_BYTES and storage.resizable():
                    found.append(storage)
        self.storages.clear()
        return found

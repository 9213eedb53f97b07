"""What an interrupted run has finished, so that `--resume` continues it to the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from tersor.formats.errors import TersorError


class Journal:
    """Append-only file: a first line that identifies the run, then a line per finished unit of work.

    A line counts once its newline is on disk; a torn last line, as a kill leaves it, is cut off on reopening. The open
    file holds a lock, so that two runs cannot write the same output.
    """

    def __init__(self, path: Path, key: dict, resume: bool):
        """Open or create. Raises TersorError when another run holds it, or `resume` meets a run with another `key`."""
        self.path = path
        self.done: dict[str, object] = {}
        self._pending: list[str] = []
        self._file = open(path, "a+b")  # noqa: SIM115 - lives as long as the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise TersorError(
                f"{path.parent}: another run is writing it", "wait for it, or choose another output"
            ) from error
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]
        if resume and lines:
            try:
                found = json.loads(lines[0])
                self.done = {unit: data for unit, data in (json.loads(line) for line in lines[1:])}
                if not isinstance(found, dict):
                    raise ValueError("its first line is not an object")
            except (ValueError, TypeError, RecursionError) as error:
                self.close()
                raise TersorError(f"{path}: not readable ({error})", "start over with --force") from error
            if found != key:
                self.close()
                changed = sorted(name for name in found.keys() | key.keys() if found.get(name) != key.get(name))
                raise TersorError(
                    f"{path.parent}: belongs to a run with other {', '.join(changed)}",
                    "repeat the command as it was, or start over with --force",
                )
            self._file.truncate(sum(len(line) + 1 for line in lines))
        else:
            self._file.truncate(0)
            self._append(json.dumps(key))

    def mark(self, unit: str, data: object) -> None:
        """Note that `unit` is finished. It counts after the next `flush`."""
        self.done[unit] = data
        self._pending.append(json.dumps([unit, data]))

    def flush(self) -> None:
        """Make the marks durable. Call it when the data they speak of is on disk."""
        for line in self._pending:
            self._append(line)
        self._pending.clear()
        os.fsync(self._file.fileno())

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

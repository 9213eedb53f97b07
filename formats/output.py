"""The folder a command writes: refused where it would destroy something, and named only when it is complete.

Everything goes to `OUT.partial/`, which is renamed to OUT when it is on disk: a kill at any moment leaves OUT absent or
whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from tersor.formats.errors import TersorError

DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file size limit",
}


def partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_output(out: Path, source: Path | None, force: bool, resume: bool) -> None:
    """Refuse an output that would destroy something. Raises TersorError; touches nothing."""
    if source is not None:
        target, origin = out.resolve(), source.resolve()
        if target == origin:
            raise TersorError(f"{out}: is the input", "choose another output folder")
        if target in origin.parents or (origin.is_dir() and origin in target.parents):
            where = "holds the input" if target in origin.parents else "lies inside the input"
            raise TersorError(f"{out}: {where}", "choose another output folder")
    if out.exists() and not out.is_dir():
        raise TersorError(f"{out}: exists and is not a folder", "choose another output folder")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise TersorError(
                f"{out}: exists and is not empty", "choose another output folder, or replace it with --force"
            )
        if not _holds_checkpoint(out):
            raise TersorError(
                f"{out}: holds no checkpoint, and --force replaces nothing else", "empty it, or choose another folder"
            )
    if partial_path(out).exists() and not (force or resume):
        raise TersorError(
            f"{partial_path(out)}: left by a run that did not finish",
            "continue it with --resume, or start over with --force",
        )


def _holds_checkpoint(folder: Path) -> bool:
    return any(
        path.name in ("config.json", "report.json") or path.suffix == ".safetensors" for path in folder.iterdir()
    )


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` (that `check_output` has passed) when the block ends without an error."""
    partial = partial_path(out)
    with disk_errors(partial):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        yield partial
        commit(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def commit(partial: Path, out: Path, remove: Path | None = None) -> None:
    """Put everything in `partial` on disk, `remove` one file of it, and give it its name."""
    with disk_errors(partial):
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        if remove is not None:
            remove.unlink()
        _sync(partial)
        if out.exists() and any(out.iterdir()):  # only with --force, see check_output
            old = _free_name(out.with_name(out.name + ".replaced"))
            os.rename(out, old)
            os.rename(partial, out)
            shutil.rmtree(old)
        else:
            os.rename(partial, out)
        _sync(out.parent)


def _free_name(path: Path) -> Path:
    """`path`, or `path.1`, `path.2` …: the first that is not there."""
    return next(
        name for name in chain([path], (path.with_name(f"{path.name}.{n}") for n in count(1))) if not name.exists()
    )


@contextmanager
def disk_errors(path: Path):
    """Turn what the operating system says about a write into an error that a user can act on."""
    try:
        yield
    except OSError as error:
        reason = DISK_ERRORS.get(error.errno, error.strerror or str(error))
        raise TersorError(
            f"{path}: cannot be written, {reason}", "free some space or choose another output folder"
        ) from error


def reserve(descriptor: int, size: int) -> None:
    """Room on the disk for a file of so many bytes, so that one that is full shows now."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot reserve: a full disk then shows while writing


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Where the bytes of tensors come from: a checkpoint, or shards under some layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TensorInfo, read_header
from tersor.formats.shards import WRITE_AGAIN, Piece, ShardIndex, find
from tersor.ops.plan_parallel.shards.intersect import tiling_problem, volume, whole
from tersor.ops.plan_parallel.shards.reshard import Part


class SourceTensor(NamedTuple):
    """`parts` tile it. `hash` is what shards.json says, None for a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    hash: str | None = None


def from_checkpoint(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """Each tensor is one part of itself."""
    return {
        name: SourceTensor(
            info.dtype,
            info.shape,
            (Part(whole(info.shape), info.file, info.offset, info.shape, (0,) * len(info.shape)),),
        )
        for name, info in checkpoint.raw.tensors.items()
    }


def headers(folder: Path, index: ShardIndex) -> tuple[list[dict[str, TensorInfo]], list[str]]:
    """The tensors of every file, and what is wrong with files: missing, cut, unreadable. A bad file has no tensors."""
    found, problems = [], []
    for name, size in zip(index.files, index.file_bytes, strict=True):
        path = folder / name
        found.append({})
        if not path.is_file():
            needs = [str(rank) for rank, files in enumerate(index.ranks) if len(found) - 1 in files]
            problems.append(f"shard {name} is missing, which rank {', '.join(needs[:4]) or 'none'} needs")
            continue
        if path.stat().st_size != size:
            problems.append(f"shard {name} has {path.stat().st_size} bytes, it was written with {size}")
            continue
        try:
            found[-1] = read_header(path)[0]
        except TersorError as error:
            problems.append(str(error))
    return found, problems


def tensor_problems(name: str, index: ShardIndex, tensors: list[dict[str, TensorInfo]]) -> list[str]:
    """Why what the files hold of one tensor is not what shards.json says. Files without tensors are passed over."""
    tensor = index.tensors[name]
    problem = tiling_problem([piece.box for piece in tensor.pieces], tensor.shape)
    if problem:
        return [f"tensor {name!r}: {problem}"]
    problems = []
    filled: dict[int, int] = {}
    for piece in tensor.pieces:
        filled[piece.file] = filled.get(piece.file, 0) + volume(piece.box)
    for number, elements in filled.items():
        info = tensors[number].get(name)
        file = index.files[number]
        if not tensors[number]:
            continue
        if info is None:
            problems.append(f"tensor {name!r} is missing in shard {file}")
        elif info.dtype != tensor.dtype or len(info.shape) != len(tensor.shape) or info.params != elements:
            problems.append(
                f"tensor {name!r} in shard {file} is {info.dtype} {list(info.shape)}, its boxes hold {elements} {tensor.dtype}"
            )
        elif any(
            start + stop - low > extent
            for piece in tensor.pieces
            if piece.file == number
            for start, (low, stop), extent in zip(piece.at, piece.box, info.shape, strict=True)
        ):
            problems.append(f"tensor {name!r} in shard {file}: a box reaches out of its {list(info.shape)}")
    return problems


def part_of(folder: Path, index: ShardIndex, tensors: list[dict[str, TensorInfo]], name: str, piece: Piece) -> Part:
    info = tensors[piece.file][name]
    return Part(piece.box, folder / index.files[piece.file], info.offset, info.shape, piece.at)


def from_shards(folder: Path) -> tuple[ShardIndex, dict[str, SourceTensor]]:
    """`folder` of shards, or of a plan. Raises TersorError for a shard that is missing or is not what shards.json says;
    bytes are not looked at yet."""
    folder = find(folder)
    index = ShardIndex.load(folder)
    found, problems = headers(folder, index)
    if problems:
        raise TersorError(f"{folder}: {problems[0]}", f"put it back, or {WRITE_AGAIN}")
    tensors = {}
    for name, tensor in index.tensors.items():
        problems = tensor_problems(name, index, found)
        if problems:
            raise TersorError(f"{folder}: {problems[0]}", WRITE_AGAIN)
        distinct = {piece.box: piece for piece in reversed(tensor.pieces)}  # the first of equal ones
        parts = tuple(part_of(folder, index, found, name, piece) for piece in distinct.values())
        tensors[name] = SourceTensor(tensor.dtype, tensor.shape, parts, tensor.hash)
    return index, tensors

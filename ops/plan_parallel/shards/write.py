"""`plan-parallel --shard`: a file for each rank of a layout, from the checkpoint or from shards of another layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tersor.formats import linear_hash
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import tensor_bytes
from tersor.formats.output import output_folder
from tersor.formats.shards import (
    FORMATS,
    WRITE_AGAIN,
    Piece,
    ShardedTensor,
    ShardIndex,
    create_file,
    dcp_file_name,
    dcp_metadata,
    file_name,
)
from tersor.formats.sparse.view import refuse
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards import reshard
from tersor.ops.plan_parallel.shards.intersect import Box, refine, tiling_problem, volume
from tersor.ops.plan_parallel.shards.layout import Local, Placement
from tersor.ops.plan_parallel.shards.reshard import Move, Part
from tersor.ops.plan_parallel.shards.source import SourceTensor, from_checkpoint, from_shards
from tersor.ops.plan_parallel.transform.rules import rules


def write_shards(
    model: PlanModel,
    layout: Layout,
    folder: Path,
    format: str = "rank",
    source: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> ShardIndex:
    """Write `folder`, which is absent until it is complete. `source` is a folder of shards to take the data from, of the
    same checkpoint under any layout; without one it comes from the model itself.

    Raises TersorError for a packed model, shards of another checkpoint, missing or altered ones, a layout that this model
    cannot be cut by, and a disk that is too small.
    """
    if format not in FORMATS:
        raise TersorError(f"shards of format {format!r} are not known", f"known are {' and '.join(FORMATS)}")
    refuse(model.checkpoint, "they cannot be cut without taking them apart")
    fingerprint = model.checkpoint.fingerprint()
    if source is None:
        tensors = from_checkpoint(model.checkpoint)
    else:
        index, tensors = from_shards(source)
        check_source(index, source, fingerprint, model.checkpoint)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    placement = Placement(model, layout, rules(model), shapes)
    with output_folder(Path(folder)) as partial:
        result = write_placed(partial, placement, tensors, format, progress)
        result.source = {"path": str(model.checkpoint.path), "fingerprint": fingerprint}
        result.save(partial)
    return result


def check_source(index: ShardIndex, folder: Path, fingerprint: str, checkpoint: Checkpoint) -> None:
    """Raises TersorError where the shards are not those of this checkpoint."""
    if index.source.get("fingerprint") != fingerprint:
        raise TersorError(
            f"{folder}: shards of another checkpoint ({index.source.get('path')}), not of {checkpoint.path}",
            "give the model that they were cut from",
        )


class Stored(NamedTuple):
    """Files as they will be: contents by number, `local` tensors with what is in them, and the files of each rank."""

    names: list[str]
    contents: list[dict[str, Local]]
    ranks: list[list[int]]


def write_placed(
    folder: Path, placement: Placement, tensors: dict[str, SourceTensor], format: str, progress
) -> ShardIndex:
    """Write files of what `placement` says each rank holds, into a folder that exists; shards.json is left to the caller."""
    stored = (_by_rank if format == "rank" else _by_box)(placement, tensors)
    targets: dict[str, list[tuple[Part, int]]] = defaultdict(list)  # with the number of the file
    sizes = []
    for number, (name, content) in enumerate(zip(stored.names, stored.contents, strict=True)):
        metadata = {"format": "pt"}
        if format == "dcp":
            metadata = dcp_metadata(
                {name: tuple(start for start, _ in local.boxes[0]) for name, local in content.items()}
            )
        layout = {tensor: (tensors[tensor].dtype, local.shape) for tensor, local in content.items()}
        offsets, size = create_file(folder / name, layout, metadata)
        sizes.append(size)
        for tensor, local in content.items():
            for box, at in zip(local.boxes, local.starts, strict=True):
                targets[tensor].append((Part(box, folder / name, offsets[tensor], local.shape, at), number))
    for name, tensor in tensors.items():
        targets[name] = _disjoint(targets[name])
        problem = tiling_problem([part.box for part, _ in targets[name]], tensor.shape)
        if problem:
            raise TersorError(
                f"tensor {name!r} {list(tensor.shape)} under {placement.layout.describe()}: {problem}",
                "choose degrees that divide it",
            )
    total = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
    done = 0

    def moved(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("shards", done, total)

    hashes = reshard.run(
        (
            Move(name, tensor.dtype, tensor.shape, tensor.parts, tuple(part for part, _ in targets[name]))
            for name, tensor in tensors.items()
        ),
        moved,
    )
    joined = {
        name: local.concatenated
        for content in stored.contents
        for name, local in content.items()
        if local.concatenated is not None
    }
    result = ShardIndex(format, asdict(placement.layout), {}, stored.names, sizes, stored.ranks)
    for name, tensor in tensors.items():
        of_box = {box: linear_hash.to_text(value) for box, value in hashes[name].items()}
        digest = linear_hash.to_text(linear_hash.of_pieces(list(hashes[name].values())))
        if tensor.hash is not None and digest != tensor.hash:
            files = sorted({part.file.name for part in tensor.parts})
            raise TersorError(
                f"tensor {name!r} has been altered in {', '.join(files[:4])}{' …' if len(files) > 4 else ''}: its hash "
                f"is {digest}, {tensor.parts[0].file.parent / 'shards.json'} says {tensor.hash}",
                f"find the file with tersor verify, or {WRITE_AGAIN}",
            )
        empty = linear_hash.to_text(linear_hash.ZERO)  # of a box without elements
        pieces = [Piece(number, part.box, part.at, of_box.get(part.box, empty)) for part, number in targets[name]]
        result.tensors[name] = ShardedTensor(tensor.dtype, tensor.shape, digest, joined.get(name), pieces)
    return result


def _by_rank(placement: Placement, tensors: dict[str, SourceTensor]) -> Stored:
    """One file for what a rank holds; ranks that hold the same share it."""
    known: dict[tuple, int] = {}
    names, contents = [], []
    ranks: list[list[int]] = [[] for _ in placement.mesh.all]
    for holders in placement.holders.values():
        content = placement.of_rank(placement.mesh.all[holders[0]])
        if not content:
            continue
        number = known.setdefault(tuple(content.items()), len(names))
        if number == len(names):
            names.append(file_name(holders[0]))
            contents.append(content)
        for rank in holders:
            ranks[rank] = [number]
    return Stored(names, contents, ranks)


def _by_box(placement: Placement, tensors: dict[str, SourceTensor]) -> Stored:
    """Every distinct box once, in a file of the least loaded of the ranks that hold it; one box of a tensor to a file."""
    held: dict[tuple[str, Box], list[int]] = defaultdict(list)
    local_of: dict[int, dict[str, Local]] = {}
    for holders in placement.holders.values():
        local_of[holders[0]] = placement.of_rank(placement.mesh.all[holders[0]])
        for name, local in local_of[holders[0]].items():
            for box in local.boxes:
                held[name, box] += holders
    boxes: dict[str, list[Box]] = defaultdict(list)
    for name, box in held:
        boxes[name].append(box)
    parts_of = {name: refine(found) for name, found in boxes.items()}
    holders_of: dict[tuple[str, Box], list[int]] = defaultdict(list)
    for (name, box), ranks in held.items():
        for part in parts_of[name][box]:
            holders_of[name, part] += ranks
    load = [0] * len(placement.mesh.all)
    saved: dict[int, dict[str, list[Box]]] = defaultdict(lambda: defaultdict(list))

    def size(key: tuple[str, Box]) -> int:
        return tensor_bytes(tensors[key[0]].dtype, (volume(key[1]),))

    for key in sorted(holders_of, key=lambda key: (len(holders_of[key]), -size(key), key)):
        rank = min(holders_of[key], key=lambda rank: (load[rank], rank))
        load[rank] += size(key)
        saved[rank][key[0]].append(key[1])
    count = max((len(found) for content in saved.values() for found in content.values()), default=1)
    names, contents = [], []
    ranks: list[list[int]] = [[] for _ in placement.mesh.all]
    owner: dict[tuple[str, Box], int] = {}
    for rank in sorted(saved):
        for number in range(count):
            content = {name: _alone(found[number]) for name, found in saved[rank].items() if number < len(found)}
            if content:
                for name, local in content.items():
                    owner[name, local.boxes[0]] = len(names)
                names.append(dcp_file_name(rank, number, count))
                contents.append(content)
    for holders in placement.holders.values():
        needed = {
            owner[name, part]
            for name, local in local_of[holders[0]].items()
            for box in local.boxes
            for part in parts_of[name][box]
        }
        for rank in holders:
            ranks[rank] = sorted(needed)
    return Stored(names, contents, ranks)


def _alone(box: Box) -> Local:
    return Local(tuple(stop - start for start, stop in box), (box,), ((0,) * len(box),))


def _disjoint(targets: list[tuple[Part, int]]) -> list[tuple[Part, int]]:
    """Parts cut further where boxes of two ranks overlap without being equal."""
    parts = refine([part.box for part, _ in targets])
    found = []
    for part, number in targets:
        for box in parts[part.box]:
            shift = tuple(
                begin + start - low for begin, (start, _), (low, _) in zip(part.at, box, part.box, strict=True)
            )
            found.append((part._replace(box=box, at=shift), number))
    return found

"""`verify` of shards: every file is there, boxes tile every tensor, and every byte is the one that was written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tersor.formats import linear_hash
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TensorInfo, tensor_bytes
from tersor.formats.shards import Piece, ShardIndex, find
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards.intersect import Box, overlaps, show, volume
from tersor.ops.plan_parallel.shards.layout import Placement
from tersor.ops.plan_parallel.shards.reshard import Arena, hash_part
from tersor.ops.plan_parallel.shards.source import from_checkpoint, headers, part_of, tensor_problems
from tersor.ops.plan_parallel.transform.rules import rules

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")


def verify_shards(
    folder: Path, source: Checkpoint | None = None, progress: Progress = lambda stage, done, total: None
) -> list[str]:
    """Problems of the shards in `folder`, each named by tensor and file; none when they reassemble bit for bit.

    Every piece is compared with its hash in shards.json, and the sum over distinct boxes with the hash of the tensor. With
    `source`, the checkpoint they were cut from, its fingerprint and the hashes of its tensors are compared too, and what
    each rank holds with what the layout says. Raises TersorError where shards.json itself cannot be read.

    folder: of the shards, or of the plan that they belong to.
    """
    folder = find(folder)
    index = ShardIndex.load(folder)
    found, problems = headers(folder, index)
    listed: list[set[str]] = [set() for _ in index.files]
    sound = []
    for name, tensor in index.tensors.items():
        wrong = tensor_problems(name, index, found)
        problems += wrong
        if not wrong:
            sound.append(name)
        for piece in tensor.pieces:
            listed[piece.file].add(name)
    for number, tensors in enumerate(found):
        problems += [
            f"tensor {name!r} in shard {index.files[number]} is in no list of {folder / 'shards.json'}"
            for name in sorted(tensors.keys() - listed[number])
        ]
    problems += _sum_problems(index, sound)
    problems += _data_problems(folder, index, found, sound, progress)
    if source is not None:
        problems += _source_problems(index, source, progress) or _rank_problems(index, source)
    return problems


def _sum_problems(index: ShardIndex, names: list[str]) -> list[str]:
    """Tensors whose hash is not the sum of those of their boxes."""
    problems = []
    for name in names:
        distinct = {piece.box: piece.hash for piece in index.tensors[name].pieces}
        total = linear_hash.to_text(linear_hash.of_pieces([linear_hash.from_text(text) for text in distinct.values()]))
        if total != index.tensors[name].hash:
            problems.append(f"tensor {name!r}: its boxes have hash {total}, it has {index.tensors[name].hash}")
    return problems


def _data_problems(
    folder: Path, index: ShardIndex, found: list[dict[str, TensorInfo]], names: list[str], progress: Progress
) -> list[str]:
    pieces = [
        (name, piece) for name in names for piece in index.tensors[name].pieces if found[piece.file]
    ]  # of files that are there

    def check(entry: tuple[str, Piece], arena: Arena) -> str | None:
        name, piece = entry
        tensor = index.tensors[name]
        part = part_of(folder, index, found, name, piece)
        if linear_hash.to_text(hash_part(part, tensor.dtype, tensor.shape, arena)) == piece.hash:
            return None
        return f"tensor {name!r} has been altered in shard {index.files[piece.file]}"

    sizes = [tensor_bytes(index.tensors[name].dtype, (volume(piece.box),)) for name, piece in pieces]
    return list(dict.fromkeys(_each(check, pieces, sizes, "shards", progress)))


def _source_problems(index: ShardIndex, source: Checkpoint, progress: Progress) -> list[str]:
    fingerprint = source.fingerprint()
    if index.source.get("fingerprint") != fingerprint:
        return [
            f"the shards were cut from a checkpoint of fingerprint {index.source.get('fingerprint')}, "
            f"{source.path} has {fingerprint}"
        ]
    tensors = from_checkpoint(source)
    problems = [f"tensor {name!r} of {source.path} is in no shard" for name in tensors.keys() - index.tensors.keys()]
    names = [name for name in tensors if name in index.tensors]

    def check(name: str, arena: Arena) -> str | None:
        tensor, found = tensors[name], index.tensors[name]
        if (tensor.dtype, tensor.shape) != (found.dtype, found.shape):
            return f"tensor {name!r} is {found.dtype} {list(found.shape)}, in {source.path} {tensor.dtype} {list(tensor.shape)}"
        value = hash_part(tensor.parts[0], tensor.dtype, tensor.shape, arena)
        if linear_hash.to_text(value) != found.hash:
            return f"tensor {name!r} is not what {tensor.parts[0].file} holds"
        return None

    sizes = [tensor_bytes(tensors[name].dtype, tensors[name].shape) for name in names]
    return problems + _each(check, names, sizes, "source", progress)


def _rank_problems(index: ShardIndex, source: Checkpoint) -> list[str]:
    """Ranks whose files lack a box that the layout gives them."""
    try:
        model = PlanModel(source)
        layout = Layout(**index.layout | {"stages": tuple(index.layout.get("stages", ()))})
        placement = Placement(model, layout, rules(model), {name: entry.shape for name, entry in index.tensors.items()})
        if layout.world != len(index.ranks):
            return [f"the layout has {layout.world} ranks, shards.json lists {len(index.ranks)}"]
        contents = {
            holders[0]: placement.of_rank(placement.mesh.all[holders[0]]) for holders in placement.holders.values()
        }
    except (TersorError, TypeError) as error:
        return [f"the layout of shards.json does not fit {source.path}: {error}"]
    in_file: list[dict[str, list[Box]]] = [defaultdict(list) for _ in index.files]
    for name, tensor in index.tensors.items():
        for piece in tensor.pieces:
            in_file[piece.file][name].append(piece.box)
    problems = []
    for holders in placement.holders.values():
        for rank in {
            tuple(index.ranks[rank]): rank for rank in reversed(holders)
        }.values():  # one for each list of files
            for name, local in contents[holders[0]].items():
                held = {box for number in index.ranks[rank] for box in in_file[number].get(name, ())}
                for box in local.boxes:
                    if sum(volume(there) for *_, there in overlaps([box], list(held))) != volume(box):
                        problems.append(f"rank {rank} should hold {show(box)} of tensor {name!r}, its files do not")
    return problems


def _each(
    check: Callable[[Item, Arena], str | None], items: list[Item], sizes: Sequence[int], stage: str, progress: Progress
) -> list[str]:
    """What `check` finds, in the order of the items, on a thread for each core."""
    count = max(1, min(4, os.cpu_count() or 1, len(items)))
    arenas = [Arena() for _ in range(count)]
    done, total, problems = 0, sum(sizes), []

    def work(item: Item) -> str | None:
        arena = arenas.pop()
        try:
            return check(item, arena)
        except TersorError as error:
            return str(error)
        finally:
            arenas.append(arena)

    with ThreadPoolExecutor(count) as pool:
        for problem, size in zip(pool.map(work, items), sizes, strict=True):
            done += size
            progress(stage, done, total)
            if problem:
                problems.append(problem)
    return problems

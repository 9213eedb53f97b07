"""A checkpoint cut over ranks: safetensors files, and `shards.json` that says which box of which tensor lies where.

    {"schema": "tersor.shards/1", "format": "rank" | "dcp", "layout": {…}, "source": {"path", "fingerprint"},
     "files": [name, …], "file_bytes": [size, …], "ranks": [[file, …], …],
     "tensors": {name: {"dtype", "shape", "hash", "concatenated", "pieces": [[file, box, at, hash], …]}}}

A *piece* is a box `[[start, stop], …]` of a logical tensor and lies from index `at` on in the tensor of the same name in a
file. In the `rank` format a file has for each tensor the one local tensor that a runtime wants: where a rank holds several
boxes (gate and up of a fused tensor, q, k and v of another), they are joined along dimension `concatenated`, null where no
rank joins any. Ranks that hold the same bytes share a file. In the `dcp` format, which is torch.distributed.checkpoint's
Hugging Face layout, an entry is one box, a rank may need several files, and no box is stored twice. Distinct boxes of a
tensor are disjoint and tile it; equal ones are replicas. `hash` is `formats.linear_hash`. A file with an integer `at` in a
list means that number in `files`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.header import DTYPE_BYTES, build_header, tensor_bytes
from tersor.formats.json_file import read_object
from tersor.formats.output import disk_errors, reserve

SCHEMA = "tersor.shards/1"
FILE_NAME = "shards.json"
FOLDER = "shards"  # of a plan
FORMATS = ("rank", "dcp")
DIGEST = re.compile("[0-9a-f]{32}")
WRITE_AGAIN = "write the shards again: tersor plan-parallel … --shard"

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """`file` counts in `ShardIndex.files`; `at` is where the box begins in the file's tensor of that name."""

    file: int
    box: Box
    at: tuple[int, ...]
    hash: str


@dataclass
class ShardedTensor:
    dtype: str
    shape: tuple[int, ...]
    hash: str
    concatenated: int | None
    pieces: list[Piece]


@dataclass
class ShardIndex:
    """What `shards.json` says. `ranks` are the files of each rank, by number."""

    format: str
    layout: dict
    source: dict
    files: list[str]
    file_bytes: list[int]
    ranks: list[list[int]]
    tensors: dict[str, ShardedTensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        entries = {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "hash": tensor.hash,
                "concatenated": tensor.concatenated,
                "pieces": [[piece.file, piece.box, piece.at, piece.hash] for piece in tensor.pieces],
            }
            for name, tensor in self.tensors.items()
        }
        head = {key: value for key, value in vars(self).items() if key != "tensors"}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in ({"schema": SCHEMA} | head).items()]
        body = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        with disk_errors(folder / FILE_NAME):
            text = "{\n" + ",\n".join(lines) + ',\n  "tensors": {\n' + body + "\n  }\n}\n"
            (folder / FILE_NAME).write_text(text, "utf-8")

    @classmethod
    def load(cls, folder: Path) -> ShardIndex:
        """Raises TersorError for anything that does not fit; nothing in the file is believed unseen."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise TersorError(f"{folder}: no {FILE_NAME}", "give a folder that plan-parallel --shard has finished")
        content = read_object(path, WRITE_AGAIN)
        if content.get("schema") != SCHEMA:
            raise TersorError(f"{path}: schema {content.get('schema')!r} is not {SCHEMA}", WRITE_AGAIN)
        try:
            return cls._parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise TersorError(f"{path}: damaged ({reason})", WRITE_AGAIN) from error

    @classmethod
    def _parse(cls, content: dict) -> ShardIndex:
        files, sizes, ranks = content["files"], content["file_bytes"], content["ranks"]
        if content["format"] not in FORMATS:
            raise ValueError(f"format {content['format']!r}")
        if not isinstance(content["layout"], dict) or not isinstance(content["source"], dict):
            raise ValueError("layout and source are not objects")
        for name in files:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"file {name!r} is not a plain name")
        if len(set(files)) != len(files) or len(sizes) != len(files) or not all(_is_size(size) for size in sizes):
            raise ValueError("files are listed twice, or without their sizes")
        if not all(_is_size(number) and number < len(files) for rank in ranks for number in rank):
            raise ValueError("a rank has a file that is not listed")
        index = cls(content["format"], content["layout"], content["source"], files, sizes, ranks)
        for name, entry in content["tensors"].items():
            index.tensors[name] = _parse_tensor(name, entry, len(files))
        return index


def _parse_tensor(name: str, entry: dict, files: int) -> ShardedTensor:
    shape, joined = tuple(entry["shape"]), entry["concatenated"]
    if entry["dtype"] not in DTYPE_BYTES or not all(_is_size(extent) for extent in shape):
        raise ValueError(f"tensor {name!r} is {entry['dtype']!r} {list(shape)}")
    if joined is not None and not (_is_size(joined) and joined < len(shape)):
        raise ValueError(f"tensor {name!r} is joined along {joined!r}")
    pieces = []
    for file, box, at, digest in entry["pieces"]:
        limits = tuple((start, stop) for start, stop in box)
        if (
            not (_is_size(file) and file < files and len(limits) == len(at) == len(shape))
            or not all(_is_size(number) for number in (*at, *(side for limit in limits for side in limit)))
            or not all(start <= stop <= extent for (start, stop), extent in zip(limits, shape, strict=True))
        ):
            raise ValueError(f"tensor {name!r} has a piece {[file, box, at]} that cannot be")
        pieces.append(Piece(file, limits, tuple(at), _digest(digest)))
    return ShardedTensor(entry["dtype"], shape, _digest(entry["hash"]), joined, pieces)


def _digest(value: object) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise ValueError(f"hash {value!r}")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def find(folder: Path) -> Path:
    """The folder of the shards, given it or the plan that has them beside its `plan.json`."""
    inside = Path(folder) / FOLDER
    return inside if (inside / FILE_NAME).is_file() else Path(folder)


def file_name(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def dcp_file_name(rank: int, number: int, count: int) -> str:
    """As torch.distributed.checkpoint names what a rank saves; ranks and files count from 1 there."""
    return f"shard-{rank + 1:05}-model-{number + 1:05}-of-{count:05}.safetensors"


def dcp_metadata(offsets: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """`__metadata__` from which HuggingFaceStorageReader learns where in the whole tensors the entries begin."""
    info = {name: {"saved_offsets": list(at)} for name, at in offsets.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}


def create_file(
    path: Path, layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[dict[str, int], int]:
    """A safetensors file with header and reserved space for `layout`: byte offset of each tensor, size of the file.

    Raises TersorError when the disk is too small.
    """
    header, offsets = build_header(layout, metadata)
    size = len(header) + sum(tensor_bytes(*entry) for entry in layout.values())
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            reserve(descriptor, size)
            os.pwrite(descriptor, header, 0)
        finally:
            os.close(descriptor)
    return offsets, size

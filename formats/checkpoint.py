"""Reading a checkpoint: headers at once, tensors on demand, never a pickle.

Bytes are read with pread into memory of their own, so that what a run holds is what it asked for; a mapping of the file
would count every page it ever touched, and the memory would follow the shard instead of the tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES, TensorInfo, read_header
from tersor.formats.json_file import read_object

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SAVE_AGAIN = "save or download the file again"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Files of the input that describe its own weights; a new checkpoint writes its own.
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", *PICKLE_SUFFIXES, ".gguf", ".onnx", ".h5", ".msgpack")
OWN_FILES = {
    "report.json",
    "report.html",
    "quantize_config.json",
    "config.json",
    "lowrank.json",
    "sparse.json",
    "plan.json",
    "training.jsonl",
    "log.jsonl",
    "elastic.json",
}


class Checkpoint:
    """A folder in Hugging Face layout, or one bare `.safetensors` file (then `config` is None)."""

    def __init__(self, path: str | Path):
        """Open `path` and check every header. Raises TersorError for anything missing, truncated or malformed."""
        self.path = Path(path)
        self.config: dict | None = None
        if self.path.is_file():
            self.shards = [self.path]
        elif self.path.is_dir():
            self.config = (
                read_object(self.path / "config.json", SAVE_AGAIN) if (self.path / "config.json").exists() else None
            )
            self.shards = _find_shards(self.path)
        else:
            raise TersorError(f"{self.path}: no such file or folder", "give a checkpoint folder or a .safetensors file")
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in read_header(shard)[0].items():
                if name in self.tensors:
                    raise TersorError(
                        f"{shard}: tensor {name!r} is also in {self.tensors[name].file.name}",
                        "the shards overlap: remove the files that do not belong to this checkpoint",
                    )
                self.tensors[name] = info
        index = self.path / INDEX_NAME
        if self.shards != [self.path / SINGLE_NAME] and index.exists():
            _check_index(index, self.tensors)

    @property
    def packed(self) -> dict:
        """The tensors that are decoded on reading, in a checkpoint seen through `formats.sparse.view`."""
        return {}

    @property
    def raw(self) -> Checkpoint:
        """The checkpoint as the file holds it."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def require_config(self, why: str) -> dict:
        """The parsed config.json. Raises TersorError where there is none, saying what needs it."""
        if self.config is None:
            raise TersorError(f"{self.path}: no config.json, {why}", "give the whole checkpoint folder")
        return self.config

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, chat template, remote code: what travels to the output byte for byte."""
        if not self.path.is_dir():
            return []
        files = (path for path in self.path.rglob("*") if path.is_file())
        return sorted(
            path
            for path in files
            if not path.name.endswith(WEIGHT_FILES)
            and path.relative_to(self.path).as_posix() not in OWN_FILES
            and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        )

    def fingerprint(self) -> str:
        """A hash of config, headers and samples of the data: another checkpoint has another one.

        Reads at most 64 KiB at three places of each shard, so that it costs the same for any size.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            with open(shard, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                header_bytes = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                digest.update(stream.read(header_bytes))
                for place in (header_bytes, size // 2, max(header_bytes, size - 65536)):
                    stream.seek(place)
                    digest.update(stream.read(65536))
        return digest.hexdigest()[:32]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise TersorError(f"{self.path}: no tensor {name!r}", "the checkpoint does not fit its config.json")
        return self.tensors[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or rows [start, stop) of its first dimension, in memory of its own."""
        import torch

        info = self._info(name)
        shape, offset, nbytes = info.shape, info.offset, info.nbytes
        if rows is not None:
            row_bytes = nbytes // max(shape[0], 1)
            shape = (rows[1] - rows[0], *shape[1:])
            offset, nbytes = offset + rows[0] * row_bytes, shape[0] * row_bytes
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.read_bytes(info.file, offset, memoryview(buffer.numpy()))
        return buffer.view(getattr(torch, TORCH_DTYPES[info.dtype])).reshape(shape)

    def map(self, name: str) -> torch.Tensor:
        """One tensor backed by the file itself: only the pages that are touched take memory. For embedding tables."""
        import numpy
        import torch

        info = self._info(name)
        data = numpy.memmap(info.file, mode="c", offset=info.offset, shape=(info.nbytes,)) if info.nbytes else []
        raw = torch.from_numpy(numpy.asarray(data)) if info.nbytes else torch.empty(0, dtype=torch.uint8)
        return raw.view(getattr(torch, TORCH_DTYPES[info.dtype])).reshape(info.shape)

    @staticmethod
    def read_bytes(file: Path, offset: int, into: memoryview) -> None:
        """Fill `into` from `file` at `offset`. Raises TersorError when the file ends early or cannot be read."""
        try:
            with open(file, "rb", buffering=0) as stream:
                done = 0
                while done < len(into):
                    count = os.preadv(stream.fileno(), [into[done:]], offset + done)
                    if count == 0:
                        raise TersorError(f"{file}: ends at byte {offset + done}", "the file was cut while being read")
                    done += count
        except OSError as error:
            raise TersorError(f"{file}: {error.strerror}", "check the disk") from error


def _find_shards(folder: Path) -> list[Path]:
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        return [single]
    if index.exists():
        return _shards_of_index(folder, index)
    found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if len(found) == 1:
        return found
    if found:
        raise TersorError(
            f"{folder}: {len(found)} safetensors files but no {INDEX_NAME}",
            "add the index, or give one file by its path",
        )
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise TersorError(
            f"{folder}: only pickled weights, which are never opened",
            "load the model once and call save_pretrained to get safetensors",
        )
    raise TersorError(f"{folder}: no safetensors file", "give a checkpoint folder or a .safetensors file")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, SAVE_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise TersorError(f"{index}: no weight_map from tensor names to files", "save or download the index again")
    return weight_map


def _shards_of_index(folder: Path, index: Path) -> list[Path]:
    shards = []
    for name in sorted(set(_weight_map(index).values())):
        shard = folder / name
        # A Hub cache holds links into its blob store, so the path is judged as written, not as resolved.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TersorError(f"{index}: names {name!r}, a path outside the folder", "do not trust this checkpoint")
        if not os.path.isfile(shard):  # which is False, not an error, for a name no file can have
            raise TersorError(f"{index}: names {name!r}, which is not there", f"put the missing shard into {folder}")
        shards.append(shard)
    if not shards:
        raise TersorError(f"{index}: names no file", "save or download the index again")
    return shards


def _check_index(index: Path, tensors: dict[str, TensorInfo]) -> None:
    shards: dict[str, Path] = {}  # a path is made once for each, not for each of many thousand tensors
    for name, file in _weight_map(index).items():
        if file not in shards:
            shards[file] = index.parent / file
        if name not in tensors or tensors[name].file != shards[file]:
            where = "no shard has it" if name not in tensors else f"it is in {tensors[name].file.name}"
            raise TersorError(
                f"{index}: tensor {name!r} should be in {file}, but {where}", "download the checkpoint again"
            )

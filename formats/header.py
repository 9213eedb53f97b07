"""The safetensors header: names, dtypes, shapes and byte ranges, checked before any of them is believed.

File = u64 little-endian N, N bytes of JSON, raw data. Offsets in the header count from the end of the header, ascend,
and leave neither gap nor overlap (https://github.com/huggingface/safetensors#format). No torch here, so that commands
which only look at headers answer at once.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import NamedTuple

from tersor.formats.errors import TersorError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SAFETENSORS_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
# The reference implementation refuses longer headers too: a real one of 100,000 tensors is about 15 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # of torch and numpy


class TensorInfo(NamedTuple):
    """Where one tensor lies: `offset` counts from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def params(self) -> int:
        return prod(self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BYTES[dtype]


def _broken(file: Path, what: str) -> TersorError:
    return TersorError(f"{file}: {what}", "the file is damaged or not a safetensors file: download or save it again")


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of one safetensors file in data order, and its metadata. Raises TersorError on anything malformed."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length < 2:
                raise _broken(file, f"{size} bytes, too short for a header")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise _broken(file, f"header claims {length} bytes, the file has {size}")
            raw = stream.read(length)
    except OSError as error:
        raise TersorError(f"{file}: {error.strerror}", "check that the file exists and can be read") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, "header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(file, "__metadata__ is not an object of strings")
    start = 8 + length
    tensors = [_entry(file, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap before it"
            raise _broken(file, f"tensor {tensor.name!r} starts at byte {tensor.offset}, expected {position}: {fault}")
        position += tensor.nbytes
    if position != size:
        fault = "truncated" if position > size else "has bytes that no tensor owns"
        raise _broken(file, f"{fault}: the header describes {position} bytes, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    for text in (*result, *result.values()):
        if isinstance(text, str):
            text.encode("utf-8")  # half of a surrogate pair, which JSON can escape, could not be written again
    return result


def _no_constants(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_countable(shape: list[int]) -> bool:
    """Whether strides and element counts fit 63 bits. A zero extent does not excuse the others: strides ignore it."""
    elements = 1
    for extent in shape:
        elements *= max(extent, 1)
        if elements >= 2**63:
            return False
    return True


def _entry(file: Path, name: str, entry: object, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(file, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise TersorError(
            f"{file}: tensor {name!r} has dtype {dtype!r}, which is not known here",
            f"known dtypes: {' '.join(DTYPE_BYTES)}",
        )
    if not isinstance(shape, list) or not all(_is_size(extent) for extent in shape):
        raise _broken(file, f"tensor {name!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _broken(file, f"tensor {name!r} has data_offsets {offsets!r}")
    if len(shape) > MAX_DIMENSIONS or not _is_countable(shape):
        raise _broken(file, f"tensor {name!r} has a shape of {len(shape)} extents that no tensor can have")
    nbytes = tensor_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(
            file,
            f"tensor {name!r} of shape {shape} and dtype {dtype} needs {nbytes} bytes, has {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def build_header(
    layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Header bytes for tensors laid out in the given order, and the absolute file offset of each tensor."""
    entries: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    begin, offsets = 0, {}
    for name, (dtype, shape) in layout.items():
        end = begin + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name] = begin
        begin = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + offset for name, offset in offsets.items()}

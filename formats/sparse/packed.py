"""Which tensors of a checkpoint are packed and how: `sparse.json`, and what every sparse format shares.

A packed tensor is one *stored* tensor (a bf16 weight, int8 codes, the int4 words of a quantized layer) whose zeros are
left out. Packing works on its **elements**, a matrix `[out, in]` of unsigned integers of `bits` bits in which 0 is a zero
weight: the raw bits of a float or int8, or a code less its zero point modulo 2^bits. So packing is exact for any content,
and one set of formats serves dense and quantized weights alike. A format is a module with

- `misfit(packed)`: why a tensor cannot be packed so, None where it can,
- `count(elements, tile)`: how many values (tiles, items) are stored,
- `layout(packed)`: name -> (dtype, shape) of the tensors that hold it,
- `encode(packed, elements)`: those tensors,
- `decode(packed, read)`: the elements again; raises TersorError for anything damaged.

`sparse.json` is `{"schema": "tersor.sparse/1", "quantization_config": …, "tensors": {name: entry}}`; entries have the
fields of `Packed`, and `quantization_config` is the one of the checkpoint that was packed. Nothing in it is believed before
the tensors have confirmed it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from types import ModuleType

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.described import damaged as damaged_file
from tersor.formats.described import read_entries
from tersor.formats.errors import TersorError
from tersor.formats.header import DTYPE_BYTES, tensor_bytes
from tersor.formats.json_file import read_object

SCHEMA = "tersor.sparse/1"
FILE_NAME = "sparse.json"
MODULES = {
    "sparse-bitmask": "bitmask",
    "sparse-24-bitmask": "two_four",
    "vector": "tiles",
    "block": "tiles",
    "tiled-csl": "tiled_csl",
}
FORMATS = tuple(MODULES)
SUFFIXES = (
    ".compressed", ".bitmask", ".row_offsets", ".shape", ".tile_values", ".tile_index", ".tile_ptr", ".csl_items",
    ".csl_offsets",
)  # fmt: skip
WORD_BITS = (2, 3, 4, 8)  # of codes packed into int32 words
CODE_DTYPES = ("I8", "U8")  # that may have a zero point
MOST_ELEMENTS = 1 << 48  # far more than any weight, and few enough that sizes in bytes cannot overflow


@dataclass(frozen=True)
class Packed:
    """One packed tensor.

    name, dtype, shape: the tensor it stands for, as it was stored. rows, columns: extents of its elements, `[out, in]` of
    the weight. bits: of an element; less than those of the dtype where an int32 word holds several codes. transposed: the
    stored tensor is the transpose (GPT-2's Conv1D, GPTQ's qweight). zero: the code that is a zero weight, 0 for floats and
    signed codes; "zero_point" where a tensor of the module says so per group. count: stored values, or tiles. tile: rows
    and columns of a tile, for `vector` and `block`.
    """

    name: str
    format: str
    dtype: str
    shape: tuple[int, int]
    rows: int
    columns: int
    bits: int
    count: int
    transposed: bool = False
    zero: int | str = 0
    tile: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """The prefix of its tensors: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def in_words(self) -> bool:
        """Whether the stored tensor holds several elements in an int32 word."""
        return self.bits < 8 * DTYPE_BYTES[self.dtype]

    @property
    def codec(self) -> ModuleType:
        return codec(self.format)

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.codec.layout(self)

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.layout.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the tensor it stands for."""
        return tensor_bytes(self.dtype, self.shape)

    def damaged(self, what: str) -> TersorError:
        return TersorError(f"packed tensor {self.name!r} ({self.format}): {what}", "the checkpoint is damaged")


def codec(format: str) -> ModuleType:
    """The module of a format, by its name."""
    return importlib.import_module(f"tersor.formats.sparse.{MODULES[format]}")


def description(tensors: Iterable[Packed], quantization_config: dict | None) -> dict:
    """The content of `sparse.json`."""
    entries = {}
    for packed in tensors:
        entry = {key: value for key, value in vars(packed).items() if key != "name"}
        entries[packed.name] = {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
    return {"schema": SCHEMA, "quantization_config": quantization_config, "tensors": entries}


def detect(checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every packed tensor of `checkpoint` by the name it stands for; none for a checkpoint without any.

    Raises TersorError when tensors and `sparse.json` do not fit each other.
    """
    found = [name for name in checkpoint.tensors if name.endswith(SUFFIXES)]
    path = checkpoint.path / FILE_NAME
    lacking = "is part of a packed one, but there is no {file} that says how"
    entries = read_entries(path, SCHEMA, "tensors", found, lacking)
    result = {name: _packed(checkpoint, path, name, entry) for name, entry in entries.items()}
    owned: dict[str, str] = {}
    for packed in result.values():
        for part in packed.layout:
            if owned.setdefault(part, packed.name) != packed.name:
                raise damaged_file(path, f"tensor {part!r} would belong to both {owned[part]!r} and {packed.name!r}")
    for name in found:
        if name not in owned:
            raise damaged_file(path, f"it does not list what tensor {name!r} belongs to")
    return result


def inner_quantization_config(checkpoint: Checkpoint) -> dict | None:
    """The quantization_config of the checkpoint that was packed."""
    inner = read_object(checkpoint.path / FILE_NAME, "write the checkpoint again").get("quantization_config")
    if inner is not None and not isinstance(inner, dict):
        raise damaged_file(checkpoint.path / FILE_NAME, "quantization_config is not an object")
    return inner


def _packed(checkpoint: Checkpoint, path, name: str, entry: object) -> Packed:
    """One entry, checked against the tensors it speaks of."""

    def damaged(what: str) -> TersorError:
        return damaged_file(path, f"tensor {name!r}: {what}")

    if not isinstance(entry, dict):
        raise damaged("is not an object")
    for key in ("format", "dtype", "shape", "rows", "columns", "bits", "count", "transposed", "zero", "tile"):
        if key not in entry:
            raise damaged(f"key {key!r} is missing")
    if entry["format"] not in FORMATS or entry["dtype"] not in tuple(DTYPE_BYTES):
        raise damaged(f"format {entry['format']!r}, dtype {entry['dtype']!r} cannot be")
    tile = entry["tile"]
    if not _is_pair(entry["shape"]) or not (tile is None or _is_pair(tile)):
        raise damaged(f"shape {entry['shape']!r}, tile {tile!r} cannot be")
    if (tile is None) == (entry["format"] in ("vector", "block")):
        raise damaged(f"format {entry['format']} and tile {tile!r} do not go together")
    if not all(_is_count(entry[key]) for key in ("rows", "columns", "bits", "count")):
        raise damaged("rows, columns, bits and count are not all numbers")
    if not isinstance(entry["transposed"], bool) or not (_is_count(entry["zero"]) or entry["zero"] == "zero_point"):
        raise damaged(f"transposed {entry['transposed']!r}, zero {entry['zero']!r} cannot be")
    packed = Packed(
        name, entry["format"], entry["dtype"], tuple(entry["shape"]), entry["rows"], entry["columns"], entry["bits"],
        entry["count"], entry["transposed"], entry["zero"], None if tile is None else tuple(tile),
    )  # fmt: skip
    if why := _misfit(packed):
        raise damaged(why)
    if name in checkpoint.tensors:
        raise damaged("is there as well, as it was before it was packed")
    for part, (dtype, shape) in packed.layout.items():
        info = checkpoint.tensors.get(part)
        if info is None:
            raise damaged(f"tensor {part!r} is missing")
        if (info.dtype, info.shape) != (dtype, tuple(shape)):
            raise damaged(f"tensor {part!r} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}")
    return packed


def _misfit(packed: Packed) -> str | None:
    """Why the numbers of an entry contradict each other."""
    extents = (packed.rows, packed.columns)
    stored = packed.shape[::-1] if packed.transposed else packed.shape
    if min(extents) < 1:
        return f"elements {list(extents)}"
    if packed.in_words:
        words = -(-packed.columns * packed.bits // 32)
        if packed.dtype != "I32" or packed.bits not in WORD_BITS or stored != (packed.rows, words):
            return f"{packed.bits}-bit elements {list(extents)} do not fit {packed.dtype} {list(packed.shape)}"
    elif packed.bits != 8 * DTYPE_BYTES[packed.dtype] or packed.bits > 32 or stored != extents:
        return f"elements {list(extents)} of {packed.bits} bits do not fit {packed.dtype} {list(packed.shape)}"
    if prod(extents) > MOST_ELEMENTS:
        return f"elements {list(extents)} are more than a tensor can have"
    if isinstance(packed.zero, int) and packed.zero >= 1 << packed.bits:
        return f"zero {packed.zero} is no code of {packed.bits} bits"
    if packed.zero != 0 and not (packed.in_words or packed.dtype in CODE_DTYPES):
        return f"zero {packed.zero!r} where {packed.dtype} has one of its own"
    return packed.codec.misfit(packed)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(extent) and extent for extent in value)

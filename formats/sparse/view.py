"""A checkpoint with packed tensors, seen as the one that was packed.

Every reader that goes through `open_checkpoint` gets the tensors under the names, dtypes and values they had, and the
quantization_config that describes them; what lies in the file is at `raw`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TensorInfo
from tersor.formats.sparse.packed import Packed, detect, inner_quantization_config

if TYPE_CHECKING:
    import torch

# In config.json. Without a quant_method transformers refuses to load; with one that it does not know, or none of this at
# all, it would warn and fill in random weights.
MARKER = {
    "format": "tersor-sparse",
    "description": "packed, see sparse.json: load with tersor.ops.model.load, or unpack with tersor convert --to dense",
}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, unpacked while it is read where it is packed. Raises TersorError as `Checkpoint` does."""
    raw = Checkpoint(path)
    packed = detect(raw)
    return UnpackedCheckpoint(raw, packed) if packed else raw


class UnpackedCheckpoint(Checkpoint):
    """`tensors` are those of the checkpoint that was packed; the `nbytes` of a packed one are what it takes in the file."""

    def __init__(self, raw: Checkpoint, packed: dict[str, Packed]):
        self.path, self.shards = raw.path, raw.shards
        self._raw, self._packed = raw, packed
        self.config = _original_config(raw)
        self._last = threading.local()  # what was decoded last, for those who read panel by panel
        owner = {part: entry for entry in packed.values() for part in entry.layout}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in raw.tensors.items():
            entry = owner.get(name)
            if entry is None:
                self.tensors[name] = info
            elif entry.name not in self.tensors:
                self.tensors[entry.name] = TensorInfo(
                    entry.name, entry.dtype, entry.shape, info.file, info.offset, entry.nbytes
                )

    @property
    def raw(self) -> Checkpoint:
        return self._raw

    @property
    def packed(self) -> dict[str, Packed]:
        return self._packed

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or rows [start, stop) of it, decoded where it is packed."""
        if name not in self._packed:
            return self._raw.read(name, rows)
        if rows is None:
            return self._decode(name)
        if getattr(self._last, "name", None) != name:
            self._last.tensor = None  # before the next one is made
            self._last.name, self._last.tensor = name, self._decode(name)
        tensor = self._last.tensor[rows[0] : rows[1]].clone()
        if rows[1] >= self.tensors[name].shape[0]:
            self._last.name = self._last.tensor = None
        return tensor

    def _decode(self, name: str) -> torch.Tensor:
        from tersor.formats.sparse.elements import from_elements

        packed = self.packed[name]
        return from_elements(packed, packed.codec.decode(packed, self._raw.read), zero_points(packed, self._raw))

    def map(self, name: str) -> torch.Tensor:
        return self.read(name) if name in self.packed else self._raw.map(name)


def zero_points(packed: Packed, checkpoint: Checkpoint) -> torch.Tensor | None:
    """The signed zero points `[out, G]` of an asymmetric compressed-tensors layer, None for any other."""
    if packed.zero != "zero_point":
        return None
    import torch
    from tersor.formats.packing import unpack_rows

    name = f"{packed.module}.weight_zero_point"
    if name not in checkpoint.tensors:
        raise packed.damaged(f"tensor {name!r}, from which its codes count, is missing")
    stored = checkpoint.read(name)
    if stored.dim() != 2 or stored.dtype not in (torch.int8, torch.int32):
        raise packed.damaged(f"tensor {name!r} is {stored.dtype} {list(stored.shape)}, no zero points of groups")
    if not packed.in_words:
        return stored
    rows = unpack_rows(stored.transpose(0, -1).contiguous(), packed.bits, packed.rows)
    return (rows.T.contiguous() - 2 ** (packed.bits - 1)).view(torch.int8)


def packed_config(config: dict | None) -> dict | None:
    """config.json of the packed checkpoint: the original one is in sparse.json, this one says that it is needed."""
    if config is None:
        return None
    return {**config, "quantization_config": MARKER}


def refuse(checkpoint: Checkpoint, why: str) -> None:
    """Raises TersorError for a checkpoint with packed tensors, saying how to get dense weights."""
    if checkpoint.packed:
        raise TersorError(
            f"{checkpoint.path}: {len(checkpoint.packed)} tensors are packed, for example {next(iter(checkpoint.packed))!r}; {why}",
            "unpack them first: tersor convert MODEL --to dense -o DENSE",
        )


def _original_config(raw: Checkpoint) -> dict | None:
    """With the quantization_config that was there before packing, in its place."""
    if raw.config is None:
        return None
    inner = inner_quantization_config(raw)
    if inner is not None:
        return {**raw.config, "quantization_config": inner}
    return {key: value for key, value in raw.config.items() if key != "quantization_config"}

"""Tensors that stay as they are: streamed from file to file in pieces, and looked at on the way."""

from __future__ import annotations

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES, TORCH_DTYPES
from tersor.formats.writer import COPY_BYTES, CheckpointWriter


def check_finite(values: torch.Tensor, name: str, checkpoint: Checkpoint) -> None:
    """Raises TersorError when `values`, of tensor `name`, hold NaN or Inf. Integers always pass."""
    if not values.is_floating_point():
        return
    if values.dtype.itemsize == 1:
        values = values.float()  # fp8 has no isfinite of its own
    if not bool(torch.isfinite(values).all()):
        raise TersorError(
            f"{checkpoint.tensors[name].file}: tensor {name!r} holds NaN or Inf",
            "the checkpoint is damaged: get a sound copy",
        )


def copy_tensor(checkpoint: Checkpoint, name: str, writer: CheckpointWriter, new_name: str | None = None) -> None:
    """Copy one tensor's bytes, unpacked if they are packed, under `new_name` if given.

    Raises TersorError when a float tensor holds NaN or Inf.
    """
    info = checkpoint.tensors[name]
    if name in checkpoint.packed:
        tensor = checkpoint.read(name)
        check_finite(tensor, name, checkpoint)
        writer.write(new_name or name, tensor)
        return
    buffer = torch.empty(min(COPY_BYTES, info.nbytes), dtype=torch.uint8)
    for start in range(0, info.nbytes, COPY_BYTES):
        piece = buffer[: min(COPY_BYTES, info.nbytes - start)]
        view = memoryview(piece.numpy())
        checkpoint.read_bytes(info.file, info.offset + start, view)
        if info.dtype in FLOAT_DTYPES:
            values = piece.view(getattr(torch, TORCH_DTYPES[info.dtype]))
            check_finite(torch.stack(torch.aminmax(values)), name, checkpoint)
        writer.write_bytes(new_name or name, start, view)

"""Where to compute."""

from __future__ import annotations

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.memory import keep_freed_memory


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one. Raises TersorError for a device that is not there."""
    keep_freed_memory()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TersorError(f"--device {name}: not a device", "auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TersorError(f"--device {name}: torch sees no GPU here", "use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise TersorError(f"--device {name}: only cpu and cuda are supported", "use --device cpu")
    return device

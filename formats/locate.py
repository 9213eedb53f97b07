"""From what the user typed to a folder or file on this disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tersor.formats.errors import TersorError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str) -> Path:
    """A path as it is; `org/name` that is not a path through the Hub and its cache (HF_HUB_OFFLINE is honoured)."""
    path = Path(os.path.expanduser(model))
    if model and os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        return path
    if not HUB_ID.fullmatch(model):
        raise TersorError(
            f"{model}: no such file or folder", "give a folder, a .safetensors file or a Hub id (org/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "onnx/*"]
            )
        )
    except Exception as error:  # the hub client raises its own, the HTTP library's and OS errors alike
        raise TersorError(
            f"{model}: not a local path, and not to be had from the Hub ({type(error).__name__})",
            "check the spelling, the network, HF_TOKEN for gated models, or give a local folder",
        ) from error

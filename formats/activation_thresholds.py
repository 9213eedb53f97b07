"""Activation sparsity: `activation_sparsity.json`, which says below which magnitude an input of a layer counts as zero.

`{"schema": "tersor.activations/1", "target": 0.5, "tensors": {weight: {"threshold": 0.031, "sparsity": 0.48}}}`. Weights go
by the names they have when dense. An input x of a layer becomes 0 where |x| <= threshold; `sparsity` is the share of its
inputs that were, on the calibration text. The weights themselves stay as they are, so the file travels with them through
every command that changes weights but neither names nor inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object

SCHEMA = "tersor.activations/1"
FILE_NAME = "activation_sparsity.json"
WAY_OUT = (
    f"calibrate again: tersor sparsify MODEL -o OUT --activations 0.5, or remove {FILE_NAME} to run the model dense"
)


@dataclass(frozen=True)
class Threshold:
    """`sparsity` is the share of the layer's inputs with a magnitude of at most `threshold`, on the calibration text."""

    threshold: float
    sparsity: float


def description(target: float, tensors: Mapping[str, Threshold]) -> dict:
    """The content of `activation_sparsity.json`."""
    return {"schema": SCHEMA, "target": target, "tensors": {name: dict(vars(entry)) for name, entry in tensors.items()}}


def read(checkpoint: Checkpoint) -> dict[str, Threshold]:
    """By dense weight name; empty for a checkpoint without the file.

    Raises TersorError for a file that is damaged, or that speaks of weights which the checkpoint does not have.
    """
    path = checkpoint.path / FILE_NAME
    if not path.is_file():
        return {}
    content = read_object(path, WAY_OUT)
    if content.get("schema") != SCHEMA:
        raise TersorError(f"{path}: schema is {content.get('schema')!r}, not {SCHEMA!r}", WAY_OUT)
    target = _number(content.get("target"))
    if target is None or not 0 < target < 1:
        raise TersorError(f"{path}: 'target' is {content.get('target')!r}, not a number between 0 and 1", WAY_OUT)
    tensors = content.get("tensors")
    if not isinstance(tensors, dict):
        raise TersorError(f"{path}: 'tensors' is missing or not an object", WAY_OUT)
    view = DenseView(checkpoint)
    return {name: _threshold(path, view, name, entry) for name, entry in tensors.items()}


def threshold_of(checkpoint: Checkpoint) -> dict[str, float]:
    """Threshold by dense weight name, checked as `read` does."""
    return {name: entry.threshold for name, entry in read(checkpoint).items()}


def refuse(checkpoint: Checkpoint, why: str) -> None:
    """Raises TersorError for a checkpoint with thresholds, which what comes would make wrong."""
    path = checkpoint.path / FILE_NAME
    if path.is_file():
        raise TersorError(
            f"{path}: thresholds for the inputs of layers; {why}",
            f"remove {FILE_NAME}, and calibrate again at the end: tersor sparsify MODEL -o OUT --activations 0.5",
        )


def _threshold(path: Path, view: DenseView, name: str, entry: object) -> Threshold:
    if name not in view.tensors:
        raise TersorError(
            f"{path}: the checkpoint has no weight {name!r}; layers were removed or renamed since", WAY_OUT
        )
    shape = view.tensors[name].shape
    if len(shape) != 2 or not re.search(r"\.\d+\..*\.weight$", f".{name}"):
        raise TersorError(f"{path}: {name!r} {list(shape)} is no weight of a linear layer in a repeated block", WAY_OUT)
    if not isinstance(entry, dict) or not {"threshold", "sparsity"} <= entry.keys():
        raise TersorError(f"{path}: entry of {name!r} has no 'threshold' and 'sparsity'", WAY_OUT)
    threshold, sparsity = _number(entry["threshold"]), _number(entry["sparsity"])
    if threshold is None or threshold < 0:
        raise TersorError(f"{path}: threshold of {name!r} is {entry['threshold']!r}, not a number from 0 up", WAY_OUT)
    if sparsity is None or not 0 <= sparsity <= 1:
        raise TersorError(f"{path}: sparsity of {name!r} is {entry['sparsity']!r}, not a number from 0 to 1", WAY_OUT)
    return Threshold(threshold, sparsity)


def _number(value: object) -> float | None:
    """None for anything but a finite number; JSON readers let NaN, Infinity and integers of any length through."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None

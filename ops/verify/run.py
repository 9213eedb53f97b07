"""`verify`: is this checkpoint sound, and does it hold what its report says?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.formats.dense import DenseView
from tersor.formats.locate import locate
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.model.soundness import check_folder
from tersor.ops.model.step import REORDERED

if TYPE_CHECKING:
    import torch


@dataclass
class Result:
    path: Path
    tensors: int = 0
    quantized_modules: int = 0
    problems: list[str] = field(default_factory=list)


def verify(model: str, against: str | None = None, progress=lambda stage, done, total: None) -> Result:
    """Every check there is. Raises TersorError when the checkpoint cannot even be opened."""
    path = locate(model)
    checkpoint = open_checkpoint(path)
    view = DenseView(checkpoint)
    result = Result(path, len(checkpoint.tensors), sum(entry.scheme is not None for entry in view.tensors.values()))
    result.problems = check_folder(path, progress=progress)
    if against is not None:
        result.problems += _compare(view, DenseView(open_checkpoint(locate(against))), progress)
    return result


def _compare(view: DenseView, original: DenseView, progress) -> list[str]:
    """The error of each tensor against the original must be what the report says."""
    from tersor.formats.report import Report

    problems = []
    for name in sorted(view.tensors.keys() ^ original.tensors.keys()):
        problems.append(f"tensor {name!r} is only in the {'original' if name in original.tensors else 'output'}")
    path = view.checkpoint.path
    entries = Report.load(path).tensors if (path / "report.json").is_file() else []
    reported = {entry.name: entry for entry in entries if entry.action != "drop"}
    for count, name in enumerate(view.tensors):
        progress("compare", count, len(view.tensors))
        if name not in original.tensors:
            continue
        if view.tensors[name].shape != original.tensors[name].shape:
            problems.append(
                f"tensor {name!r} has shape {view.tensors[name].shape}, the original {original.tensors[name].shape}"
            )
            continue
        error = (reported[name].error or {}).get("relative_mse") if name in reported else None
        reason = (reported[name].reason if name in reported else None) or ""
        if error is None or "inputs scaled" in reason or REORDERED in reason:
            continue  # another weight stands there, for the same function
        measured = relative_error(view.read(name), original.read(name))
        if not abs(measured - error) <= 1e-3 * max(error, 1e-9) + 1e-12:  # NaN is a problem too
            problems.append(f"tensor {name!r}: error {measured:.3e} against the original, the report says {error:.3e}")
    return problems


def relative_error(decoded: torch.Tensor, weight: torch.Tensor) -> float:
    """||W' - W||^2 / ||W||^2 in float32; 0 for a weight of zeros that stayed one."""
    import torch

    weight = weight.float()
    error, norm = torch.linalg.vector_norm(decoded.float() - weight), torch.linalg.vector_norm(weight)
    return float(error / norm) ** 2 if error else 0.0

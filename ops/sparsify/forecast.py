"""What --dry-run says: from headers, without torch. How many zeros there are is in the pattern, or in the input's report."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.report import Report
from tersor.ops.model.dry_run import LIBRARY_BYTES, calibrated_peak, table
from tersor.ops.sparsify.request import Request
from tersor.ops.sparsify.targets import Target, Targets

COPIES = 6  # of a tensor in work: as stored, in float32, importance, elements, mask, packed


def forecast(checkpoint: Checkpoint, targets: Targets, request: Request) -> dict:
    """Action, bytes and reason for each stored tensor; output bytes where the zeros are known, memory, disk."""
    known = _known_zeros(checkpoint)
    changes = {name: ("keep", info.nbytes, "copied") for name, info in checkpoint.tensors.items()}
    changes |= {
        name: ("keep", checkpoint.tensors[name].nbytes, why) for name, why in targets.kept.items() if name in changes
    }
    unknown = 0
    for target in targets.found.values():
        sparsity = target.sparsity if target.pattern is not None else known.get(target.name)
        if sparsity is None:
            unknown += 1
            changes[target.stored] = ("pack?", target.template.stored_nbytes, "its zeros are counted in the run")
        else:
            changes[target.stored] = _change(target, sparsity)
    warnings = list(targets.warnings)
    if unknown:
        warnings.append(f"{unknown} layers count with the bytes they have: no report says how many zeros they hold")
    largest = max(4 * target.template.rows * target.template.columns for target in targets.found.values())
    peak = LIBRARY_BYTES + COPIES * largest
    if request.activations is not None:
        hidden = (checkpoint.config or {}).get("hidden_size") or 0
        peak = max(peak, calibrated_peak(checkpoint, request, hidden, block_copies=2))
    nbytes = sum(after for _, after, _ in changes.values())
    return table(checkpoint, changes, nbytes, 0, peak, warnings)


def _known_zeros(checkpoint: Checkpoint) -> dict[str, float]:
    """Share of zeros by dense name, as the report that travels with the input has them, or its history's last mask."""
    if not (checkpoint.path / "report.json").is_file():
        return {}
    return {entry.name: entry.sparsity for entry in Report.load(checkpoint.path).tensors if entry.sparsity is not None}


def _change(target: Target, sparsity: float) -> tuple[str, int, str]:
    """With the format that the pattern suggests, or the one that was asked for."""
    template, pattern = target.template, target.pattern
    name, tile = target.format.name, target.format.tile
    if name is None:
        tile = (pattern.rows, pattern.columns) if pattern is not None and pattern.kind == "tile" else None
        two_four = pattern is not None and (pattern.n, pattern.m) == (2, 4)
        name = ("vector" if 1 in tile else "block") if tile else "sparse-24-bitmask" if two_four else "sparse-bitmask"
    values = round(prod((template.rows, template.columns)) * (1 - sparsity))
    count = values if tile is None else -(-values // prod(tile))
    packed = replace(template, format=name, tile=tile, count=count)
    if packed.nbytes >= template.stored_nbytes:
        return "keep", template.stored_nbytes, f"{sparsity:.1%} zeros, too few for {name}"
    return "pack", packed.nbytes, f"{name}, about {sparsity:.1%} zeros"

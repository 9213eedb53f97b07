"""Parameters and bytes of a checkpoint by the part of the model they belong to, and the sparsity it declares."""

from __future__ import annotations

import json

from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.facts import Facts
from tersor.ops.model.operators import KINDS, kind_of
from tersor.ops.model.stored import Stored

LARGEST_REPORT_BYTES = 32_000_000  # more would take longer to read than all the rest


def inventory(weights: dict[str, Stored], facts: Facts | None) -> list[dict]:
    """A row per kind of module: tensors, params, bytes, and the same by how they are stored."""
    rows: dict[str, dict] = {}
    for name, weight in weights.items():
        kind = kind_of(name, weight, facts)
        row = rows.setdefault(kind, {"kind": kind, "tensors": 0, "params": 0, "stored_bytes": 0, "by_dtype": {}})
        row["tensors"] += 1
        row["params"] += weight.params
        row["stored_bytes"] += weight.nbytes
        by_dtype = row["by_dtype"].setdefault(weight.label, {"params": 0, "stored_bytes": 0})
        by_dtype["params"] += weight.params
        by_dtype["stored_bytes"] += weight.nbytes
    return [rows[kind] for kind in KINDS if kind in rows]


def by_dtype(rows: list[dict]) -> dict[str, dict]:
    """Params and bytes by how they are stored, most bytes first."""
    total: dict[str, dict] = {}
    for row in rows:
        for label, numbers in row["by_dtype"].items():
            entry = total.setdefault(label, {"params": 0, "stored_bytes": 0})
            for key, value in numbers.items():
                entry[key] += value
    return dict(sorted(total.items(), key=lambda item: -item[1]["stored_bytes"]))


def declared_sparsity(checkpoint: Checkpoint) -> dict | None:
    """{pattern, sparsity, source}: what the report beside the weights, or else the config, says of their zeros.

    The zeros themselves are not looked at. `sparsity` is None where only the pattern is told.
    """
    settings = (checkpoint.config or {}).get("quantization_config")
    config = settings.get("sparsity_config") if isinstance(settings, dict) else None
    if isinstance(config, dict) and config.get("sparsity_structure"):
        structure = config["sparsity_structure"]
        pattern = "unstructured" if structure in ("0:0", "unstructured") else str(structure)
        return {"pattern": pattern, "sparsity": config.get("global_sparsity"), "source": "config.json"}
    pattern, sparsity = None, None
    for step in _steps(checkpoint):
        arguments, totals = step.get("args"), step.get("totals")
        if not isinstance(arguments, dict) or not isinstance(totals, dict):
            continue
        if step.get("command") == "prune" and arguments.get("remove", "weights") == "weights":
            pattern = arguments.get("pattern") or "unstructured"
        if step.get("command") == "convert":
            continue  # which changes no weight and measures no zeros
        if pattern is not None and isinstance(totals.get("sparsity"), (int, float)):
            sparsity = totals["sparsity"]
    return None if pattern is None else {"pattern": pattern, "sparsity": sparsity, "source": "report.json"}


def _steps(checkpoint: Checkpoint) -> list[dict]:
    """The life of the checkpoint as its report tells it, nothing where there is no report that can be read."""
    path = checkpoint.path / "report.json"
    try:
        if path.stat().st_size > LARGEST_REPORT_BYTES:
            return []
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(content, dict):
        return []
    history = content.get("history")
    return [step for step in [*(history if isinstance(history, list) else []), content] if isinstance(step, dict)]

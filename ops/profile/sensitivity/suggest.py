"""From sensitivities to a policy: the scheme of each layer that meets a budget at the least damage.

Damages of several layers add up nearly, so the choice is a knapsack (`ops/model/rate_distortion.py`). Layers that read the
same input, and all experts of a block, are chosen together: servers run them as one. No torch here: `found` is what
`analyse` returned.

Bits are those of all linear layers in blocks, on average per weight, with scales and everything else that is stored for
them, as `bits_per_weight` counts in the report of `quantize`. Bytes are those of all tensors of the checkpoint, those
that stay as they are included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.formats.units import size
from tersor.ops.model.rate_distortion import Curve, Options, allocate_rd
from tersor.ops.model.schemes import scheme_from_name
from tersor.ops.profile.sensitivity.candidates import ACTIVATIONS, AMOUNTS, KEEP

FILE_NAME = "policy.json"
TARGET = re.compile(r"(\d+(?:\.\d+)?)\s*(bits?|[kmgt]?i?b|ms|s)", re.IGNORECASE)
PICOSECONDS = 10**12  # costs are integers
# Seconds of a step in layer `name` `[out, in]` that is stored in so many bytes by a scheme, None for dense.
Cost = Callable[[str, tuple[int, int], int, Scheme | None], float]


@dataclass(frozen=True)
class Target:
    """`kind` is bits (a weight), bytes (of the checkpoint) or seconds (a step)."""

    kind: str
    value: float


def parse_target(text: str) -> Target:
    """`4.25bits`, `2.5GB`, `1.5GiB`, `30ms`. Raises TersorError for anything else."""
    found = TARGET.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise TersorError(f"--suggest {text!r} is no budget", "write it like 4.25bits, 2.5GB or 30ms")
    value, unit = float(found[1]), found[2].lower()
    if unit.startswith("bit"):
        return Target("bits", value)
    if unit in ("ms", "s"):
        return Target("seconds", value / 1000 if unit == "ms" else value)
    power = " kmgt".index(unit[0]) if unit[0] in "kmgt" else 0
    return Target("bytes", value * (1024 if "i" in unit else 1000) ** power)


def suggest(found: dict, text: str, cost: Cost | None = None, other_seconds: float = 0.0, method: str = "rtn") -> dict:
    """The choice for the budget `text`. Raises TersorError, with the smallest that is possible, when it cannot be met.

    `method` is how `quantize` is going to round: the damages are those of `rtn`, `gptq` leaves a share of them.
    `cost` and `other_seconds`, the time of all that is no linear layer in a block, are needed for a budget of time only;
    `step_time` has them.
    """
    target = parse_target(text)
    if method == "gptq":
        found = compensated(found)
    tensors = found["tensors"]
    if target.kind == "seconds" and cost is None:
        raise TersorError(
            f"--suggest {text}: needs a prediction of time", "give --hardware, or a budget of bits or bytes"
        )
    units: dict[str, list[str]] = {}
    for name, numbers in tensors.items():
        units.setdefault(numbers["unit"], []).append(name)
    budget = _budget(found, target, other_seconds)
    choices = {unit: _choices(tensors, names, target, cost) for unit, names in units.items()}
    options = {unit: Options([row[1] for row in rows], [row[2] for row in rows]) for unit, rows in choices.items()}
    least = sum(min(of.costs) for of in options.values())
    if least > budget:
        raise _impossible(found, text, least, other_seconds)
    choice = allocate_rd(options, budget)
    labels = {name: choices[unit][choice.index[unit]][0] for unit, names in units.items() for name in names}
    return {
        "target": text,
        "method": method,
        "kind": target.kind,
        **_totals(found, labels),
        "damage_is": found["damage_is"],
        "uniform": _best_uniform(found, target, cost, budget),
        "labels": labels,
    }


def compensated(found: dict) -> dict:
    """`found` with the damages that GPTQ would leave; without text nothing is known of that."""
    tensors = {
        name: numbers
        | {
            "schemes": {
                label: row | {"damage": row["damage"] * numbers.get("gptq_share", 1.0)}
                for label, row in numbers["schemes"].items()
            }
        }
        for name, numbers in found["tensors"].items()
    }
    return found | {"tensors": tensors}


def check_possible(found: dict, text: str, least: int) -> None:
    """Before anything is measured: raises TersorError when `least` bytes of the layers are over the budget."""
    target = parse_target(text)
    if target.kind != "seconds" and least > _budget(found, target, 0.0):
        raise _impossible(found, text, least, 0.0)


def _impossible(found: dict, text: str, least: int, other_seconds: float) -> TersorError:
    return TersorError(
        f"--suggest {text} is less than any mix of schemes can reach",
        f"the smallest possible is {_in_words(found, parse_target(text), least, other_seconds)}",
    )


def _common_labels(tensors: dict) -> list[str]:
    """What all layers can have."""
    return [
        label
        for label in _labels(next(iter(tensors.values())))
        if all(label in _labels(numbers) for numbers in tensors.values())
    ]


def _choices(tensors: dict, names: list[str], target: Target, cost: Cost | None) -> list[tuple[str, int, float]]:
    """What a unit can have: label, cost of all its layers, damage of all of them."""
    labels = [KEEP, *_labels(tensors[names[0]])]
    rows = []
    for label in labels:
        if label != KEEP and not all(label in _labels(tensors[name]) for name in names):
            continue
        damage = sum(_damage(tensors[name], label) for name in names)
        rows.append((label, sum(_cost(name, tensors[name], label, target, cost) for name in names), damage))
    return rows


def _labels(numbers: dict) -> list[str]:
    return [label for label, row in numbers["schemes"].items() if "bytes" in row and label not in ACTIVATIONS]


def _damage(numbers: dict, label: str) -> float:
    return 0.0 if label == KEEP else numbers["schemes"][label]["damage"]


def _bytes(numbers: dict, label: str) -> int:
    return numbers["bytes"] if label == KEEP else numbers["schemes"][label]["bytes"]


def _cost(name: str, numbers: dict, label: str, target: Target, cost: Cost | None) -> int:
    if target.kind != "seconds":
        return _bytes(numbers, label)
    scheme = None
    if label != KEEP:
        settings = numbers["schemes"][label]["settings"]
        scheme = scheme_from_name(settings["scheme"], settings.get("group_size"))
    return round(cost(name, tuple(numbers["shape"]), _bytes(numbers, label), scheme) * PICOSECONDS)


def _budget(found: dict, target: Target, other_seconds: float) -> int:
    """In the unit of the costs, for the linear layers alone."""
    if target.kind == "bits":
        return int(target.value * found["weights"] / 8)
    if target.kind == "bytes":
        return int(target.value) - found["other_bytes"]
    return round((target.value - other_seconds) * PICOSECONDS)


def _in_words(found: dict, target: Target, cost: int, other_seconds: float) -> str:
    if target.kind == "bits":
        return f"{math.ceil(8e4 * cost / found['weights']) / 1e4}bits"
    if target.kind == "bytes":
        return f"{size(cost + found['other_bytes'])} ({cost + found['other_bytes']}B)"
    return f"{math.ceil(1e7 * (cost / PICOSECONDS + other_seconds) - 1e-6) / 1e4}ms"


def _totals(found: dict, labels: dict[str, str]) -> dict:
    """Bytes, bits and damage of a choice."""
    tensors = found["tensors"]
    nbytes = sum(_bytes(tensors[name], label) for name, label in labels.items())
    return {
        "linear_bytes": nbytes,
        "checkpoint_bytes": nbytes + found["other_bytes"],
        "bits_per_weight": 8 * nbytes / max(found["weights"], 1),
        "damage": sum(_damage(tensors[name], label) for name, label in labels.items()),
    }


def _best_uniform(found: dict, target: Target, cost: Cost | None, budget: int) -> dict | None:
    """The one scheme for all layers that does least damage within the budget, give or take a hundredth of it."""
    tensors = found["tensors"]
    rows = []
    for label in _common_labels(tensors):
        spent = sum(_cost(name, numbers, label, target, cost) for name, numbers in tensors.items())
        if spent <= 1.01 * budget:
            rows.append({"label": label, **_totals(found, dict.fromkeys(tensors, label))})
    return min(rows, key=lambda row: row["damage"], default=None)


def sparsities(found: dict, target: float = 0.5) -> dict[str, float]:
    """The share of zeros of each layer, `target` of all weights together, that does least damage under Wanda's masks.

    Layers that cannot be measured at some share have none.
    """
    tensors = found["tensors"]
    labels = [f"{share:.0%}" for share in AMOUNTS]
    measured = {name: rows for name, rows in tensors.items() if all(label in rows["schemes"] for label in labels)}
    curves = {
        name: Curve(
            prod(rows["shape"]), [0.0, *AMOUNTS], [0.0, *(rows["schemes"][label]["damage"] for label in labels)]
        )
        for name, rows in measured.items()
    }
    total = sum(curve.size for curve in curves.values())
    choice = allocate_rd({name: curve.options() for name, curve in curves.items()}, total - int(target * total))
    return {name: (0.0, *AMOUNTS)[index] for name, index in choice.index.items()}


def policy_of(found: dict, labels: dict[str, str]) -> dict:
    """The policy file's content (tersor.policy/1): every layer by its whole name, so that no default decides.

    `quantize` reads the scheme, `prune` the sparsity, both leave a layer with `keep` alone.
    """
    tensors, zeros = found["tensors"], sparsities(found)
    entries = {}
    for name, label in labels.items():
        settings = {"keep": True} if label == KEEP else dict(tensors[name]["schemes"][label]["settings"])
        if label != KEEP and name in zeros:
            settings["sparsity"] = zeros[name]
        entries[re.escape(name)] = settings
    return {"schema": "tersor.policy/1", "tensors": entries}

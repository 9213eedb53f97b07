"""The same model in other formats, as the roofline predicts it: what would be gained before anything is cut.

Only the linear layers inside the blocks change, as the commands of the toolkit change them: routers, norms, embeddings
and the head stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tersor.formats.hardware import Hardware
from tersor.formats.scheme import Scheme
from tersor.ops.model.facts import Facts
from tersor.ops.model.operators import Linear, Operator, Pass
from tersor.ops.model.roofline import total_seconds
from tersor.ops.profile.headers.roofline import middle_step, prompt_pass
from tersor.ops.profile.request import Workload

CHANGED_KINDS = ("attention", "mlp", "experts", "shared experts")
GROUP = 128
LARGEST_BATCH = 1 << 14


def _stored(linear: Linear, label: str, bytes_per_weight: float, **changes) -> Linear:
    """`linear` as a dense bf16 matrix that takes so many bytes, with further `changes`."""
    numbers = linear.shape[-1] * linear.shape[-2]
    dense = {"macs": numbers, "precision": "bf16", "unpacks": False, "speedup": 1.0, "scheme": None}
    return replace(linear, label=label, weight_bytes=numbers * bytes_per_weight, **dense | changes)


def _bf16(linear: Linear) -> Linear:
    return _stored(linear, "bf16", 2)


def _w4a16(linear: Linear) -> Linear:
    scheme = Scheme(4, group_size=GROUP)
    return _stored(linear, "int4", 0.5 + 2 / GROUP, unpacks=True, scheme=scheme)


def _w8a8(linear: Linear) -> Linear:
    return _stored(linear, "int8", 1 + 2 / linear.shape[-1], precision="int8")


def _fp8(linear: Linear) -> Linear:
    return _stored(linear, "fp8", 1 + 2 / linear.shape[-1], precision="fp8")


def _two_of_four(linear: Linear) -> Linear:
    """Half of the numbers, and 2 bits that say where each of them belongs."""
    return _stored(linear, "bf16 2:4", 2 / 2 + 2 / 8 / 2, speedup=2.0)


# name -> (how a linear layer is stored, what else there is to say)
FORMATS: dict[str, tuple[Callable[[Linear], Linear], str]] = {
    "bf16": (_bf16, ""),
    "fp8": (_fp8, "activations quantized as well"),
    "w8a8": (_w8a8, "int8, activations quantized as well"),
    "w4a16": (_w4a16, f"int4 in groups of {GROUP}, unpacked to bf16 before the product"),
    "2:4": (_two_of_four, "needs 2:4 kernels"),
    "50 % unstructured": (_bf16, "dense kernels read and multiply the zeros"),
}


def in_format(found: list[Operator], name: str) -> list[Operator]:
    """The operators with the layers that a command would change in format `name`."""
    change = FORMATS[name][0]
    return [
        change(operator) if isinstance(operator, Linear) and operator.kind in CHANGED_KINDS else operator
        for operator in found
    ]


def weight_bytes(found: list[Operator]) -> float:
    """Stored bytes of all linear layers, a tied head's not counted again."""
    return sum(
        operator.count * operator.weight_bytes * (operator.experts or 1)
        for operator in found
        if isinstance(operator, Linear) and operator.params
    )


def slower_from_batch(
    facts: Facts, found: list[Operator], other: list[Operator], hardware: Hardware, workload: Workload, devices: int
) -> int | None:
    """The smallest batch at which a step with `found` takes longer than with `other`; None up to LARGEST_BATCH."""

    def is_slower(batch: int) -> bool:
        run = middle_step(workload, batch)
        ours = total_seconds(facts, found, run, hardware, devices)
        return ours > total_seconds(facts, other, run, hardware, devices) * (1 + 1e-9)

    high = 1
    while not is_slower(high):
        high *= 2
        if high > LARGEST_BATCH:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_slower(middle) else (middle, high)
    return high


def compare_formats(
    facts: Facts, found: list[Operator], hardware: Hardware, workload: Workload, devices: int, total_bytes: int
) -> list[dict]:
    """A row for the checkpoint as it is and for each format: bytes, times, times the speed of bf16."""
    reference = in_format(found, "bf16")
    variants = {"as stored": found} | {name: in_format(found, name) for name in FORMATS}
    if found == reference:
        del variants["bf16"]  # it is stored that way
    now = weight_bytes(found)
    rows = []
    for name, variant in variants.items():
        row = {
            "format": name,
            "note": "" if name == "as stored" else FORMATS[name][1],
            "stored_bytes": total_bytes - now + weight_bytes(variant),
            "native": name not in ("fp8", "w8a8") or hardware.supports("fp8" if name == "fp8" else "int8"),
        }
        runs: dict[str, Pass] = {"prefill": prompt_pass(facts, workload)}
        if facts.causal and workload.generate:
            runs["decode"] = middle_step(workload)
        for phase, run in runs.items():
            seconds = total_seconds(facts, variant, run, hardware, devices)
            row[f"{phase}_seconds"] = seconds
            row[f"{phase}_speedup"] = total_seconds(facts, reference, run, hardware, devices) / seconds
        if "decode" in runs:
            row["slower_from_batch"] = slower_from_batch(facts, variant, reference, hardware, workload, devices)
        rows.append(row)
    return rows

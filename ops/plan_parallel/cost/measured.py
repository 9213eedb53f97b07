"""Times of a report of `tersor profile --measure` in place of the roofline: for the operators of a block, on one device.

Forward passes were timed, of the whole block on one device, on a prompt. Products go by rows and by the share of the weight
that a rank holds, attention by pairs of query and key, the rest by tokens. A backward pass is priced from that as always:
two products for one, attention's 2.5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.model.operators import Pass

ATTENTION, NORMS, REST, EMBEDDING = "scores and values", "norms", "element-wise and the rest", "embedding"
WAY_OUT = "make one with `tersor profile MODEL --measure` on a device of the cluster"


@dataclass(frozen=True)
class Measured:
    """`products`: seconds a row by module inside a block (or of the shell); `attention`: seconds a pair of query and key of
    one sequence, all heads; `elementwise`: seconds a token of one block."""

    device: str
    products: dict[str, float]
    attention: float
    elementwise: float


def read_measured(path: Path, model, hardware: Hardware) -> Measured:
    """Raises TersorError for a file that is no such report, or one of another model or device."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TersorError(f"{path}: {error.strerror}", WAY_OUT) from error
    except ValueError as error:
        raise TersorError(f"{path}: not readable as JSON ({error})", WAY_OUT) from error
    try:
        measure = report["quality"]["models"][0]["measure"]
        device, prompt = measure["device"], measure["operators"]["prompt"]
        batch, tokens = measure["workload"]["batch"], prompt["tokens"]
        rows = {row["name"]: row for row in prompt["rows"]}
        name, machine = device["name"], measure["host"]["name"]
        seconds = {key: row["seconds"] for key, row in rows.items()}
        totals = {key: row["total_seconds"] for key, row in rows.items()}
    except (KeyError, IndexError, TypeError) as error:
        raise TersorError(f"{path}: no report of measured operators", WAY_OUT) from error
    if hardware.name != machine and hardware.name.split()[0].lower() not in name.lower():
        raise TersorError(f"{path}: measured on {name}, the cluster has {hardware.name}", WAY_OUT)
    known = {
        (weight.place.rest if weight.place else key).removesuffix(".weight")
        for key, weight in model.stored.items()
        if len(weight.shape) >= 2
    }
    products = {key: value / (batch * tokens) for key, value in seconds.items() if key in known}
    if not products:
        raise TersorError(f"{path}: none of its operators is in {model.checkpoint.path}", "give a report of this model")
    attends = model.facts.attends
    pairs = max((attention.pairs(tokens) for attention in attends), default=0) * batch
    loose = sum(totals.get(key, 0.0) for key in (NORMS, REST))
    return Measured(
        name,
        products,
        seconds.get(ATTENTION, 0.0) / pairs if pairs else 0.0,
        loose / (batch * tokens * model.facts.layers),
    )


def attention_seconds(measured: Measured, attention, run: Pass) -> float:
    """Of one layer for the whole micro-batch on one device."""
    return measured.attention * attention.pairs(run.new, run.past) * run.batch

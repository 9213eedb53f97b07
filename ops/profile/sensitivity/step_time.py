"""What a layer's scheme costs in time: the roofline of one step that adds a token to each sequence."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import Hardware
from tersor.formats.scheme import Scheme
from tersor.ops.model.facts import facts
from tersor.ops.model.operators import Linear, operators, precision_of
from tersor.ops.model.roofline import seconds_of, total_seconds
from tersor.ops.model.stored import Stored, stored_weights
from tersor.ops.profile.headers.roofline import middle_step, prompt_pass
from tersor.ops.profile.request import Workload
from tersor.ops.profile.sensitivity.candidates import EXPERT
from tersor.ops.profile.sensitivity.suggest import Cost


def step_time(checkpoint: Checkpoint, found: dict, hardware: Hardware, workload: Workload) -> tuple[Cost, float]:
    """Seconds of one layer of `found` (what `analyse` returned) by its scheme, and of all the rest of the step.

    On one device. An encoder, which has no such step, is timed reading one prompt.
    """
    weights = stored_weights(checkpoint)
    model = facts(checkpoint, weights)
    run = middle_step(workload) if model.causal else prompt_pass(model, workload)

    def cost(name: str, shape: tuple[int, int], nbytes: int, scheme: Scheme | None) -> float:
        numbers = prod(shape)
        stored = (
            weights[name] if scheme is None else Stored(shape, numbers, nbytes, f"int{scheme.bits}", scheme, numbers)
        )
        precision, unpacks = precision_of(stored)
        layer = Linear(
            name, "mlp", 1, shape, numbers, numbers, nbytes, stored.label, precision, unpacks, scheme=scheme
        )  # fmt: skip
        if not EXPERT.search(name):
            return seconds_of(layer, run, hardware)[0]
        layer = replace(layer, experts=model.experts, active=model.experts_per_token)
        return seconds_of(layer, run, hardware)[0] / model.experts  # all of them are one operator

    dense = sum(cost(name, tuple(row["shape"]), row["bytes"], None) for name, row in found["tensors"].items())
    return cost, max(0.0, total_seconds(model, operators(model, weights), run, hardware) - dense)

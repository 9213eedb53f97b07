"""What a placement of experts is worth: how often tokens change devices, before and after, on tokens it was not made for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tersor.formats.routing import Routing, from_trace
from tersor.ops.plan_parallel.experts.placement import Placement, linear, place, step_cost, weights


class Crossings(NamedTuple):
    """Means over tokens, their pairs of experts and the steps between layers. `cost` counts 1 within a node, 2 across.

    `devices` is on how many devices the k experts of a token are, in one layer (None without a trace): what is sent twice,
    there and back, when experts are dispatched."""

    within_node: float
    across_nodes: float
    cost: float
    devices: float | None

    @property
    def crossings(self) -> float:
        return self.within_node + self.across_nodes


def crossings(routing: Routing, device: np.ndarray, devices: int, nodes: int) -> Crossings:
    """`device` `[layers, experts]`."""
    weight = weights(devices, nodes)
    total = max(float(routing.transitions.sum()), 1.0)
    across = step_cost(routing.transitions, device, (weight > 1).astype(float)) / total
    within = step_cost(routing.transitions, device, (weight == 1).astype(float)) / total
    spread = None
    if routing.trace is not None:
        spread = float(np.mean([_distinct(device[layer][routing.trace[:, layer]]) for layer in range(routing.layers)]))
    return Crossings(within, across, within + 2 * across, spread)


def _distinct(devices: np.ndarray) -> float:
    """Mean number of different values in a row of `[tokens, k]`."""
    ordered = np.sort(devices, 1)
    return float(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).mean())


def shuffled(routing: Routing, seed: int = 0) -> Routing:
    """The control: every layer keeps its own popular experts, but what a token does in one says nothing about the next."""
    generator = np.random.default_rng(seed)
    trace = np.stack(
        [routing.trace[generator.permutation(len(routing.trace)), layer] for layer in range(routing.layers)], 1
    )
    return from_trace(trace, routing.experts, routing.modules)


def judge(
    routing: Routing, devices: int, nodes: int = 1, groups: int = 1, held_out: float = 0.2, control: bool = True, seed: int = 0
) -> tuple[Placement, dict]:  # fmt: skip
    """The placement for all of `routing`, and what one made for most of the tokens saves on those held out.

    With `control` the same for shuffled tokens, where nothing is to be gained but from experts that are popular
    everywhere. Without a trace the counts judge themselves, and the result says so (`held_out` is False).
    """
    before = linear(routing.layers, routing.experts, devices)
    found = place(routing, devices, nodes, groups, seed=seed)
    numbers: dict = {"devices": devices, "nodes": nodes, "exact": found.exact, "held_out": routing.trace is not None}

    def compare(fit: Routing, test: Routing, placement: Placement | None = None) -> dict:
        placement = placement or place(fit, devices, nodes, groups, seed=seed)
        first = crossings(test, before, devices, nodes)
        second = crossings(test, placement.device, devices, nodes)
        saved = 1 - second.cost / first.cost if first.cost else 0.0
        return {
            "before": first._asdict(),
            "after": second._asdict(),
            "saved_share": saved,
            "busiest_before": Placement(before, devices, nodes, 1, 0, 0, False).load(test.counts),
            "busiest_after": placement.load(test.counts),
        }

    if routing.trace is None:
        return found, numbers | compare(routing, routing, found)
    numbers |= compare(*routing.split(held_out))
    if control:
        numbers["control"] = compare(*shuffled(routing, seed).split(held_out))
    return found, numbers

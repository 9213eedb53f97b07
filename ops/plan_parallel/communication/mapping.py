"""Which node of the cluster takes which place of a layout, where the links between nodes are not equally fast.

After Pipette (Yim et al., DATE 2024): simulated annealing over the order of the nodes with the moves of a travelling
salesman, against a measured bandwidth matrix. The ranks inside a node stay in order: their links are equal.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.communication.groups import AXES, node_groups, span_of, stride_and_size
from tersor.ops.plan_parallel.layout import Layout

COLDEST = 1e-4  # of the cost at the start: differences that the last steps still accept
ITERATIONS = 20_000


@dataclass(frozen=True)
class Mapping:
    """`order[i]` is the node of the cluster that runs the layout's i-th node, so ranks `i * devices_per_node` and on.

    `before_seconds` and `after_seconds` are what all communication between nodes takes in a step, in the cluster's own
    order and in this one.
    """

    order: tuple[int, ...]
    before_seconds: float
    after_seconds: float

    def devices(self, devices_per_node: int) -> tuple[int, ...]:
        """The device of each rank, counted through the cluster node by node."""
        return tuple(node * devices_per_node + device for node in self.order for device in range(devices_per_node))


def map_ranks(
    layout: Layout,
    cluster: Cluster,
    message_bytes: dict[str, float],
    seed: int = 0,
    iterations: int | None = None,
    seconds: float | None = None,
) -> Mapping:
    """The best order of nodes found in `iterations`, or `seconds` of a clock, from the cluster's own order on.

    `message_bytes` are bytes of one step by axis: for `pp` those that a rank sends over one stage boundary, forward (as
    much comes back), for `ep` those that a rank hands to its all-to-alls forward (as much in the backward pass), for the
    others the buffer that a group all-reduces, or reduce-scatters and all-gathers. The same seed and iterations give the same order; a time limit does not.
    Raises TersorError when the layout needs more devices than there are.
    """
    if layout.world > cluster.devices:
        raise TersorError(
            f"the layout has {layout.world} ranks, {cluster.name} has {cluster.devices} devices", "use smaller degrees"
        )
    start = np.arange(cluster.nodes)
    if cluster.bandwidth is None or cluster.nodes == 1:
        return Mapping(tuple(range(cluster.nodes)), 0.0, 0.0)
    cost = step_cost(layout, cluster, message_bytes)
    before = cost(start)
    if iterations is None and seconds is None:
        iterations = ITERATIONS
    best, after = anneal(start, cost, random.Random(seed), iterations, seconds) if before > 0 else (start, before)
    return Mapping(tuple(int(node) for node in best), before, after)


def step_cost(layout: Layout, cluster: Cluster, message_bytes: dict[str, float]) -> Callable[[np.ndarray], float]:
    """Seconds of communication between nodes in a step, of an order of nodes: the slowest pipeline, and of every other axis
    the slowest group."""
    inverse = 1e-9 / np.array(
        [[speed if i != j else np.inf for j, speed in enumerate(row)] for i, row in enumerate(cluster.bandwidth)]
    )
    parts = []
    for axis, nbytes in message_bytes.items():
        if axis not in AXES:
            raise ValueError(f"axis {axis!r} is none of {', '.join(AXES)}")
        groups = [group for group in node_groups(layout, axis, cluster.devices_per_node) if len(group) > 1]
        if not groups or nbytes <= 0:
            continue
        stride, ranks = stride_and_size(layout, axis)
        share = span_of(stride, ranks, layout.world, cluster.devices_per_node)[0]  # ranks on a node, each with its card
        moved = nbytes
        if axis == "ep":
            moved *= share / ranks  # to each other node
        elif axis != "pp":
            moved *= 2 * (ranks - 1) / ranks / share  # over each link of the ring, which the cards of a node share
        runs = [run for group in groups for run in _talks(axis, group)]
        first = np.array([i for run in runs for i, _ in run])
        second = np.array([j for run in runs for _, j in run])
        starts = np.cumsum([0, *(len(run) for run in runs[:-1])])
        parts.append((axis in ("pp", "ep"), moved, first, second, starts))

    def seconds(order: np.ndarray) -> float:
        total = 0.0
        for one_by_one, moved, first, second, starts in parts:
            there, back = inverse[order[first], order[second]], inverse[order[second], order[first]]
            if one_by_one:
                total += moved * float(np.add.reduceat(there + back, starts).max())
            else:
                total += moved * float(np.maximum(there, back).max())
        return total

    return seconds


def _talks(axis: str, group: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Runs of pairs of nodes. Along a pipeline, and from one node of an all-to-all to all others, times add up, there and
    back; around a ring all links are busy at once and the slowest counts, in whichever direction."""
    if axis == "ep":
        return [[(node, other) for other in group if other != node] for node in group]
    pairs = list(pairwise(group))
    return [pairs if axis == "pp" else [*pairs, (group[-1], group[0])]]


def anneal(
    start: np.ndarray,
    cost: Callable[[np.ndarray], float],
    rng: random.Random,
    iterations: int | None,
    seconds: float | None = None,
) -> tuple[np.ndarray, float]:
    """The cheapest order that was met, `start` where none is cheaper. The temperature falls evenly on a logarithmic scale
    from the whole cost to COLDEST of it."""
    deadline = None if seconds is None else time.monotonic() + seconds
    began = time.monotonic()
    current = best = start
    value = lowest = scale = cost(start)
    done = 0
    while iterations is None or done < iterations:
        progress = done / iterations if iterations else 0.0
        if deadline is not None:
            now = time.monotonic()
            if now >= deadline:
                break
            progress = max(progress, (now - began) / seconds)
        tried = MOVES[rng.randrange(len(MOVES))](current, rng)
        price = cost(tried)
        if price <= value or rng.random() < math.exp((value - price) / (scale * COLDEST**progress)):
            current, value = tried, price
            if value < lowest:
                best, lowest = current, value
        done += 1
    return best, lowest


def _cut(order: np.ndarray, rng: random.Random) -> tuple[int, int]:
    """A segment [first, last) of at least two places."""
    first, last = sorted(rng.sample(range(len(order) + 1), 2))
    return (first, last) if last - first > 1 else (max(0, last - 2), max(2, last))


def two_opt(order: np.ndarray, rng: random.Random) -> np.ndarray:
    """A segment the other way round."""
    first, last = _cut(order, rng)
    return np.concatenate((order[:first], order[first:last][::-1], order[last:]))


def swap(order: np.ndarray, rng: random.Random) -> np.ndarray:
    found = order.copy()
    i, j = rng.sample(range(len(order)), 2)
    found[i], found[j] = order[j], order[i]
    return found


def insert(order: np.ndarray, rng: random.Random) -> np.ndarray:
    """One node to another place."""
    place = rng.randrange(len(order))
    return _put(np.delete(order, place), order[place : place + 1], rng)


def insert_route(order: np.ndarray, rng: random.Random) -> np.ndarray:
    """A segment to another place."""
    first, last = _cut(order, rng)
    return _put(np.concatenate((order[:first], order[last:])), order[first:last], rng)


def insert_reversed(order: np.ndarray, rng: random.Random) -> np.ndarray:
    """A segment to another place, the other way round."""
    first, last = _cut(order, rng)
    return _put(np.concatenate((order[:first], order[last:])), order[first:last][::-1], rng)


def _put(rest: np.ndarray, segment: np.ndarray, rng: random.Random) -> np.ndarray:
    place = rng.randrange(len(rest) + 1)
    return np.concatenate((rest[:place], segment, rest[place:]))


MOVES = (two_opt, swap, insert, insert_route, insert_reversed)

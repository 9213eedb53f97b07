"""Which device holds which expert, so that tokens change devices rarely from one mixture of experts to the next.

After ExFlow (Yao et al. 2024, "Exploiting Inter-Layer Expert Affinity"): tokens of expert i in a layer prefer some
experts of the next. Each device holds equally many experts of every layer; a step of a token between two layers costs
nothing on one device, 1 between devices of a node, 2 between nodes. The trace is folded into transition counts, so that
its length does not matter. Few experts are placed exactly, by dynamic programming over all ways to cut a layer; many by
several starts that are improved until no layer, no tail of layers and no pair of devices can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np
from tersor.formats.errors import TersorError
from tersor.formats.routing import Routing
from tersor.ops.plan_parallel.experts.assignment import assign_in_groups
from tersor.ops.plan_parallel.experts.spectral import spectral_start

EXACT_STATES = 3000  # ways to cut a layer up to which all pairs of ways are compared
WITHIN_NODE, ACROSS_NODES = 1.0, 2.0
ENOUGH = 1e-4  # of the cost: a round of improvements that saves less is the last


@dataclass(frozen=True)
class Placement:
    """`device[l, e]` holds expert e of layer l. `cost` and `linear_cost` are a token's mean per step, here and with experts in
    the order of the checkpoint, on the counts that it was made for. `exact`: no placement is better."""

    device: np.ndarray
    devices: int
    nodes: int
    groups: int
    cost: float
    linear_cost: float
    exact: bool

    def orders(self) -> list[list[int]]:
        """Per layer which expert stands at each position; device d has positions [d * E / G, (d + 1) * E / G).

        Where routers choose among groups of experts, the members of a group stay neighbours.
        """
        found = []
        for device in self.device:
            experts = len(device)
            group = np.arange(experts) // (experts // self.groups)
            if self.groups >= self.devices:  # whole groups on a device
                order = np.lexsort((np.arange(experts), group, device))
            else:
                first = np.array([device[group == one].min() for one in range(self.groups)])
                order = np.lexsort((np.arange(experts), device, first[group]))
            found.append(order.tolist())
        return found

    def load(self, counts: np.ndarray) -> float:
        """Tokens of the busiest device over those of a mean one, the worst layer. `counts` `[layers, experts]`."""
        worst = 1.0
        for device, layer in zip(self.device, counts, strict=True):
            per_device = np.bincount(device, layer, self.devices)
            if per_device.sum():
                worst = max(worst, float(per_device.max() / per_device.mean()))
        return worst


def linear(layers: int, experts: int, devices: int) -> np.ndarray:
    """Experts in the order of the checkpoint: `[layers, experts]`."""
    return np.tile(np.arange(experts) // (experts // devices), (layers, 1))


def weights(devices: int, nodes: int) -> np.ndarray:
    """Cost of a step `[from, to]`."""
    node = np.arange(devices) // (devices // nodes)
    cost = np.where(node[:, None] == node, WITHIN_NODE, ACROSS_NODES)
    np.fill_diagonal(cost, 0)
    return cost


def step_cost(transitions: np.ndarray, device: np.ndarray, weight: np.ndarray) -> float:
    """Sum over all counted pairs."""
    return float(
        sum(
            (counts * weight[np.ix_(here, there)]).sum()
            for counts, here, there in zip(transitions, device, device[1:], strict=False)
        )
    )


def place(routing: Routing, devices: int, nodes: int = 1, groups: int = 1, starts: int = 4, seed: int = 0) -> Placement:
    """Never worse than the order of the checkpoint. `groups`: of experts that the router chooses among first (DeepSeek's
    n_group), which stay together. Raises TersorError where the experts cannot be shared evenly."""
    experts = routing.experts
    _check(experts, devices, nodes, groups)
    weight = weights(devices, nodes)
    before = linear(routing.layers, experts, devices)
    total = max(float(routing.transitions.sum()), 1.0)
    worst = step_cost(routing.transitions, before, weight)
    exact = groups == 1 and _ways(experts, devices) <= EXACT_STATES
    if devices == 1 or routing.layers < 2:
        best = before
    elif exact:
        best = _exact(routing.transitions, weight, devices)
    else:
        best = _search(routing.transitions, before, weight, devices, nodes, groups, starts, seed)
    cost = step_cost(routing.transitions, best, weight)
    if cost >= worst:
        best, cost = before, worst
    return Placement(best, devices, nodes, groups, cost / total, worst / total, exact or devices == 1)


def _check(experts: int, devices: int, nodes: int, groups: int) -> None:
    if devices < 1 or experts % devices:
        raise TersorError(f"{experts} experts cannot be shared evenly by {devices} devices", "use a divisor")
    if nodes < 1 or devices % nodes:
        raise TersorError(f"{devices} devices cannot be spread evenly over {nodes} nodes", "use a divisor")
    if groups < 1 or experts % groups or (devices % groups and groups % devices):
        raise TersorError(
            f"{groups} groups of experts that a router chooses among cannot be shared evenly by {devices} devices",
            "use a divisor or a multiple of the groups",
        )


def _ways(experts: int, devices: int) -> int:
    return factorial(experts) // factorial(experts // devices) ** devices


def _cuts(experts: tuple[int, ...], capacity: int) -> list[list[tuple[int, ...]]]:
    """All ways to give `experts` to devices of `capacity`, as lists of who goes where."""
    if not experts:
        return [[]]
    return [
        [chosen, *rest]
        for chosen in combinations(experts, capacity)
        for rest in _cuts(tuple(expert for expert in experts if expert not in chosen), capacity)
    ]


def _exact(transitions: np.ndarray, weight: np.ndarray, devices: int) -> np.ndarray:
    """Viterbi over the ways to cut each layer: the cost of two neighbours is a product of their one-hot forms."""
    experts = transitions.shape[1]
    cuts = _cuts(tuple(range(experts)), experts // devices)
    device = np.empty((len(cuts), experts), np.int64)
    for row, cut in enumerate(cuts):
        for index, members in enumerate(cut):
            device[row, list(members)] = index
    one_hot = np.eye(devices)[device].reshape(len(cuts), -1)
    reached, came = np.zeros(len(cuts)), []
    for counts in transitions:
        pairs = (one_hot @ np.kron(counts.T, weight)) @ one_hot.T  # [to, from]
        pairs += reached
        came.append(pairs.argmin(1))
        reached = pairs[np.arange(len(cuts)), came[-1]]
    chosen = [int(reached.argmin())]
    for back in reversed(came):
        chosen.append(int(back[chosen[-1]]))
    return device[chosen[::-1]]


def _search(
    transitions: np.ndarray, before: np.ndarray, weight: np.ndarray, devices: int, nodes: int, groups: int, starts: int, seed: int
) -> np.ndarray:  # fmt: skip
    layers, experts = before.shape
    capacity, size = experts // devices, experts // groups
    # The layers scaled to one mean, so that none drowns in the float sums; their proportions stay.
    counts = transitions / max(transitions.max(), 1.0)
    generator = np.random.default_rng(seed)

    def any_start() -> np.ndarray:
        noise = generator.random((layers, experts, devices))
        return np.stack([assign_in_groups(one, size, capacity) for one in noise])

    candidates = [before, spectral_start(counts, devices, size, capacity)]
    candidates += [any_start() for _ in range(max(0, starts - 2))]
    best, least = before, step_cost(counts, before, weight)
    for start in candidates:
        found = _improve(counts, start.copy(), weight, nodes, size, capacity)
        cost = step_cost(counts, found, weight)
        if cost < least * (1 - 1e-12):
            best, least = found, cost
    return best


def _improve(
    counts: np.ndarray, device: np.ndarray, weight: np.ndarray, nodes: int, size: int, capacity: int
) -> np.ndarray:
    """Until nothing helps: every layer anew between its neighbours, tails of layers renamed, devices moved between nodes."""
    layers, devices = len(device), len(weight)
    cost = step_cost(counts, device, weight)
    while True:
        for layer in (*range(layers), *range(layers - 2, 0, -1)):
            wanted = np.zeros((device.shape[1], devices))
            if layer:
                wanted += counts[layer - 1].T @ weight[device[layer - 1]]
            if layer < layers - 1:
                wanted += counts[layer] @ weight[device[layer + 1]]
            device[layer] = assign_in_groups(wanted, size, capacity)
        if size <= capacity:  # groups that span devices would have to move as one
            for layer in range(layers - 1):
                flow = _flow(counts[layer], device[layer], device[layer + 1], devices)
                rename = assign_in_groups((weight.T @ flow).T, devices // nodes)
                device[layer + 1 :] = rename[device[layer + 1 :]]
            if nodes > 1:
                device = _regroup(counts, device, weight)[device]
        now = step_cost(counts, device, weight)
        if now >= cost * (1 - ENOUGH):
            return device
        cost = now


def _flow(counts: np.ndarray, here: np.ndarray, there: np.ndarray, devices: int) -> np.ndarray:
    """Counts between devices `[from, to]`."""
    one_hot = np.eye(devices)
    return one_hot[here].T @ counts @ one_hot[there]


def _regroup(counts: np.ndarray, device: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """New names of the devices, in all layers at once: pairs change places while that saves steps between nodes."""
    devices = len(weight)
    flow = sum(_flow(one, here, there, devices) for one, here, there in zip(counts, device, device[1:], strict=False))
    flow = flow + flow.T
    name, own = np.arange(devices), np.diag(flow)
    while True:
        here = weight[np.ix_(name, name)]
        moved = flow @ here  # [i, j]: what i has with all others, if it stood where j stands
        stay = np.diag(moved)
        change = moved + moved.T - stay[:, None] - stay - here * (own[:, None] + own - 2 * flow)
        one, other = divmod(int(change.argmin()), devices)
        if change[one, other] >= -1e-9 * flow.sum():
            return name
        name[[one, other]] = name[[other, one]]

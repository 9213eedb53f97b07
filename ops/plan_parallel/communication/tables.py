"""How long a collective takes: latency plus bytes over bandwidth, the quickest of what NCCL may choose from.

The constants are those of NCCL (`tuning.cc`: latencies, channels, protocols) and, where measurements with nccl-tests on H100
with NVSwitch say otherwise, what was fitted to them: both as published in `autoparallel/cost_models/nccl_cost_model.py`
(meta-pytorch, BSD-3; NCCL 2.27.5). Their tables for 1 to 32 nodes come out of these formulas to the last digit, so that any
number of nodes and of ranks has an answer. Other devices are scaled: what the network limits by the speed of the network card
against 50 GB/s, what the links of a node limit by theirs against 450 GB/s.

Protocols are (LL, LL128, Simple) throughout: small messages pay little latency for little bandwidth, large ones the other
way round. Times in microseconds, bandwidth in GB/s (10^9 bytes), so that time = latency + bytes / (1000 * bandwidth).
"""

from __future__ import annotations

import math
from typing import NamedTuple

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send")
REFERENCE_LINK, REFERENCE_NETWORK = 450.0, 50.0  # H100: NVLink 4 and 400 Gb/s, one direction
REFERENCE_LATENCY = 5e-6  # seconds; of a small message over the network in NCCL's constants
SIMPLE = 2

RING_BASE, TREE_BASE = (6.6, 14.0, 8.4), (6.8, 14.0, 8.4)
RING_LINK, TREE_LINK = (0.6, 1.9, 3.4), (0.6, 1.25, 4.0)  # one step inside a node
RING_PCIE = (1.0, 2.5, 5.7)  # the same where there are no links but PCIe
RING_NETWORK, TREE_NETWORK = (2.7, 4.0, 14.0), (5.0, 8.5, 14.0)  # one step between nodes
STEP_FLOOR = (1.0, 1.0, 3.0)  # of a ring over several nodes

# Inside one NVSwitch, (ranks, GB/s or microseconds) for the whole buffer: nccl-tests at 1 GB on 2, 4, 8 H100.
NODE_GATHER = ((2, 537.0), (4, 434.0), (8, 394.0))
NODE_GATHER_LATENCY = ((2, 8.0), (4, 17.0), (8, 30.0))
NODE_REDUCE = ((2, 324.0), (4, 236.0), (8, 267.0))
NODE_REDUCE_LATENCY = ((2, 10.0), (4, 15.0), (8, 31.0))
NODE_EXCHANGE, NODE_EXCHANGE_LATENCY = 380.0, 50.0  # all-to-all of 8 by copy engines
EXCHANGE_BY_KERNELS = 0.7  # of the ring's bandwidth, where no copy engine does it

RING_PER_CARD = 48.0  # of the 50 GB/s of a network card
RING_IN_NODE = 384.0  # most that a ring moves through a node
RING_LL128 = 0.92, 293.6, 587.2  # share of Simple, most over several nodes (8 channels of 36.7), most inside one (16)
RING_LL = 0.5, 141.0, 39.0, 20.4  # share of Simple, most in one node, two, more
PLATEAU = 1.4  # NCCL's factor on the latency of ring all-reduce in Simple beyond small messages

TREE_CHANNEL = 41.4, 36.0  # GB/s of a channel: two nodes, more
TREE_CHANNEL_LL128 = 36.7, 29.0
TREE_LL128 = 120 / 128  # payload of an LL128 line
TREE_SHARE = 0.85 / 2  # of the bus: NCCL's correction, and every byte goes up and down
TREE_CORRECTION = (  # by log2(bytes / 64), a protocol each
    (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1),
    (0.9,) * 7 + (0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9),
)

NVLS_LATENCY, NVLS_NETWORK = 25.0, 14.0  # of the switches, and of a step of the tree over nodes
NVLS_PER_CARD = 40.0, 20.0  # all-reduce, a network card: two nodes, more
NVLS_MOST = 266.7
NVLS_RANKS = 4  # in each node, from which NCCL uses it

EXCHANGE_LATENCY = ((2, 37.0), (4, 42.0), (8, 60.0), (16, 98.0), (32, 290.0))  # all-to-all over so many nodes
EXCHANGE_LOSS = 0.44  # of a network card, over the number of nodes

# Share of the bandwidth that messages reach, by log2(bytes of a rank / 64): rings that use whole nodes, NVLS trees,
# all-to-all over two nodes (of more, the shortfall is divided by the logarithm of their number). The two last begin at
# 16 kB; smaller messages were not fitted and keep the first share, so that a smaller message never takes longer.
RING_RAMP = (0.01, 0.02, 0.03, 0.06, 0.10, 0.16, 0.25, 0.36, *[0.68] * 10, 0.79, 0.87)
NVLS_RAMP = (*[0.10] * 10, 0.15, 0.28, 0.41, 0.55, 0.72, 0.88, 1.0)
EXCHANGE_RAMP = (*[0.28] * 10, 0.35, 0.43, 0.62, 0.71, 0.82, 0.89, 0.92, 0.95, 1.0)


class Fabric(NamedTuple):
    """What connects the ranks. `latency` is microseconds that a step between nodes takes beyond NCCL's constants."""

    kind: str  # nvls, switch, mesh, host: see formats.cluster
    devices_per_node: int
    link_gbps: float
    network_gbps: float
    latency: float = 0.0

    def link(self, ranks: int) -> float:
        """GB/s among so many ranks of a node; of a mesh only the wires between them count."""
        if self.kind != "mesh" or self.devices_per_node < 2:
            return self.link_gbps
        return self.link_gbps * min(1.0, max(1, ranks - 1) / (self.devices_per_node - 1))


def microseconds(fabric: Fabric, collective: str, nbytes: float, ranks_per_node: int, nodes: int) -> float:
    """Of one collective on `nbytes`, the whole buffer, among `ranks_per_node * nodes` ranks, at least two."""
    if collective == "send":
        return _send(fabric, nbytes, nodes)
    if collective == "all_to_all":
        return _exchange(fabric, nbytes, ranks_per_node, nodes)
    if fabric.kind == "nvls" and nodes == 1 and collective != "broadcast":
        reduces = collective == "all_reduce"
        speed = interpolate(NODE_REDUCE if reduces else NODE_GATHER, ranks_per_node)
        latency = interpolate(NODE_REDUCE_LATENCY if reduces else NODE_GATHER_LATENCY, ranks_per_node, beyond=True)
        return latency + nbytes / (1e3 * speed * fabric.link_gbps / REFERENCE_LINK)
    found = _ring(fabric, collective, nbytes, ranks_per_node, nodes)
    if collective == "all_reduce" and nodes > 1:
        found = min(found, _tree(fabric, nbytes, ranks_per_node, nodes))
        if fabric.kind == "nvls" and ranks_per_node >= NVLS_RANKS:
            found = min(found, _nvls_tree(fabric, nbytes, ranks_per_node, nodes))
    return found


def ring_parts(fabric: Fabric, collective: str, ranks_per_node: int, nodes: int) -> list[tuple[float, float]]:
    """(latency, bandwidth for the whole buffer) of a ring in each protocol, before the ramp of small messages."""
    ranks = ranks_per_node * nodes
    passes = 2 if collective == "all_reduce" else 1
    moved = 1.0 if collective == "broadcast" else passes * (ranks - 1) / ranks  # times the buffer, over each link
    hops = passes * (nodes - 1)
    inside = passes * (ranks - 1) - hops
    far = RING_NETWORK if ranks_per_node > 1 else TREE_NETWORK
    near = RING_PCIE if fabric.kind == "host" else RING_LINK
    found = []
    for protocol, speed in enumerate(_ring_bus(fabric, ranks_per_node, nodes)):
        step = max(near[protocol], STEP_FLOOR[protocol]) if nodes > 1 else near[protocol]
        between = far[protocol] + fabric.latency * (2 if protocol == SIMPLE else 1)  # Simple flushes: there and back
        found.append((RING_BASE[protocol] + inside * step + hops * between, speed / moved))
    return found


def _ring_bus(fabric: Fabric, ranks_per_node: int, nodes: int) -> tuple[float, float, float]:
    """GB/s over the slowest link of a ring, per protocol."""
    link, scale = fabric.link(ranks_per_node) / REFERENCE_LINK, fabric.link_gbps / REFERENCE_LINK
    if nodes == 1:
        gathered = interpolate(NODE_GATHER, ranks_per_node)
        measured = min(ranks_per_node, NODE_GATHER[-1][0])
        simple = gathered * (measured - 1) / measured * link
    else:
        simple = RING_IN_NODE * link if ranks_per_node > 1 else math.inf
        simple = min(simple, RING_PER_CARD * fabric.network_gbps / REFERENCE_NETWORK * ranks_per_node)
    most_ll = RING_LL[1] * scale if nodes == 1 else RING_LL[2] if nodes == 2 else RING_LL[3]
    most_ll128 = RING_LL128[1 if nodes > 1 else 2] * scale
    return min(RING_LL[0] * simple, most_ll), min(RING_LL128[0] * simple, most_ll128), simple


def _ring(fabric: Fabric, collective: str, nbytes: float, ranks_per_node: int, nodes: int) -> float:
    ranks = ranks_per_node * nodes
    whole_nodes = nodes > 1 and 1 < ranks_per_node >= fabric.devices_per_node
    share = ramp(RING_RAMP, nbytes / ranks) if whole_nodes else 1.0
    best = math.inf
    for protocol, (latency, speed) in enumerate(ring_parts(fabric, collective, ranks_per_node, nodes)):
        plateau = protocol == SIMPLE and collective == "all_reduce" and nodes > 1 and nbytes / (16 * ranks) >= 64
        best = min(best, latency * (PLATEAU if plateau else 1.0) + nbytes / (1e3 * speed * share))
    return best


def tree_parts(fabric: Fabric, ranks_per_node: int, nodes: int) -> list[tuple[float, float]]:
    """(latency, bandwidth) of a tree all-reduce over nodes in each protocol, before the correction by size."""
    row = 0 if nodes == 2 else 1
    link = fabric.link_gbps / REFERENCE_LINK
    cards = RING_PER_CARD * fabric.network_gbps / REFERENCE_NETWORK * ranks_per_node
    channels = min(8, 2 * ranks_per_node) * link
    # Two nodes send each byte once, one of several sends what it gets up and down the tree.
    simple = min(channels * TREE_CHANNEL[row], cards / TREE_SHARE if nodes == 2 else cards * RING_LL128[0])
    speeds = (
        min(simple / 3.8, RING_LL[2 + row]),
        min(simple * TREE_LL128, channels * TREE_CHANNEL_LL128[row]),
        simple,
    )
    levels = (nodes - 1).bit_length()
    found = []
    for protocol, speed in enumerate(speeds):
        between = TREE_NETWORK[protocol] + fabric.latency * (2 if protocol == SIMPLE else 1)
        latency = TREE_BASE[protocol] + 2 * ((ranks_per_node - 1) * TREE_LINK[protocol] + levels * between)
        found.append((latency, speed * TREE_SHARE))
    return found


def _tree(fabric: Fabric, nbytes: float, ranks_per_node: int, nodes: int) -> float:
    return min(
        latency + nbytes / (1e3 * speed * ramp(TREE_CORRECTION[protocol], nbytes))
        for protocol, (latency, speed) in enumerate(tree_parts(fabric, ranks_per_node, nodes))
    )


def nvls_tree_part(fabric: Fabric, ranks_per_node: int, nodes: int) -> tuple[float, float]:
    """(latency, bandwidth) of an all-reduce that switches add up inside nodes and a tree over them."""
    cards = NVLS_PER_CARD[0 if nodes == 2 else 1] * ranks_per_node * fabric.network_gbps / REFERENCE_NETWORK
    levels = (nodes - 1).bit_length()
    latency = NVLS_LATENCY + 2 * levels * (NVLS_NETWORK + 2 * fabric.latency)
    return latency, min(cards, NVLS_MOST * fabric.link_gbps / REFERENCE_LINK)


def _nvls_tree(fabric: Fabric, nbytes: float, ranks_per_node: int, nodes: int) -> float:
    latency, speed = nvls_tree_part(fabric, ranks_per_node, nodes)
    return latency + nbytes / (1e3 * speed * ramp(NVLS_RAMP, nbytes / (ranks_per_node * nodes)))


def _exchange(fabric: Fabric, nbytes: float, ranks_per_node: int, nodes: int) -> float:
    """All-to-all of `nbytes` a rank: pairs send at once, and what a rank keeps costs nothing."""
    ranks = ranks_per_node * nodes
    link = fabric.link(ranks_per_node)
    if fabric.kind == "nvls":
        inside = NODE_EXCHANGE * 7 / 8 * link / REFERENCE_LINK  # measured on 8, of which each kept an eighth
        latency = NODE_EXCHANGE_LATENCY
    else:
        inside = EXCHANGE_BY_KERNELS * _ring_bus(fabric, ranks_per_node, 1)[SIMPLE] if ranks_per_node > 1 else math.inf
        step = RING_PCIE if fabric.kind == "host" else RING_LINK
        latency = RING_BASE[SIMPLE] + ranks * step[SIMPLE]
    local = nbytes * (ranks_per_node - 1) / ranks / (1e3 * inside)
    if nodes == 1:
        return latency + local
    card = fabric.network_gbps * (1 - EXCHANGE_LOSS / nodes)
    share = 1 - (1 - ramp(EXCHANGE_RAMP, nbytes / ranks)) / max(1.0, math.log2(nodes))
    latency = interpolate(EXCHANGE_LATENCY, nodes, beyond=True) + 2 * fabric.latency
    return latency + max(local, nbytes * (ranks - ranks_per_node) / ranks / (1e3 * card * share))


def _send(fabric: Fabric, nbytes: float, nodes: int) -> float:
    """One message from a device to another: a ring of two, of which one direction is used."""
    parts = ring_parts(fabric, "broadcast", *((1, 2) if nodes > 1 else (2, 1)))
    return min(latency + nbytes / (1e3 * speed) for latency, speed in parts)


def interpolate(points: tuple[tuple[float, float], ...], at: float, beyond: bool = False) -> float:
    """Linear between `points`; before them the first value, behind them the last or, with `beyond`, on along the last line."""
    if at <= points[0][0]:
        return points[0][1]
    if at >= points[-1][0] and not beyond:
        return points[-1][1]
    place = next((i for i in range(1, len(points)) if at <= points[i][0]), len(points) - 1)
    (left, low), (right, high) = points[place - 1], points[place]
    return low + (high - low) * (at - left) / (right - left)


def ramp(shares: tuple[float, ...], nbytes: float) -> float:
    """The share of the bandwidth for `nbytes`, between the steps of 64 bytes times powers of two."""
    place = math.log2(nbytes / 64) if nbytes > 64 else 0.0
    if place >= len(shares) - 1:
        return shares[-1]
    low = int(place)
    return shares[low] + (shares[low + 1] - shares[low]) * (place - low)

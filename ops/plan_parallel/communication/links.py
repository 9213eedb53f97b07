"""Time of a collective between ranks of a cluster: from the tables, or as nccl-tests measured it there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from tersor.formats.cluster import Cluster
from tersor.formats.nccl_tests import Run
from tersor.ops.plan_parallel.communication.groups import AXES, node_groups, span_of, stride_and_size
from tersor.ops.plan_parallel.communication.tables import COLLECTIVES, REFERENCE_LATENCY, Fabric, microseconds
from tersor.ops.plan_parallel.layout import Layout

SIZES = tuple(float(1 << power) for power in range(6, 45))  # bytes at which a curve is computed: exact there
SEND = (1, 0)  # stands for the span of messages from one node to the next, among however many


class Curve:
    """Seconds by bytes, linear between points and on along the last line; never falling."""

    __slots__ = ("seconds", "sizes", "slopes")

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]):
        self.sizes = list(sizes)
        self.seconds = list(accumulate(seconds, max))
        places = range(len(self.sizes) - 1)
        self.slopes = [(self.seconds[i + 1] - self.seconds[i]) / (self.sizes[i + 1] - self.sizes[i]) for i in places]
        self.slopes.append(self.slopes[-1])

    def __call__(self, nbytes: float) -> float:
        place = bisect_right(self.sizes, nbytes) - 1
        if place < 0:
            return self.seconds[0]
        return self.seconds[place] + self.slopes[place] * (nbytes - self.sizes[place])


class Links:
    """What connects the devices of `cluster`. `calibration` are runs of nccl-tests there (formats.nccl_tests.read): each
    replaces the table for its collective between as many ranks on as many nodes.

    A bandwidth matrix counts as the nodes stand in the cluster: groups on m nodes are taken to lie on m nodes in a row,
    messages to go from a node to the next, and all take as long as the slowest of them; `placed` says it exactly for one
    layout and order of nodes.
    """

    def __init__(self, cluster: Cluster, calibration: Iterable[Run] | None = None):
        self.cluster = cluster
        self._measured = _by_span(calibration or ())
        self._curves: dict[tuple, Curve] = {}
        self._shared: dict[tuple, Curve] = {}  # by speed of the network too: also for layouts placed elsewhere
        self._speeds: dict[tuple[int, int], float] = {}  # GB/s of a device to other nodes, for groups of a span
        self.calibrated: set[tuple[str, int, int]] = set()  # what was asked for and answered from measurements

    def seconds(self, collective: str, nbytes: float, ranks_per_node: int, nodes: int) -> float:
        """Of one of tables.COLLECTIVES. `nbytes` is the whole buffer: gathered by all_gather, before reduce_scatter,
        reduced by all_reduce, held by one rank of all_to_all, the message of broadcast and send."""
        if nbytes <= 0 or ranks_per_node * nodes <= 1:
            return 0.0
        curve = self._curves.get((collective, ranks_per_node, nodes))
        if curve is None:
            curve = self._curve(collective, ranks_per_node, nodes)
        return curve(nbytes)

    def span(self, layout: Layout, axis: str) -> tuple[int, int]:
        """(ranks per node, nodes) that a group of `axis` lies on, the worst one where they differ."""
        if axis not in AXES:
            raise ValueError(f"axis {axis!r} is none of {', '.join(AXES)}")
        return span_of(*stride_and_size(layout, axis), layout.world, self.cluster.devices_per_node)

    def placed(self, layout: Layout, order: Sequence[int] | None = None) -> Links:
        """These links for `layout` alone, whose i-th node (from 0) is the cluster's node `order[i]`: the groups of an axis
        go as fast as the slowest link between neighbours in any of them, all-to-alls of experts as the node whose links
        to all others are slowest together. Without a bandwidth matrix nothing changes."""
        matrix = self.cluster.bandwidth
        if matrix is None:
            return self
        order = range(len(matrix)) if order is None else order
        found = Links.__new__(Links)
        found.cluster, found._measured, found._shared = self.cluster, self._measured, self._shared
        found._curves, found.calibrated = {}, self.calibrated
        speeds: dict[tuple[int, int], float] = {}
        for axis in AXES:
            key = SEND if axis == "pp" else self.span(layout, axis)
            for group in node_groups(layout, axis, self.cluster.devices_per_node):
                if len(group) > 1:
                    nodes = [order[node] for node in group]
                    speed = exchanged(matrix, nodes) if axis == "ep" else slowest(matrix, nodes, ring=axis != "pp")
                    speeds[key] = min(speed, speeds.get(key, speed))
        found._speeds = speeds
        return found

    def _curve(self, collective: str, ranks_per_node: int, nodes: int) -> Curve:
        if collective not in COLLECTIVES:
            raise ValueError(f"collective {collective!r} is none of {', '.join(COLLECTIVES)}")
        cluster = self.cluster
        network = cluster.network_gbps if nodes == 1 else self._network(collective, ranks_per_node, nodes)
        key = (collective, ranks_per_node, nodes, network)
        if key not in self._shared:
            fabric = Fabric(
                cluster.fabric,
                cluster.devices_per_node,
                cluster.link_gbps,
                network,
                1e6 * (cluster.network_latency_seconds - REFERENCE_LATENCY),
            )
            seconds = [1e-6 * microseconds(fabric, collective, size, ranks_per_node, nodes) for size in SIZES]
            self._shared[key] = Curve(SIZES, seconds)
        curve = self._shared[key]
        measured = self._measured.get(_span_key(collective, ranks_per_node, nodes))
        if measured is not None:
            self.calibrated.add((collective, ranks_per_node, nodes))
            curve = _joined(measured, curve)
        self._curves[collective, ranks_per_node, nodes] = curve
        return curve

    def _network(self, collective: str, ranks_per_node: int, nodes: int) -> float:
        matrix = self.cluster.bandwidth
        if matrix is None:
            return self.cluster.network_gbps
        key = SEND if collective == "send" else (ranks_per_node, nodes)
        if key not in self._speeds:
            width = len(matrix) if key == SEND else nodes
            rows = [range(start, start + width) for start in range(0, len(matrix) - width + 1, width)]
            found = [slowest(matrix, row, ring=key != SEND) for row in rows if width > 1]
            self._speeds[key] = min(found, default=self.cluster.network_gbps)
        return self._speeds[key]


def slowest(matrix: Sequence[Sequence[float]], nodes: Sequence[int], ring: bool = True) -> float:
    """GB/s of the slowest link, in either direction, between neighbours; in a ring the last is also one of the first."""
    pairs = list(pairwise(nodes))
    if ring:
        pairs.append((nodes[-1], nodes[0]))
    return min(min(matrix[i][j], matrix[j][i]) for i, j in pairs)


def exchanged(matrix: Sequence[Sequence[float]], nodes: Sequence[int]) -> float:
    """GB/s of the slowest node's card while it sends as much to each of the others."""
    times = [sum(1 / matrix[i][j] for j in nodes if j != i) for i in nodes]
    return (len(nodes) - 1) / max(times)


def _span_key(collective: str, ranks_per_node: int, nodes: int) -> tuple[str, int, int]:
    """What measurements are kept under: a message between two devices does not know how many others there are."""
    return (collective, 1, min(nodes, 2)) if collective == "send" else (collective, ranks_per_node, nodes)


def _by_span(runs: Iterable[Run]) -> dict[tuple[str, int, int], tuple[list[float], list[float]]]:
    """(bytes, seconds) of each collective and span, by rising size. Several times of one size: the median. A larger message
    that took less shows that the smaller one was disturbed, and counts for it."""
    found: dict[tuple[str, int, int], dict[float, list[float]]] = {}
    for run in runs:
        sizes = found.setdefault(_span_key(run.collective, run.ranks // run.nodes, run.nodes), {})
        for nbytes, seconds in run.points:
            sizes.setdefault(float(nbytes), []).append(seconds)
    curves = {}
    for key, times in found.items():
        sizes = sorted(times)
        seconds = [sorted(times[size])[len(times[size]) // 2] for size in sizes]
        for place in range(len(seconds) - 2, -1, -1):
            seconds[place] = min(seconds[place], seconds[place + 1])
        curves[key] = (sizes, seconds)
    return curves


def _joined(measured: tuple[list[float], list[float]], table: Curve) -> Curve:
    """The measured points, and outside of their range the table scaled to meet the nearest of them."""
    sizes, seconds = measured
    first, last = seconds[0] / table(sizes[0]), seconds[-1] / table(sizes[-1])
    before = [(size, first * table(size)) for size in SIZES if size < sizes[0]]
    behind = [(size, last * table(size)) for size in SIZES if size > sizes[-1]]
    points = [*before, *zip(sizes, seconds, strict=True), *behind]
    return Curve([size for size, _ in points], [time for _, time in points])

"""Which nodes the groups of a layout's axes lie on: ranks fill one node after the other, in the order of `layout.Mesh`."""

from __future__ import annotations

from functools import lru_cache

from tersor.ops.plan_parallel.layout import Layout

AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", "shard", "replicate")


def stride_and_size(layout: Layout, axis: str) -> tuple[int, int]:
    """A group of `axis` are `size` ranks, each `stride` after the one before."""
    tp, cp, dp = layout.tp, layout.cp, layout.dp
    per_replica = dp // layout.replicate
    return {
        "tp": (1, tp),
        "cp": (tp, cp),
        "dp": (tp * cp, dp),
        "pp": (tp * cp * dp, layout.pp),
        "etp": (1, layout.etp),
        "ep": (layout.etp, layout.ep),
        "edp": (layout.etp * layout.ep, layout.edp),
        "shard": (tp, cp * per_replica),
        "replicate": (tp * cp * per_replica, layout.replicate),
    }[axis]


@lru_cache(maxsize=65536)
def span_of(stride: int, size: int, world: int, devices_per_node: int) -> tuple[int, int]:
    """(ranks per node, nodes) of such groups. Where they lie unevenly: that of the group on most nodes, with as many
    ranks on each as the whole group has on average, rounded down, since the node with fewest is the slowest."""
    width = stride * size
    if devices_per_node % width == 0 or world <= devices_per_node:
        return size, 1
    if width % devices_per_node == 0:
        if devices_per_node % stride == 0:
            return devices_per_node // stride, width // devices_per_node
        if stride % devices_per_node == 0:
            return 1, size
    nodes = max(len(group) for group in _node_groups(stride, size, world, devices_per_node))
    return max(1, size // nodes), nodes


def node_groups(layout: Layout, axis: str, devices_per_node: int) -> tuple[tuple[int, ...], ...]:
    """The nodes of each group of `axis`, every node once, in the order of the group; equal ones are given once."""
    return _node_groups(*stride_and_size(layout, axis), layout.world, devices_per_node)


@lru_cache(maxsize=4096)
def _node_groups(stride: int, size: int, world: int, devices_per_node: int) -> tuple[tuple[int, ...], ...]:
    width = stride * size
    found: dict[tuple[int, ...], None] = {}
    for outer in range(0, world, width):
        for inner in range(stride):
            first = outer + inner
            nodes = dict.fromkeys(rank // devices_per_node for rank in range(first, first + width, stride))
            found[tuple(nodes)] = None
    return tuple(found)

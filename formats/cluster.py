"""Clusters: how many devices, how they are joined, and what hosts and disks they have.

A short form says it where the usual machine is meant: `4x8xh100` are four nodes of eight H100, `8xh100` is one node, `h100`
one device, `4x8xmine.toml` takes the device from a hardware file. All else is a TOML file:

    name = "our cluster"
    nodes = 4
    devices_per_node = 8
    hardware = "h100"             # or a hardware file, relative to this one
    network_gbps = 50             # gigaBYTES (10^9) a second, of one device, in one direction, between nodes
    bandwidth = [[0, 50, 50, 12], [50, 0, 50, 12], [50, 50, 0, 12], [12, 12, 12, 0]]     # measured, node to node

The other keys are the fields of `Cluster`; what is left out comes from `DEFAULTS`.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.hardware import HOST, Hardware, load_hardware, names

FABRICS = ("nvls", "switch", "mesh", "host")
MOST_DEVICES = 1 << 20

# What a node of each device usually has; a cluster file overrides every number. Network: one network card a device, as in
# the vendors' own machines (DGX H100/H200: ConnectX-7 at 400 Gb/s; DGX A100: ConnectX-6 at 200 Gb/s; MI300X platforms:
# 400 Gb/s; L40S servers: one card of 200 Gb/s for two devices). Host memory and disks: data sheets of DGX H100, H200 and
# A100 (2 TB, eight drives of 3.84 TB); for the others assumptions. `host_gbps` is what pinned copies reach, about 0.8 of
# PCIe, and `nvme_gbps` what eight drives sustain in a mix of reads and writes: assumptions, too.
_DGX = {"host_memory_bytes": 2e12, "nvme_bytes": 30.7e12, "nvme_gbps": 25.0}
DEFAULTS: dict[str, dict] = {
    "H100": {"network_gbps": 50.0, "fabric": "nvls", "host_gbps": 50.0, **_DGX},
    "H200": {"network_gbps": 50.0, "fabric": "nvls", "host_gbps": 50.0, **_DGX},
    "A100": {"network_gbps": 25.0, "fabric": "switch", "host_gbps": 25.0, **_DGX},
    "MI300X": {"network_gbps": 50.0, "fabric": "mesh", "host_gbps": 50.0, **_DGX},
    "L40S": {"network_gbps": 12.5, "fabric": "host", "host_gbps": 25.0, **_DGX, "host_memory_bytes": 1e12},
}
DEVICES_PER_NODE = 8  # of every machine above; more of them in one word is more likely a slip than a node


@dataclass(frozen=True)
class Cluster:
    """`nodes` times `devices_per_node` equal devices. `*_gbps` are 10^9 bytes a second in one direction.

    `network_gbps` is what one device has to other nodes while all others use theirs; `bandwidth[i][j]` is that as measured
    from node i to node j (the diagonal counts for nothing). `network_latency_seconds` is that of a small message between
    nodes. `fabric` joins the devices of a node: `switch`, `nvls` (a switch that adds up: NVLink SHARP), `mesh` (a wire for
    each pair, so that few devices have few of them), `host` (PCIe only). `host_gbps` is from one device to the memory of its
    host, `host_memory_bytes`, `nvme_bytes` and `nvme_gbps` are per node. `usable_memory` is the share of a device's memory
    that is left beside the driver, its context and communication buffers.
    """

    name: str
    nodes: int
    devices_per_node: int
    hardware: Hardware
    network_gbps: float = 25.0
    network_latency_seconds: float = 5e-6
    bandwidth: tuple[tuple[float, ...], ...] | None = None
    fabric: str = "switch"
    host_memory_bytes: float = 512e9
    host_gbps: float = 25.0
    nvme_bytes: float = 0.0
    nvme_gbps: float = 0.0
    usable_memory: float = 0.94

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def memory_bytes(self) -> float:
        """What a plan may use of one device."""
        return self.hardware.memory_bytes * self.usable_memory

    @property
    def link_gbps(self) -> float:
        """From a device to the others of its node."""
        return self.hardware.link_gbps or self.hardware.pcie_gbps or self.host_gbps

    def describe(self) -> str:
        each = f"{self.devices_per_node} {self.hardware.name}"
        return f"{self.nodes} nodes of {each}" if self.nodes > 1 else each


WAY_OUT = "write 4x8xh100 (nodes x devices), 8xh100, h100, or a cluster file: see tersor.formats.cluster"


def load_cluster(text: str | Path) -> Cluster:
    """Raises TersorError for what is neither the short form nor a sound cluster file."""
    text = str(text)
    if text.endswith(".toml") and Path(text).is_file():
        return _of_file(Path(text))
    match = re.fullmatch(r"(?:(-?\d{1,9})[xX×])?(?:(-?\d{1,9})[xX×])?(.+)", text, re.ASCII)
    if match is None:
        raise TersorError(f"cluster {text!r} is not understood", WAY_OUT)
    first, second, device = match.groups()
    counts = [int(count) for count in (first, second) if count is not None]
    if not counts and device.endswith(".toml"):
        raise TersorError(f"{text}: no such cluster file", WAY_OUT)
    for count in counts:
        if count < 1:
            raise TersorError(f"cluster {text!r} has {count} nodes or devices", "give numbers from 1 on")
    if not device.endswith(".toml") and device.lower() not in (*names(), HOST):
        known = ", ".join([*names(), HOST])
        raise TersorError(
            f"cluster {text!r}: unknown device {device!r}", f"known are {known}, or a .toml file; {WAY_OUT}"
        )
    if device.endswith(".toml") and "hardware" in _read(Path(device)):
        raise TersorError(f"cluster {text!r}: {device} describes a whole cluster", f"give {device} alone")
    hardware = load_hardware(device)
    nodes, each = [1, 1, *counts][-2:]
    if len(counts) == 1 and each > DEVICES_PER_NODE and device.lower() != HOST:
        raise TersorError(
            f"cluster {text!r} is one node of {each} devices",
            f"write {-(-each // DEVICES_PER_NODE)}x{DEVICES_PER_NODE}x{device} for several nodes, 1x{text} if it is meant",
        )
    return _build(text, {"name": text, "nodes": nodes, "devices_per_node": each}, hardware)


def _of_file(path: Path) -> Cluster:
    content = _read(path)
    if "hardware" not in content and "peak_flops" in content:
        return _build(str(path), {"name": path.stem, "nodes": 1, "devices_per_node": 1}, load_hardware(path))
    known = sorted(entry.name for entry in fields(Cluster))
    for key in content:
        if key not in known:
            raise TersorError(f"{path}: key {key!r} is not known", f"known are {', '.join(known)}")
    device = content.pop("hardware", None)
    if not isinstance(device, str):
        raise TersorError(
            f"{path}: key 'hardware' is {'missing' if device is None else 'not text'}",
            f"name one of {', '.join(names())}, or a hardware file",
        )
    if device.endswith(".toml"):
        device = str(path.parent / device)
    content.setdefault("name", path.stem)
    matrix = content.get("bandwidth")
    if isinstance(matrix, list) and matrix:
        content.setdefault("nodes", len(matrix))
    for key in WHOLE:
        if key not in content:
            raise TersorError(f"{path}: key {key!r} is missing", "say how many nodes, and how many devices each has")
    return _build(str(path), content, load_hardware(device))


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TersorError(f"{path}: {error.strerror}", WAY_OUT) from error
    except ValueError as error:
        raise TersorError(f"{path}: not readable as TOML ({error})", "see toml.io for the syntax") from error


def _build(source: str, given: dict, hardware: Hardware) -> Cluster:
    """`given` are fields by name; what lacks comes from DEFAULTS of the device, then from Cluster."""
    values = DEFAULTS.get(hardware.name.split()[0].upper(), {}) | given
    for key, value in values.items():
        _check(source, key, value, values)
    if values.get("bandwidth") is not None:
        values["bandwidth"] = tuple(tuple(float(speed) for speed in row) for row in values["bandwidth"])
        if "network_gbps" not in given and len(values["bandwidth"]) > 1:
            values["network_gbps"] = max(_between_nodes(values["bandwidth"]))
    cluster = Cluster(hardware=hardware, **values)
    if cluster.devices > MOST_DEVICES:
        raise TersorError(f"{source}: {cluster.devices:,} devices", f"a cluster has at most {MOST_DEVICES:,}")
    fastest = max(hardware.link_gbps or 0.0, hardware.pcie_gbps or 0.0)
    speeds = [cluster.network_gbps] if "network_gbps" in given else []
    speeds += _between_nodes(cluster.bandwidth or ())
    if fastest and max(speeds, default=0.0) > fastest:
        raise TersorError(
            f"{source}: {max(speeds):g} GB/s between nodes is more than the {fastest:g} of a device inside its node",
            "network_gbps and bandwidth are gigabytes a second of one device: 400 Gb/s are 50",
        )
    return cluster


def _between_nodes(matrix: tuple[tuple[float, ...], ...]) -> list[float]:
    return [speed for i, row in enumerate(matrix) for j, speed in enumerate(row) if i != j]


WHOLE = ("nodes", "devices_per_node")
MAY_BE_ZERO = ("network_latency_seconds", "host_memory_bytes", "nvme_bytes", "nvme_gbps")


def _check(source: str, key: str, value: object, values: dict) -> None:
    def wrong(what: str) -> TersorError:
        return TersorError(f"{source}: {key} is {value!r}", f"it should be {what}")

    if key == "name":
        if not isinstance(value, str) or not value:
            raise wrong("text")
    elif key == "fabric":
        if value not in FABRICS:
            raise wrong(f"one of {', '.join(FABRICS)}")
    elif key == "bandwidth":
        _check_matrix(source, value, values["nodes"])
    elif key in WHOLE:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong("a whole number from 1 on")
    elif not _is_number(value) or value < 0 or (value == 0 and key not in MAY_BE_ZERO):
        raise wrong("a positive number")
    elif key == "usable_memory" and value > 1:
        raise wrong("a share, above 0 and at most 1")


def _check_matrix(source: str, matrix: object, nodes: object) -> None:
    if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
        raise TersorError(f"{source}: bandwidth is no matrix", "give a row a node, of gigabytes a second to each node")
    if len(matrix) != nodes or any(len(row) != nodes for row in matrix):
        shape = f"{len(matrix)} rows of {', '.join(sorted({str(len(row)) for row in matrix}))}"
        raise TersorError(f"{source}: bandwidth has {shape}, nodes is {nodes!r}", "give a row and a column a node")
    for i, row in enumerate(matrix):
        for j, speed in enumerate(row):
            if not _is_number(speed) or speed < 0 or (speed == 0 and i != j):
                raise TersorError(
                    f"{source}: bandwidth from node {i} to node {j} is {speed!r}", "it should be a positive number"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

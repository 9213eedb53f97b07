"""States on the host or a disk: what must be copied in a step, how fast, and how efficient that leaves the devices.

ZeRO-Offload (Ren et al. 2021) keeps gradients and optimizer states in host memory and updates there: 4 bytes a parameter
cross PCIe in a step. ZeRO-Infinity (Rajbhandari et al. 2021, sections 3 and 4) gives the efficiency
ait * bw / (ait * bw + peak) with the arithmetic intensity ait in FLOPs a byte: seq * batch for weights and gradients, a
fourth of that for optimizer states, 24 * hidden * (blocks between checkpoints) for activation checkpoints. Its bandwidths
are those of one device in what all devices read and write together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tersor.ops.plan_parallel.cost.conventions import Kept
from tersor.ops.plan_parallel.layout import Layout

TARGET = 0.9  # efficiency that required bandwidths are given for
HOST_UPDATE_GBPS = 25.0  # a device's share of its host's memory while Adam runs there: 8 channels DDR5 over 8 devices
FORWARDS_AND_BACKWARDS = 4  # of a step with recomputation, in forward passes: 2 * 4 FLOPs a parameter and token
KINDS = ("weights and gradients", "optimizer states", "activation checkpoints")


def efficiency(intensity: float, bandwidth: float, peak: float) -> float:
    """Share of its peak that a device reaches. `bandwidth` in bytes/s, `peak` in FLOP/s."""
    return intensity * bandwidth / (intensity * bandwidth + peak)


def required_bandwidth(intensity: float, peak: float, target: float = TARGET) -> float:
    """Bytes/s of a device that leave it `target` of its peak."""
    return target / (1 - target) * peak / intensity


def intensities(seq_len: int, batch: int, hidden: int, blocks_between: int = 1) -> dict[str, float]:
    """FLOPs a byte, by what is moved."""
    return {
        KINDS[0]: float(seq_len * batch),
        KINDS[1]: seq_len * batch / 4,
        KINDS[2]: 24.0 * hidden * blocks_between,
    }


@dataclass(frozen=True)
class Tier:
    """`required_gbps` is what each device would need for 90 % efficiency, `reached` the efficiency that it has."""

    name: str
    used_bytes: float
    capacity_bytes: float
    gbps: float
    required_gbps: float
    reached: float

    @property
    def obstacle(self) -> str:
        """Why it is infeasible, '' if it is not."""
        if self.used_bytes > self.capacity_bytes:
            return (
                f"{self.name} holds {self.capacity_bytes / 1e9:,.0f} GB a node, {self.used_bytes / 1e9:,.0f} are needed"
            )
        return ""


@dataclass(frozen=True)
class Offload:
    """What a plan that offloads needs. Byte counts are per node; `seconds` are of one step, not hidden."""

    tiers: tuple[Tier, ...]
    seconds: float
    moved_bytes: float

    @property
    def first_obstacle(self) -> str:
        return next((tier.obstacle for tier in self.tiers if tier.obstacle), "")


def plan_offload(
    layout: Layout,
    kept: Kept,
    updated: float,
    numbers: float,
    cluster,
    tokens: float,
    micro_batches: int,
    computing: float,
    peak: float,
) -> Offload:
    """Of the fullest rank. `updated`: numbers whose optimizer states are its own, after ZeRO; `numbers`: those it computes
    with. `tokens` are of one micro-batch on a rank, `computing` the seconds of a step that copies may hide behind."""
    ranks = min(cluster.devices_per_node, layout.world)
    states = updated * kept.optimizer
    crossing = updated * (kept.gradients + 2)  # gradients down, 16-bit weights up
    resident = states
    if layout.offload == "states":  # weights come up twice for every micro-batch, gradients go down once
        crossing = (
            numbers / max(1, layout.shard_ranks if layout.zero == 3 else 1) * (2 * 2 * micro_batches + kept.gradients)
        )
        resident += updated * (kept.weights + kept.gradients)
    host = max(cluster.host_gbps, 1e-9) * 1e9
    update = updated * (2 * kept.optimizer + kept.gradients + 2) / (HOST_UPDATE_GBPS * 1e9)
    weights_intensity, states_intensity, _ = intensities(round(tokens * micro_batches), 1, 1).values()
    intensity = weights_intensity if layout.offload == "states" else states_intensity
    seconds = max(0.0, crossing / host - computing) if layout.offload == "states" else crossing / host
    used = {"cpu": resident * ranks, "nvme": 0.0}
    tiers = []
    if layout.tier == "nvme":
        disk = max(cluster.nvme_gbps, 1e-9) * 1e9 / ranks
        used = {"cpu": 0.1 * resident * ranks, "nvme": resident * ranks}  # the host holds what is on its way
        seconds += 2 * states / disk
        need = required_bandwidth(states_intensity, peak)
        tiers.append(
            Tier(
                "nvme",
                used["nvme"],
                cluster.nvme_bytes,
                disk / 1e9,
                need / 1e9,
                efficiency(states_intensity, disk, peak),
            )
        )
    need = required_bandwidth(intensity, peak)
    tiers.insert(
        0,
        Tier(
            "host memory",
            used["cpu"],
            cluster.host_memory_bytes,
            host / 1e9,
            need / 1e9,
            efficiency(intensity, host, peak),
        ),
    )
    return Offload(tuple(tiers), seconds + update, crossing)


def swap_share(activation_bytes: float, compute_seconds: float, pcie_gbps: float, disk_gbps: float) -> float:
    """The share of a block's activations to swap to a disk that costs no time: the most that PCIe and disk move while the
    block computes, forward and backward (Fuyou: Liao et al. 2024, which minimises the longest of the three)."""
    slowest = min(pcie_gbps, disk_gbps) * 1e9
    if not activation_bytes:
        return 1.0
    return min(1.0, compute_seconds * slowest / activation_bytes)

"""How long operators take: the longer of their arithmetic at the reachable peak and their bytes at the reachable
bandwidth, plus what starting a kernel takes (Williams et al., "Roofline", CACM 2009; the efficiencies are the hardware's).
"""

from __future__ import annotations

from tersor.formats.hardware import Hardware
from tersor.ops.model.facts import Facts
from tersor.ops.model.operators import Linear, Operator, Pass

REDUCTIONS_PER_LAYER = 2  # of tensor parallelism: after attention and after the MLP


def reachable_flops(operator: Operator, hardware: Hardware) -> float:
    """FLOP/s of the device in the operator's precision; less where weights are unpacked on the way."""
    speed = hardware.flops(operator.precision)
    if isinstance(operator, Linear):
        widened = operator.precision in ("fp8", "int8") and not hardware.supports(operator.precision)
        if operator.unpacks or widened:
            speed *= hardware.dequantize_efficiency
        speed *= min(operator.speedup, hardware.sparse_speedup)
    return speed


def seconds_of(operator: Operator, run: Pass, hardware: Hardware, devices: int = 1) -> tuple[float, str]:
    """(time of one of them when `devices` share it evenly, what bounds it: compute, memory or launch)"""
    return bounded_seconds(operator.flops(run) / devices, operator.bytes(run) / devices, operator, hardware)


def bounded_seconds(flops: float, nbytes: float, operator: Operator, hardware: Hardware) -> tuple[float, str]:
    """The same for a device's own share of `operator`: FLOPs and bytes moved."""
    compute = flops / reachable_flops(operator, hardware)
    memory = nbytes / hardware.bytes_per_second
    work, floor = max(compute, memory), hardware.kernel_floor_seconds
    bound = "launch" if floor > work else "compute" if compute > memory else "memory"
    return work + floor, bound


def reduction_seconds(facts: Facts, run: Pass, hardware: Hardware, devices: int) -> float:
    """Time in which `devices` add up their shares of the hidden states, by a ring, after every half layer."""
    if devices == 1:
        return 0.0
    nbytes = 2 * (devices - 1) / devices * run.tokens * facts.hidden * 2
    link = (hardware.link_gbps or hardware.pcie_gbps or hardware.memory_gbps) * 1e9
    return REDUCTIONS_PER_LAYER * facts.layers * (nbytes / link + hardware.kernel_floor_seconds)


def total_seconds(facts: Facts, found: list[Operator], run: Pass, hardware: Hardware, devices: int = 1) -> float:
    work = sum(operator.count * seconds_of(operator, run, hardware, devices)[0] for operator in found)
    return work + reduction_seconds(facts, run, hardware, devices)

"""States on the host or a disk: ZeRO-Infinity's efficiencies, what is required, and the first thing that lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tersor.formats.cluster import load_cluster
from tersor.ops.plan_parallel.cost.conventions import kept
from tersor.ops.plan_parallel.cost.offload import (
    efficiency,
    intensities,
    plan_offload,
    required_bandwidth,
    swap_share,
)
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.request import Workload

PEAK = 70e12  # of a V100 in ZeRO-Infinity's figures


def test_published_efficiency_of_weights_over_70_gb_a_second():
    assert efficiency(intensities(1024, 1, 8192)["weights and gradients"], 70e9, PEAK) == pytest.approx(0.506, abs=5e-4)


def test_published_intensities():
    found = intensities(1024, 2, 8192)
    assert found["optimizer states"] == found["weights and gradients"] / 4 == 512
    assert found["activation checkpoints"] == 24 * 8192


def test_the_required_bandwidth_gives_the_target():
    for intensity in intensities(1024, 2, 8192).values():
        needed = required_bandwidth(intensity, PEAK, 0.9)
        assert efficiency(intensity, needed, PEAK) == pytest.approx(0.9)
    # "nearly 1.5 TB/s" for optimizer states at batch size 2 a device (ZeRO-Infinity, section 4.2)
    assert required_bandwidth(intensities(1024, 2, 8192)["optimizer states"], PEAK, 0.9) == pytest.approx(
        1.23e12, rel=0.01
    )


def offloaded(numbers: float, **choices):
    layout = Layout(dp=8, zero=3, offload=choices.pop("offload", "optimizer"), tier=choices.pop("tier", "cpu"))
    cluster = replace(load_cluster("8xh100"), **choices)
    keep = kept("paper", Workload())
    return plan_offload(layout, keep, numbers / 8, numbers, cluster, 4096.0, 4, 10.0, 600e12)


def test_zero_offload_moves_four_bytes_a_parameter():
    plan = offloaded(8e9)
    assert plan.moved_bytes == 4 * 1e9
    (host,) = plan.tiers
    assert host.used_bytes == pytest.approx(12 * 8e9)  # of all eight devices of the node
    assert plan.first_obstacle == ""


def test_states_offloaded_keep_weights_and_gradients_there_too():
    assert offloaded(8e9, offload="states").tiers[0].used_bytes == pytest.approx(16 * 8e9)


def test_the_first_tier_that_is_too_small_is_named():
    assert "host memory holds 10 GB a node, 96 are needed" in offloaded(8e9, host_memory_bytes=10e9).first_obstacle
    full = offloaded(8e9, tier="nvme", nvme_bytes=50e9)
    assert full.first_obstacle.startswith("nvme holds 50 GB")
    assert offloaded(8e9, tier="nvme").first_obstacle == ""


def test_a_slow_disk_takes_longer_than_host_memory():
    assert offloaded(8e9, tier="nvme", nvme_gbps=2.0).seconds > offloaded(8e9).seconds + 2 * 12e9 / 2e9


def test_the_share_to_swap_is_what_moves_while_a_block_computes():
    assert swap_share(10e9, 0.1, 64.0, 25.0) == pytest.approx(0.25)
    assert swap_share(1e9, 0.1, 64.0, 25.0) == 1.0

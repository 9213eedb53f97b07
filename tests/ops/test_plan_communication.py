"""Times of collectives: the published tables to the last digit, other devices scaled, measurements in their place."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.cluster import load_cluster
from tersor.formats.nccl_tests import Run
from tersor.ops.plan_parallel.communication.groups import AXES, node_groups
from tersor.ops.plan_parallel.communication.links import Curve, Links
from tersor.ops.plan_parallel.communication.tables import (
    COLLECTIVES,
    Fabric,
    microseconds,
    nvls_tree_part,
    ramp,
    ring_parts,
    tree_parts,
)
from tersor.ops.plan_parallel.layout import Layout, Mesh

H100 = Fabric("nvls", 8, 450.0, 50.0)
GB = 1 << 30

# NCCL 2.27.5 on H100 with NVSwitch, as published with autoparallel: (nodes, ranks per node) -> (microseconds, GB/s) in
# LL, LL128, Simple.
GATHER_RING = {
    (2, 1): ((11.6, 48.0), (22.5, 88.3), (22.4, 96.0)),
    (2, 2): ((11.3, 52.0), (21.8, 117.8), (29.2, 128.0)),
    (2, 8): ((23.3, 41.6), (44.6, 313.2), (70.0, 409.6)),
    (4, 4): ((26.7, 21.8), (48.8, 188.4), (91.2, 204.8)),
    (4, 8): ((42.7, 21.1), (79.2, 303.1), (145.6, 396.4)),
    (8, 1): ((41.6, 23.3), (73.5, 50.5), (106.4, 54.9)),
    (8, 8): ((81.5, 20.7), (148.4, 298.3), (296.8, 390.1)),
    (16, 8): ((159.1, 20.6), (286.8, 295.9), (599.2, 387.0)),
    (32, 1): ((161.6, 21.1), (277.5, 45.6), (442.4, 49.5)),
    (32, 8): ((314.3, 20.5), (563.6, 294.8), (1204.0, 385.5)),
}
REDUCE_RING = {
    (2, 8): ((40.0, 20.8), (75.2, 156.6), (131.6, 204.8)),
    (8, 4): ((92.4, 10.5), (161.2, 91.2), (367.6, 99.1)),
    (32, 1): ((316.6, 10.5), (541.0, 22.8), (876.4, 24.8)),
}
REDUCE_TREE = {
    (2, 1): ((16.8, 9.3), (31.0, 31.2), (36.4, 35.2)),
    (2, 2): ((18.0, 16.6), (33.5, 62.4), (44.4, 70.4)),
    (2, 8): ((25.2, 16.6), (48.5, 124.8), (92.4, 140.8)),
    (4, 1): ((26.8, 4.9), (48.0, 17.6), (64.4, 18.8)),
    (4, 4): ((30.4, 8.7), (55.5, 70.4), (88.4, 75.1)),
    (4, 8): ((35.2, 8.7), (65.5, 98.6), (120.4, 122.4)),
    (8, 8): ((45.2, 8.7), (82.5, 98.6), (148.4, 122.4)),
    (32, 8): ((65.2, 8.7), (116.5, 98.6), (204.4, 122.4)),
}
REDUCE_NVLS_TREE = {
    (2, 4): (53.0, 160.0),
    (2, 8): (53.0, 266.7),
    (4, 4): (81.0, 80.0),
    (4, 8): (81.0, 160.0),
    (8, 8): (109.0, 160.0),
    (32, 8): (165.0, 160.0),
}


def links(cluster="32x8xh100", **changes):
    return Links(replace(load_cluster(cluster), **changes))


def same(parts, table):
    for got, published in zip(parts, table, strict=True):
        assert got == pytest.approx(published, abs=0.051)  # they are printed with one decimal


@pytest.mark.parametrize("span", GATHER_RING)
def test_ring_gather_table(span):
    same(ring_parts(H100, "all_gather", span[1], span[0]), GATHER_RING[span])
    same(ring_parts(H100, "reduce_scatter", span[1], span[0]), GATHER_RING[span])


def test_reduce_tables():
    for (nodes, each), published in REDUCE_RING.items():
        same(ring_parts(H100, "all_reduce", each, nodes), published)
    for (nodes, each), published in REDUCE_TREE.items():
        same(tree_parts(H100, each, nodes), published)
    for (nodes, each), published in REDUCE_NVLS_TREE.items():
        same([nvls_tree_part(H100, each, nodes)], [published])


def test_one_node_table():
    published = {
        "all_gather": {2: (537, 8), 4: (434, 17), 8: (394, 30)},
        "reduce_scatter": {2: (537, 8), 4: (434, 17), 8: (394, 30)},
        "all_reduce": {2: (324, 10), 4: (236, 15), 8: (267, 31)},
        "all_to_all": {8: (380, 50)},
    }
    for collective, rows in published.items():
        for ranks, (speed, latency) in rows.items():
            expected = 1e-6 * (latency + GB / (1e3 * speed))
            assert links().seconds(collective, GB, ranks, 1) == pytest.approx(expected, rel=1e-12)


def test_large_messages_over_nodes():
    """Beyond the ramp: ring gathers at 0.87 of the table where they use whole nodes, at all of it otherwise."""
    assert links().seconds("all_gather", 8 * GB, 8, 4) == pytest.approx(145.6e-6 + 8 * GB / 0.87 / 396.39e9, rel=1e-4)
    assert links().seconds("all_gather", 8 * GB, 1, 8) == pytest.approx(106.4e-6 + 8 * GB / 54.857e9, rel=1e-4)
    assert links().seconds("all_reduce", 8 * GB, 8, 2) == pytest.approx(53e-6 + 8 * GB / 266.7e9, rel=1e-4)


def test_all_to_all_over_nodes():
    for nodes, latency, efficiency in ((2, 37, 0.78), (4, 42, 0.89), (8, 60, 0.945)):
        remote = 16 * GB * (nodes - 1) / nodes
        expected = 1e-6 * latency + remote / (50e9 * efficiency)
        assert links().seconds("all_to_all", 16 * GB, 8, nodes) == pytest.approx(expected, rel=1e-6)
    assert links().seconds("all_to_all", 64, 8, 32) == pytest.approx(290e-6, rel=1e-3)


def test_ramp_of_small_messages():
    shares = (0.01, 0.02, 0.03)
    assert [ramp(shares, size) for size in (0, 1, 64, 96, 128, 256, 1e9)] == pytest.approx(
        [0.01, 0.01, 0.01, 0.01 + 0.01 * math.log2(1.5), 0.02, 0.03, 0.03]
    )


def test_a_message_between_two_devices():
    inside, between = links().seconds("send", GB, 8, 1), links().seconds("send", GB, 1, 2)
    assert inside == pytest.approx(GB / 268.5e9, rel=0.01)  # half of what two ranks exchange in one NVSwitch
    assert between == pytest.approx(GB / 48e9, rel=0.01)
    assert links().seconds("send", GB, 4, 8) == between  # whoever else there is
    assert links().seconds("send", 1, 2, 1) == pytest.approx(7.2e-6, rel=1e-3)


def test_nothing_to_do_takes_no_time():
    for collective in COLLECTIVES:
        assert links().seconds(collective, 1e9, 1, 1) == 0.0
        assert links().seconds(collective, 0, 8, 4) == 0.0


def test_unknown_names():
    with pytest.raises(ValueError, match="gatherv"):
        links().seconds("gatherv", 1, 8, 1)
    with pytest.raises(ValueError, match="sp"):
        links().span(Layout(), "sp")


def test_measured_a100_with_nvlink():
    """Galvatron's tables for all-reduce and all-to-all of 8: large messages to a tenth, none twice off. It has no switches
    that add up."""
    a100 = links("1x8xa100")
    for megabytes, milliseconds in ((256, 2.36), (1024, 8.14)):
        assert 1e3 * a100.seconds("all_reduce", megabytes << 20, 8, 1) == pytest.approx(milliseconds, rel=0.12)
    assert 1e3 * a100.seconds("all_reduce", 64 << 20, 8, 1) == pytest.approx(0.652, rel=0.2)
    assert 1e3 * a100.seconds("all_to_all", 64 << 20, 8, 1) == pytest.approx(0.4, rel=0.05)


def test_other_devices_scale_with_their_links():
    fast, slow = links("4x8xh100"), links("4x8xh100", network_gbps=25.0)
    assert slow.seconds("all_gather", GB, 1, 4) == pytest.approx(2 * fast.seconds("all_gather", GB, 1, 4), rel=0.01)
    assert slow.seconds("all_gather", GB, 8, 1) == fast.seconds("all_gather", GB, 8, 1)
    late = links("4x8xh100", network_latency_seconds=25e-6)
    assert late.seconds("send", 1, 1, 2) == pytest.approx(fast.seconds("send", 1, 1, 2) + 20e-6)
    assert late.seconds("all_gather", 64, 1, 4) == pytest.approx(fast.seconds("all_gather", 64, 1, 4) + 60e-6)


def test_two_devices_of_a_mesh_have_one_wire():
    mesh, switch = links("8xmi300x"), links("8xmi300x", fabric="switch")
    assert mesh.seconds("all_gather", GB, 8, 1) == switch.seconds("all_gather", GB, 8, 1)
    assert mesh.seconds("all_gather", GB, 2, 1) == pytest.approx(7 * switch.seconds("all_gather", GB, 2, 1), rel=0.01)


def test_devices_that_add_up_in_the_switch_reduce_faster():
    with_switch, without = links("8xh100"), links("8xh100", fabric="switch")
    assert with_switch.seconds("all_reduce", GB, 8, 1) < 0.8 * without.seconds("all_reduce", GB, 8, 1)
    twice = 2 * without.seconds("all_gather", GB, 8, 1)  # a ring reduces and gathers
    assert without.seconds("all_reduce", GB, 8, 1) == pytest.approx(twice, rel=0.02)


device = st.sampled_from(["h100", "h200", "a100", "l40s", "mi300x"])


@settings(max_examples=60, deadline=None)
@given(
    device,
    st.sampled_from(COLLECTIVES),
    st.integers(1, 8),
    st.integers(1, 150),
    st.lists(st.floats(1, 1e12), min_size=2, max_size=6),
)
def test_more_bytes_never_take_less(device, collective, each, nodes, sizes):
    found = links(f"150x8x{device}")
    times = [found.seconds(collective, size, each, nodes) for size in sorted(sizes)]
    assert times == sorted(times)
    if each * nodes > 1:
        assert times[0] > 1e-6 and times[-1] > max(sizes) / 1e12


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(COLLECTIVES), st.integers(1, 8), st.sampled_from([1, 2, 3, 8, 40]), st.integers(6, 40))
def test_the_curve_is_the_table_at_powers_of_two(collective, each, nodes, power):
    if each * nodes == 1:
        return
    exact = 1e-6 * microseconds(H100, collective, float(1 << power), each, nodes)
    assert links().seconds(collective, 1 << power, each, nodes) == pytest.approx(exact, rel=0.02)
    assert links().seconds(collective, 1 << power, each, nodes) >= exact * (1 - 1e-12)


def test_curves():
    curve = Curve([64.0, 128.0, 256.0], [2.0, 1.0, 5.0])
    assert [curve(size) for size in (1, 64, 100, 128, 192, 256, 512)] == pytest.approx([2, 2, 2, 2, 3.5, 5, 11])


# Which ranks talk


def groups_of(layout, axis):
    """By the coordinates that Mesh gives, without the strides."""
    others = {"tp": "pp dp cp", "cp": "pp dp tp", "dp": "pp cp tp", "pp": "dp cp tp"} | {
        "ep": "pp edp etp",
        "etp": "pp edp ep",
        "edp": "pp ep etp",
        "shard": "pp tp",
        "replicate": "pp cp tp",
    }
    per_replica = layout.dp // layout.replicate
    found = {}
    for rank, place in enumerate(Mesh(layout).all):
        key = [getattr(place, name) for name in others[axis].split()]
        key += [place.dp // per_replica] if axis == "shard" else [place.dp % per_replica] if axis == "replicate" else []
        found.setdefault(tuple(key), []).append(rank)
    return list(found.values())


small = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=80, deadline=None)
@given(small, small, small, st.sampled_from([1, 2]), st.data())
def test_spans_are_those_of_the_mesh(tp, pp, dp, cp, data):
    inside = tp * dp * cp
    ep = data.draw(st.sampled_from([n for n in range(1, inside + 1) if inside % n == 0]))
    etp = data.draw(st.sampled_from([n for n in range(1, 5) if inside % (ep * n) == 0]))
    replicate = data.draw(st.sampled_from([n for n in range(1, dp + 1) if dp % n == 0]))
    layout = Layout(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, etp=etp, replicate=replicate)
    each = data.draw(st.sampled_from([1, 2, 4, 8]))
    found = links("1x8xh100", devices_per_node=each)
    for axis in AXES:
        nodes_of = [tuple(dict.fromkeys(rank // each for rank in group)) for group in groups_of(layout, axis)]
        assert set(node_groups(layout, axis, each)) == set(nodes_of)
        ranks, nodes = found.span(layout, axis)
        size = len(groups_of(layout, axis)[0])
        assert nodes == max(len(group) for group in nodes_of)
        assert ranks == max(1, size // nodes)


def test_spans_of_usual_layouts():
    found = links("16x8xh100")
    layout = Layout(tp=4, cp=2, dp=4, pp=4, ep=8, replicate=2)
    spans = {axis: found.span(layout, axis) for axis in AXES}
    assert spans == {
        "tp": (4, 1),
        "cp": (2, 1),
        "dp": (1, 4),
        "pp": (1, 4),
        "ep": (8, 1),
        "etp": (1, 1),
        "edp": (1, 4),
        "shard": (2, 2),
        "replicate": (1, 2),
    }


def test_uneven_groups_count_the_node_with_fewest():
    assert links("2x8xh100").span(Layout(tp=3, dp=5), "tp") == (1, 2)  # ranks 6, 7 and 8


# Measurements


def test_measurements_replace_the_table():
    cluster = load_cluster("4x8xh100")
    runs = [Run("all_reduce", 8, 1, ((1 << 20, 1e-3), (1 << 22, 2e-3), (1 << 30, 0.5)))]
    found, table = Links(cluster, runs), Links(cluster)
    assert found.seconds("all_reduce", 1 << 20, 8, 1) == 1e-3
    assert found.seconds("all_reduce", (1 << 20) + (3 << 19), 8, 1) == pytest.approx(1.5e-3)
    assert found.seconds("all_reduce", 1 << 30, 8, 1) == 0.5
    assert found.seconds("all_reduce", 1 << 34, 8, 1) == pytest.approx(8.0, rel=0.01)  # as fast as the last
    scaled = 1e-3 / table.seconds("all_reduce", 1 << 20, 8, 1)
    assert found.seconds("all_reduce", 1 << 12, 8, 1) == pytest.approx(
        scaled * table.seconds("all_reduce", 1 << 12, 8, 1)
    )
    assert found.calibrated == {("all_reduce", 8, 1)}
    for span in ((4, 1), (8, 2)):
        assert found.seconds("all_reduce", 1 << 30, *span) == table.seconds("all_reduce", 1 << 30, *span)


def test_a_measured_message_holds_for_any_pair():
    found = Links(
        load_cluster("4x8xh100"), [Run("send", 2, 2, ((1 << 20, 1.0),)), Run("send", 8, 1, ((1 << 20, 0.5),))]
    )
    assert found.seconds("send", 1 << 20, 1, 4) == found.seconds("send", 1 << 20, 8, 2) == 1.0
    assert found.seconds("send", 1 << 20, 4, 1) == 0.5


def test_repeated_and_disturbed_measurements():
    runs = [Run("all_gather", 8, 1, ((1024, t), (2048, 4.0))) for t in (1.0, 9.0, 2.0)]
    assert Links(load_cluster("8xh100"), runs).seconds("all_gather", 1024, 8, 1) == 2.0
    late = [Run("all_gather", 8, 1, ((1024, 5.0), (2048, 4.0)))]
    assert Links(load_cluster("8xh100"), late).seconds("all_gather", 1024, 8, 1) == 4.0


# Uneven links

MATRIX = ((0, 50, 10, 50), (50, 0, 50, 50), (50, 50, 0, 50), (50, 50, 50, 0))  # node 0 to node 2 is slow


def test_a_matrix_in_the_order_of_the_nodes():
    even, uneven = links("4x8xh100"), links("4x8xh100", bandwidth=MATRIX)
    assert uneven.seconds("all_gather", GB, 8, 2) == even.seconds("all_gather", GB, 8, 2)  # nodes 0 1, 2 3
    assert uneven.seconds("all_gather", GB, 8, 4) == even.seconds("all_gather", GB, 8, 4)  # a ring 0 1 2 3
    assert uneven.seconds("all_gather", GB, 8, 1) == even.seconds("all_gather", GB, 8, 1)


def test_a_matrix_in_another_order():
    layout, uneven = Layout(tp=8, dp=4), links("4x8xh100", bandwidth=MATRIX)
    slow = uneven.placed(layout, (0, 2, 1, 3))
    as_slow = links("4x8xh100", network_gbps=10.0)
    span = uneven.span(layout, "dp")
    assert slow.seconds("all_gather", GB, *span) == as_slow.seconds("all_gather", GB, *span)
    placed = uneven.placed(layout)
    assert placed.seconds("all_gather", GB, *span) == uneven.seconds("all_gather", GB, *span)
    even = links("4x8xh100")
    assert even.placed(layout, (0, 2, 1, 3)) is even


def test_a_pipeline_is_no_ring():
    layout, uneven = Layout(tp=8, pp=4), links("4x8xh100", bandwidth=MATRIX)
    span = uneven.span(layout, "pp")
    fast = links("4x8xh100").seconds("send", GB, *span)
    assert uneven.placed(layout, (0, 1, 3, 2)).seconds("send", GB, *span) == fast  # 2 to 0 would close a ring
    assert uneven.placed(layout, (1, 0, 2, 3)).seconds("send", GB, *span) > 4 * fast
    assert uneven.placed(layout, (1, 0, 2, 3)).seconds("send", GB, 1, 2) > 4 * fast  # asked as one pair
    assert uneven.seconds("send", GB, *span) == fast


def test_experts_talk_to_all_nodes():
    layout, uneven = Layout(tp=1, dp=32, ep=32), links("4x8xh100", bandwidth=MATRIX)
    placed = uneven.placed(layout)
    speed = 3 / (1 / 50 + 1 / 50 + 1 / 10)  # of node 0, which sends to each of the others in turn
    same = links("4x8xh100", network_gbps=speed)
    span = uneven.span(layout, "ep")
    assert placed.seconds("all_to_all", GB, *span) == pytest.approx(same.seconds("all_to_all", GB, *span))

"""Clusters: the short form, the file, and what is wrong with either, by name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.cluster import DEFAULTS, FABRICS, load_cluster
from tersor.formats.errors import TersorError
from tersor.formats.hardware import load_hardware, names, save_hardware

SMALLEST = 'nodes = 2\ndevices_per_node = 8\nhardware = "h100"\n'


def written(tmp_path, text, name="ours.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "nodes", "each", "device"),
    [
        ("4x8xh100", 4, 8, "h100"),
        ("8xh100", 1, 8, "h100"),
        ("h100", 1, 1, "h100"),
        ("3x2xMI300X", 3, 2, "mi300x"),
        ("2X4xa100", 2, 4, "a100"),
        ("1x16xh100", 1, 16, "h100"),
    ],
)
def test_short_forms(text, nodes, each, device):
    cluster = load_cluster(text)
    assert (cluster.nodes, cluster.devices_per_node, cluster.devices) == (nodes, each, nodes * each)
    assert cluster.hardware == load_hardware(device)
    assert cluster.name == text and cluster.bandwidth is None


@settings(max_examples=30, deadline=None)
@given(nodes=st.integers(1, 500), each=st.integers(1, 16), device=st.sampled_from(names()))
def test_every_product_of_counts(nodes, each, device):
    cluster = load_cluster(f"{nodes}x{each}x{device}")
    assert (cluster.nodes, cluster.devices_per_node) == (nodes, each)


def test_known_devices_have_sound_defaults():
    assert {load_hardware(name).name.split()[0].upper() for name in names()} == set(DEFAULTS)
    for name in names():
        cluster = load_cluster(f"2x8x{name}")
        assert cluster.fabric in FABRICS and cluster.network_gbps < cluster.link_gbps
        assert cluster.host_gbps < cluster.hardware.pcie_gbps
        assert 0.9 * cluster.hardware.memory_bytes < cluster.memory_bytes < cluster.hardware.memory_bytes
    assert load_cluster("h100").network_gbps == 50  # 400 Gb/s
    assert load_cluster("a100").network_gbps == 25


def test_a_hardware_file_in_the_short_form_and_alone(tmp_path, monkeypatch):
    mine = dataclasses.replace(load_hardware("a100"), name="A100 of ours", memory_bytes=40e9)
    save_hardware(mine, tmp_path / "mine.toml")
    cluster = load_cluster(f"4x8x{tmp_path / 'mine.toml'}")
    assert cluster.hardware == mine and cluster.nodes == 4
    assert cluster.network_gbps == DEFAULTS["A100"]["network_gbps"]  # its name says what it is
    assert load_cluster(tmp_path / "mine.toml").devices == 1
    save_hardware(dataclasses.replace(mine, name="something new"), tmp_path / "new.toml")
    monkeypatch.chdir(tmp_path)
    assert load_cluster("2x8xnew.toml").fabric == "switch"


def test_a_cluster_file(tmp_path):
    text = SMALLEST + 'name = "rack 7"\nnetwork_gbps = 12.5\nusable_memory = 0.9\nfabric = "mesh"\n'
    cluster = load_cluster(written(tmp_path, text + "network_latency_seconds = 2e-5\nnvme_bytes = 1e12\n"))
    assert cluster.name == "rack 7" and cluster.devices == 16 and cluster.hardware.name.startswith("H100")
    assert (cluster.network_gbps, cluster.fabric, cluster.network_latency_seconds) == (12.5, "mesh", 2e-5)
    assert cluster.memory_bytes == pytest.approx(72e9) and cluster.nvme_bytes == 1e12
    assert cluster.host_memory_bytes == DEFAULTS["H100"]["host_memory_bytes"]  # what it does not say
    assert load_cluster(written(tmp_path, SMALLEST)).name == "ours"


def test_hardware_next_to_the_cluster_file(tmp_path):
    (tmp_path / "deep").mkdir()
    save_hardware(load_hardware("l40s"), tmp_path / "deep" / "card.toml")
    path = written(tmp_path / "deep", SMALLEST.replace("h100", "card.toml"))
    assert load_cluster(path).hardware == load_hardware("l40s")


def test_a_bandwidth_matrix(tmp_path):
    text = SMALLEST.replace("nodes = 2\n", "") + "bandwidth = [[0, 40, 10], [50, 0, 20.5], [10, 20, 0]]\n"
    cluster = load_cluster(written(tmp_path, text))
    assert cluster.nodes == 3 and cluster.bandwidth == ((0, 40, 10), (50, 0, 20.5), (10, 20, 0))
    assert cluster.network_gbps == 50  # the fastest, where it is not said
    assert load_cluster(written(tmp_path, text + "network_gbps = 45\n")).network_gbps == 45


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("4x8xh300", "h300"),
        ("0x8xh100", "0 nodes"),
        ("4x-8xh100", "-8"),
        ("16xh100", "one node of 16"),
        ("", "not understood"),
        ("4x8x", "unknown device"),
        ("none.toml", "none.toml"),
        ("4x8xnone.toml", "none.toml"),
        ("999999x999999xh100", "devices"),
        ("99999999999999999999xh100", "unknown device"),
    ],
)
def test_wrong_short_forms(text, named):
    with pytest.raises(TersorError, match=named) as error:
        load_cluster(text)
    assert error.value.hint


def test_unknown_devices_are_told_the_known():
    with pytest.raises(TersorError) as error:
        load_cluster("2x8xh300")
    assert all(name in error.value.hint for name in names())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (SMALLEST + "network_gbit = 3\n", "network_gbit"),
        (SMALLEST.replace('hardware = "h100"', ""), "hardware"),
        (SMALLEST.replace('"h100"', "3"), "hardware"),
        (SMALLEST.replace("nodes = 2\n", ""), "nodes"),
        (SMALLEST.replace("devices_per_node = 8\n", ""), "devices_per_node"),
        (SMALLEST.replace("nodes = 2", "nodes = 2.5"), "nodes"),
        (SMALLEST.replace("nodes = 2", "nodes = 0"), "nodes"),
        (SMALLEST.replace("= 8", "= true"), "devices_per_node"),
        (SMALLEST + "network_gbps = 0\n", "network_gbps"),
        (SMALLEST + "network_gbps = nan\n", "network_gbps"),
        (SMALLEST + 'host_gbps = "fast"\n', "host_gbps"),
        (SMALLEST + "usable_memory = 1.1\n", "usable_memory"),
        (SMALLEST + 'fabric = "torus"\n', "torus"),
        (SMALLEST + 'name = ""\n', "name"),
        (SMALLEST + "bandwidth = 3\n", "bandwidth"),
        (SMALLEST + "bandwidth = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]\n", "bandwidth has 3 rows"),
        (SMALLEST + "bandwidth = [[0, 1], [1]]\n", "bandwidth has 2 rows"),
        (SMALLEST + "bandwidth = [[0, 0], [1, 0]]\n", "from node 0 to node 1"),
        (SMALLEST + "bandwidth = [[0, 4], [-1, 0]]\n", "from node 1 to node 0"),
        (SMALLEST + "network_latency_seconds = -1\n", "network_latency_seconds"),
        ("nodes = ", "TOML"),
    ],
)
def test_wrong_files_name_the_key(tmp_path, text, named):
    path = written(tmp_path, text)
    with pytest.raises(TersorError, match=named) as error:
        load_cluster(path)
    assert str(path) in str(error.value) and error.value.hint


def test_gigabits_given_for_gigabytes_are_noticed(tmp_path):
    for line in ("network_gbps = 800\n", "bandwidth = [[0, 800], [800, 0]]\n"):
        with pytest.raises(TersorError, match="800") as error:
            load_cluster(written(tmp_path, SMALLEST + line))
        assert "gigabytes" in error.value.hint


def test_a_cluster_file_takes_no_counts(tmp_path):
    with pytest.raises(TersorError, match="whole cluster"):
        load_cluster(f"2x{written(tmp_path, SMALLEST)}")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TersorError, match=r"folder\.toml"):
        load_cluster(tmp_path / "folder.toml")

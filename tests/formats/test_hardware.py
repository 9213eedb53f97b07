"""Hardware files: what ships is sound, what a user writes is checked, what is saved comes back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.hardware import PRECISIONS, Hardware, host_path, load_hardware, names, save_hardware

SMALLEST = 'name = "mine"\nmemory_bytes = 8e9\nmemory_gbps = 50\n[peak_flops]\nfp32 = 1e12\n'


def test_the_devices_of_the_issue_ship():
    assert set(names()) == {"h100", "h200", "a100", "l40s", "mi300x"}


@pytest.mark.parametrize("name", names())
def test_built_in_devices_are_dense_peaks(name):
    device = load_hardware(name.upper())
    assert (
        device.peak_flops["bf16"] == device.peak_flops["fp16"] > device.peak_flops["tf32"] > device.peak_flops["fp32"]
    )
    eight_bits = device.peak_flops["int8"] / device.peak_flops["bf16"]
    assert eight_bits == pytest.approx(2, rel=0.02)  # the same silicon, half the width; a sparse figure would say 4
    assert 30e9 < device.memory_bytes < 300e9 and device.dollars_per_hour > 0
    assert device.memory_gbps > (device.link_gbps or 0) >= device.pcie_gbps > 0


def test_numbers_of_the_h100_datasheet():
    device = load_hardware("h100")
    assert device.flops("bf16") == pytest.approx(0.7 * 989.4e12)
    assert device.bytes_per_second == pytest.approx(0.7 * 3.35e12)


def test_a_precision_that_is_missing_is_computed_in_the_next_wider():
    assert load_hardware("a100").computes_in("fp8") == "bf16"
    assert load_hardware("h100").computes_in("fp8") == "fp8"
    cpu = Hardware("cpu", {"fp32": 1e12}, 8e9, 50)
    assert [cpu.computes_in(precision) for precision in PRECISIONS] == ["fp32"] * len(PRECISIONS)
    turing = Hardware("t4", {"fp16": 65e12, "int8": 130e12}, 16e9, 300)
    assert turing.computes_in("bf16") == "fp16" and turing.computes_in("fp8") == "fp16"
    assert turing.computes_in("fp32") == "int8"  # nothing wider than what there is


def test_unknown_name_lists_the_known():
    with pytest.raises(TersorError, match="h300") as error:
        load_hardware("h300")
    assert all(name in error.value.hint for name in [*names(), "host"])


def test_host_before_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host_path() == tmp_path / "tersor" / "host.toml"
    with pytest.raises(TersorError) as error:
        load_hardware("host")
    assert "--measure" in error.value.hint
    measured = Hardware("this machine", {"fp32": 1.5e11, "bf16": 0.4e11}, 24e9, 21.4, memory_efficiency=1.0)
    save_hardware(measured, host_path())
    assert load_hardware("host") == measured


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (SMALLEST.replace("memory_gbps = 50\n", ""), "memory_gbps"),
        (SMALLEST.replace("memory_gbps", "memory_gbs"), "memory_gbs"),
        (SMALLEST.replace("50", '"fast"'), "memory_gbps"),
        (SMALLEST.replace("50", "0"), "memory_gbps"),
        (SMALLEST.replace("50", "nan"), "memory_gbps"),
        (SMALLEST.replace("8e9", "true"), "memory_bytes"),
        (SMALLEST.replace('"mine"', "3"), "name"),
        (SMALLEST.replace("fp32", "fp64"), "peak_flops"),
        (SMALLEST.replace("1e12", "-1.0"), "peak_flops"),
        ("compute_efficiency = 1.5\n" + SMALLEST, "compute_efficiency"),
        ("sparse_speedup = 0.5\n" + SMALLEST, "sparse_speedup"),
        (SMALLEST.replace("[peak_flops]\nfp32 = 1e12", "peak_flops = {}"), "peak_flops"),
        ("name = ", "TOML"),
    ],
)
def test_wrong_files_name_the_key(tmp_path, text, named):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TersorError, match=named) as error:
        load_hardware(path)
    assert str(path) in str(error.value) and error.value.hint


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path / "folder.toml"):
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        with pytest.raises(TersorError, match=path.name):
            load_hardware(path)


def test_the_smallest_file_is_enough(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALLEST)
    assert load_hardware(str(path)) == Hardware("mine", {"fp32": 1e12}, 8e9, 50)


positive = st.floats(1e-9, 1e18)


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    peaks=st.dictionaries(st.sampled_from(PRECISIONS), positive, min_size=1),
    numbers=st.lists(positive, min_size=3, max_size=3),
    dollars=st.none() | positive,
)
def test_save_and_load_give_the_same(tmp_path_factory, name, peaks, numbers, dollars):
    path = tmp_path_factory.mktemp("hardware") / "deep" / "mine.toml"
    notes = {name: "measured", "again": name + "\x7f\r\n"}
    device = Hardware(name, peaks, *numbers[:2], kernel_floor_seconds=numbers[2], dollars_per_hour=dollars, notes=notes)
    save_hardware(device, path)
    assert load_hardware(path) == device
    assert [file.name for file in path.parent.iterdir()] == ["mine.toml"]


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TersorError, match="file"):
        save_hardware(load_hardware("h100"), tmp_path / "file" / "mine.toml")


def test_a_device_is_not_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_hardware("h100").memory_gbps = 1

"""Choices that a user pins: what is read, what is refused and by which name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import OFFLOAD, RECOMPUTE, SCHEDULES, Layout
from tersor.ops.plan_parallel.search.pins import check_pins, load_pins, parse_pins


def pins_of(tmp_path, text: str):
    path = tmp_path / "pins.yaml"
    path.write_text(text)
    return load_pins(path)


def test_yaml(tmp_path):
    text = "tp: 8\npp: [4, 8]  # one of these\nrecompute: full\nzero: 0\nstages: [3, 4, 4, 3]\ndevices: 16\n"
    assert pins_of(tmp_path, text) == {
        "tp": (8,), "pp": (4, 8), "recompute": ("full",), "zero": (0,), "stages": ((3, 4, 4, 3),), "devices": (16,),
    }  # fmt: skip


def test_an_empty_file_pins_nothing(tmp_path):
    assert pins_of(tmp_path, "# all to the planner\n") == {}


def test_several_cuts(tmp_path):
    assert pins_of(tmp_path, "stages: [[3, 4], [4, 3]]") == {"stages": ((3, 4), (4, 3))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpp: 8", "'tpp' cannot be pinned"),
        ("nonsense: 8", "'nonsense' cannot be pinned"),
        ("1: 8", "1 cannot be pinned"),
        ("tp: 0", "tp is 0"),
        ("tp: -2", "tp is -2"),
        ("tp: true", "tp is True"),
        ("tp: 2.5", "tp is 2.5"),
        ("tp: eight", "tp is 'eight'"),
        ("tp: {a: 1}", "tp is {'a': 1}"),
        ("tp: []", "tp is an empty list"),
        ("tp: [2, [4]]", "tp is [4]"),
        ("tp:", "tp is None"),
        ("zero: 4", "zero is 4"),
        ("zero: true", "zero is True"),
        ("schedule: 2f2b", "schedule is '2f2b'"),
        ("recompute: [none, {}]", "recompute is {}"),
        ("offload: disk", "offload is 'disk'"),
        ("tier: gpu", "tier is 'gpu'"),
        ("stages: 8", "stages is 8"),
        ("stages: []", "stages is []"),
        ("stages: [4, -1]", "stages is [4, -1]"),
        ("stages: [4, four]", "stages is [4, 'four']"),
        ("- tp\n- pp", "holds a list"),
        ("tp: [", "not readable as YAML"),
        ("tp: 8\n  pp: 2", "not readable as YAML in line 2"),
        ("tp: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_refused(tmp_path, text, words):
    with pytest.raises(TersorError) as error:
        pins_of(tmp_path, text)
    assert words in str(error.value) and "pins.yaml" in str(error.value)
    assert error.value.__class__ is TersorError and error.value.args


def test_a_slip_is_corrected(tmp_path):
    with pytest.raises(TersorError) as error:
        pins_of(tmp_path, "micro_batches: 2")
    assert "did you mean micro_batch?" in error.value.hint


def test_missing_file_and_no_text(tmp_path):
    with pytest.raises(TersorError, match="no such file"):
        load_pins(tmp_path / "pins.yaml")
    (tmp_path / "pins.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TersorError, match=r"pins\.yaml"):
        load_pins(tmp_path / "pins.yaml")


def test_one_line():
    assert parse_pins("tp=8, pp=2,schedule=zbv,stages=20+20+20+20") == {
        "tp": (8,), "pp": (2,), "schedule": ("zbv",), "stages": ((20, 20, 20, 20),),
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", ",", "tp", "tp=", "=8", "tp=8,tp=4", "tp=x", "tp=²", "tp=8;pp=2", "stages=a+b", "tp=" + 5000 * "9"]
)
def test_one_line_refused(text):
    with pytest.raises(TersorError) as error:
        parse_pins(text)
    assert error.value.hint


@given(
    st.builds(
        Layout,
        tp=st.integers(1, 64),
        pp=st.just(4),
        dp=st.integers(1, 9),
        zero=st.integers(0, 3),
        micro_batch=st.integers(1, 9),
        schedule=st.sampled_from(SCHEDULES),
        stages=st.sampled_from([(), (1, 2, 3, 4)]),
        recompute=st.sampled_from(RECOMPUTE),
        offload=st.sampled_from(OFFLOAD),
        tier=st.sampled_from(["cpu", "nvme"]),
    )
)
def test_a_described_layout_is_read_back(layout):
    pins = parse_pins(layout.describe())
    assert Layout(**{name: value for name, (value,) in pins.items()}) == layout


def test_checked_pins_are_checked_again_to_the_same():
    pins = check_pins({"tp": [2, 4, 2], "stages": [1, 2], "schedule": "zbv"})
    assert pins == {"tp": (2, 4), "stages": ((1, 2),), "schedule": ("zbv",)}
    assert check_pins(pins) == pins

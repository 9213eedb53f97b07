"""PyTorch's snapshot pickles: converted as they are, and harmless whatever is in them."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.memory_snapshot import load_snapshot, read_plain_pickle

BASE = 0x7F0000000000


def entry(action: str, offset: int = 0, size: int = 512, **more: object) -> dict:
    return {"action": action, "addr": BASE + offset, "size": size, "stream": 0, "time_us": 17, **more}


def both(offset: int, size: int = 512) -> list[dict]:
    return [entry("free_requested", offset, size), entry("free_completed", offset, size)]


def block(offset: int, size: int, state: str = "active_allocated") -> dict:
    return {"address": BASE + offset, "size": size, "requested_size": size - 12, "state": state, "frames": []}


def segment(size: int, *blocks: dict, device: int = 0) -> dict:
    return {
        "device": device, "address": BASE, "total_size": size, "allocated_size": 0, "active_size": 0, "stream": 0,
        "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False, "blocks": list(blocks),
    }  # fmt: skip


def snapshot(entries: list[dict], *segments: dict, **more: object) -> dict:
    return {"segments": list(segments), "device_traces": [entries], "allocator_settings": {"a": 1.5}} | more


def read(tmp_path, content: object, protocol: int = 4):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return load_snapshot(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_events_become_lifetimes(tmp_path, protocol):
    frames = [
        {"filename": "/x/torch/nn/linear.py", "line": 3, "name": "forward"},
        {"filename": "/home/me/model.py", "line": 41, "name": "attend"},
    ]
    entries = [
        entry("segment_alloc", 0, 2 << 20),
        entry("alloc", 0, 1000, frames=frames),
        entry("alloc", 1024, 600),
        *both(0, 1000),
        entry("alloc", 0, 24),
        entry("snapshot", 0, 0),
    ]
    trace = read(tmp_path, snapshot(entries, segment(2 << 20)), protocol)
    assert [(b.bytes, b.start, b.end) for b in trace.blocks] == [(1000, 0, 2), (600, 1, 4), (24, 3, 4)]
    assert trace.blocks[0].label == "model.py:41 attend"
    assert trace.recorded_reserved_bytes == 2 << 20


def test_memory_from_before_the_recording_comes_first(tmp_path):
    """Alive to the end (from the segments), and freed while it was recorded."""
    entries = [entry("alloc", 4096, 512), *both(8192, 2000), *both(4096)]
    held = segment(1 << 20, block(0, 1024), block(1024, 512, "inactive"), block(2048, 512, "active_pending_free"))
    trace = read(tmp_path, snapshot(entries, held))
    assert [(b.bytes, b.start, b.end) for b in trace.blocks] == [
        (1012, 0, 6), (500, 1, 6), (2000, 2, 4), (512, 3, 5)
    ]  # fmt: skip
    assert trace.blocks[0].phase == "before the recording"


def test_blocks_without_an_address_lie_one_behind_the_other(tmp_path):
    """As old snapshots have them, and what torch.profiler records."""
    held = segment(1 << 20, block(0, 1024), block(0, 512, "inactive"), block(0, 2048))
    for one in held["blocks"]:
        del one["address"]
    trace = read(tmp_path, snapshot([*both(1536, 2036), entry("alloc", 1536, 7)], held))
    assert [(b.id, b.bytes, b.start, b.end) for b in trace.blocks] == [
        ("0x7f0000000000", 1012, 0, 4), ("0x7f0000000600", 2036, 1, 2), ("0x7f0000000600", 7, 3, 4)
    ]  # fmt: skip


def test_a_segment_that_was_given_back_was_there_before(tmp_path):
    entries = [*both(100), entry("segment_free", 0, 1 << 20), entry("alloc", 5 << 20)]
    trace = read(tmp_path, snapshot(entries, segment(0)))
    assert [(b.start, b.end) for b in trace.blocks] == [(0, 1), (2, 3)]
    assert trace.recorded_reserved_bytes == 1 << 20


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ([entry("alloc"), *both(1 << 30)], "event 2: 0x7f0040000000 is freed, but never allocated"),
        ([entry("alloc"), *both(0), *both(0)], "event 4: 0x7f0000000000 is freed twice"),
        ([entry("alloc"), entry("alloc")], "event 1: 0x7f0000000000 is allocated again"),
        ([entry("alloc", size=-1)], "event 0: 'size' is -1"),
        ([entry("alloc", size="many")], "event 0: 'size' is str"),
        ([{"action": "alloc", "size": 1}], "event 0: 'addr' is NoneType"),
        ([], "records no event"),
        (["alloc"], "an entry is str, not a dict"),
        ([entry("oom")], "holds no allocation"),
    ],
)
def test_impossible_events_are_named(tmp_path, entries, named):
    with pytest.raises(TersorError) as error:
        read(tmp_path, snapshot(entries, segment(1 << 20)))
    assert named in str(error.value)


def test_streams_and_pools_are_kept_apart(tmp_path):
    entries = [entry("alloc", 0), entry("alloc", 512, stream=9), entry("alloc", 1024, pool_id=(0, 1))]
    assert [b.stream for b in read(tmp_path, snapshot(entries, segment(4096))).blocks] == [0, 1, 2]


def test_the_device_with_the_most_events_is_taken(tmp_path):
    content = snapshot([entry("alloc")], segment(4096, device=1))
    content["device_traces"].append([entry("alloc", 0), entry("alloc", 512), entry("oom", 0, 99)])
    trace = read(tmp_path, content)
    assert len(trace.blocks) == 2
    assert "2 devices were recorded; this is device 1" in trace.notes[0]
    assert "ran out of memory at event 2, which asked for 99 bytes" in trace.notes[1]
    assert len(load_snapshot(tmp_path / "snapshot.pickle", 0).blocks) == 1
    with pytest.raises(TersorError, match="no device 2"):
        load_snapshot(tmp_path / "snapshot.pickle", 2)


@pytest.mark.parametrize("content", [None, [], {"segments": []}, {"segments": 1, "device_traces": 2}, "text", 7])
def test_other_pickles_are_not_snapshots(tmp_path, content):
    with pytest.raises(TersorError):
        read(tmp_path, content)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_never_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TersorError) as error:
        read(tmp_path, snapshot([Harmful()]), protocol)
    assert not (tmp_path / "harmed").exists()
    if protocol >= 2:
        assert "posix.system" in str(error.value)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x80\x04cos\nsystem\n.", "os.system"),
        (b"\x80\x04(ios\nsystem\n.", "os.system"),
        (b"\x80\x04]]R.", "REDUCE"),
        (b"\x80\x04]}b.", "BUILD"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        (b"\x80\x04B\xff\xff\xff\xff.", "BINBYTES"),
        (b"\x80\x04" + b"(" * 1000, "nest deeper than 100"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f.", "cut short"),
        (b"\x80\x04\x8b\xff\xff\xff\xff.", "cut short"),
        (b"\x80\x04\x8a\x14" + b"1" * 20 + b".", "a number of 20 bytes"),
        (b"\x80\x04X\xff\xff\xff\xff.", "cut short"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".", "cut short"),
        (b"\x80\x04]h\x05.", "KeyError"),
        (b"\x80\x04}](u.", "sets items of no dict"),
        (b"\x80\x04})Ns.", "a key is tuple"),
        (b"\x80\x09N.", "protocol 9"),
        (b"\x80\x04N", "no end"),
        (b"\x80", "damaged"),
        (b"", "no end"),
    ],
)
def test_hostile_opcodes_are_named(data, named):
    with pytest.raises(TersorError) as error:
        read_plain_pickle(data)
    assert named in str(error.value)


def test_a_large_memo_index_takes_no_memory():
    """The C unpickler would make room for two thousand million entries."""
    assert read_plain_pickle(b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7f.") == []


def test_one_list_named_many_times_is_an_error(tmp_path):
    """A few kilobytes that would be walked as ten million blocks."""
    inner = [block(0, 512)] * 4000
    content = snapshot([entry("alloc")], *([segment(4096) | {"blocks": inner}] * 4000))
    with pytest.raises(TersorError, match="over and over"):
        read(tmp_path, content)


def test_a_list_inside_itself_is_an_error(tmp_path):
    trace: list = []
    trace.append(trace)
    with pytest.raises(TersorError):
        read(tmp_path, {"segments": trace, "device_traces": trace})


def test_deep_nests_do_not_overflow():
    depth = 200_000
    deep = read_plain_pickle(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert len(deep) == 1
    tuples = read_plain_pickle(b"\x80\x02)" + b"\x85" * depth + b".")
    assert len(tuples) == 1


def plain():
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text()
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.lists(inner).map(tuple)
        ),
        max_leaves=30,
    )


@settings(deadline=None, max_examples=150)
@given(plain(), st.integers(2, 5))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert read_plain_pickle(data) == value
    assert read_plain_pickle(pickletools.optimize(data)) == value


SOUND = pickle.dumps(snapshot([entry("alloc"), entry("alloc", 512), *both(0)], segment(4096, block(2048, 512))), 4)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200).map(lambda body: b"\x80\x04" + body) | st.binary(max_size=100))
def test_any_bytes_give_an_error_or_a_trace(tmp_path_factory, body):
    path = tmp_path_factory.getbasetemp() / "any.pickle"
    path.write_bytes(body)
    try:
        load_snapshot(path)
    except TersorError as error:
        assert error.hint


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(SOUND)))
def test_damaged_snapshots_give_an_error_or_a_trace(tmp_path_factory, changes, length):
    damaged = bytearray(SOUND)
    for at, value in changes:
        damaged[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pickle"
    path.write_bytes(bytes(damaged[: length or None]))
    try:
        assert load_snapshot(path).events >= 1
    except TersorError as error:
        assert error.hint

"""The memory plan as a whole: numbers that agree with each other, advice, page, plan file."""

from __future__ import annotations

import json
import pickle

import pytest
from tersor.formats.errors import TersorError
from tersor.formats.memory_trace import TraceBuilder, trace_content
from tersor.formats.page import Notes, Plot, Table
from tersor.ops.profile.memory.page import sections
from tersor.ops.profile.memory.run import PLAN_FILE, PLAN_SCHEMA, load, memory_plan, write_plan
from tersor.ops.profile.memory.synthesize import Experts, synthetic_trace

MIB = 1 << 20


def growing() -> TraceBuilder:
    """Tensors that grow from step to step: a segment each for the cache, one for what can expand."""
    builder = TraceBuilder("growing")
    for index in range(12):
        builder.alloc(str(index), (40 + 4 * index) * MIB, label=f"layer {index} output")
        builder.free(str(index))
    return builder


def interlocked() -> TraceBuilder:
    """Every second of many tensors is freed, then come larger ones: only a plan does without the holes."""
    builder = TraceBuilder("interlocked")
    for index in range(40):
        builder.alloc(f"a{index}", 40 * MIB)
    for index in range(0, 40, 2):
        builder.free(f"a{index}")
    for index in range(12):
        builder.alloc(f"b{index}", 60 * MIB)
    return builder


def full() -> TraceBuilder:
    builder = TraceBuilder("full")
    for index in range(10):
        builder.alloc(str(index), 100 * MIB)
    return builder


@pytest.mark.parametrize(
    ("made", "action"), [(growing, "expandable_segments"), (interlocked, "plan"), (full, "nothing")]
)
def test_advice(made, action):
    data, _ = memory_plan(made().finish())
    assert data["advice"]["action"] == action
    text = data["advice"]["text"]
    assert ("PYTORCH_ALLOC_CONF=expandable_segments:True" in text) is (action == "expandable_segments")
    assert (PLAN_FILE in text) is (action == "plan")
    assert text.startswith("Nothing to do") is (action == "nothing")


@pytest.mark.parametrize(
    ("made", "mib", "action"),
    [
        (growing, 83, "reduce"),
        (growing, 90, "plan"),  # the last tensor has 84, which is no multiple of a page of 20
        (growing, 120, "expandable_segments"),
        (interlocked, 1700, "plan"),
        (full, 999, "reduce"),
        (full, 1000, "nothing"),
    ],
)
def test_advice_for_a_device(made, mib, action):
    data, _ = memory_plan(made().finish(), mib * MIB)
    assert data["advice"]["action"] == action
    assert "As it is, it fits" not in data["advice"]["text"]
    roomy, _ = memory_plan(made().finish(), 100_000 * MIB)
    assert ("As it is, it fits into the 105 GB" in roomy["advice"]["text"]) is (roomy["advice"]["action"] != "nothing")


def test_a_trace_smaller_than_a_segment_needs_nothing():
    builder = TraceBuilder()
    builder.alloc("a", 3 * MIB)
    data, _ = memory_plan(builder.finish())
    assert data["caching"]["utilisation"] < 0.2
    assert data["advice"]["action"] == "nothing"


def test_a_trace_of_nothing_but_empty_tensors():
    builder = TraceBuilder()
    builder.alloc("a", 0)
    builder.free("a")
    data, packing = memory_plan(builder.finish(), 10)
    assert (data["live_peak_bytes"], packing.offsets, data["advice"]["action"]) == (0, [0], "nothing")
    assert sections(data)[0].items


def test_numbers_agree():
    trace = synthetic_trace(
        [8 * MIB, 4 * MIB, 21 * MIB],
        [2 * MIB],
        6,
        weights=[30 * MIB],
        micro_batches=4,
        stages=2,
        experts=Experts(4, 9 * MIB),
    )
    data, packing = memory_plan(trace)
    assert data["live_peak_bytes"] == data["lower_bound_bytes"] <= packing.peak_bytes == data["plan"]["peak_bytes"]
    for key in ("caching", "expandable"):
        assert data[key]["reserved_peak_bytes"] >= data["live_peak_bytes"]
        assert data[key]["utilisation"] == pytest.approx(1 - data[key]["fragmentation"])
    timeline = data["timeline"]
    assert max(timeline["live_bytes"]) == data["live_peak_bytes"]
    assert max(timeline["caching_bytes"]) == data["caching"]["reserved_peak_bytes"]
    assert len(timeline["event"]) == len(timeline["live_bytes"]) <= 400
    assert sum(one["bytes"] for one in data["top_at_peak"]) <= data["live_peak_bytes"]
    assert any(one["label"] == "weight" and one["tensors"] == 3 for one in data["top_at_peak"])
    assert 0 < data["dynamic_share_at_peak"] < 1
    assert data["plan"]["static_then_dynamic_bytes"] >= data["lower_bound_bytes"]
    assert any(row[0] == "the same, dynamic sizes as they come" for row in sections(data)[0].items[0].rows)
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize(("gib", "warns"), [(None, ""), (64, ""), (1.05, "emptying its cache"), (0.5, "")])
def test_capacity(gib, warns):
    builder = TraceBuilder()
    builder.alloc("a", 600 * MIB)
    builder.free("a")
    builder.alloc("b", 700 * MIB)
    data, _ = memory_plan(builder.finish(), None if gib is None else int(gib * 2**30))
    texts = [text for item in sections(data)[0].items if isinstance(item, Notes) and item.warn for text in item.lines]
    assert any(warns in text for text in texts) if warns else not texts


def test_running_out_of_memory_is_a_warning():
    """Every second tensor of each segment stays, so that no segment can be given back."""
    builder = TraceBuilder()
    for index in range(400):
        builder.alloc(f"a{index}", 5 * MIB)
    for index in range(0, 400, 2):
        builder.free(f"a{index}")
    for index in range(12):
        builder.alloc(f"b{index}", 60 * MIB)
    data, _ = memory_plan(builder.finish(), 2100 * MIB)
    assert not data["caching"]["fits"]
    assert data["caching"]["out_of_memory_event"] == 601
    lines = sections(data)[0].items[0].lines
    assert any("runs out of 2.2 GB at event 601" in line for line in lines)


def test_page():
    trace = synthetic_trace([8 * MIB, 21 * MIB], [], 4, weights=[30 * MIB], micro_batches=2)
    trace.notes.append("a note")
    trace.recorded_reserved_bytes = 10**9
    data, _ = memory_plan(trace)
    (section,) = sections(json.loads(json.dumps(data)))
    tables = [item for item in section.items if isinstance(item, Table)]
    plots = [item for item in section.items if isinstance(item, Plot)]
    assert section.lead == data["advice"]["text"]
    assert [row[0] for row in tables[0].rows][-1] == "reserved in the recording"
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert tables[0].columns[-1] == "fragmentation"
    assert plots[0].steps
    assert plots[0].unit_y == "size"
    assert set(plots[0].curves) == {"alive", "reserved, caching allocator", "reserved, expandable segments"}
    assert section.items[-1] == Notes(["a note"])


def test_plan_file(tmp_path):
    trace = synthetic_trace([8 * MIB, 21 * MIB], [], 3)
    _, packing = memory_plan(trace)
    write_plan(tmp_path / PLAN_FILE, trace, packing)
    content = json.loads((tmp_path / PLAN_FILE).read_text())
    assert content["schema"] == PLAN_SCHEMA
    assert content["bytes"] == packing.peak_bytes
    assert [row[0] for row in content["placements"]] == [block.start for block in trace.blocks]
    assert [row[2:] for row in content["placements"]] == [
        [offset, block.bytes] for block, offset in zip(trace.blocks, packing.offsets, strict=True)
    ]


def test_files_are_told_apart(tmp_path):
    trace = growing().finish()
    (tmp_path / "trace.json").write_text("\n " + json.dumps(trace_content(trace)))
    assert load(tmp_path / "trace.json") == trace
    entries = [{"action": "alloc", "addr": 4096, "size": 100, "stream": 0}]
    (tmp_path / "snapshot.pickle").write_bytes(pickle.dumps({"segments": [], "device_traces": [entries]}))
    assert load(tmp_path / "snapshot.pickle").blocks[0].id == "0x1000"


@pytest.mark.parametrize("content", [b"", b"(lp0\n.", b"\x1f\x8b", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TersorError, match="neither JSON nor a memory snapshot"):
        load(tmp_path / "file")
    with pytest.raises(TersorError, match="not readable"):
        load(tmp_path / "absent")


def test_a_real_training_run(tmp_path):
    """What torch.profiler records of a few steps on the CPU, as PyTorch itself writes it in the form of a snapshot."""
    torch = pytest.importorskip("torch")
    viz = pytest.importorskip("torch.cuda._memory_viz")
    if not hasattr(viz, "_profile_to_snapshot"):
        pytest.skip("this PyTorch does not write profiles as snapshots")
    layers = [torch.nn.Linear(64, 64) if index % 2 else torch.nn.GELU() for index in range(8)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.profiler.profile(profile_memory=True, record_shapes=True, with_stack=True) as recorded:
        for rows in (32, 96, 64):
            model(torch.ones(rows, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (tmp_path / "steps.pickle").write_bytes(pickle.dumps(viz._profile_to_snapshot(recorded)))
    trace = load(tmp_path / "steps.pickle")
    data, packing = memory_plan(trace)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert data["live_peak_bytes"] > 3 * weights  # weights and two states of Adam
    assert data["lower_bound_bytes"] <= packing.peak_bytes <= 1.05 * data["lower_bound_bytes"]
    assert {"parameter", "optimizer_state"} <= {one["label"] for one in data["top_at_peak"]}
    assert data["recorded_reserved_bytes"] is None


def test_no_torch_is_needed():
    import subprocess
    import sys

    code = (
        "import sys, tersor.ops.profile.memory.run, tersor.ops.profile.memory.page; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)

"""Our trace format: read strictly, written back the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.memory_trace import LARGEST, SCHEMA, TraceBuilder, load_trace, parse_trace, trace_content


def content(*events: dict) -> dict:
    return {"schema": SCHEMA, "events": list(events)}


def alloc(id: object, nbytes: object = 512, **more: object) -> dict:
    return {"action": "alloc", "id": id, "bytes": nbytes, **more}


def free(id: object, **more: object) -> dict:
    return {"action": "free", "id": id, **more}


def test_lifetimes_are_event_numbers():
    trace = parse_trace(
        content(alloc("a", 100), alloc("b", 7, stream=3, label="x", phase="f"), free("a"), alloc("a", 1))
    )
    assert [(b.id, b.bytes, b.start, b.end) for b in trace.blocks] == [("a", 100, 0, 2), ("b", 7, 1, 4), ("a", 1, 3, 4)]
    assert (trace.events, trace.blocks[1].stream, trace.blocks[1].label, trace.blocks[1].phase) == (4, 3, "x", "f")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (content(alloc("a"), free("b")), "event 1: 'b' is freed but not allocated"),
        (content(alloc("a"), free("a"), free("a")), "event 2: 'a' is freed but not"),
        (content(alloc("a"), alloc("a")), "event 1: 'a' is allocated again"),
        (content(alloc("a", -1)), "event 0: 'a' has -1 bytes"),
        (content(alloc("a", LARGEST + 1)), "event 0: 'a' has"),
        (content(*[alloc(index, LARGEST) for index in range(2049)]), "event 2048: '2048' brings the sum"),
        (content(alloc("a", 1.5)), "'bytes' is not a whole number"),
        (content(alloc("a", True)), "'bytes' is not a whole number"),
        (content(alloc("a"), alloc("b", None)), "event 1: 'b': 'bytes'"),
        (content(alloc("a", stream="x")), "'stream' is not a whole number"),
        (content(alloc("a", label=1)), "'label' is not text"),
        (content(alloc("a", dynamic=1)), "'dynamic' is not true or false"),
        (content(alloc("a", colour="red")), "event 0: 'a': key 'colour' is not known"),
        (content(alloc("a"), free("a", bytes=512)), "event 1: 'a': key 'bytes' is not known for free"),
        (content({"action": "move", "id": "a"}), "action 'move'"),
        (content({"id": "a"}), "has no action"),
        (content(alloc(None)), "event 0: has no id"),
        (content(alloc("a"), "free a"), "event 1: is not an object"),
        ({"schema": SCHEMA, "events": {}}, "'events' is not a list"),
        ({"schema": SCHEMA, "events": [], "extra": 1}, "key 'extra' is not known"),
        ({"schema": "tersor.trace/2", "events": []}, f"is not a {SCHEMA}"),
        ([], f"is not a {SCHEMA}"),
        (content(), "holds no allocation"),
    ],
)
def test_what_cannot_have_happened_is_named(bad, named):
    with pytest.raises(TersorError) as error:
        parse_trace(bad)
    assert named in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, '{"schema": 1', "\xff\xfe"])
def test_not_json(tmp_path, text):
    path = tmp_path / "trace.json"
    path.write_text(text, "latin-1")
    with pytest.raises(TersorError, match=r"trace\.json"):
        load_trace(path)


def test_missing_file(tmp_path):
    with pytest.raises(TersorError, match="not readable"):
        load_trace(tmp_path / "absent.json")


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_written_and_read_back(data):
    builder, alive = TraceBuilder("t"), []
    for index in range(data.draw(st.integers(1, 20))):
        if alive and data.draw(st.booleans()):
            builder.free(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        else:
            id = f"id {index}"
            builder.alloc(id, data.draw(st.integers(0, LARGEST)), data.draw(st.integers(0, 2)), "l" * (index % 2))
            alive.append(id)
    trace = builder.finish()
    again = parse_trace(json.loads(json.dumps(trace_content(trace))))
    assert again == trace

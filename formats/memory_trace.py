"""Allocation traces: which memory was taken and given back, in what order (schema `tersor.trace/1`).

    {"schema": "tersor.trace/1", "name": "step of a 7B model", "events": [
      {"action": "alloc", "id": "w0", "bytes": 33554432},
      {"action": "alloc", "id": "a0", "bytes": 4096, "stream": 7, "label": "gelu", "phase": "forward 0", "dynamic": true},
      {"action": "free", "id": "a0"}]}

Events stand in the order in which they happened. An id may be used again once it was freed, as addresses are; what is
never freed stays to the end. `stream`, `label`, `phase` and `dynamic` (a size that the data decides, such as the tokens
that an expert got) are optional. `bytes` are as requested, before any rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.formats.errors import TersorError

SCHEMA = "tersor.trace/1"
KEYS = {"schema", "name", "events"}
EVENT_KEYS = {"alloc": {"action", "id", "bytes", "stream", "label", "phase", "dynamic"}, "free": {"action", "id"}}
LARGEST = 1 << 50  # bytes of one allocation
LARGEST_TOTAL = 1 << 61  # of all of them, with their rounding: sums stay within 63 bits
MOST_EVENTS = 10_000_000
WAY_OUT = "a trace lists alloc and free events in time order, see tersor.formats.memory_trace"


@dataclass(slots=True)
class Block:
    """Memory from its allocation to its release, both given as event numbers: alive in `[start, end)`."""

    id: str
    bytes: int
    start: int
    end: int
    stream: int = 0
    label: str = ""
    phase: str = ""
    dynamic: bool = False


@dataclass
class Trace:
    """`blocks` in the order of their allocation; one that is never freed ends at `events`, the number of events.

    `recorded_reserved_bytes` is the most that the recorded process had reserved, where the recording tells.
    """

    blocks: list[Block]
    events: int
    name: str = ""
    notes: list[str] = field(default_factory=list)
    recorded_reserved_bytes: int | None = None


class TraceBuilder:
    """Turns events into a Trace. Raises TersorError for an event that cannot have happened, by its number and id."""

    def __init__(self, name: str = "", source: str = "trace"):
        self.trace = Trace([], 0, name)
        self._source, self._alive, self._total = source, {}, 0

    def alloc(self, id: str, nbytes: int, stream: int = 0, label: str = "", phase: str = "", dynamic: bool = False):
        if id in self._alive:
            self.fail(f"{id!r} is allocated again while it is alive (since event {self._alive[id].start})")
        if not 0 <= nbytes <= LARGEST:
            self.fail(f"{id!r} has {nbytes} bytes; a size is 0 to {LARGEST}")
        self._total += nbytes
        if self._total > LARGEST_TOTAL:
            self.fail(f"{id!r} brings the sum of all allocations above {LARGEST_TOTAL} bytes")
        if self.trace.events >= MOST_EVENTS:
            self.fail(f"more than {MOST_EVENTS} events", "record fewer steps")
        block = Block(id, nbytes, self.trace.events, -1, stream, label, phase, dynamic)
        self._alive[id] = block
        self.trace.blocks.append(block)
        self.trace.events += 1

    def free(self, id: str) -> None:
        block = self._alive.pop(id, None)
        if block is None:
            self.fail(f"{id!r} is freed but not allocated (unmatched free)")
        block.end = self.trace.events
        self.trace.events += 1

    def finish(self) -> Trace:
        """What is still alive lasts to the end."""
        for block in self._alive.values():
            block.end = self.trace.events
        if not self.trace.blocks:
            raise TersorError(f"{self._source}: holds no allocation", WAY_OUT)
        return self.trace

    def fail(self, problem: str, way_out: str = WAY_OUT):
        raise TersorError(f"{self._source}: event {self.trace.events}: {problem}", way_out)


def load_trace(path: Path) -> Trace:
    """Raises TersorError when the file is not a sound `tersor.trace/1`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TersorError(f"{path}: not readable as JSON ({str(error)[:200]})", WAY_OUT) from error
    return parse_trace(content, str(path))


def parse_trace(content: Any, source: str = "trace") -> Trace:
    """The trace in parsed JSON. Raises TersorError naming the event number and its id."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise TersorError(f"{source}: is not a {SCHEMA}", WAY_OUT)
    if unknown := sorted(content.keys() - KEYS):
        raise TersorError(f"{source}: key {unknown[0]!r} is not known", f"the keys are {', '.join(sorted(KEYS))}")
    events, name = content.get("events"), content.get("name", "")
    if not isinstance(events, list):
        raise TersorError(f"{source}: 'events' is not a list", WAY_OUT)
    if not isinstance(name, str):
        raise TersorError(f"{source}: 'name' is not text", WAY_OUT)
    builder = TraceBuilder(name, source)
    for event in events:
        _add(builder, event)
    return builder.finish()


def _add(builder: TraceBuilder, event: Any) -> None:
    if not isinstance(event, dict):
        builder.fail("is not an object")
    action, id = event.get("action"), event.get("id")
    known = EVENT_KEYS.get(action) if isinstance(action, str) else None
    if known is None:
        builder.fail(
            f"action {action[:40]!r} is neither alloc nor free" if isinstance(action, str) else "has no action"
        )
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        builder.fail("has no id (text or a whole number)")
    if unknown := sorted(event.keys() - known):
        builder.fail(f"{id!r}: key {unknown[0]!r} is not known for {action}")
    if action == "free":
        builder.free(str(id))
        return
    nbytes, stream = event.get("bytes"), event.get("stream", 0)
    for key, value in (("bytes", nbytes), ("stream", stream)):
        if isinstance(value, bool) or not isinstance(value, int):
            builder.fail(f"{id!r}: {key!r} is not a whole number")
    label, phase, dynamic = event.get("label", ""), event.get("phase", ""), event.get("dynamic", False)
    for key, value, kind in (("label", label, str), ("phase", phase, str), ("dynamic", dynamic, bool)):
        if not isinstance(value, kind):
            builder.fail(f"{id!r}: {key!r} is not {'text' if kind is str else 'true or false'}")
    builder.alloc(str(id), nbytes, stream, label, phase, dynamic)


def trace_content(trace: Trace) -> dict:
    """`trace` as JSON-ready content, which `parse_trace` reads back."""
    events: list[dict | None] = [None] * trace.events
    for block in trace.blocks:
        optional = {"stream": block.stream, "label": block.label, "phase": block.phase, "dynamic": block.dynamic}
        event = {"action": "alloc", "id": block.id, "bytes": block.bytes}
        events[block.start] = event | {key: value for key, value in optional.items() if value}
        if block.end < trace.events:
            events[block.end] = {"action": "free", "id": block.id}
    return {"schema": SCHEMA, "name": trace.name, "events": events}

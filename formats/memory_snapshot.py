"""PyTorch's memory snapshots (`torch.cuda.memory._dump_snapshot`, `_snapshot`) as allocation traces.

A snapshot is a pickle of lists, dicts, text and numbers. It is read here by an interpreter of just those opcodes: there
is no opcode that imports, calls or builds anything, numbers and depth are bounded, and an opcode outside the list is an
error that says what the file wanted. Schema: torch/cuda/memory.py `_snapshot`, torch/csrc/cuda/memory_snapshot.cpp.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

from tersor.formats.errors import TersorError
from tersor.formats.memory_trace import LARGEST, Trace, TraceBuilder

MOST_BYTES = 4 << 30
DEEPEST = 100  # containers that are open at once
LONGEST_NUMBER = 16  # bytes
FRAMES_LOOKED_AT = 64
WAY_OUT = (
    "record one with torch.cuda.memory._record_memory_history() and torch.cuda.memory._dump_snapshot(FILE), and load "
    "it as it came"
)


def load_snapshot(path: Path, device: int | None = None) -> Trace:
    """The trace of one device, without `device` of the one with the most events.

    Memory that was allocated before the recording comes first: what the `segments` hold at the end, or what is freed in
    the recording from a segment that is known. Raises TersorError for anything that is not such a snapshot.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TersorError(
                f"{path}: {path.stat().st_size} bytes is more than the {MOST_BYTES} that a snapshot may have",
                "record less: torch.cuda.memory._record_memory_history(max_entries=100000)",
            )
        data = path.read_bytes()
    except OSError as error:
        raise TersorError(f"{path}: not readable ({error})", WAY_OUT) from error
    return _Snapshot(read_plain_pickle(data, str(path)), len(data), str(path)).trace(device)


def read_plain_pickle(data: bytes, source: str = "pickle") -> Any:
    """The lists, tuples, dicts with text keys, text, numbers, True, False and None in a pickle; TersorError otherwise."""
    try:
        return _interpret(data, source)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise TersorError(f"{source}: a damaged pickle ({type(error).__name__}: {str(error)[:80]})", WAY_OUT) from error


PROTO, FRAME, STOP, MARK = 0x80, 0x95, ord("."), ord("(")
OTHER_OPCODES = {
    ord("c"): "GLOBAL", 0x93: "STACK_GLOBAL", ord("R"): "REDUCE", ord("b"): "BUILD", ord("i"): "INST", ord("o"): "OBJ",
    0x81: "NEWOBJ", 0x92: "NEWOBJ_EX", ord("P"): "PERSID", ord("Q"): "BINPERSID", 0x82: "EXT1", 0x83: "EXT2",
    0x84: "EXT4", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", ord("B"): "BINBYTES", ord("C"): "SHORT_BINBYTES",
    0x8E: "BINBYTES8", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET",
}  # fmt: skip
CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
EMPTY = {ord("}"): dict, ord("]"): list, ord(")"): tuple}
# Opcodes with a number of fixed width; with its length before a number or a text; with an index of the memo.
_U1, _U2, _U4, _U8, _I4 = (
    (struct.Struct(code), width) for code, width in (("<B", 1), ("<H", 2), ("<I", 4), ("<Q", 8), ("<i", 4))
)
NUMBERS = {0x4B: _U1, 0x4D: _U2, 0x4A: _I4, 0x47: (struct.Struct(">d"), 8)}
LONGS = {0x8A: _U1, 0x8B: _I4}
TEXTS = {0x8C: _U1, 0x58: _U4, 0x8D: _U8}
PUTS = {0x71: _U1, 0x72: _U4}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def _interpret(data: bytes, source: str) -> Any:
    """The opcodes that a snapshot is full of come first, and without a call."""
    stack: list = []
    open_stacks: list[list] = []
    memo: dict[int, Any] = {}
    at, end = 0, len(data)
    while at < end:
        opcode = data[at]
        at += 1
        if opcode == 0x68:  # BINGET
            stack.append(memo[data[at]])
            at += 1
        elif opcode == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif opcode == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif opcode in NUMBERS:
            kind, width = NUMBERS[opcode]
            stack.append(kind.unpack_from(data, at)[0])
            at += width
        elif opcode in LONGS:
            length, at = _length(LONGS[opcode], data, at, end)
            if length > LONGEST_NUMBER:
                raise TersorError(f"{source}: a number of {length} bytes in the pickle", WAY_OUT)
            stack.append(int.from_bytes(_taken(data, at, length), "little", signed=True))
            at += length
        elif opcode in TEXTS:
            length, at = _length(TEXTS[opcode], data, at, end)
            stack.append(_taken(data, at, length).decode("utf-8", "surrogatepass"))
            at += length
        elif opcode in PUTS:
            index, at = _length(PUTS[opcode], data, at, 1 << 32)
            memo[index] = stack[-1]
        elif opcode == 0x75:  # SETITEMS
            items, stack = stack, open_stacks.pop()
            _set(stack[-1], items)
        elif opcode == MARK:
            if len(open_stacks) >= DEEPEST:
                raise TersorError(f"{source}: containers nest deeper than {DEEPEST} in the pickle", WAY_OUT)
            open_stacks.append(stack)
            stack = []
        elif opcode in EMPTY:
            stack.append(EMPTY[opcode]())
        elif opcode == 0x65:  # APPENDS
            items, stack = stack, open_stacks.pop()
            _list(stack[-1]).extend(items)
        elif opcode == 0x61:  # APPEND
            item = stack.pop()
            _list(stack[-1]).append(item)
        elif opcode == 0x73:  # SETITEM
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in TUPLES:
            count = TUPLES[opcode]
            if len(stack) < count:
                raise IndexError("stack is empty")
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == 0x74:  # TUPLE
            items, stack = stack, open_stacks.pop()
            stack.append(tuple(items))
        elif opcode == 0x30:  # POP
            stack.pop()
        elif opcode == 0x31:  # POP_MARK
            stack = open_stacks.pop()
        elif opcode == PROTO:
            if data[at] > 5:
                raise TersorError(f"{source}: pickle protocol {data[at]} is not known", WAY_OUT)
            at += 1
        elif opcode == FRAME:
            at += 8  # only says how much to read at once
        elif opcode == STOP:
            return stack.pop()
        else:
            _refuse(opcode, data, at, stack, source)
    raise ValueError("no end")


def _length(kind: tuple[struct.Struct, int], data: bytes, at: int, most: int) -> tuple[int, int]:
    """A count of fixed width at `at`, and where it ends."""
    (value,) = kind[0].unpack_from(data, at)
    if not 0 <= value <= most:
        raise ValueError("cut short")
    return value, at + kind[1]


def _taken(data: bytes, at: int, length: int) -> bytes:
    if length > len(data) - at:
        raise ValueError("cut short")
    return data[at : at + length]


def _list(target: Any) -> list:
    if type(target) is not list:
        raise TypeError(f"appends to {type(target).__name__}")
    return target


def _set(target: Any, items: list) -> None:
    """Keys are text only: hashing what a hostile file nests would take unbounded recursion."""
    if type(target) is not dict or len(items) % 2:
        raise TypeError("sets items of no dict")
    for key in items[::2]:
        if type(key) is not str:
            raise TypeError(f"a key is {type(key).__name__}, not text")
    target.update(zip(items[::2], items[1::2], strict=True))


def _refuse(opcode: int, data: bytes, at: int, stack: list, source: str) -> None:
    """Raise for an opcode that makes more than plain values, with the name of what it wants."""
    name = OTHER_OPCODES.get(opcode, f"0x{opcode:02x}")
    wanted = ""
    if name in ("GLOBAL", "INST"):
        lines = data[at : at + 400].split(b"\n")[:2]
        wanted = ".".join(line[:100].decode("utf-8", "replace") for line in lines)
    elif name == "STACK_GLOBAL" and len(stack) > 1 and all(type(part) is str for part in stack[-2:]):
        wanted = f"{stack[-2][:100]}.{stack[-1][:100]}"
    raise TersorError(
        f"{source}: the pickle wants {'to import ' + repr(wanted) if wanted else 'opcode ' + name}, which no memory "
        "snapshot needs",
        f"nothing of it was run; {WAY_OUT}",
    )


class _Snapshot:
    """Walks a parsed snapshot. A pickle may name one list many times, so what is visited is counted: `budget`."""

    def __init__(self, content: Any, budget: int, source: str):
        self.source, self.budget = source, budget
        if not isinstance(content, dict) or not {"segments", "device_traces"} <= content.keys():
            raise TersorError(f"{source}: has no 'segments' and 'device_traces', so it is no memory snapshot", WAY_OUT)
        self.content = content
        self._labels: dict[int, str] = {}
        self._pools: dict[tuple, int] = {}

    def trace(self, device: int | None) -> Trace:
        traces = [list(self._dicts(trace)) for trace in self._items(self.content["device_traces"], "device_traces")]
        if not traces:
            raise TersorError(f"{self.source}: 'device_traces' is empty", WAY_OUT)
        if device is None:
            device = max(range(len(traces)), key=lambda index: len(traces[index]))
        elif not 0 <= device < len(traces):
            raise TersorError(f"{self.source}: has no device {device}", f"it has devices 0 to {len(traces) - 1}")
        entries = traces[device]
        if not entries:
            raise TersorError(
                f"{self.source}: records no event",
                "call torch.cuda.memory._record_memory_history() before what is to be recorded",
            )
        segments = [entry for entry in self._dicts(self.content["segments"]) if entry.get("device", 0) == device]
        builder = TraceBuilder(Path(self.source).name, self.source)
        for address, block in sorted(self._before(entries, segments).items()):
            builder.alloc(f"0x{address:x}", *block, phase="before the recording")
        for number, entry in enumerate(entries):
            self._replay(builder, number, entry)
        trace = builder.finish()
        trace.recorded_reserved_bytes = self._reserved(entries, segments)
        trace.notes += self._notes(entries, device, len([one for one in traces if one]))
        return trace

    def _replay(self, builder: TraceBuilder, number: int, entry: dict) -> None:
        """`free_completed` ends a block: before it another stream may still read it."""
        action = entry.get("action")
        if action == "alloc":
            size = self._number(entry, "size", number, LARGEST)
            id = f"0x{self._number(entry, 'addr', number):x}"
            builder.alloc(id, size, self._pool(entry, number), self._label(entry))
        elif action == "free_completed":
            builder.free(f"0x{self._number(entry, 'addr', number):x}")

    def _before(self, entries: list[dict], segments: list[dict]) -> dict[int, tuple[int, int, str]]:
        """What was alive when the recording began: address → (bytes, stream, label)."""
        found: dict[int, tuple[int, int, str]] = {}
        alive: dict[int, bool] = {}  # of every address that the recording names
        inside = self._reserved_ranges(entries, segments)
        for number, entry in enumerate(entries):
            action = entry.get("action")
            if action not in ("alloc", "free_completed"):
                continue
            address = self._number(entry, "addr", number)
            if action == "alloc":
                if alive.get(address):
                    self._fail(number, address, "is allocated again while it is alive")
                alive[address] = True
                continue
            if address not in alive:
                if not inside(address):
                    self._fail(number, address, "is freed, but never allocated nor in a known segment (unmatched free)")
                found[address] = (self._number(entry, "size", number, LARGEST), self._pool(entry, number), "")
            elif not alive[address]:
                self._fail(number, address, "is freed twice")
            alive[address] = False
        for segment in segments:
            at = self._number(segment, "address", -1)
            for block in self._dicts(segment.get("blocks", [])):
                # Old snapshots give no address in a block: blocks lie one behind the other.
                address = self._number(block, "address", -1) if "address" in block else at
                at = address + self._number(block, "size", -1)
                state = block.get("state")
                if isinstance(state, str) and state.startswith("active") and address not in alive:
                    size = self._number(block, "requested_size" if "requested_size" in block else "size", -1, LARGEST)
                    pool = {"stream": segment.get("stream", 0), "pool_id": segment.get("segment_pool_id", (0, 0))}
                    found[address] = (size, self._pool(pool, -1), self._label(block))
        return found

    def _reserved_ranges(self, entries: list[dict], segments: list[dict]):
        """Whether an address lies in memory that was reserved at some time of the recording."""
        ranges = [(self._number(s, "address", -1), self._number(s, "total_size", -1)) for s in segments]
        for number, entry in enumerate(entries):
            if entry.get("action") in ("segment_free", "segment_unmap"):
                ranges.append((self._number(entry, "addr", number), self._number(entry, "size", number)))
        merged: list[list[int]] = []
        for start, size in sorted(ranges):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        starts = [start for start, _ in merged]

        def inside(address: int) -> bool:
            index = bisect_right(starts, address) - 1
            return index >= 0 and address < merged[index][1]

        return inside

    def _reserved(self, entries: list[dict], segments: list[dict]) -> int | None:
        """The most that was reserved, counted back from what is reserved at the end; None from the profiler, whose one
        segment is no memory that was reserved but all addresses it saw."""
        if any("segment_type" not in segment for segment in segments):
            return None
        signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
        now = peak = sum(self._number(segment, "total_size", -1) for segment in segments)
        for number in range(len(entries) - 1, -1, -1):
            action = entries[number].get("action")
            if sign := signs.get(action, 0) if isinstance(action, str) else 0:
                now -= sign * self._number(entries[number], "size", number)
                peak = max(peak, now)
        return peak

    def _notes(self, entries: list[dict], device: int, recorded: int) -> list[str]:
        notes = []
        if recorded > 1:
            notes.append(f"{recorded} devices were recorded; this is device {device}, the one with the most events")
        for number, entry in enumerate(entries):
            if entry.get("action") == "oom":
                size = self._number(entry, "size", number)
                notes.append(f"the recording ran out of memory at event {number}, which asked for {size} bytes")
                break
        settings = self.content.get("allocator_settings")
        if isinstance(settings, dict) and settings.get("expandable_segments") is True:
            notes.append("recorded with expandable_segments:True")
        return notes

    def _items(self, value: Any, what: str) -> list:
        if not isinstance(value, (list, tuple)):
            raise TersorError(f"{self.source}: {what} is not a list", WAY_OUT)
        self.budget -= len(value)
        if self.budget < 0:
            raise TersorError(f"{self.source}: names the same lists over and over", WAY_OUT)
        return value

    def _dicts(self, value: Any):
        for item in self._items(value, "a list of the snapshot"):
            if not isinstance(item, dict):
                raise TersorError(f"{self.source}: an entry is {type(item).__name__}, not a dict", WAY_OUT)
            yield item

    def _number(self, entry: dict, key: str, number: int, most: int = (1 << 64) - 1) -> int:
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            where = f"event {number}" if number >= 0 else "segments"
            shown = value if isinstance(value, (int, float)) else type(value).__name__
            raise TersorError(f"{self.source}: {where}: {key!r} is {shown}, not a whole number up to {most}", WAY_OUT)
        return value

    def _pool(self, entry: dict, number: int) -> int:
        """Streams, and pools of CUDA graphs, share no memory: each pair of them gets a number of its own."""
        pool = entry.get("pool_id", (0, 0))
        if not isinstance(pool, tuple) or len(pool) != 2 or not all(isinstance(part, int) for part in pool):
            pool = (0, 0)
        key = (self._number({"stream": entry.get("stream", 0)}, "stream", number), *pool)
        return self._pools.setdefault(key, len(self._pools))

    def _label(self, entry: dict) -> str:
        """The innermost line of the user's own code in an event's stack, else what the profiler says that it is."""
        category = entry.get("category")
        otherwise = category[:60] if isinstance(category, str) else ""
        frames = entry.get("frames")
        if not isinstance(frames, list) or not frames:
            return otherwise
        if id(frames) not in self._labels:
            texts = []
            for frame in frames[:FRAMES_LOOKED_AT]:
                name = frame.get("filename") if isinstance(frame, dict) else None
                if isinstance(name, str) and name.endswith(".py"):
                    called = str(frame.get("name"))[:60] if isinstance(frame.get("name"), str) else "?"
                    line = frame.get("line") if isinstance(frame.get("line"), int) else 0
                    texts.append(("/torch/" in name, f"{name[-300:].rpartition('/')[2]}:{line} {called}"))
            own = [text for library, text in texts if not library] or [text for _, text in texts]
            self._labels[id(frames)] = own[0] if own else ""
        return self._labels[id(frames)] or otherwise

    def _fail(self, number: int, address: int, problem: str):
        raise TersorError(f"{self.source}: event {number}: 0x{address:x} {problem}", WAY_OUT)

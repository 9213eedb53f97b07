"""The memory plan of a trace: what two settings of PyTorch's allocator reserve, what a plan needs, what to do."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tersor.formats import units
from tersor.formats.errors import TersorError
from tersor.formats.memory_snapshot import load_snapshot
from tersor.formats.memory_trace import Trace, load_trace
from tersor.ops.profile.memory.caching_allocator import LARGE_BUFFER, SMALL_BUFFER, Simulated, rounded, simulate
from tersor.ops.profile.memory.packing import ALIGNMENT, Packing, live_bytes, pack, static_then_dynamic

PLAN_SCHEMA = "tersor.memory-plan/1"
PLAN_FILE = "memory_plan.json"
UTILISED = 0.90  # STWeaver's documentation: below it, act
ONE_SEGMENT = LARGE_BUFFER + SMALL_BUFFER  # a loss that the grain of the cache explains
TIMELINE_POINTS = 400
TOP_TENSORS = 8


def load(path: Path, device: int | None = None) -> Trace:
    """A trace from our JSON or from a PyTorch snapshot, told apart by the first byte. Raises TersorError otherwise."""
    try:
        with path.open("rb") as stream:
            first = stream.read(64).lstrip()[:1]
    except OSError as error:
        raise TersorError(f"{path}: not readable ({error})", "name a trace or a snapshot") from error
    if first == b"{":
        return load_trace(path)
    if first == b"\x80":
        return load_snapshot(path, device)
    raise TersorError(
        f"{path}: is neither JSON nor a memory snapshot of PyTorch",
        "give a tersor.trace/1, or what torch.cuda.memory._dump_snapshot() wrote",
    )


def memory_plan(trace: Trace, capacity_bytes: int | None = None) -> tuple[dict, Packing]:
    """What page.sections shows, and the packing for `write_plan`. `capacity_bytes` is the memory of the device."""
    packing = pack(trace)
    caching, expandable = simulate(trace), simulate(trace, expandable=True)
    start, end = (np.array([getattr(block, key) for block in trace.blocks], np.int64) for key in ("start", "end"))
    live = live_bytes(start, end, np.array([rounded(block.bytes) for block in trace.blocks], np.int64))
    peak_event = int(live.argmax())
    peak = int(live[peak_event])
    at_peak = [block for block in trace.blocks if block.start <= peak_event < block.end]
    data = {
        "name": trace.name,
        "events": trace.events,
        "blocks": len(trace.blocks),
        "streams": len({block.stream for block in trace.blocks}),
        "live_peak_bytes": peak,
        "lower_bound_bytes": packing.lower_bound_bytes,
        "caching": _allocator(trace, caching, peak, False, capacity_bytes),
        "expandable": _allocator(trace, expandable, peak, True, capacity_bytes),
        "plan": {
            "peak_bytes": packing.peak_bytes,
            "method": packing.method,
            "utilisation": _share(peak, packing.peak_bytes),
            "above_bound": packing.peak_bytes / packing.lower_bound_bytes - 1 if packing.lower_bound_bytes else 0.0,
            "tried_bytes": packing.tried,
            "static_then_dynamic_bytes": static_then_dynamic(trace),
        },
        "recorded_reserved_bytes": trace.recorded_reserved_bytes,
        "capacity_bytes": capacity_bytes,
        "dynamic_share_at_peak": _share(sum(rounded(block.bytes) for block in at_peak if block.dynamic), peak, 0.0),
        "peak_event": peak_event,
        "peak_phase": max(at_peak, key=lambda block: block.start).phase if at_peak else "",
        "top_at_peak": _top(at_peak),
        "timeline": _timeline(live, caching, expandable),
        "notes": list(trace.notes),
    }
    data["advice"] = advice(data)
    return data, packing


def advice(data: dict) -> dict:
    """`action` is reduce, nothing, expandable_segments or plan; `text` says it in a sentence or two."""
    peak, caching, expandable, plan = (data["live_peak_bytes"], data["caching"], data["expandable"], data["plan"])
    reserved, grown, capacity = (
        caching["reserved_peak_bytes"],
        expandable["reserved_peak_bytes"],
        data["capacity_bytes"],
    )
    if capacity is not None and peak > capacity:
        text = f"Does not fit: {units.size(peak)} are alive at once, on a device of {units.size(capacity)}. No setting of the "
        text += "allocator helps; recompute activations, shrink the micro-batch, or shard weights and optimizer states."
        return {"action": "reduce", "text": text}
    used = f"{units.percent(caching['utilisation'])} of the {units.size(reserved)} that PyTorch reserves"
    if _serves(caching, peak):
        if caching["utilisation"] >= UTILISED:
            return {"action": "nothing", "text": f"Nothing to do: {used} is in use at the peak."}
        lost = units.size(reserved - peak)
        text = f"Nothing to do: {used} is in use, and what is lost, {lost}, is no more than a segment of its cache."
        return {"action": "nothing", "text": text}
    too_much = capacity is not None and reserved > capacity
    why = ", more than the device has" if too_much else ""
    spare = ""
    if caching["fits"] and not caching["retries"]:
        spare = f" As it is, it fits into the {units.size(capacity)} of the device; what is gained is room for more."
    setting = "PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF in older versions)"
    if _serves(expandable, peak):
        text = f"Set {setting}: PyTorch then reserves {units.size(grown)} instead of {units.size(reserved)}{why}, for {units.size(peak)} in use.{spare}"
        return {"action": "expandable_segments", "text": text}
    wants = (
        f"PyTorch wants {units.size(reserved)}{why}, for {units.size(peak)} in use"
        if too_much
        else f"Only {used} is in use"
    )
    text = f"{wants}; a fixed plan needs {units.size(plan['peak_bytes'])}"
    text += (
        f" and expandable segments {units.size(grown)}. " if grown < reserved else ", expandable segments do not help. "
    )
    text += f"{PLAN_FILE} has the plan, for an allocator that follows it (torch.cuda.memory.CUDAPluggableAllocator)"
    text += f"; the setting is {setting}." if grown < reserved else "."
    if data["dynamic_share_at_peak"] > 1 - UTILISED:
        text += f" {units.percent(data['dynamic_share_at_peak'])} of the peak has sizes that change from step to step: plan with room."
    return {"action": "plan", "text": text + spare}


def _serves(allocator: dict, peak: int) -> bool:
    """Little is lost, and the device never runs short."""
    close = allocator["utilisation"] >= UTILISED or allocator["reserved_peak_bytes"] - peak <= ONE_SEGMENT
    return close and allocator["fits"] is not False and not allocator["retries"]


def plan_content(trace: Trace, packing: Packing) -> dict:
    """Where each allocation goes: rows of event number, offset and size, in the order of the allocations."""
    return {
        "schema": PLAN_SCHEMA,
        "name": trace.name,
        "alignment_bytes": ALIGNMENT,
        "bytes": packing.peak_bytes,
        "lower_bound_bytes": packing.lower_bound_bytes,
        "method": packing.method,
        "columns": ["event", "id", "offset", "bytes"],
        "placements": [
            [block.start, block.id, offset, block.bytes]
            for block, offset in zip(trace.blocks, packing.offsets, strict=True)
        ],
    }


def write_plan(path: Path, trace: Trace, packing: Packing) -> None:
    """`memory_plan.json`, one allocation a line."""
    content = plan_content(trace, packing)
    rows = content.pop("placements")
    head = json.dumps(content, indent=1, ensure_ascii=True).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{head},\n "placements": [\n{lines}\n ]\n}}\n', "utf-8")


def _allocator(trace: Trace, simulated: Simulated, peak: int, expandable: bool, capacity: int | None) -> dict:
    found = {
        "reserved_peak_bytes": simulated.reserved_peak_bytes,
        "utilisation": _share(peak, simulated.reserved_peak_bytes),
        "fragmentation": simulated.fragmentation,
        "fits": None,
        "retries": 0,
        "out_of_memory_event": None,
    }
    if capacity is not None:
        tight = simulate(trace, expandable, capacity) if simulated.reserved_peak_bytes > capacity else simulated
        found |= {
            "fits": tight.out_of_memory_event is None,
            "retries": tight.retries,
            "out_of_memory_event": tight.out_of_memory_event,
        }
    return found


def _share(part: int, whole: int, otherwise: float = 1.0) -> float:
    return part / whole if whole else otherwise


def _top(at_peak: list) -> list[dict]:
    """What holds the most at the peak, tensors of one kind in all layers together."""
    nbytes, count = Counter(), Counter()
    for block in at_peak:
        kind = re.sub(r"\b(expert|activation) \d+", r"\1", re.sub(r"^layer \d+ ", "", block.label))
        label = kind or block.phase or "without a label"
        nbytes[label] += rounded(block.bytes)
        count[label] += 1
    return [{"label": label, "tensors": count[label], "bytes": size} for label, size in nbytes.most_common(TOP_TENSORS)]


def _timeline(live: np.ndarray, caching: Simulated, expandable: Simulated) -> dict:
    """The most of each quantity in each of at most TIMELINE_POINTS stretches of events."""
    cuts = np.unique(np.linspace(0, live.size, TIMELINE_POINTS + 1).astype(np.int64)[:-1])
    columns = {"live_bytes": live, "caching_bytes": caching.reserved, "expandable_bytes": expandable.reserved}
    highest = {
        name: [int(value) for value in np.maximum.reduceat(np.asarray(column, np.int64), cuts)]
        for name, column in columns.items()
    }
    return {"event": [int(cut) for cut in cuts], **highest}

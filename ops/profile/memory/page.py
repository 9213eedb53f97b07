"""The memory plan as people read it."""

from __future__ import annotations

from tersor.formats import units
from tersor.formats.page import Notes, Plot, Section, Table


def sections(data: dict) -> list[Section]:
    """From what `run.memory_plan` found."""
    peak = data["live_peak_bytes"]
    by_stream = data["lower_bound_bytes"] > peak
    rows = [["tensors alive at the peak" if by_stream else "alive at the peak: lower bound", units.size(peak), "", ""]]
    if by_stream:
        rows.append(["lower bound, stream by stream", units.size(data["lower_bound_bytes"]), "", ""])
    for name, key in (("caching allocator, as it comes", "caching"), ("expandable segments", "expandable")):
        rows.append(_row(name, data[key]["reserved_peak_bytes"], peak))
    plan = data["plan"]
    rows.append(_row(f"fixed plan ({plan['method']})", plan["peak_bytes"], peak))
    if plan["static_then_dynamic_bytes"]:
        rows.append(_row("the same, dynamic sizes as they come", plan["static_then_dynamic_bytes"], peak))
    if data["recorded_reserved_bytes"]:
        rows.append(_row("reserved in the recording", data["recorded_reserved_bytes"], peak))
    where = f" in {data['peak_phase']}" if data["peak_phase"] else ""
    note = (
        f"{data['blocks']:,} allocations in {data['events']:,} events; the peak is at event {data['peak_event']:,}{where}. "
        f"The plan is {_above(plan['above_bound'])} the lower bound."
    )
    if data["capacity_bytes"]:
        note += f" The device has {units.size(data['capacity_bytes'])}."
    compare = Table("Peak memory", ["", "peak", "in use", "fragmentation"], rows, note=note)
    top = Table(
        "What is alive at the peak, all layers together",
        ["", "tensors", "bytes", "share"],
        [
            [
                one["label"],
                f"{one['tensors']:,}",
                units.size(one["bytes"]),
                units.percent(one["bytes"] / max(peak, 1)),
            ]
            for one in data["top_at_peak"]
        ],
        folded=True,
    )
    timeline = data["timeline"]
    names = {
        "alive": "live_bytes",
        "reserved, caching allocator": "caching_bytes",
        "reserved, expandable segments": "expandable_bytes",
    }
    curves = {
        name: [(float(x), float(y)) for x, y in zip(timeline["event"], timeline[key], strict=True)]
        for name, key in names.items()
    }
    plot = Plot("Memory over the trace", "", "event", "bytes", curves, steps=True, unit_x="count", unit_y="size")
    items = [compare, top, plot]
    if warnings := _warnings(data):
        items.insert(0, Notes(warnings, warn=True))
    if data["notes"]:
        items.append(Notes(data["notes"]))
    return [Section("Memory plan", items, data["advice"]["text"])]


def _row(name: str, reserved: int, peak: int) -> list[str]:
    share = peak / reserved if reserved else 1.0
    return [name, units.size(reserved), units.percent(share), units.size(reserved - peak)]


def _above(share: float) -> str:
    return "exactly at" if share == 0 else f"{units.percent(share)} above"


def _warnings(data: dict) -> list[str]:
    """Where the device is too small."""
    found, capacity = [], data["capacity_bytes"]
    if capacity is None or data["live_peak_bytes"] > capacity:
        return found  # the lead says enough
    for name, key in (("The caching allocator", "caching"), ("With expandable segments it", "expandable")):
        one = data[key]
        if not one["fits"]:
            found.append(f"{name} runs out of {units.size(capacity)} at event {one['out_of_memory_event']:,}.")
        elif one["retries"]:
            found.append(
                f"{name} fits into {units.size(capacity)} only by emptying its cache {one['retries']:,} times."
            )
    return found

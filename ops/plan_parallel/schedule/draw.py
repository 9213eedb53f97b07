"""A schedule that was run on the clock, as parts of report.html: its blocks, and the memory of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.formats.page import Bars, Plot, Span
from tersor.formats.page import Timeline as Drawing
from tersor.formats.units import latency, percent, size
from tersor.ops.plan_parallel.schedule.pipeline import Block, Timeline

KINDS = {"F": "forward", "BW": "backward", "B": "gradient of the input", "W": "gradient of the weights"}
ROWS = 16  # so many ranks are drawn: of more, the first and the last
SHOWN = 55  # short blocks side by side at either end of a step that is too long to show whole
CURVES = 4  # ranks whose memory is drawn over time


def schedule(timeline: Timeline, title: str = "Schedule of one step") -> Drawing:
    """The blocks of each rank with the numbers of their micro-batches; a long step without its middle."""
    grid, cut = timeline.grid, _cut(timeline)
    ranks = chosen(grid.pp, ROWS)
    blocks: dict[int, list[Block]] = {rank: [] for rank in ranks}
    for block in timeline.blocks:
        if block.rank in blocks and not (cut and cut[0] <= block.start and block.end <= cut[1]):
            blocks[block.rank].append(block)
    place = [stage // grid.pp for stage in range(grid.stages)]
    rows = [
        (
            f"rank {rank}",
            f"{percent(max(timeline.bubble_share[rank], 0.0))} idle",
            [
                Span(block.start, block.end, KINDS[block.kind], str(block.micro), _what(block), place[block.stage])
                for block in blocks[rank]
            ],
        )
        for rank in ranks
    ]
    note = f"{grid.schedule}, {grid.micro_batches} micro-batches over {grid.pp} pipeline ranks"
    note += f" of {grid.chunks} model chunks each" if grid.chunks > 1 else ""
    note += f", {latency(timeline.seconds)} without the work after the last gradient. Numbers are micro-batches, where there is room for them."
    if len(ranks) < grid.pp:
        note += f" The ranks from {ROWS // 2} to {grid.pp - ROWS // 2 - 1} are left out."
    if cut:
        note += f" {latency(cut[1] - cut[0])} in the middle, where the pattern repeats, is left out."
    shades = [f"model chunk {chunk}" for chunk in range(grid.chunks)] if grid.chunks > 1 else []
    return Drawing(title, note, rows, shades, cut)


def memory_bars(
    timeline: Timeline,
    sizes: Sequence[float],
    kept: Sequence[dict[str, float]],
    limit: float | None = None,
    title: str = "Most memory of each pipeline rank",
) -> Bars:
    """Bytes of a rank at its peak. `sizes[stage]` is what a micro-batch in flight holds, `kept[rank]` what is there all
    the time, by what it is; `limit` the memory of a device."""
    rows = []
    for rank in chosen(timeline.grid.pp, 2 * ROWS):
        parts = {**kept[rank], "activations": timeline.grid.peak(sizes)[rank]}
        total = sum(parts.values())
        words = size(total) + (f", {size(total - limit)} too many" if limit is not None and total > limit else "")
        rows.append((f"rank {rank}", words, list(parts.items())))
    note = f"A device has {size(limit)} to give." if limit is not None else ""
    return Bars(title, note, rows)


def memory_curves(
    timeline: Timeline,
    sizes: Sequence[float],
    kept: Sequence[dict[str, float]],
    limit: float | None = None,
    title: str = "Memory over one step",
) -> Plot:
    """As `memory_bars`, over time, for a few of the ranks."""
    held = timeline.held(sizes)
    curves = {}
    for rank in chosen(timeline.grid.pp, CURVES, spread=True):
        fixed = sum(kept[rank].values())
        curves[f"rank {rank}"] = [(time, fixed + amount) for time, amount in held[rank]]
    if limit is not None:
        curves["memory of a device"] = [(0.0, limit), (timeline.seconds, limit)]
    note = "What is there all the time, and the activations of the micro-batches in flight."
    return Plot(title, note, "time", "", curves=curves, steps=True, unit_x="duration", unit_y="size")


def chosen(count: int, most: int, spread: bool = False) -> list[int]:
    """All of `count` ranks, or of more than `most` the first and the last, or some evenly spread."""
    if count <= most:
        return list(range(count))
    if spread:
        return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})
    return [*range(most // 2), *range(count - most // 2, count)]


def _cut(timeline: Timeline) -> tuple[float, float] | None:
    """The middle of a step too long for its blocks to be told apart: all but the warm-up and the cool-down.

    Each end shows SHOWN short blocks at least, and more where the first rank has to wait longer for its first backward.
    """
    takes: dict[str, list[float]] = {}
    for block in timeline.blocks:
        takes.setdefault(block.kind, []).append(block.end - block.start)
    means = [sum(times) / len(times) for times in takes.values()]
    short = min((mean for mean in means if mean > max(means) / 10), default=0.0)
    first = next((block.end for block in timeline.blocks if block.rank == 0 and block.kind != "F"), 0.0)
    end = max(SHOWN * short, min(first + 6 * short, 3 * SHOWN * short))
    if not short or timeline.seconds < 2.3 * end:
        return None
    return end, timeline.seconds - end


def _what(block: Block) -> str:
    return f"{KINDS[block.kind]} of micro-batch {block.micro}, stage {block.stage}"

"""Drawn schedules: what is on the page is what was simulated, and long ones stay readable."""

from __future__ import annotations

import pytest
from tersor.formats.page import Section
from tersor.formats.page_html import render
from tersor.formats.page_text import render as text
from tersor.ops.plan_parallel.schedule import draw
from tersor.ops.plan_parallel.schedule.pipeline import Timeline, build, simulate


def ran(schedule: str, pp: int, micro_batches: int, chunks: int = 1) -> Timeline:
    return simulate(build(schedule, pp, micro_batches, chunks), 0.01, 0.011, 0.009, 0.0002)


@pytest.mark.parametrize(
    ("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zbv", 2)]
)
def test_a_short_step_is_drawn_whole(schedule, chunks):
    timeline = ran(schedule, 4, 8, chunks)
    item = draw.schedule(timeline)
    assert item.cut is None
    assert [label for label, _, _ in item.rows] == [f"rank {rank}" for rank in range(4)]
    assert sum(len(spans) for _, _, spans in item.rows) == len(timeline.blocks)
    for rank, (_, _, spans) in enumerate(item.rows):
        expected = [(block.start, block.end, str(block.micro)) for block in timeline.blocks if block.rank == rank]
        assert [(span.start, span.end, span.text) for span in spans] == expected
        assert {span.shade for span in spans} == set(range(chunks))
    assert len(item.shades) == (chunks if chunks > 1 else 0)
    split = {"forward", "gradient of the input", "gradient of the weights"}
    assert {span.series for _, _, spans in item.rows for span in spans} == (
        split if schedule.startswith("zb") else {"forward", "backward"}
    )


def test_a_long_step_keeps_both_ends():
    timeline = ran("1f1b", 16, 64)
    item = draw.schedule(timeline)
    start, end = item.cut
    assert "in the middle, where the pattern repeats, is left out" in item.note
    assert max(span.end for _, _, spans in item.rows for span in spans) == timeline.seconds
    for rank, (_, _, spans) in enumerate(item.rows):
        assert spans[0].text == "0"
        assert spans[-1].text == "63"
        assert any(span.series == "backward" and span.end <= start for span in spans), rank
        assert all(span.start < start or span.end > end for span in spans)
    assert len(render("T", "e", [], [Section("S", [item])], [])) < 300_000


def test_of_many_ranks_the_first_and_the_last_are_drawn():
    item = draw.schedule(ran("1f1b", 40, 40))
    assert [label for label, _, _ in item.rows] == [f"rank {rank}" for rank in (*range(8), *range(32, 40))]
    assert "The ranks from 8 to 31 are left out." in item.note


def test_idle_share_stands_beside_the_row():
    timeline = simulate(build("1f1b", 4, 8), 1, 1, 1)
    assert {value for _, value, _ in draw.schedule(timeline).rows} == {"27.3 % idle"}  # (4 - 1) / (8 + 4 - 1)


def test_memory_of_ranks():
    timeline = ran("1f1b", 4, 8)
    kept = [{"weights": 10e9, "optimizer": 20e9}] * 4
    bars = draw.memory_bars(timeline, [1e9] * 4, kept, 33e9)
    assert [dict(parts)["activations"] for _, _, parts in bars.rows] == [4e9, 3e9, 2e9, 1e9]
    assert [words for _, words, _ in bars.rows] == ["34 GB, 1 GB too many", "33 GB", "32 GB", "31 GB"]
    assert "33 GB" in bars.note
    plot = draw.memory_curves(timeline, [1e9] * 4, kept, 33e9)
    assert list(plot.curves) == ["rank 0", "rank 1", "rank 2", "rank 3", "memory of a device"]
    assert max(amount for _, amount in plot.curves["rank 0"]) == 34e9
    assert plot.curves["rank 3"][0] == (0.0, 30e9)
    assert all(curve[-1][0] == timeline.seconds for curve in plot.curves.values())


def test_memory_of_many_ranks_is_drawn_for_some():
    timeline = ran("zbv", 16, 32, 2)
    plot = draw.memory_curves(timeline, [1e9] * 32, [{"weights": 1e9}] * 16)
    assert list(plot.curves) == ["rank 0", "rank 5", "rank 10", "rank 15"]
    items = [draw.schedule(timeline), draw.memory_bars(timeline, [1e9] * 32, [{"weights": 1e9}] * 16), plot]
    assert "rank 15" in text([Section("S", items)], 100)


def test_a_pipeline_of_one_rank_and_times_of_zero():
    draw.schedule(simulate(build("1f1b", 1, 1), 1, 1, 1))
    item = draw.schedule(simulate(build("1f1b", 2, 2), 0, 0, 0))
    assert item.cut is None
    assert "rank 1" in render("T", "e", [], [Section("S", [item])], [])
    assert "1f1b, 2 micro-batches" in text([Section("S", [item])], 80)

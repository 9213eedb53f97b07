"""Timelines: blocks lie where their times say, text is readable, a cut leaves out what it says."""

from __future__ import annotations

import math
import re

import pytest
from html_checks import HOSTILE, Page, loads_nothing, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.page import Section, Span, Timeline
from tersor.formats.page_html import render
from tersor.formats.page_text import render as text
from tersor.formats.svg_timeline import TITLED, timeline

ROWS = [
    ("rank 0", "25 % idle", [Span(0, 1, "forward", "0", "first"), Span(1, 2, "forward", "1"), Span(2, 3, "backward", "0")]),
    ("rank 1", "50 % idle", [Span(1, 3, "forward", "0", shade=1), Span(3, 4, "weights", "0")]),
]  # fmt: skip


def drawn(rows=ROWS, **changes) -> str:
    return timeline("k", Timeline("Title", "Note.", rows, **changes))


def blocks(html: str) -> list[tuple[str, float, float, float]]:
    """Class, left and width in percent, and the top in pixels."""
    found = []
    for style, body in re.findall(r'<g class="(\w+)" fill-opacity="[\d.]+">(.*?)</g>', html):
        for x, y, width in re.findall(r'<rect x="([\d.]+)%" y="(\d+)" width="([\d.]+)%"', body):
            found.append((style, float(x), float(width), int(y)))
    return found


def test_blocks_lie_where_their_times_say():
    found = blocks(drawn())
    assert sorted(found, key=lambda block: (block[3], block[1])) == [
        ("s0", 0, 25, 2), ("s0", 25, 25, 2), ("s1", 50, 25, 2), ("s0", 25, 50, 25), ("s2", 75, 25, 25),
    ]  # fmt: skip


def test_everything_has_its_words():
    page = Page(drawn(shades=["light", "dark"]))
    assert page.faults == []
    for words in ("Title", "Note.", "rank 1", "50 % idle", "forward", "weights", "light", "dark", "0 s", "4 s", "time"):
        assert words in page.text
    assert "first, 0 µs to 1 s" in page.text
    assert "weights, 3 s to 4 s" in page.text
    assert "light" not in Page(drawn(shades=["light"])).text  # one shade needs no explanation


def test_shades_are_apart():
    html = drawn(shades=["a", "b", "c"])
    found = [float(opacity) for opacity in re.findall(r'<g class="s0" fill-opacity="([\d.]+)">', html)]
    assert len(found) == 2
    assert found[0] < found[1] - 0.1


def test_a_cut_leaves_out_the_middle_and_keeps_the_scale():
    rows = [("a", "", [Span(at, at + 1, "work", str(at)) for at in range(100)])]
    html = drawn(rows, cut=(10, 70))
    found = blocks(html)
    assert len(found) == 40
    widths = {round(width, 2) for _, _, width, _ in found}
    assert max(widths) - min(widths) <= 0.01
    left = sorted(x for _, x, _, _ in found)
    assert left[10] - left[9] > 2 * max(widths)  # the gap
    assert left[-1] + max(widths) == pytest.approx(100, abs=0.02)
    assert "…" in Page(html).text
    assert blocks(drawn(rows, cut=(70, 10))) == blocks(drawn(rows))
    clipped = blocks(drawn([("a", "", [Span(0, 60, "w"), Span(60, 100, "v")])], cut=(20, 80)))
    assert [style for style, *_ in clipped] == ["s0", "s1"]
    assert clipped[0][2] == pytest.approx(clipped[1][2])


def test_text_stands_only_where_there_is_room():
    wide = [("a", "", [Span(0, 1, "work", "12")])]
    assert 'class="on"' in drawn(wide)
    tight = [("a", "", [Span(at, at + 1, "work", "12") for at in range(90)])]
    assert 'class="on"' not in drawn(tight)
    assert drawn([("a", "", [Span(at, at + 1, "work", "1") for at in range(50)])]).count('class="on"') == 50


def test_very_many_blocks_are_one_path():
    rows = [("a", "", [Span(at, at + 0.5, f"kind {at % 2}") for at in range(TITLED + 2)])]
    html = drawn(rows)
    assert html.count("<path") == 2
    assert html.count("M") >= TITLED
    assert len(html) < 40 * TITLED
    assert Page(html).faults == []


def test_more_series_than_colours():
    html = drawn([("a", "", [Span(at, at + 1, f"kind {at}") for at in range(11)])])
    assert 'class="rest"' in html
    assert "3 more" in Page(html).text


@pytest.mark.parametrize("rows", [[], [("a", "b", [])], [("a", "", [Span(math.nan, 1, "x"), Span(0, math.inf, "y")])]])
def test_nothing_to_draw_is_said(rows):
    assert "There is nothing to draw." in drawn(rows)
    assert "<svg" not in drawn(rows)
    assert "Title" in text([Section("S", [Timeline("Title", "Note.", rows)])], 80)


def test_what_has_no_time_is_counted():
    html = drawn([("a", "", [Span(0, 1, "x"), Span(1, math.inf, "x"), Span(None, 2, "y")])])
    assert "2 without a time left out." in html
    assert len(blocks(html)) == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.sampled_from("abc")), max_size=6), max_size=4),
    cut=st.none() | st.tuples(st.floats(-5, 60), st.floats(-5, 60)), width=st.integers(20, 120),
)  # fmt: skip
def test_any_times_are_drawn_inside(rows, cut, width):
    rows = [(f"row {at}", "", [Span(*sorted(span[:2]), span[2]) for span in spans]) for at, spans in enumerate(rows)]
    html = drawn(rows, cut=cut)
    assert Page(html).faults == []
    assert not re.search(r"\b(nan|inf)\b", html)
    assert all(x >= 0 and x + w <= 100.02 for _, x, w, _ in blocks(html))
    lines = text([Section("S", [Timeline("T", "N", rows, cut=cut)])], width).splitlines()
    assert all(len(line) <= max(width, 40) for line in lines)


def test_the_terminal_shows_signs():
    lines = text([Section("S", [Timeline("T", "", ROWS)])], 40).splitlines()
    assert "█ forward   ▒ backward   ▓ weights" in lines
    assert all(len(line) == 40 for line in lines[-2:])
    first, second = (line[8:].split("  ")[0] for line in lines[-2:])
    assert re.fullmatch("█+▒+·+", first)
    assert re.fullmatch("·+█+▓+", second)
    assert abs(first.count("█") - 2 * first.count("▒")) <= 2
    cut = text([Section("S", [Timeline("T", "", ROWS, cut=(1, 3))])], 60)
    assert "~ left out" in cut
    assert re.search(r"rank 0  █+ ~ ·+  25 % idle", cut)


@pytest.mark.parametrize("word", HOSTILE)
def test_text_from_outside_stays_text(word):
    rows = [(word, word, [Span(0, 1, word, word, word), Span(1, 2, f"{word} 2", word, word, 1)])]
    html = render("T", "e", [], [Section("S", [Timeline(word, word, rows, [word, word])])], [])
    page = Page(html)
    assert page.faults == []
    assert word in page.words
    text([Section("S", [Timeline(word, word, rows, [word])])], 80)


def test_nothing_is_loaded():
    loads_nothing(render("T", "e", [], [Section("S", [Timeline("T", "N", ROWS)])], []))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(dark, tmp_path):
    many = [("a", "", [Span(at, at + 0.5, "work", "1") for at in range(TITLED + 2)])]
    items = [Timeline("Few", "", ROWS, ["x", "y"], (1.5, 2.5)), Timeline("Many", "", many)]
    page = shown(render("T", "e", [], [Section("S", items)], []), tmp_path, dark)
    assert page.faults == []
    assert sum(attributes.get("role") == "img" for _, attributes in page.tags) == 2

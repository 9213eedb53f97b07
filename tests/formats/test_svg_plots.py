"""Axes, thinning and plots: what is drawn is where the numbers say, whatever the numbers are."""

from __future__ import annotations

import math
import re

import pytest
from html_checks import HOSTILE, Page
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import units
from tersor.formats.axes import axis
from tersor.formats.page import UNITS, Plot
from tersor.formats.svg import SERIES
from tersor.formats.svg_labels import SPOTS
from tersor.formats.svg_plots import COLUMNS, DOTS, lines, plot, thin


def drawn(**changes) -> str:
    return plot("k", Plot("Title", "Note.", "x", "y", **changes))


def heights(html: str) -> list[int]:
    return [int(found) for found in re.findall(r'class="dot" d="M\d+ (-?\d+)h0"><title>', html)]


def line(html: str) -> list[tuple[int, int]]:
    return [tuple(map(int, place.split(","))) for place in re.search(r'points="([^"]*)"', html)[1].split()]


def marks(html: str) -> list[tuple[float, float]]:
    """Percentages across and down."""
    return [(float(x), float(y)) for x, y in re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%"><g class="mark', html)]


def on_axes(html: str) -> tuple[list[str], list[str]]:
    """Texts along x and along y."""
    across = re.findall(r'class="middle" x="[\d.]+%" y="100%" dy="18">([^<]*)<', html)
    return across, re.findall(r'class="value" x="-8"[^>]*>([^<]*)<', html)


def test_numbers_stand_on_the_axes():
    across, down = on_axes(drawn(curves={"a": [(0, 0), (40, 7e9)]}, unit_y="size"))
    assert across == ["0", "5", "10", "15", "20", "25", "30", "35", "40"]
    assert down == ["0 B", "2 GB", "4 GB", "6 GB", "8 GB"]
    across, down = on_axes(drawn(curves={"a": [(1, 1e-3), (1e4, 1)]}, log_x=True, log_y=True, unit_y="percent"))
    assert across == ["1", "10", "100", "1,000", "10,000"]
    assert down == ["0.1 %", "1 %", "10 %", "100 %"]


@pytest.mark.parametrize(
    ("values", "unit", "logarithmic", "expected"),
    [
        ([0, 100], "number", False, ["0", "20", "40", "60", "80", "100"]),
        ([-3, 3], "number", False, ["-4", "-2", "0", "2", "4"]),
        ([0, 3], "count", False, ["0", "1", "2", "3"]),  # no half tensors
        ([0, 600], "duration", False, ["0 s", "2 min 0 s", "4 min 0 s", "6 min 0 s", "8 min 0 s", "10 min 0 s"]),
        ([1.0e9, 1.004e9], "size", False, ["1 GB", "1.001 GB", "1.002 GB", "1.003 GB", "1.004 GB"]),
        ([0.999, 0.9991], "percent", False, ["99.9 %", "99.902 %", "99.904 %", "99.906 %", "99.908 %", "99.91 %"]),
        ([7], "number", False, ["0", "5", "10", "15"]),
        ([3], "number", True, ["2", "5"]),
        ([0.02, 0.5], "number", True, ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        ([1e-9, 1e9], "number", True, ["1×10⁻⁹", "1×10⁻⁶", "0.001", "1", "1,000", "1,000,000", "1,000,000,000"]),
    ],
)  # fmt: skip
def test_ticks_are_round_and_told_apart(values, unit, logarithmic, expected):
    assert axis(values, unit, logarithmic, True, 1e9, False).words == expected


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e299, 1e299) | st.integers(-5, 5).map(float), min_size=1, max_size=5),
    unit=st.sampled_from(UNITS), logarithmic=st.booleans(), upright=st.booleans(), zero=st.booleans(),
)  # fmt: skip
def test_any_values_have_an_axis(values, unit, logarithmic, upright, zero):
    logarithmic = logarithmic and any(value >= 1e-300 for value in values)
    found = axis(values, unit, logarithmic, upright, 300, zero)
    assert found.low < found.high
    assert 1 <= len(found.ticks) == len(found.words) <= 13
    shown = [text for text in found.words if text]
    assert len(set(shown)) == len(shown)
    assert found.ticks == sorted(found.ticks)
    assert all(0 <= found.share(value) <= 1 for value in [*values, *found.ticks])
    low, high = min(values), max(values)
    if not logarithmic:
        assert found.share(low) <= found.share(high)
        assert found.low <= low + 1e-8 * (found.high - found.low)
        assert found.high >= high - 1e-8 * (found.high - found.low)


def test_few_texts_fit_a_narrow_axis():
    wide = axis([0, 9e12], "size", False, False, 1000, False)
    narrow = axis([0, 9e12], "size", False, False, 200, False)
    assert len(narrow.ticks) < len(wide.ticks)
    assert sum(6 * len(text) for text in narrow.words) < 200


def test_points_lie_where_their_numbers_say():
    html = drawn(curves={"roof": [(1, 1), (10_000, 1)]}, points={"dots": [(100, 1, "middle")]}, log_x=True)
    assert marks(html)[0][0] == pytest.approx(50, abs=0.1)
    assert Page(html).text.count("middle") == 2  # its name, and all of it under the pointer
    assert "dots · middle: 100, 1" in Page(html).text
    html = drawn(curves={"a": [(0, 0.0), (1, 1.0), (4, 2.0)]})
    assert line(html) == [(0, 1000), (250, 500), (1000, 0)]


def test_a_logarithmic_axis_is_one():
    html = drawn(curves={"a": [(1, 1), (10, 10), (100, 100)]}, log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = line(html)
    assert (x0, x1, x2) == (0, 500, 1000)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=1)


def test_what_a_logarithmic_axis_cannot_show():
    html = drawn(curves={"a": [(1, 0.0), (2, -1.0), (3, 1.0), (4, 100.0)]}, log_y=True)
    assert len(line(html)) == 3
    assert line(html)[0][1] == 1000
    assert "Zeros lie on the lower edge. 1 value that the axes cannot show left out." in html
    html = drawn(points={"a": [(0, 1.0, "gone"), (1, 1.0, "here")]}, log_x=True)
    assert "gone" not in html
    assert "<figcaption><b>Title</b> no stop. Zeros" in plot(
        "k", Plot("Title", "no stop", "", "", {"a": [(1, 0.0), (2, 1.0)]}, log_y=True)
    )
    assert len(marks(html)) == 1
    assert line(drawn(curves={"a": [(0, 0.0), (1, 0.0)]}, log_y=True)) == [(0, 1000), (1000, 1000)]  # no positive one


def test_what_is_not_finite_is_left_out_and_counted():
    bad = [(1, math.nan), (math.inf, 2), (3, -math.inf), (4, None)]
    html = drawn(curves={"a": [(0, 1.0), *bad, (5, 2.0)], "b": bad})
    assert len(line(html)) == 2
    assert "8 values that the axes cannot show left out." in html
    assert "<li>" not in html or "b</li>" not in html
    assert not re.search(r"\b(nan|inf)\b", html)


@pytest.mark.parametrize("content", [{}, {"curves": {"a": []}}, {"points": {"a": [(math.nan, 1, "x")]}}])
def test_nothing_to_draw_is_said(content):
    html = drawn(**content)
    assert "There is nothing to draw." in html
    assert "<svg" not in html


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("values", [[(5, 7)], [(1, 7), (2, 7)], [(3, 1), (3, 2)], [(0, 0)], [(-1, -2)]])
def test_degenerate_data_is_drawn(values, log, steps):
    html = drawn(curves={"a": values}, points={"b": [(x, y, "") for x, y in values]}, log_x=log, log_y=log, steps=steps)
    page = Page(html)
    assert page.faults == []
    assert not re.search(r"\b(nan|inf)\b", html)
    if not log or min(min(value) for value in values) > 0:
        assert len(marks(html)) == len(values)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in marks(html))


def test_stairs_hold_a_value_until_the_next():
    html = drawn(curves={"a": [(0, 1), (1, 3), (2, 2)]}, steps=True)
    scale = 1000 / 3
    assert f'd="M0 {1000 - scale:.0f}H500V0H1000V{1000 - 2 * scale:.0f}"' in html
    assert "<polyline" not in html


def test_thinning_keeps_every_peak():
    points = [(at / 100_000, (at * 7919 % 1000) / 2000) for at in range(100_000)]
    points[54_321] = (points[54_321][0], 1.0)
    points[76_543] = (points[76_543][0], 0.0)
    kept = thin(points)
    assert len(kept) <= 4 * (COLUMNS + 1)
    assert {points[0], points[54_321], points[-1]} <= set(kept)
    assert min(y for _, y in kept) == 0.0
    assert kept == sorted(kept)
    assert thin(points[:50]) == points[:50]


def test_a_long_curve_stays_small_and_reaches_its_peak():
    timeline = [(at, 1e9 + at % 1000) for at in range(200_000)]
    timeline[123_456] = (123_456, 5e9)
    html = drawn(curves={"live": timeline}, steps=True, unit_y="size")
    assert len(html) < 60_000
    assert re.search(r"H617V0H", html)  # 123,456 of 200,000 across, and the top
    assert "5 GB" in on_axes(html)[1]


@pytest.mark.parametrize("count", [SPOTS, SPOTS + 1])
def test_names_stand_by_a_few_dots(count):
    html = drawn(points={"operators": [(x, 5 * x % 13, f"name {x}") for x in range(count)]})
    named = re.findall(r"<tspan[^>]*>name \d+<", html)
    assert len(named) == (count if count <= SPOTS else 0)
    assert html.count("<title>operators · name") == count


def test_dots_on_one_spot_share_a_text():
    html = drawn(points={"a": [(1, 1, "query"), (1, 1, "key"), (1.001, 1, "value"), (2, 2, "far")]})
    assert ">query, key, value<" in html
    assert ">far<" in html
    html = drawn(points={"a": [(1, 1, "query, 2 ms"), (1, 1, "key, 1 ms"), (2, 2, "far")]})
    assert ">query, key<" in html
    assert "a · query, 2 ms: 1, 1" in Page(html).text
    many = {"a": [(1 + x % 3, 1 + x % 3, f"layer {x}") for x in range(30)]}
    assert "layer 29" in "".join(re.findall(r"<tspan[^>]*>([^<]*)<", drawn(points=many)))


def test_names_do_not_cover_each_other():
    """Twelve dots near each other: at the narrowest width no two texts overlap."""
    places = [(x + 0.1 * y, 10 * y + x, f"operator {3 * x + y}") for x in range(4) for y in range(3)]
    html = drawn(points={"a": places})
    boxes = []
    for x, y, anchor, left, top, text in re.findall(
        r'<svg x="([\d.]+)%" y="([\d.]+)%">(?:<line[^>]*>)?<text class="name (\w+)"><tspan x="(-?\d+)" y="(-?\d+)">([^<]*)<',
        html,
    ):
        start = 4.7 * float(x) + int(left) - {"start": 0, "middle": 3, "end": 6}[anchor] * len(text)
        boxes.append((start, 3.4 * float(y) + int(top), start + 6 * len(text)))
    assert len(boxes) == 12
    for index, (left, base, right) in enumerate(boxes):
        for other_left, other_base, other_right in boxes[:index]:
            assert right <= other_left or other_right <= left or abs(base - other_base) >= 12


def test_series_past_the_colours_are_drawn_apart_and_counted():
    html = drawn(curves={f"curve {index}": [(0, index), (1, index)] for index in range(SERIES + 3)})
    assert html.count("<polyline") == SERIES + 3
    assert html.count('<g class="rest"><polyline') == 3
    assert "<li>" in html and ">3 more</li>" in html


def test_very_many_points_are_one_path_each_series():
    html = drawn(points={"a": [(x, x % 97, "") for x in range(20_000)], "b": [(x, 3, "") for x in range(3000)]})
    assert "<title>a" not in html
    assert html.count('class="dot"') == 2
    assert len(html) < 300_000
    assert len(marks(drawn(points={"a": [(x, x % 97, "") for x in range(DOTS)]}))) == DOTS


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(text):
    html = plot(text, Plot(text, text, text, text, {text: [(1, 1), (2, 2)]}, {text: [(1, 1, text)], f"{text}2": [(2, 2, text)]}))  # fmt: skip
    plain = plot("k", Plot("T", "N", "x", "y", {"a": [(1, 1), (2, 2)]}, {"a": [(1, 1, "b")], "c": [(2, 2, "d")]}))
    page, expected = Page(html), Page(plain)
    assert page.faults == []
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in expected.tags} | {"line"}
    assert {name for _, found in page.tags for name in found} <= {name for _, found in expected.tags for name in found}
    assert text in page.words


ANY = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-3, 3).map(float)


@settings(max_examples=100, deadline=None)
@given(
    curves=st.dictionaries(st.text(max_size=3), st.lists(st.tuples(ANY, ANY), max_size=5), max_size=3),
    points=st.dictionaries(st.text(max_size=3), st.lists(st.tuples(ANY, ANY, st.text(max_size=3)), max_size=5), max_size=3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()), unit=st.sampled_from(UNITS),
)  # fmt: skip
def test_any_numbers_can_be_shown(curves, points, flags, unit):
    log_x, log_y, steps = flags
    item = Plot("T", "N", "x", "y", curves, points, log_x, log_y, steps, unit, unit)
    html = plot("k", item)
    assert Page(html).faults == []
    assert html == plot("k", item)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)


def test_lines_share_colours_and_scale():
    twelve = [(f"kind {index}", x, 1.0) for index in range(12) for x in range(3)]
    html = lines("k", "T", "D", twelve, "number", "layer")
    assert html.count("<polyline") == SERIES
    assert "5 other kinds" in html
    linear = heights(lines("k", "T", "D", [("a", 0, 0.0), ("a", 1, 1.0), ("a", 2, 2.0)], "number", "x"))
    assert linear == [1000, 500, 0]
    logarithmic = heights(lines("k", "T", "D", [("a", x, y) for x, y in enumerate((0.0, 1, 10, 100))], "number", "x"))
    assert logarithmic[0] == 1000  # no logarithm of zero
    assert logarithmic[1] - logarithmic[2] == pytest.approx(logarithmic[2] - logarithmic[3], abs=1)
    assert lines("k", "T", "D", [("a", 1, 1.0), ("b", 1, 2.0)], "number", "x") == ""


def test_long_lines_are_thinned_to_means():
    html = lines("k", "T", "D", [("a", x, float(x % 2)) for x in range(100_000)], "number", "x")
    assert COLUMNS / 2 <= len(line(html)) <= COLUMNS + 1
    assert 'class="dot" d="M0 ' in html
    assert all(0 <= y <= 1000 for _, y in line(html))


def test_units_are_those_of_the_terminal():
    for unit in UNITS:
        html = drawn(curves={"a": [(0, 1.0), (1, 3.0)]}, unit_y=unit)
        assert f"a, 1: {getattr(units, unit)(3.0)}" in Page(html).text

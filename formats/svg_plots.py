"""Curves and points over two axes as inline SVG.

The curves live in a nested `<svg preserveAspectRatio="none">` of 1000 by 1000 whose strokes do not scale; what must
keep its shape (text, marks) stands at percentages of the whole. Colours are the classes `s0` to `s7` of `report.css`,
each with its own dashes and its own mark, so that nothing hangs on telling colours apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

from tersor.formats import units
from tersor.formats.axes import SMALLEST, Axis, axis
from tersor.formats.page import Plot
from tersor.formats.svg import SERIES, escape, figure, shorten
from tersor.formats.svg_labels import WIDTHS
from tersor.formats.svg_labels import names as names_of
from tersor.formats.units import finite

DOTS = 1200  # a plot of more points has no texts on them
COLUMNS = 400  # no more points along x than a screen can show
NARROW = 290  # pixels of a plot without names on the narrowest screen
HEIGHT = {False: 240, True: 340}
MARKS = (
    '<circle r="4.5"/>', '<rect x="-4" y="-4" width="8" height="8"/>', '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>', '<path d="M0-5 5 4H-5z"/>',
    '<path d="M-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z"/>', '<path d="M0 5 5-4H-5z"/>', '<circle class="hollow" r="4"/>',
    '<path class="hollow" d="M-3.5-3.5h7v7h-7z"/>',
)  # fmt: skip


class Dot(NamedTuple):
    """A point on its way to the page: `across` and `down` from 0 to 1."""

    across: float
    down: float
    series: int
    name: str
    title: str


def lines(
    key: str, title: str, description: str, points: Iterable[tuple[str, int, float]], unit: str, x_label: str
) -> str:
    """A line per label over whole numbers x, from points (label, x, y); nothing for fewer than two different x.

    Labels keep their order, and past SERIES of them the rest share one line. Points that share label and x become
    their mean. The y axis is logarithmic where values span more than a decade.
    """
    points = list(points)
    if len({x for _, x, _ in points}) < 2:
        return ""
    series, averaged = _series(points)
    description += " Means where a layer has several of a kind." if averaged else ""
    values = [y for line in series.values() for _, y in line]
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) > 10 * min(positive)
    return plot(key, Plot(title, description, x_label, "", curves=series, log_y=logarithmic, unit_y=unit))


def plot(key: str, item: Plot) -> str:
    """`item` as a figure. `key` makes the ids of the page unique.

    A few points have their names next to them, up to the first comma of what they are; all of it is under the pointer. Curves without steps in a plot that
    has no points of its own show where their values are. What is not finite cannot be drawn, nor what is negative on a
    logarithmic axis; the caption counts it.
    """
    item = _drawable(item)
    names = list(dict.fromkeys([*item.curves, *item.points]))
    if not names:
        return figure(key, item.title, f"{item.note} There is nothing to draw.".strip(), 0, "", "", [])
    height = HEIGHT[bool(item.points)]
    across, down = _axes(item, WIDTHS[0] if item.points else NARROW)
    dots = _dots(item, names, across, down)
    named = [(dot.across, dot.down, dot.name.partition(", ")[0]) for dot in dots]
    labels = names_of(named, _outline(item, across, down), height)
    parts = [
        _grid(item, across, down),
        '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">',
        *(_curve(item, name, _style(names.index(name)), across, down) for name in item.curves),
        _crowd(dots) if len(dots) > DOTS else "",
        "</svg>",
    ]
    if len(dots) <= DOTS:
        parts += (_mark(dot) for dot in dots)
    parts += labels
    widest = max(map(len, down.words))
    kind = "lines" + (" named" if item.y_label else "") + (" wider" if widest > 10 else " wide" if widest > 6 else "")
    return figure(key, item.title, item.note, height, kind, "".join(parts), _legend(item, names), bool(labels))


def thin(points: Sequence[tuple[float, float]], columns: int = COLUMNS) -> list[tuple[float, float]]:
    """First, lowest, highest and last point of each of `columns` columns of x from 0 to 1, so that no peak is lost.

    Jugel et al., M4: A Visualization-Oriented Time Series Data Aggregation, VLDB 2014.
    """
    if len(points) <= 4 * columns:
        return list(points)
    found = []
    for _, run in groupby(enumerate(points), lambda item: int(item[1][0] * columns)):
        run = list(run)
        kept = {run[0], min(run, key=lambda item: item[1][1]), max(run, key=lambda item: item[1][1]), run[-1]}
        found += [point for _, point in sorted(kept)]
    return found


def _series(points: list[tuple[str, int, float]]) -> tuple[dict[str, list[tuple[int, float]]], bool]:
    """Lines of at most COLUMNS points with x ascending, and whether a y is a mean."""
    labels = list(dict.fromkeys(label for label, _, _ in points))
    others = f"{len(labels) - SERIES + 1} other kinds"
    labels = labels if len(labels) <= SERIES else [*labels[: SERIES - 1], others]
    first, last = min(x for _, x, _ in points), max(x for _, x, _ in points)
    step = (last - first) // COLUMNS + 1
    found = {label: defaultdict(list) for label in labels}
    for label, x, y in points:
        found[label if label in found else others][first + (x - first) // step * step].append(y)
    averaged = any(len(values) > 1 for line in found.values() for values in line.values())
    return {
        label: [(x, sum(ys) / len(ys)) for x, ys in sorted(line.items())] for label, line in found.items()
    }, averaged


def _drawable(item: Plot) -> Plot:
    """Without what its axes cannot show and without series that nothing is left of; its note says so."""
    finished = [
        point for group in (item.curves, item.points) for series in group.values() for point in series
        if finite(point[0]) is not None and finite(point[1]) is not None
    ]  # fmt: skip
    log_x = item.log_x and any(x >= SMALLEST for x, *_ in finished)
    log_y = item.log_y and any(y >= SMALLEST for x, y, *_ in finished if x >= SMALLEST or not log_x)
    lost, zeros = 0, False

    def kept(group: dict[str, list]) -> dict[str, list]:
        nonlocal lost, zeros
        found = {}
        for name, series in group.items():
            inside = [
                point for point in series
                if finite(point[0]) is not None and finite(point[1]) is not None
                and (point[0] >= SMALLEST or not log_x) and (point[1] >= 0 or not log_y)
            ]  # fmt: skip
            lost += len(series) - len(inside)
            zeros = zeros or (log_y and any(point[1] < SMALLEST for point in inside))
            found |= {name: inside} if inside else {}
        return found

    curves, points = kept(item.curves), kept(item.points)
    note = item.note + ("." if item.note and item.note[-1] not in ".!?" and (zeros or lost) else "")
    note += " Zeros lie on the lower edge." if zeros else ""
    if lost:
        note += f" {lost:,} {'value' if lost == 1 else 'values'} that the axes cannot show left out."
    return replace(item, curves=curves, points=points, log_x=log_x, log_y=log_y, note=note.strip())


def _axes(item: Plot, width: int) -> tuple[Axis, Axis]:
    """Lines begin at zero, and points where that takes little room. Points keep off the edges."""
    curve_x, curve_y = ([point[at] for line in item.curves.values() for point in line] for at in (0, 1))
    point_x, point_y = ([point[at] for dots in item.points.values() for point in dots] for at in (0, 1))
    low, high = min(point_y + curve_y), max(point_y + curve_y)
    down = axis(curve_y + point_y, item.unit_y, item.log_y, True, 1e9, not point_y or low <= high / 2)
    zero = bool(point_x) and 0 <= min(point_x + curve_x) <= max(point_x + curve_x) / 3
    if point_x and item.log_x:
        point_x += [0.8 * min(point_x), min(1.25 * max(point_x), 1e300)]
    elif point_x:
        span = max(point_x) - min(point_x)
        point_x += [max(point_x) + 0.05 * span] + ([] if zero else [min(point_x) - 0.05 * span])
    return axis(curve_x + point_x, item.unit_x, item.log_x, False, width, zero), down


def _grid(item: Plot, across: Axis, down: Axis) -> str:
    parts = []
    for tick, text in zip(down.ticks, down.words, strict=True):
        y = 100 - 100 * down.share(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}%" y2="{y:.1f}%"/>')
        parts.append(f'<text class="value" x="-8" y="{y:.1f}%" dy="4">{escape(text)}</text>')
    for tick, text in zip(across.ticks, across.words, strict=True):
        x = 100 * across.share(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}%" x2="{x:.1f}%" y1="{"0" if item.log_x else "98.5%"}" y2="100%"/>'
        )
        parts.append(f'<text class="middle" x="{x:.1f}%" y="100%" dy="18">{escape(text)}</text>')
    parts.append(f'<text class="middle" x="50%" y="100%" dy="36">{escape(item.x_label)}</text>')
    if item.y_label:
        parts.append(f'<text x="-46" y="-14">{escape(item.y_label)}</text>')
    return "".join(parts)


def _style(index: int) -> str:
    return f"s{index}" if index < SERIES else "rest"


def _curve(item: Plot, name: str, style: str, across: Axis, down: Axis) -> str:
    """Its line, and where its values are when they are few."""
    points = [(across.share(x), 1 - down.share(y)) for x, y in item.curves[name]]
    places = [(f"{1000 * x:.0f}", f"{1000 * y:.0f}") for x, y in thin(points)]
    if item.steps:
        stairs = f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])
        parts = [f'<g class="{style}"><path class="line" d="{stairs}"/>']
    else:
        parts = [f'<g class="{style}"><polyline class="line" points="{" ".join(map(",".join, places))}"/>']
    few = not item.points and not item.steps and sum(map(len, item.curves.values())) <= DOTS
    if few or len(places) == 1:
        for (x, y), place in zip(item.curves[name], places, strict=True):
            title = escape(f"{name}, {_word(item.unit_x, x)}: {_word(item.unit_y, y)}")
            parts.append(f'<path class="dot" d="M{place[0]} {place[1]}h0"><title>{title}</title></path>')
    return "".join(parts) + "</g>"


def _word(unit: str, value: float) -> str:
    return getattr(units, unit)(value if abs(value) >= SMALLEST else 0.0)


def _dots(item: Plot, names: list[str], across: Axis, down: Axis) -> list[Dot]:
    """The points of all series; where very many would cover each other, one of them."""
    found = [
        Dot(across.share(x), 1 - down.share(y), names.index(series), what,
            f"{series}{' · ' if what else ''}{what}: {_word(item.unit_x, x)}, {_word(item.unit_y, y)}")
        for series, points in item.points.items() for x, y, what in points
    ]  # fmt: skip
    if len(found) <= DOTS:
        return found
    return list({(dot.series, round(dot.across * 500), round(dot.down * 200)): dot for dot in found}.values())


def _mark(dot: Dot) -> str:
    style = _style(dot.series)
    mark = MARKS[min(dot.series, SERIES - 1)]
    return (
        f'<svg x="{100 * dot.across:.2f}%" y="{100 * dot.down:.2f}%"><g class="mark {style}">{mark}'
        f"<title>{escape(dot.title)}</title></g></svg>"
    )


def _crowd(dots: list[Dot]) -> str:
    """Too many to have a text each."""
    parts = []
    for series, members in groupby(sorted(dots, key=lambda dot: dot.series), lambda dot: dot.series):
        places = "".join(f"M{1000 * dot.across:.0f} {1000 * dot.down:.0f}h0" for dot in members)
        parts.append(f'<g class="{_style(series)}"><path class="dot" d="{places}"/></g>')
    return "".join(parts)


def _legend(item: Plot, names: list[str]) -> list[tuple[str, str]]:
    entries = []
    for index, name in enumerate(names[:SERIES]):
        line = '<line class="line" x1="1" x2="29" y1="6" y2="6"/>' if name in item.curves else ""
        mark = ""
        if name in item.points:
            mark = f'<g class="mark" transform="translate(15 6)">{MARKS[index]}</g>'
        elif not item.steps and not item.points:
            mark = '<path class="dot" d="M15 6h0"/>'
        width = 30 if line else 14
        view = "0 0 30 12" if line else "8 0 14 12"
        swatch = f'<svg width="{width}" height="12" viewBox="{view}" aria-hidden="true"><g class="s{index}">{line}{mark}</g></svg>'
        entries.append((swatch, shorten(name, 60)))
    if len(names) > SERIES:
        line = '<line class="line" x1="1" x2="29" y1="6" y2="6"/>'
        swatch = f'<svg width="30" height="12" aria-hidden="true"><g class="rest">{line}</g></svg>'
        entries.append((swatch, f"{len(names) - SERIES} more"))
    return entries if len(entries) > 1 or entries[0][1] else []


def _outline(item: Plot, across: Axis, down: Axis) -> list[tuple[float, float]]:
    """Places along the curves, which names had better not cover, from 0 to 1."""
    found = []
    for line in item.curves.values():
        places = thin([(across.share(x), 1 - down.share(y)) for x, y in line], 50)
        for (x0, y0), (x1, y1) in pairwise(places):
            count = 1 + int(100 * max(abs(x1 - x0), abs(y1 - y0)))
            found += [(x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count) for step in range(count + 1)]
    return found

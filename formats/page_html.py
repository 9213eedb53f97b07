"""Sections of the neutral page model (`page`) as one self-contained page for the browser.

Like the report's own page it loads nothing and needs no script: escaped text, tables, and charts as inline SVG.
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.formats import svg, svg_plots, svg_timeline
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table, Timeline
from tersor.formats.svg import SERIES, escape
from tersor.formats.units import finite

ROOM = 52  # letters of label and value that stand side by side on a narrow screen


def render(
    title: str,
    eyebrow: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[Section],
    provenance: Sequence[tuple[str, str]],
) -> str:
    """The page. `title` is its headline, one sentence; `eyebrow` the small line above; tiles are name, value, a word.

    `provenance` is what it takes to do it again, names and values; the one named "command" is set as a shell line.
    The same content gives the same page.
    """
    body = [svg.header(eyebrow, title, tiles)]
    for index, section in enumerate(sections):
        items = "".join(_item(f"s{index}-{at}", item) for at, item in enumerate(section.items))
        lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
        body.append(svg.section(section.title, lead + items))
    lines = "".join(f"<p>{svg.command(value)}</p>" for name, value in provenance if name == "command")
    body.append(
        svg.section("How to do it again", lines + svg.facts(pair for pair in provenance if pair[0] != "command"))
    )
    return svg.page(title, "".join(body))


def _item(key: str, item: Facts | Notes | Table | Bars | Plot | Timeline) -> str:
    match item:
        case Facts():
            return svg.facts(item.pairs)
        case Notes(warn=True):
            return svg.warnings(item.lines, 3)
        case Notes(lines=[line]):
            return f"<p>{escape(line)}</p>"
        case Notes():
            return svg.listing(item.lines, "notes")
        case Table():
            return _table(item)
        case Bars():
            return _bars(key, item)
        case Plot():
            return svg_plots.plot(key, item)
        case Timeline():
            return svg_timeline.timeline(key, item)
    raise TypeError(f"{type(item).__name__} is no part of a page")


def _table(item: Table) -> str:
    """Folded ones open on a click. Every row has as many cells as there are columns."""
    width = len(item.columns)
    rows = []
    for row in item.rows:
        cells = [*row, *[""] * (width - len(row))]
        body = "".join(
            f"<td{' class=n' if at >= item.numeric_from else ''}>{escape(cell)}</td>" for at, cell in enumerate(cells)
        )
        rows.append(f"<tr>{body}</tr>\n")
    table = svg.table(item.title or "Table", item.columns, f"<tbody>{''.join(rows)}</tbody>", item.numeric_from)
    note = f'<p class="soft">{escape(item.note)}</p>' if item.note else ""
    if item.folded:
        count = f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'}"
        summary = f"{escape(item.title)} ({count})" if item.title else count
        return f"<details><summary>{summary}</summary>{note}{table}</details>"
    return f"{f'<h3>{escape(item.title)}</h3>' if item.title else ''}{note}{table}"


def _bars(key: str, item: Bars) -> str:
    """A colour per series; the ninth and later ones share one. Long labels lose their beginning."""
    names = list(dict.fromkeys(name for _, _, segments in item.rows for name, _ in segments))
    classes = {name: f"s{index}" if index < SERIES else "rest" for index, name in enumerate(names)}
    legend = {f"s{index}": name for index, name in enumerate(names[:SERIES])}
    if len(names) > SERIES:
        legend["rest"] = ", ".join(names[SERIES:])
    rows = []
    for label, value, segments in item.rows:
        track = [(classes[name], max(finite(length) or 0.0, 0.0)) for name, length in segments]
        value = value if len(value) <= ROOM - 12 else value[: ROOM - 13] + "…"
        rows.append(svg.Bar(svg.shorten(label, ROOM - len(value)), value, [track]))
    return svg.bars(key, item.title, item.note, rows, legend, 12)

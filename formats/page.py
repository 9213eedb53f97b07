"""What a page says, apart from how it looks: sections of tables and plots, for the terminal and for the browser alike.

A command builds `Section`s from its numbers; `page_text` prints them, `page_html` draws them. Cells and labels are
finished text (`units` has the forms), so that both show the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tersor.formats.units import finite


@dataclass(frozen=True)
class Facts:
    """Names and values, one under the other."""

    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Notes:
    """Sentences; with `warn` they are set apart."""

    lines: list[str]
    warn: bool = False


@dataclass(frozen=True)
class Table:
    """`rows` of cells in words. Columns from `numeric_from` on are numbers, set right. `folded` tables are long ones:

    the browser hides them behind a click, the terminal shows the first few rows.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    numeric_from: int = 1
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: (label, value in words, segments as (series name, value)). The terminal prints the words."""

    title: str
    note: str
    rows: list[tuple[str, str, list[tuple[str, float]]]]


@dataclass(frozen=True)
class Plot:
    """Curves and points over two axes. Browser only, so whatever matters in it stands in a table or a note too.

    `curves` are lines and `points` are dots: series name → [(x, y)] and [(x, y, what the dot is)]. What stands
    before the first ", " of that is written beside the dot, where there is room. `steps` draws curves
    as stairs (a value holds until the next x), `log_x` and `log_y` need positive values. `unit_*` is a name of UNITS.
    """

    title: str
    note: str
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    points: dict[str, list[tuple[float, float, str]]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    steps: bool = False
    unit_x: str = "number"
    unit_y: str = "number"


class Span(NamedTuple):
    """From `start` to `end` something of a `series` happens. `text` stands on it where there is room, `what` under the
    pointer; `shade` is one of the names that the timeline has for shades."""

    start: float
    end: float
    series: str
    text: str = ""
    what: str = ""
    shade: int = 0


@dataclass(frozen=True)
class Timeline:
    """What happens when, in seconds: rows of (label, value in words, spans), one under the other.

    Spans of a row do not overlap. `shades` are names for shades of the colours, from light to dark. `cut`, (from, to), is
    a time in which everything goes on as before and that is left out. The terminal shows it in signs.
    """

    title: str
    note: str
    rows: list[tuple[str, str, list[Span]]]
    shades: list[str] = field(default_factory=list)
    cut: tuple[float, float] | None = None


def drawable(item: Timeline) -> Timeline:
    """Without spans that have no place in time; the note counts them."""
    lost, rows = 0, []
    for label, value, spans in item.rows:
        kept = [span for span in spans if finite(span.start) is not None and finite(span.end) is not None]
        lost += len(spans) - len(kept)
        rows.append((label, value, kept))
    note = f"{item.note} {lost:,} without a time left out.".strip() if lost else item.note
    return replace(item, rows=rows, note=note)


def windows(item: Timeline) -> list[tuple[float, float]]:
    """The times that a timeline shows, (from, to): all of it, or what is before and what is after its cut."""
    ends = [time for _, _, spans in item.rows for span in spans for time in (span.start, span.end)]
    start, end = min(0.0, *ends), max(ends)
    if item.cut and start < item.cut[0] < item.cut[1] < end:
        return [(start, item.cut[0]), (item.cut[1], end)]
    return [(start, end)]


UNITS = ("number", "size", "count", "duration", "percent")


@dataclass(frozen=True)
class Section:
    """`lead` is the one sentence that a hurried reader takes away."""

    title: str
    items: list[Facts | Notes | Table | Bars | Plot | Timeline]
    lead: str = ""

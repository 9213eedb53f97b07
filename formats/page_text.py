"""Sections of the neutral page model (`page`) as plain text, for the terminal and for pasting into a design review.

No colours and no frames: headings are underlined, columns stand under their names. Plots are for the browser; what
matters in them stands in a table or a note too.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence

from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Span, Table, Timeline, drawable, windows
from tersor.formats.svg import spelled
from tersor.formats.units import finite

FIRST_ROWS = 8  # of a folded table
WIDEST_BAR = 40
FILLS = "█▒▓░"
GLUE = "\ue000"  # keeps the parts of a number together while rich lays out; it breaks lines at any other space
ASCII = str.maketrans(
    {
        "×": "x", "·": "-", "…": "...", "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~",
        "±": "+-", "≠": "!=", "°": " deg", "µ": "u", "μ": "u", "“": '"', "”": '"', "‘": "'", "’": "'", "√": "sqrt",
        "Δ": "delta", "∞": "inf", "█": "#", "▒": "=", "▓": "+", "░": ".",
    }
)  # fmt: skip
SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def render(sections: Sequence[Section], width: int, ascii_only: bool = False) -> str:
    """Text of at most `width` columns (never fewer than 40 are used), ending in a newline unless it is empty.

    `ascii_only` spells out what a stream that is not UTF-8 cannot carry. Nothing in it controls a terminal, whatever
    the texts hold. The same content gives the same text.
    """
    width = max(width, 40)
    parts = []
    for section in sections:
        items = [text for item in section.items if (text := _item(item, width))]
        if section.lead:
            items.insert(0, _sentence(section.lead, width))
        if items:
            title = _sentence(section.title, width)
            line = "=" * max(map(len, title.splitlines()), default=0)
            parts.append("\n\n".join([f"{title}\n{line}".strip(), *items]))
    text = "\n\n\n".join(parts) + "\n" if parts else ""
    return plain(text) if ascii_only else text


def plain(text: str) -> str:
    """`text` in ASCII: signs in words or look-alikes, letters without accents, a question mark for the rest."""
    parts, raised = [], False
    for character in text.translate(ASCII):
        below = character.translate(SUPERSCRIPT)
        parts.append("^" + below if below != character and not raised else below)
        raised = below != character
    letters = (sign for sign in unicodedata.normalize("NFKD", "".join(parts)) if not unicodedata.combining(sign))
    return "".join(letters).encode("ascii", "replace").decode()


def _item(item: Facts | Notes | Table | Bars | Plot | Timeline, width: int) -> str:
    match item:
        case Facts():
            return _columns([[name, value] for name, value in item.pairs], width)
        case Notes(lines=[line], warn=False):
            return _sentence(line, width)
        case Notes():
            mark = "Warning:" if item.warn else "-"
            return _columns([[mark, line] for line in item.lines], width, gap=1)
        case Table():
            return _table(item, width)
        case Bars():
            return _bars(item, width)
        case Plot():
            return ""
        case Timeline():
            return _timeline(item, width)
    raise TypeError(f"{type(item).__name__} is no part of a page")


def _table(item: Table, width: int) -> str:
    """A table too wide even with names of columns broken goes on below, its first column repeated."""
    across = max(len(item.columns), *map(len, item.rows)) if item.rows else len(item.columns)
    shown = item.rows[:FIRST_ROWS] if item.folded else item.rows
    rows = [[*map(spelled, row), *[""] * (across - len(row))] for row in (item.columns, *shown)]
    least = [_least([row[at] for row in rows], at >= item.numeric_from, True) for at in range(across)]
    blocks = [list(range(across))]
    if sum(least) + across - 1 > width:
        blocks = [[0]]
        for at in range(1, across):
            if len(blocks[-1]) > 1 and sum(least[other] + 2 for other in blocks[-1]) + least[at] > width:
                blocks.append([0])
            blocks[-1].append(at)
    parts = [_sentence(text, width) for text in (item.title, item.note) if text]
    for index, block in enumerate(blocks):
        numeric_from = sum(at < item.numeric_from for at in block)
        text = _columns([[row[at] for at in block] for row in rows], width, numeric_from, heads=True)
        parts.append(f"\n{text}" if index else text)
    if len(item.rows) > len(shown):
        parts.append(f"… {len(item.rows) - len(shown):,} more in report.html")
    return "\n".join(parts)


def _bars(item: Bars, width: int) -> str:
    """A row of block signs per bar; up to four series have signs of their own, further ones share the last."""
    names = list(dict.fromkeys(name for _, _, segments in item.rows for name, _ in segments))
    fills = {name: FILLS[min(index, len(FILLS) - 1)] for index, name in enumerate(names)}
    rows = [
        (label, value, [(fills[name], max(finite(length) or 0.0, 0.0)) for name, length in segments])
        for label, value, segments in item.rows
    ]
    longest = max((sum(length for _, length in segments) for _, _, segments in rows), default=0.0) or 1.0
    words = max((len(label) for label, _, _ in rows), default=0) + max((len(value) for _, value, _ in rows), default=0)
    most = max(10, min(WIDEST_BAR, width - words - 4))
    lines = [[label, _bar(segments, longest, most), value] for label, value, segments in rows]
    parts = [_sentence(text, width) for text in (item.title, item.note) if text]
    if len(names) > 1:
        parts.append(_sentence("   ".join(f"{fills[name]} {name}" for name in names), width))
    return "\n".join([*parts, _columns(lines, width, 2)])


def _bar(segments: list[tuple[str, float]], longest: float, most: int) -> str:
    """Segments end at the nearest column; a bar that is not zero has a sign at least."""
    text, total = "", 0.0
    for fill, length in segments:
        total += length
        text += fill * (round(most * total / longest) - len(text))
    return text or (next(fill for fill, length in segments if length) if total else "")


def _timeline(item: Timeline, width: int) -> str:
    """A row of signs per row; a sign is what takes most of its time, a dot where nothing happens."""
    item = drawable(item)
    names = list(dict.fromkeys(span.series for _, _, spans in item.rows for span in spans))
    fills = {name: FILLS[min(index, len(FILLS) - 1)] for index, name in enumerate(names)}
    label, value = (max((len(spelled(row[at])) for row in item.rows), default=0) for at in (0, 1))
    room = width - label - value - 4
    parts = windows(item) if names else []
    whole = sum(end - start for start, end in parts)
    if not whole or room < 16:
        return "\n".join(_sentence(text, width) for text in (item.title, item.note) if text)
    first = round((room - 3) * (parts[0][1] - parts[0][0]) / whole)
    first = min(max(first, 1), room - 4)
    signs = [room] if len(parts) == 1 else [first, room - 3 - first]
    lines = []
    for name, words, spans in item.rows:
        strips = [
            "".join(_strip(spans, start, end, count, fills)) for (start, end), count in zip(parts, signs, strict=True)
        ]
        lines.append(f"{spelled(name):<{label}}  {' ~ '.join(strips)}  {spelled(words):>{value}}".rstrip())
    legend = "   ".join([*(f"{fills[name]} {name}" for name in names), *(["~ left out"] if item.cut else [])])
    return "\n".join([*(_sentence(text, width) for text in (item.title, item.note, legend) if text), *lines])


def _strip(spans: Sequence[Span], start: float, end: float, count: int, fills: dict[str, str]) -> list[str]:
    """`count` signs for the time from `start` to `end`."""
    step = (end - start) / count
    taken: list[dict[str, float]] = [{} for _ in range(count)]
    for span in spans:
        first, last = max(span.start, start), min(span.end, end)
        for at in range(int((first - start) / step), count) if first < last else ():
            inside = min(last, start + (at + 1) * step) - max(first, start + at * step)
            if inside <= 0:
                break
            taken[at][fills[span.series]] = taken[at].get(fills[span.series], 0.0) + inside
    found = []
    for shares in taken:
        fill = max(shares, key=shares.get, default="·")
        found.append(fill if sum(shares.values()) > step / 2 else "·")
    return found


def _sentence(text: str, width: int) -> str:
    return _columns([[text]], width)


def _columns(
    rows: Iterable[Sequence[str]], width: int, numeric_from: int = 1_000, heads: bool = False, gap: int = 2
) -> str:
    """Cells in columns, those from `numeric_from` on set right and never broken while anything else can be.

    With `heads` the first row is underlined.
    """
    from rich.align import Align
    from rich.box import Box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    rows = [[spelled(cell) for cell in row] for row in rows]
    if not rows:
        return ""
    across = max(map(len, rows))
    rows = [[*row, *[""] * (across - len(row))] for row in rows]
    wide = [max(cell_len(row[at]) for row in rows) for at in range(across)]
    least = [_least([row[at] for row in rows], at >= numeric_from, heads) for at in range(across)]
    if heads and sum(least) + gap * (across - 1) > width:
        gap = 1  # the line under the names still tells columns apart
    room = width - gap * (across - 1)
    cells = [max([low, *(cell_len(row[at]) for row in rows[heads:])]) for at, low in enumerate(least)]
    rule = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True) if heads else None
    grid = Grid(box=rule, show_header=heads, show_edge=False, pad_edge=False, padding=(0, gap - heads, 0, 0))
    for at, extent in enumerate(_shared(room, least, cells, wide)):
        side = "right" if at >= numeric_from else "left"
        head = Align(Text(rows[0][at]), side, vertical="bottom") if heads else ""
        grid.add_column(head, justify=side, overflow="fold", max_width=extent)
    for row in rows[heads:]:
        grid.add_row(*(Text(cell.replace(" ", GLUE) if at >= numeric_from else cell) for at, cell in enumerate(row)))
    output = io.StringIO()
    console = Console(
        file=output, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
    )
    console.print(grid)
    return "\n".join(line.rstrip() for line in output.getvalue().replace(GLUE, " ").splitlines())


def _least(cells: list[str], numeric: bool, heads: bool) -> int:
    """Columns that a column of a table needs for no word to break, and no number: only names break between words."""
    from rich.cells import cell_len

    whole = cells[heads:] if numeric else []
    words = [word for cell in cells[: heads or None if numeric else None] for word in cell.split()]
    return max([1, *map(cell_len, whole), *map(cell_len, words)])


def _shared(room: int, *wishes: list[int]) -> list[int]:
    """Widths of columns: the first wishes, then of the next as much as there is room for, most to what lacks most."""
    widths = list(wishes[0])
    for wished in wishes[1:]:
        for _ in range(min(room, sum(wished)) - sum(widths)):
            at = max(range(len(widths)), key=lambda at: wished[at] - widths[at])
            widths[at] += 1
    return widths

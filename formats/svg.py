"""What a page is made of that loads nothing: escaped text, numbers in human units, tables, and charts as inline SVG.

Charts stretch to the width of the page while their text keeps its size: labels stand at percentages, and the lines of
a plot live in a nested `<svg preserveAspectRatio="none">` whose strokes do not scale. Colours are CSS classes (`s0` to
`s7`, `before`, `after`, `kept`), so that one stylesheet serves a light and a dark page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

SERIES = 8  # as many as there are colours that people with any colour vision can tell apart, each with its own dashes
DOTS = 1200  # a plot of more points has lines only
COLUMNS = 400  # and no more points along x than a screen can show
# Filters and sorts the searchable table, within its groups; without it the table is only longer to read.
SCRIPT = """
const table = document.getElementById("searchable"), box = document.getElementById("find");
if (table) {
  const bodies = [...table.tBodies].map(body => [body, [...body.rows].slice(1)]), heads = [...table.tHead.rows[0].cells];
  box.hidden = false;
  box.oninput = () => bodies.forEach(([, rows]) => rows.forEach(row => row.hidden = !row.textContent.includes(box.value)));
  heads.forEach((head, i) => {
    const button = document.createElement("button"), key = row => row.cells[i].dataset.v ?? row.cells[i].textContent;
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort === "descending" ? 1 : -1, text = new Intl.Collator("en", {numeric: true});
      heads.forEach(other => other.ariaSort = other === head ? (sign > 0 ? "ascending" : "descending") : null);
      for (const [body, rows] of bodies)
        body.append(...rows.sort((a, b) => sign * (key(a) - key(b) || text.compare(key(a), key(b)))));
    };
  });
}
"""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Bar(NamedTuple):
    """One row of `bars`: what it is, the value in words, and its bars as (class, [(class, value), ...]) segments."""

    label: str
    value: str
    tracks: list[list[tuple[str, float]]]


def escape(text: object) -> str:
    """`text` as HTML. Control, bidirectional and surrogate characters are spelled out: names may be hostile."""
    plain = str(text)
    if not plain.isprintable():
        plain = "".join(_spelled(character) if not character.isprintable() else character for character in plain)
    return html.escape(plain)


def _spelled(character: str) -> str:
    if character.isspace() and unicodedata.category(character) == "Zs":
        return " "
    return f"\\u{ord(character):04x}"


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, as disks and the Hub count them."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} TB"


def count(value: float) -> str:
    for power, unit in ((12, " T"), (9, " B"), (6, " M"), (3, " k")):
        if value >= 10**power:
            return f"{value / 10**power:.4g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 2)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def finite(value: object) -> float | None:
    """`value` if it is a number that a float can hold, which a report from elsewhere need not keep to."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def number(given: object, digits: int = 3) -> str:
    """`digits` significant digits, more where the whole part has them; other things as they are."""
    if (value := finite(given)) is None:
        return str(given)
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    power = math.floor(math.log10(abs(value)))
    if power < -4:
        return f"{value / 10.0**power:.2g}×10{str(power).translate(SUPERSCRIPT)}"
    return f"{value:.{max(0, digits - 1 - power)}f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    return f"{number(100 * share, 2 if share < 0.1 else 3)} %"


def ratio(before: float, after: float) -> str:
    if before == after:
        return "same size"
    return f"{number(before / after)}× smaller" if after < before else f"{number(after / before)}× larger"


def shorten(text: str, limit: int) -> str:
    """The end of a long name says more than its beginning."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


def keyed(key: str, value: object) -> tuple[str, str]:
    """A key of a report whose name ends in its unit, and its value: `decode_seconds` 0.5 is "decode", "0.5 s"."""
    units = {"_bytes": size, "_seconds": duration, "_gbps": lambda speed: f"{number(speed)} GB/s"}
    if finite(value) is not None:
        for unit, form in units.items():
            if key.endswith(unit):
                return key.removesuffix(unit).replace("_", " "), form(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else number(value)
    return key.replace("_", " "), text if value is not None and value != [] else "—"


def flat(values: dict, above: str = "") -> Iterable[tuple[str, Any]]:
    """Nested quality as one list: {"speed": {"decode_seconds": 1}} gives "speed · decode_seconds"."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key} · ")
        else:
            yield above + key, value


def few(texts: Iterable[str], most: int = 2) -> str:
    """The first of the different texts and how many more there are, as HTML."""
    found = list(dict.fromkeys(texts))
    return escape(", ".join(found[:most]) + (f" and {len(found) - most:,} more" if len(found) > most else ""))


def listing(texts: Iterable[object]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def facts(pairs: Iterable[tuple[object, object]]) -> str:
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{body}</dl>' if body else ""


def tiles(found: Iterable[tuple[str, object, str]]) -> str:
    """Name, value and a word on it."""
    body = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in found)
    return f'<dl class="tiles">{"".join(body)}</dl>'


def table(label: str, heads: Sequence[str], bodies: str, numeric_from: int, key: str = "") -> str:
    """`bodies` is HTML, the tbody elements. Columns from `numeric_from` on are numbers."""
    row = "".join(
        f'<th scope="col"{" class=n" if index >= numeric_from else ""}>{escape(text)}</th>'
        for index, text in enumerate(heads)
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"<table{f' id={key}' if key else ''}><thead><tr>{row}</tr></thead>{bodies}</table></div>"
    )


def searchable_table(label: str, heads: Sequence[str], bodies: str, numeric_from: int) -> str:
    """One table of a page may be this one. The first row of each tbody is its heading, and `data-v` what cells sort by."""
    return (
        '<input id="find" type="search" placeholder="part of a row" aria-label="Show rows that contain" hidden>'
        + table(label, heads, bodies, numeric_from, "searchable")
    )


def section(title: str, body: str) -> str:
    """`body` is HTML; no section without one."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def policy_hash(text: str) -> str:
    """How a content security policy names an inline text that it lets through."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def small(text: object) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def bars(key: str, title: str, description: str, rows: Sequence[Bar], classes: dict[str, str], height: int = 9) -> str:
    """Horizontal bars under their labels. `key` makes the ids of the page unique; `classes` explains the colours."""
    longest = max((sum(value for _, value in track) for row in rows for track in row.tracks), default=0) or 1
    parts, y = [], 0
    for row in rows:
        parts.append(f'<text x="0" y="{y + 12}">{escape(row.label)}</text>')
        parts.append(f'<text class="value" x="100%" y="{y + 12}">{escape(row.value)}</text>')
        y += 18
        for track in row.tracks:
            x = 0.0
            for name, value in track:
                width = 100 * value / longest
                parts.append(f'<rect class="{name}" x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{height}"/>')
                x += width
            y += height + 2
        y += 9
    used = {name for row in rows for track in row.tracks for name, _ in track}
    keys = [(f'<span class="key {name}"></span>', text) for name, text in classes.items() if name in used]
    return _figure(key, title, description, y, "bars", "".join(parts), keys)


def lines(
    key: str,
    title: str,
    description: str,
    points: Iterable[tuple[str, int, float]],
    form: Callable[[float], str],
    x_label: str,
    height: int = 240,
) -> str:
    """A line per label over whole numbers x, from points (label, x, y); nothing for fewer than two different x.

    Labels keep their order, and past SERIES of them the rest share one line. Points that share label and x become
    their mean. The y axis is logarithmic where values span more than a decade; there zeros lie on the lower edge.
    """
    points = list(points)
    if len({x for _, x, _ in points}) < 2:
        return ""
    series, averaged = _series(points)
    description += " Means where a layer has several of a kind." if averaged else ""
    values = [y for _, points in series for _, y in points]
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) > 10 * min(positive)
    low, high, ticks = _log_axis(min(positive), max(positive)) if logarithmic else _linear_axis(max(values))
    left, right = min(x for _, x, _ in points), max(x for _, x, _ in points)

    def across(x: float) -> float:
        return 1000 * (x - left) / (right - left)

    def down(y: float) -> float:
        if logarithmic:
            share = (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            share = (max(y, low) - low) / (high - low)
        return 1000 * (1 - share)

    parts = []
    for tick in ticks:
        y = down(tick) / 10
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}%" y2="{y:.1f}%"/>')
        parts.append(f'<text class="value" x="-8" y="{y:.1f}%" dy="4">{escape(form(tick))}</text>')
    for tick in _whole_ticks(left, right):
        parts.append(f'<text class="middle" x="{across(tick) / 10:.1f}%" y="100%" dy="18">{tick:.0f}</text>')
    parts.append(f'<text class="middle" x="50%" y="100%" dy="36">{escape(x_label)}</text>')
    parts.append(
        '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" overflow="visible">'
    )
    dots = len(values) <= DOTS
    for index, (label, points) in enumerate(series):
        path = " ".join(f"{across(x):.0f},{down(y):.0f}" for x, y in points)
        parts.append(f'<g class="s{index}"><polyline class="line" points="{path}"/>')
        if dots:
            name = escape(label)
            parts += [
                f'<path class="dot" d="M{across(x):.0f} {down(y):.0f}h0"><title>{name}, {x:.0f}: {escape(form(y))}</title></path>'
                for x, y in points
            ]
        parts.append("</g>")
    parts.append("</svg>")
    legend = [(_swatch(index), shorten(label, 40)) for index, (label, _) in enumerate(series)]
    return _figure(key, title, description, height, "lines", "".join(parts), legend)


def _figure(
    key: str, title: str, description: str, height: int, kind: str, body: str, legend: Iterable[tuple[str, str]]
) -> str:
    """`legend` has a swatch, in HTML, and what it stands for."""
    key, title, description = escape(key), escape(title), escape(description)
    items = "".join(f"<li>{swatch}{escape(text)}</li>" for swatch, text in legend)
    return (
        f'<figure><figcaption><b>{title}</b> {description}</figcaption><ul class="legend">{items}</ul>'
        f'<svg class="{kind}" role="img" aria-labelledby="{key}-title {key}-text" height="{height}">'
        f'<title id="{key}-title">{title}</title><desc id="{key}-text">{description}</desc>{body}</svg></figure>'
    )


def _swatch(index: int) -> str:
    return (
        f'<svg width="30" height="10" aria-hidden="true"><g class="s{index}"><line class="line" x1="1" x2="29" y1="5" y2="5"/>'
        f'<path class="dot" d="M15 5h0"/></g></svg>'
    )


def _series(points: list[tuple[str, int, float]]) -> tuple[list[tuple[str, list[tuple[int, float]]]], bool]:
    """Lines as (label, [(x, y)]) with x ascending and at most COLUMNS of them, and whether a y is a mean."""
    labels = list(dict.fromkeys(label for label, _, _ in points))
    others = f"{len(labels) - SERIES + 1} other kinds"
    labels = labels if len(labels) <= SERIES else [*labels[: SERIES - 1], others]
    first, last = min(x for _, x, _ in points), max(x for _, x, _ in points)
    step = (last - first) // COLUMNS + 1
    found = {label: defaultdict(list) for label in labels}
    for label, x, y in points:
        found[label if label in found else others][first + (x - first) // step * step].append(y)
    averaged = any(len(values) > 1 for line in found.values() for values in line.values())
    return [
        (label, [(x, sum(ys) / len(ys)) for x, ys in sorted(line.items())]) for label, line in found.items()
    ], averaged


def _linear_axis(top: float) -> tuple[float, float, list[float]]:
    """From zero to a little over `top`, with a tick at every 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return 0.0, 1.0, [0.0]
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 5)
    count = math.ceil(top / step - 1e-9)
    return 0.0, step * count, [step * index for index in range(count + 1)]


def _log_axis(bottom: float, top: float) -> tuple[float, float, list[float]]:
    """A tick at every decade, thinned when there are many; at 1, 2 and 5 when there are few."""
    first, last = math.floor(math.log10(bottom)), math.ceil(math.log10(top))
    low, high = max(bottom * 0.8, 1e-300), min(top * 1.25, 1e300)
    every = math.ceil((last - first) / 6)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return low, high, [tick for tick in ticks if low <= tick <= high]


def _whole_ticks(left: float, right: float) -> list[float]:
    span = right - left
    if span <= 0:
        return [left]
    step = max(1, 10 ** math.floor(math.log10(span / 4 or 1)))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 7)
    first = math.ceil(left / step) * step
    return [first + step * index for index in range(int((right - first) // step) + 1)]

"""What a page is made of that loads nothing: its shell, escaped text, tables, and bars as inline SVG (`svg_plots` has
curves and points).

Charts stretch to the width of the page while their text keeps its size: labels stand at percentages. Colours are CSS
classes (`s0` to `s7`, `rest`, `before`, `after`, `kept`), so that one stylesheet serves a light and a dark page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tersor.formats.units import duration, finite, number, size

SERIES = 8  # as many as there are colours that people with any colour vision can tell apart, each with its own dashes
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


class Bar(NamedTuple):
    """One row of `bars`: what it is, the value in words, and its bars as (class, [(class, value), ...]) segments."""

    label: str
    value: str
    tracks: list[list[tuple[str, float]]]


def page(title: str, body: str, script: str = "") -> str:
    """A whole page that may load nothing and run nothing but `script`. `body` is HTML."""
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {policy_hash(style)}"
    policy += f"; script-src {policy_hash(script)}" if script else ""
    end = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · tersor</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n{end}</body>\n</html>\n"
    )


def header(eyebrow: str, title: str, found: Iterable[tuple[str, object, str]]) -> str:
    """The top of a page: one sentence, and the numbers in tiles."""
    return f'<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n<h1>{escape(title)}</h1>\n{tiles(found)}\n</header>'


def policy_hash(text: str) -> str:
    """How a content security policy names an inline text that it lets through."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def escape(text: object) -> str:
    """`text` as HTML, on one line."""
    return html.escape(spelled(text))


def spelled(text: object) -> str:
    """`text` with control, bidirectional and surrogate characters spelled out: names may be hostile."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(character if character.isprintable() else _spelled(character) for character in plain)


def _spelled(character: str) -> str:
    if character.isspace() and unicodedata.category(character) == "Zs":
        return " "
    return f"\\u{ord(character):04x}"


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


def command(line: str) -> str:
    """A command line as HTML that breaks before options, not within."""
    return f"<code><span>{escape(line).replace(' --', '</span> <span>--')}</span></code>"


def warnings(texts: Sequence[str], level: int = 2) -> str:
    """A box that stands out; `level` is that of its heading."""
    title = "1 warning" if len(texts) == 1 else f"{len(texts)} warnings"
    return f'<div class="warnings"><h{level}>{title}</h{level}>{listing(texts)}</div>' if texts else ""


def listing(texts: Iterable[object], kind: str = "") -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul{f' class={kind}' if kind else ''}>{items}</ul>" if items else ""


def facts(pairs: Iterable[tuple[object, object]]) -> str:
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{body}</dl>' if body else ""


def tiles(found: Iterable[tuple[str, object, str]]) -> str:
    """Name, value and a word on it."""
    body = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}{small(c)}</dd></div>" for a, b, c in found)
    return f'<dl class="tiles">{body}</dl>' if body else ""


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
                width = max(100 * value / longest, 0.3 if value and not x else 0)  # what there is can be seen
                place = f'x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{height}"'
                parts.append(f'<rect class="{name}" {place}><title>{escape(classes.get(name, ""))}</title></rect>')
                x += width
            y += height + 2
        y += 9
    used = {name for row in rows for track in row.tracks for name, _ in track}
    keys = [(f'<span class="key {name}"></span>', text) for name, text in classes.items() if name in used]
    keys = keys if len(keys) > 1 else []
    return figure(key, title, description, y, "bars", "".join(parts), keys)


def figure(
    key: str,
    title: str,
    description: str,
    height: int,
    kind: str,
    body: str,
    legend: Iterable[tuple[str, str]],
    scrolls: bool = False,
) -> str:
    """A chart of `height` pixels with its caption, drawn by `body`; one that `scrolls` keeps a least width.

    `legend` has a swatch, in HTML, and what it stands for. Without a body there is the caption alone.
    """
    key, title, description = escape(key), escape(title), escape(description)
    caption = f"<figcaption>{f'<b>{title}</b> ' if title else ''}{description}</figcaption>"
    if not body:
        return f"<figure>{caption}</figure>"
    items = "".join(f"<li>{swatch}{escape(text)}</li>" for swatch, text in legend)
    items = f'<ul class="legend">{items}</ul>' if items else ""
    picture = (
        f'<svg class="{kind}" role="img" aria-labelledby="{key}-title {key}-text" height="{height}">'
        f'<title id="{key}-title">{title}</title><desc id="{key}-text">{description}</desc>{body}</svg>'
    )
    if scrolls:
        picture = f'<div class="scroll wide" role="region" aria-label="{title}" tabindex="0">{picture}</div>'
    return f"<figure>{caption}{items}{picture}</figure>"

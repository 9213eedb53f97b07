"""What happens when, as inline SVG: a row of blocks per worker over one axis of time.

Blocks stand at percentages of the width, so that the picture stretches and its text does not. Colours are the classes of
`report.css`; a block is a tint of its colour with an edge of the full one, which text can be read on in light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tersor.formats import units
from tersor.formats.axes import axis
from tersor.formats.page import Span, Timeline, drawable, windows
from tersor.formats.svg import SERIES, escape, figure, shorten

ROW, THICK = 23, 19  # pixels from row to row, and of a block
WIDTH = 730  # pixels of the picture on the narrowest screen: it scrolls rather than be narrower
LETTER = 6.1  # pixels of the small text on a block
TITLED = 2400  # more blocks than these have no text under the pointer, and are drawn as one path for each colour
GAP = 0.03  # of the width, where time is left out
TINTS = (0.3, 0.62)  # opacity of the first and last shade


class Place(NamedTuple):
    """A span in the picture: its row, left edge and width as shares of the picture's width."""

    row: int
    left: float
    width: float
    span: Span


def timeline(key: str, item: Timeline) -> str:
    """`item` as a figure. `key` makes the ids of the page unique."""
    item = drawable(item)
    if not any(spans for _, _, spans in item.rows):
        return figure(key, item.title, f"{item.note} There is nothing to draw.".strip(), 0, "", "", [])
    names = list(dict.fromkeys(span.series for _, _, spans in item.rows for span in spans))
    panels = _panels(item)
    places = [place for panel in panels for place in _places(item, *panel)]
    height = ROW * len(item.rows)
    parts = [*_labels(item), *_backs(item, panels), *_blocks(places, names, len(item.shades), height)]
    parts += (_text(place) for place in places if _fits(place))
    parts += (part for panel in panels for part in _axis(panel, height))
    parts += (
        f'<text class="middle" x="{100 * (left - GAP / 2):.2f}%" y="{height}" dy="15">…</text>'
        for _, _, left, _ in panels[1:]
    )
    parts.append(f'<text class="middle" x="50%" y="{height}" dy="34">time</text>')
    return figure(key, item.title, item.note, height, "timeline", "".join(parts), _legend(item, names), True)


Panel = tuple[float, float, float, float]  # time from and to, left and right as shares of the width


def _panels(item: Timeline) -> list[Panel]:
    """The windows side by side on one scale."""
    shown = windows(item)
    whole = sum(end - start for start, end in shown) or 1.0
    scale, left, found = (1 - GAP * (len(shown) - 1)) / whole, 0.0, []
    for start, end in shown:
        found.append((start, end, left, left + scale * (end - start)))
        left = found[-1][3] + GAP
    return found


def _places(item: Timeline, start: float, end: float, left: float, right: float) -> Iterator[Place]:
    scale = (right - left) / ((end - start) or 1.0)
    for row, (_, _, spans) in enumerate(item.rows):
        for span in spans:
            first, last = max(span.start, start), min(span.end, end)
            if first < last or span.start == span.end == first <= end:
                yield Place(row, left + scale * (first - start), scale * (last - first), span)


def _blocks(places: list[Place], names: list[str], shades: int, height: int) -> Iterator[str]:
    """A group for each colour and shade."""
    groups: dict[tuple[int, int], list[Place]] = {}
    for place in places:
        groups.setdefault((min(names.index(place.span.series), SERIES), place.span.shade), []).append(place)
    many = len(places) > TITLED
    for (series, shade), members in sorted(groups.items()):
        drawn = _path(members, height) if many else "".join(map(_rect, members))
        yield f'<g class="{_style(series)}" fill-opacity="{_tint(shade, shades):.2f}">{drawn}</g>'


def _style(series: int) -> str:
    return f"s{series}" if series < SERIES else "rest"


def _tint(shade: int, shades: int) -> float:
    light, dark = TINTS
    return light + (dark - light) * min(shade / (shades - 1), 1) if shades > 1 else (light + dark) / 2


def _rect(place: Place) -> str:
    span = place.span
    shown = f'x="{100 * place.left:.2f}%" y="{ROW * place.row + 2}" width="{100 * place.width:.2f}%" height="{THICK}"'
    time = f"{units.latency(span.start)} to {units.latency(span.end)}"
    title = ", ".join(filter(None, (span.what or span.series, time)))
    return f"<rect {shown}><title>{escape(title)}</title></rect>"


def _path(members: list[Place], height: int) -> str:
    boxes = "".join(
        f"M{10_000 * place.left:.0f} {ROW * place.row + 2}h{10_000 * place.width:.0f}v{THICK}h-{10_000 * place.width:.0f}z"
        for place in members
    )
    view = f'width="100%" height="{height}" viewBox="0 0 10000 {height}" preserveAspectRatio="none"'
    return f'<svg {view}><path d="{boxes}"/></svg>'


def _fits(place: Place) -> bool:
    text = place.span.text
    return bool(text) and place.width * WIDTH >= LETTER * len(text) + 4


def _text(place: Place) -> str:
    x, y = 100 * (place.left + place.width / 2), ROW * place.row + 2 + THICK / 2
    return f'<text class="on" x="{x:.2f}%" y="{y:.1f}" dy="4">{escape(place.span.text)}</text>'


def _labels(item: Timeline) -> Iterator[str]:
    for row, (label, value, _) in enumerate(item.rows):
        y = ROW * row + 2 + THICK / 2
        yield f'<text class="value" x="-8" y="{y:.1f}" dy="4">{escape(shorten(label, 10))}</text>'
        yield f'<svg x="100%" y="{y:.1f}"><text x="8" y="0" dy="4">{escape(shorten(value, 11))}</text></svg>'


def _backs(item: Timeline, panels: list[Panel]) -> Iterator[str]:
    """What is seen where nothing happens."""
    for row in range(len(item.rows)):
        for _, _, left, right in panels:
            yield (
                f'<rect class="back" x="{100 * left:.2f}%" y="{ROW * row + 2}" width="{100 * (right - left):.2f}%" '
                f'height="{THICK}"/>'
            )


def _axis(panel: Panel, height: int) -> Iterator[str]:
    start, end, left, right = panel
    found = axis([start, end], "duration", False, False, (right - left) * WIDTH, False)
    for tick, words in zip(found.ticks, found.words, strict=True):
        x = 100 * (left + (right - left) * found.share(tick))
        yield f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{height}" y2="{height + 4}"/>'
        yield f'<text class="middle" x="{x:.2f}%" y="{height}" dy="18">{escape(words)}</text>'


def _legend(item: Timeline, names: list[str]) -> list[tuple[str, str]]:
    entries = [(f'<span class="key s{index}"></span>', shorten(name, 60)) for index, name in enumerate(names[:SERIES])]
    if len(names) > SERIES:
        entries.append(('<span class="key rest"></span>', f"{len(names) - SERIES} more"))
    for shade, name in enumerate(item.shades if len(item.shades) > 1 else ()):
        fill = f'<rect width="12" height="12" fill-opacity="{_tint(shade, len(item.shades)):.2f}"/>'
        swatch = f'<svg class="shade" width="12" height="12" aria-hidden="true"><g fill="currentColor">{fill}</g></svg>'
        entries.append((swatch, shorten(name, 40)))
    return entries

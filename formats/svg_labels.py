"""Names next to the dots of a plot, on places where they cover little."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from tersor.formats.svg import escape, shorten

WIDTHS = (470, 890)  # pixels of a plot with names on the narrowest screen and on a wide one; a place must suit both
LINE, LETTER = 14, 6.3  # pixels that a name takes
DOTS, SPOTS = 40, 12  # so many names, on so many places, can be read
TOGETHER = 7  # dots no further apart share a text


class Spot(NamedTuple):
    """Dots that share a text, the leftmost first, as (across, down) from 0 to 1."""

    dots: list[tuple[float, float]]
    text: list[str]


class Place(NamedTuple):
    """Where a text may stand, in pixels from the dot of its spot that it is anchored to, and how little we like it."""

    left: float
    top: float
    right: float
    bottom: float
    anchor: str
    dislike: float

    def dot(self, spot: Spot) -> tuple[float, float]:
        return spot.dots[-1] if self.anchor == "start" else spot.dots[0]

    def near(self) -> tuple[float, float]:
        """Where a line from the dot meets the text; (0, 0) where none is needed."""
        x, y = min(max(self.left, 0), self.right), min(max(self.top, 0), self.bottom)
        return (x, y) if x**2 + y**2 > 18**2 else (0, 0)


Box = tuple[float, float, float, float]  # left, top, right, bottom


class Offer(NamedTuple):
    """A place, the box of the text in the plot and the line that leads to it at each of WIDTHS, and what it costs."""

    place: Place
    boxes: list[Box]
    leaders: list[list[tuple[float, float]]]
    cost: float


def names(dots: Sequence[tuple[float, float, str]], outline: Sequence[tuple[float, float]], height: int) -> list[str]:
    """SVG of the names of `dots` (across, down, name), which stand clear of each other and mostly of the `outline`.

    Positions run from 0 to 1 over the plot. Nothing where there are too many to be read. Greedy, then each a few
    times more with all others in place.
    """
    if len(dots) > DOTS or len(spots := _spots(dots, height)) > SPOTS:
        return []
    offers = [_offers(spot, dots, outline, height) for spot in spots]
    chosen: list[Offer | None] = [None] * len(spots)

    def cost(index: int, offer: Offer) -> float:
        rivals = [taken for at, taken in enumerate(chosen) if taken and at != index]
        return offer.cost + sum(_conflict(offer, rival) + _conflict(rival, offer) for rival in rivals)

    for _ in range(4):
        for index, places in enumerate(offers):
            chosen[index] = min(places, key=lambda offer, index=index: cost(index, offer))
    return [_drawn(spot, offer.place) for spot, offer in zip(spots, chosen, strict=True)]


def _offers(
    spot: Spot, dots: Sequence[tuple[float, float, str]], outline: Sequence[tuple[float, float]], height: int
) -> list[Offer]:
    """Places for the text of `spot`, and what each costs whatever the other texts do."""
    found = []
    for place in _places(spot.text):
        boxes, cost = [_box(spot, place, width, height) for width in WIDTHS], place.dislike
        leaders = [_along(place, box) for box in boxes]
        for (left, top, right, bottom), width in zip(boxes, WIDTHS, strict=True):
            near = ((left - 4) / width, (top - 4) / height, (right + 4) / width, (bottom + 4) / height)
            hidden = sum(near[0] < x < near[2] and near[1] < y < near[3] for x, y, _ in dots)
            crossed = sum(near[0] < x < near[2] and near[1] < y < near[3] for x, y in outline)
            outside = max(0, -30 - left) + max(0, right - width - 20) + max(0, 2 - top) + max(0, bottom - height + 2)
            cost += 40 * outside + 150 * hidden + 10 * min(crossed, 12)
        found.append(Offer(place, boxes, leaders, cost))
    return found


def _spots(dots: Sequence[tuple[float, float, str]], height: int) -> list[Spot]:
    groups: list[list[tuple[float, float, str]]] = []
    for across, down, name in sorted(dot for dot in dots if dot[2]):
        for group in groups:
            if (across - group[0][0]) * WIDTHS[0] <= TOGETHER and abs(down - group[0][1]) * height <= TOGETHER:
                group.append((across, down, name))
                break
        else:
            groups.append([(across, down, name)])
    order = {name: index for index, (_, _, name) in reversed(list(enumerate(dots)))}
    spots = []
    for group in groups:
        words = list(
            dict.fromkeys(shorten(name, 32) for name in sorted({name for *_, name in group}, key=order.__getitem__))
        )
        text = textwrap.wrap(", ".join(words), 34, break_on_hyphens=False)
        spots.append(Spot([(across, down) for across, down, _ in group], text or [""]))
    return spots


def _places(text: list[str]) -> list[Place]:
    """Beside, above and below, then the same further off."""
    width, height, found = LETTER * max(map(len, text)), LINE * len(text), []
    for gap, dislike in ((8, 0), (26, 120), (52, 180), (84, 260)):
        near = gap == 8
        tops = (-height / 2, -height - gap / 2, gap / 2) if near else (-height - gap, gap, -height / 2)
        sides = [(top, side) for top in tops for side in ("start", "end")]
        for rank, (top, side) in enumerate([*sides, (-height - gap, "middle"), (gap, "middle")]):
            left = {"start": gap, "end": -gap - width, "middle": -width / 2}[side]
            found.append(Place(left, top, left + width, top + height, side, dislike + 6 * rank))
    return found


def _box(spot: Spot, place: Place, width: int, height: int) -> Box:
    x, y = place.dot(spot)[0] * width, place.dot(spot)[1] * height
    return x + place.left, y + place.top, x + place.right, y + place.bottom


def _along(place: Place, box: Box) -> list[tuple[float, float]]:
    """Pixels of the plot on the way from the dot to its text; none where that is close."""
    x, y = place.near()
    if x == y == 0:
        return []
    left, top = box[0] - place.left, box[1] - place.top
    return [(left + x * step / 8, top + y * step / 8) for step in range(9)]


def _conflict(one: Offer, other: Offer) -> float:
    """For the pixels that both texts cover, counted from both sides, and for a line through the other's text."""
    total = 0.0
    for mine, theirs, leader in zip(one.boxes, other.boxes, one.leaders, strict=True):
        width, height = (
            min(mine[2], theirs[2]) - max(mine[0], theirs[0]),
            min(mine[3], theirs[3]) - max(mine[1], theirs[1]),
        )
        total += max(width, 0) * max(height, 0)
        total += 80 * sum(theirs[0] < x < theirs[2] and theirs[1] < y < theirs[3] for x, y in leader)
    return total


def _drawn(spot: Spot, place: Place) -> str:
    """Pixels from the dot, so that the text stays by it at every width; a thin line leads to one that stands far off."""
    across, down = place.dot(spot)
    x = {"start": place.left, "end": place.right, "middle": 0}[place.anchor]
    near_x, near_y = place.near()
    leader = f'<line class="leader" x1="0" y1="0" x2="{near_x:.0f}" y2="{near_y:.0f}"/>' if near_x or near_y else ""
    spans = "".join(
        f'<tspan x="{x:.0f}" y="{place.top + LINE * at + 11:.0f}">{escape(line)}</tspan>'
        for at, line in enumerate(spot.text)
    )
    return (
        f'<svg x="{100 * across:.2f}%" y="{100 * down:.2f}%">{leader}'
        f'<text class="name {place.anchor}">{spans}</text></svg>'
    )

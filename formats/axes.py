"""Where the ticks of an axis stand and what they say. No drawing: `svg_plots` draws."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from tersor.formats import units

LETTER = 6.7  # pixels, about
SMALLEST = 1e-300  # positive values below are zeros to a logarithmic axis
CLOCK = (60, 120, 300, 600, 1800, 3600, 7200, 18_000, 36_000, 86_400)  # seconds, steps people count in


class Axis(NamedTuple):
    """From `low` to `high`, with a line at each tick and a text by it (empty where it would repeat another)."""

    low: float
    high: float
    logarithmic: bool
    ticks: list[float]
    words: list[str]

    def share(self, value: float) -> float:
        """How far along the axis `value` is: 0 at `low`, 1 at `high`, and no further."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], unit: str, logarithmic: bool, upright: bool, room: float, zero: bool) -> Axis:
    """The axis of finite `values`, of which a logarithmic one needs a positive.

    An `upright` axis has a tick at either end (or nearly, where it is logarithmic); a lying one ends with its values
    and has as many ticks as texts have `room`, in pixels. `zero`: a linear axis of positive values begins there.
    """
    if logarithmic:
        low, high = min(value for value in values if value >= SMALLEST), max(values)
        low, high = (max(0.8 * low, SMALLEST), min(1.25 * high, 1e300)) if upright or low == high else (low, high)
    else:
        low, high = min(values), max(values)
        low = 0.0 if zero and low > 0 else low
        if high - low <= max(1e-9 * max(abs(low), abs(high)), SMALLEST):  # one value: in the middle
            low, high = sorted((0.0, 2.0 * high)) if abs(high) > SMALLEST else (0.0, 1.0)
    whole = all(value == int(value) for value in values) or (unit in ("size", "count") and high - low >= 2)
    for most in (5,) if upright else (8, 6, 5, 4, 3, 2):
        if logarithmic:
            found = _log(low, high, most + 1)
        else:
            found = _linear(low, high, _step((high - low) / most, unit, whole), upright)
        words = _words(found[2], unit)
        if sum(LETTER * len(text) + 14 for text in words) <= room:
            break
    return Axis(found[0], found[1], logarithmic, found[2], words)


def _step(least: float, unit: str, whole: bool) -> float:
    """The first of 1, 2 and 5 times the powers of ten that is not below `least`; times have minutes and hours."""
    if unit == "duration" and 30 < least <= CLOCK[-1]:
        return next(step for step in CLOCK if step >= least)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    return max(step, 1.0) if whole else step


def _linear(low: float, high: float, step: float, ends: bool) -> tuple[float, float, list[float]]:
    if ends:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = step * first, step * last
    else:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return low, high, [step * index for index in range(first, last + 1)]


def _log(low: float, high: float, most: int) -> tuple[float, float, list[float]]:
    """A tick at every decade, or every second or third of many; at 1, 2 and 5 where there are hardly any."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first) / most))
    decades = [10.0**power for power in range(math.ceil(first / every) * every, last + 1, every)]
    if len(decades) > 2:
        return low, high, decades
    fine = [factor * 10.0**power for power in range(first - 2, last + 3) for factor in (1, 2, 5)]
    ticks = [tick for tick in fine if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
    if len(ticks) < 2:
        low, high = max(tick for tick in fine if tick <= low), min(tick for tick in fine if tick >= high)
        ticks = [tick for tick in fine if low <= tick <= high]
    return low, high, ticks[:: math.ceil(len(ticks) / (most + 2))]


def _words(ticks: Sequence[float], unit: str) -> list[str]:
    """Ticks in their unit. Where its few digits cannot tell neighbours apart, with as many as it takes."""
    form = getattr(units, unit)
    words = [form(tick) for tick in ticks]
    if len(set(words)) == len(words):
        return words
    largest = max(range(len(ticks)), key=lambda index: abs(ticks[index]))
    found = re.fullmatch(r"(-?[\d,.]+)(\D*)", words[largest])
    if found and (shown := float(found[1].replace(",", ""))):
        scale = 10.0 ** round(math.log10(ticks[largest] / shown))
        words = [f"{tick / scale:,.12g}{found[2]}" for tick in ticks]
    return ["" if text in words[:index] else text for index, text in enumerate(words)]

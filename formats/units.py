"""Numbers as people read them, the same in the terminal, in reports and on pages."""

from __future__ import annotations

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440:,} d {minutes % 1440 // 60} h"


def latency(seconds: float) -> str:
    """Times that are compared with milliseconds."""
    if seconds < 1e-3:
        return f"{number(1e6 * seconds)} µs"
    return f"{number(1e3 * seconds)} ms" if seconds < 1 else f"{number(seconds)} s"


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
        mantissa, power = f"{value:.1e}".split("e")  # not value / 10**power, which has no float for the smallest
        return f"{float(mantissa):.2g}×10{str(int(power)).translate(SUPERSCRIPT)}"
    text = f"{value:.{max(0, digits - 1 - power)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    return f"{number(100 * share, 2 if share < 0.1 else 3)} %"


def ratio(before: float, after: float) -> str:
    if before == after:
        return "same size"
    return f"{number(before / after)}× smaller" if after < before else f"{number(after / before)}× larger"

"""`--loss kl=1,hidden=0.5` as terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tersor.formats.errors import TersorError

EXAMPLE = "write for example --loss kl=1,hidden=0.5"


@dataclass(frozen=True)
class Parameter:
    """The number behind the colon: `js:0.3`. `allows` says which values do, in words `range`."""

    meaning: str
    default: float
    allows: Callable[[float], bool]
    range: str


@dataclass(frozen=True)
class Known:
    """One loss. `needs`: what of student and teacher it looks at (logits, blocks, attention, or text alone). `kind`: its
    name in kernels/divergence.py."""

    needs: str
    kind: str | None = None
    parameter: Parameter | None = None


KNOWN = {
    "kl": Known("logits", "forward_kl"),
    "reverse-kl": Known("logits", "reverse_kl"),
    "js": Known("logits", "jensen_shannon", Parameter("beta", 0.5, lambda x: 0 < x < 1, "between 0 and 1")),
    "top-k-kl": Known("logits", "forward_kl"),
    "mse": Known("logits", "logit_mse"),
    "bd-kd": Known("logits", "balanced", Parameter("balance", 2 / 3, lambda x: 0 < x < 1, "between 0 and 1")),
    "next": Known("text", "next_token"),
    "hidden": Known("blocks", None, Parameter("exponent", 2.0, lambda x: 0 <= x <= 4, "within 0 to 4")),
    "attention": Known(
        "attention", None, Parameter("layers", 1.0, lambda x: x >= 1 and x == int(x), "a whole number from 1 on")
    ),
}


@dataclass(frozen=True)
class Term:
    """One loss with its weight, and the number after its name where it takes one."""

    name: str
    weight: float
    parameter: float | None = None

    @property
    def needs(self) -> str:
        return KNOWN[self.name].needs

    @property
    def kind(self) -> str | None:
        return KNOWN[self.name].kind


def parse_loss(text: str) -> list[Term]:
    """The terms of `name[:parameter][=weight],...`, in the order given; a weight left out is 1.

    Raises TersorError for names that are not known, weights that are not positive numbers, and names given twice.
    """
    terms: dict[str, Term] = {}
    for part in text.split(","):
        left, equals, weight = (piece.strip() for piece in part.partition("="))
        name, colon, parameter = (piece.strip() for piece in left.partition(":"))
        if name not in KNOWN:
            raise TersorError(f"--loss {text}: {name!r} is no loss known here", f"there are {', '.join(KNOWN)}")
        if name in terms:
            raise TersorError(f"--loss {text}: {name} is given twice", "give each loss one weight")
        value = _number(weight) if equals else 1.0
        if not (value > 0 and math.isfinite(value)):
            raise TersorError(f"--loss {text}: the weight of {name} is {weight!r}, not a positive number", EXAMPLE)
        terms[name] = Term(name, value, _parameter(text, name, parameter if colon else None))
    return list(terms.values())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parameter(text: str, name: str, given: str | None) -> float | None:
    parameter = KNOWN[name].parameter
    if parameter is None:
        if given is not None:
            raise TersorError(f"--loss {text}: {name} takes no {given!r} after its name", EXAMPLE)
        return None
    if given is None:
        return parameter.default
    value = _number(given)
    if not (math.isfinite(value) and parameter.allows(value)):
        raise TersorError(
            f"--loss {text}: the {parameter.meaning} of {name} is {given!r}, it should be {parameter.range}",
            f"leave it out for {parameter.default:.4g}",
        )
    return value


def check_teacher(terms: list[Term], teacher: str | None) -> None:
    """Whether a teacher of this kind has what the terms need: `model`, `cached` logits, or None.

    Raises TersorError that says which terms, and what to do.
    """
    if teacher == "model":
        return
    for term in terms:
        if teacher is None and term.needs != "text":
            raise TersorError(
                f"--loss: {term.name} compares with a teacher, and there is none",
                "add --teacher CHECKPOINT, or train on text alone with --loss next",
            )
        if teacher == "cached" and term.needs in ("blocks", "attention"):
            raise TersorError(
                f"--loss: {term.name} looks into the teacher's blocks, and cached logits hold none",
                f"give the teacher's checkpoint as --teacher, or leave {term.name} out of --loss",
            )
        if teacher == "cached" and term.name == "mse":
            raise TersorError(
                "--loss: mse needs all of the teacher's logits, and the cache holds the highest of each position",
                "use kl, or give the teacher's checkpoint as --teacher",
            )

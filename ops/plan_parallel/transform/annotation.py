"""What an operator does to the dimensions of its tensors, as einops-like text, and the ways to cut it that follow.

    linear     b s i+, o i+ -> b s o
    attention  b s (g q d^), b t^ (g d^), b t^ (g v^) -> b s (g q v^)
    norm       b s e^, e^ -> b s e^

A name is a dimension that may be cut; with `+` it is summed over, so that cutting it leaves partial values of the results;
with `^` it must stay whole. Names in brackets make up one dimension, outermost first: only the first can be cut, because
only that leaves contiguous parts. (The notation is nnScaler's, read as such; the brackets are einops'.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import NamedTuple

from tersor.formats.errors import TersorError

R, V = "R", "V"
Place = str | int  # R, V, or the dimension that is cut
TOKEN = re.compile(r"\(([^()]*)\)|([A-Za-z_]\w*[+^]?)")
NAME = re.compile(r"([A-Za-z_]\w*)([+^]?)")


class Name(NamedTuple):
    """`kind` is `` (may be cut), `+` (summed over) or `^` (whole)."""

    name: str
    kind: str = ""


Dims = tuple[tuple[Name, ...], ...]  # of one tensor


class Annotation(NamedTuple):
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    adds: bool = False  # linear in all inputs together: it may run on partial values, and its results are partial

    def kind(self, name: str) -> str:
        """`^` anywhere wins; a name that no output has is summed over wherever it is `+`."""
        kinds = {n.kind for dims in (*self.inputs, *self.outputs) for dim in dims for n in dim if n.name == name}
        return "^" if "^" in kinds else "+" if "+" in kinds else ""

    @property
    def names(self) -> tuple[str, ...]:
        found = (n.name for dims in (*self.inputs, *self.outputs) for dim in dims for n in dim)
        return tuple(dict.fromkeys(found))

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        inputs, outputs = (", ".join(_written(dims) for dims in side) for side in (self.inputs, self.outputs))
        return f"{inputs} -> {outputs}"

    def shape(self, dims: Dims, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(prod(sizes[n.name] for n in dim) for dim in dims)


def _written(dims: Dims) -> str:
    words = [" ".join(n.name + n.kind for n in dim) for dim in dims]
    return " ".join(f"({word})" if " " in word else word for word in words)


class Split(NamedTuple):
    """One way to run an operator on several ranks: along `name`, or (None) the same on all.

    Where each operand lies then, and its gradient: inputs that lack `name` are whole on every rank, but each rank has only
    its part of their gradient; results of a sum that is cut are partial, and take a whole gradient.
    """

    name: str | None
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    input_gradients: tuple[Place, ...]
    output_gradients: tuple[Place, ...]


@cache
def parse(text: str, adds: bool = False) -> Annotation:
    """Raises TersorError naming what cannot be read."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise TersorError(f"annotation {text!r} has no ->", "write inputs -> outputs")
    inputs, outputs = (tuple(_dims(part, text) for part in side.split(",")) for side in (left, right))
    result = Annotation(inputs, outputs, adds)
    for dims in outputs:
        for name in (n for dim in dims for n in dim):
            if name.kind == "+":
                raise TersorError(
                    f"annotation {text!r}: {name.name} is summed over and in a result", "drop the + or it"
                )
    return result


def _dims(part: str, text: str) -> Dims:
    found, position, part = [], 0, part.strip()
    for token in TOKEN.finditer(part):
        if part[position : token.start()].strip():
            break
        words = token[1].split() if token[1] is not None else [token[2]]
        names = [NAME.fullmatch(word) for word in words]
        if not words or None in names:
            break
        found.append(tuple(Name(name[1], name[2]) for name in names))
        position = token.end()
    if part[position:].strip():
        raise TersorError(f"annotation {text!r}: {part!r} cannot be read", "write names, name+, name^ or (names)")
    return tuple(found)


def place(dims: Dims, name: str) -> Place:
    """The dimension that is cut with `name`, R where the tensor lacks it."""
    return next((index for index, dim in enumerate(dims) if any(n.name == name for n in dim)), R)


def can_cut(annotation: Annotation, name: str, sizes: Mapping[str, int], n: int) -> bool:
    """Whether `name` may be cut in `n`: it need not stay whole, divides, and is outermost wherever it stands."""
    everywhere = [dim for dims in (*annotation.inputs, *annotation.outputs) for dim in dims]
    outermost = all(dim[0].name == name for dim in everywhere if any(n_.name == name for n_ in dim))
    return annotation.kind(name) != "^" and sizes[name] % n == 0 and outermost


def splits(annotation: Annotation, sizes: Mapping[str, int], n: int) -> list[Split]:
    """All ways to run the operator on `n` ranks, the same on all of them first. `sizes` by name.

    On a mesh of several axes each axis has one of these; see `dependencies.layout.placed`.
    """
    inputs, outputs = annotation.inputs, annotation.outputs
    whole = (R,) * len(inputs), (R,) * len(outputs)
    found = [Split(None, *whole, *whole)]
    if annotation.adds:
        values = (V,) * len(inputs), (V,) * len(outputs)
        found.append(Split("partial", *values, *whole))
    for name in annotation.names:
        if not can_cut(annotation, name, sizes, n):
            continue
        places = tuple(place(dims, name) for dims in inputs)
        gradients = tuple(V if where == R else where for where in places)
        results = tuple(place(dims, name) for dims in outputs)
        if annotation.kind(name) == "+":
            results = tuple(V if where == R else where for where in results)
        found.append(Split(name, places, results, gradients, tuple(R if where == V else where for where in results)))
    return found

"""How one tensor lies on the ranks of a mesh: replicated, as partial values, or cut, axis by axis of the mesh (RVD).

The algebra of nnScaler (Lin et al., OSDI 2024): <R, V, D1 .. Dk> says how many replicas there are, how many partial values
that add up to the tensor, and in how many parts each dimension is cut; R * V * D1 * .. * Dk are all ranks. Here every axis
of the mesh has a place of its own, so that axes with different links (nodes, devices of a node) are priced apart, and
factors need not be powers of two: `refined` cuts an axis into its prime factors.

One step moves axes from one place to another. The last axes of a dimension are the innermost cut, so that what a step
joins or cuts is contiguous:

    D -> R  all_gather      D -> D'  all_to_all      V -> R  all_reduce      V -> D  reduce_scatter
    R -> D  chunk, free     R -> V   keep on one rank and zeros on the others, free      D -> D reordered  send
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from math import prod
from typing import NamedTuple

from tersor.formats.errors import TersorError

R, V = "R", "V"
FREE = ("chunk", "keep")
REORDERED_AT_MOST = 3  # axes of one dimension that a send may put into any other order


class Group(NamedTuple):
    """The ranks of a collective: how many, and the axes of the mesh that they lie along."""

    ranks: int
    axes: tuple[str, ...]


class Step(NamedTuple):
    """`source` and `target` are R, V or a dimension. `nbytes` is the full buffer: what is gathered, reduced or scattered,
    what one rank holds before an all-to-all, or the message."""

    collective: str
    group: Group
    source: str | int
    target: str | int
    nbytes: float


@dataclass(frozen=True)
class State:
    """`mesh` are (axis, ranks) in order; `cuts` for each dimension of the tensor the axes that cut it, outermost first;
    `partial` the axes along which values are partial. Along the others there are replicas."""

    mesh: tuple[tuple[str, int], ...]
    cuts: tuple[tuple[str, ...], ...]
    partial: frozenset[str] = frozenset()

    def __post_init__(self):
        used = [axis for cut in self.cuts for axis in cut] + list(self.partial)
        if len(used) != len(set(used)) or not set(used) <= {axis for axis, _ in self.mesh}:
            raise TersorError(
                f"layout {self.cuts} with partial {sorted(self.partial)}: an axis has two places or is not in the mesh",
                "each axis of the mesh has one place",
            )

    def size(self, axis: str) -> int:
        return next(ranks for name, ranks in self.mesh if name == axis)

    def ranks(self, axes) -> int:
        return prod(self.size(axis) for axis in axes)

    @property
    def replicated(self) -> tuple[str, ...]:
        used = {axis for cut in self.cuts for axis in cut} | self.partial
        return tuple(axis for axis, _ in self.mesh if axis not in used)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """What one rank holds; None where the cuts do not divide the shape."""
        parts = [self.ranks(cut) for cut in self.cuts]
        if any(extent % part for extent, part in zip(shape, parts, strict=True)):
            return None
        return tuple(extent // part for extent, part in zip(shape, parts, strict=True))

    def rvd(self) -> tuple[int, ...]:
        """(R, V, D1, ..)."""
        return (self.ranks(self.replicated), self.ranks(self.partial), *(self.ranks(cut) for cut in self.cuts))

    def describe(self) -> str:
        replicas, values, *cuts = self.rvd()
        return f"R{replicas} V{values} D({','.join(map(str, cuts))})"


def placed(mesh: Mapping[str, int], places: Mapping[str, str | int], dimensions: int) -> State:
    """The layout in which each axis is at its place: R (the default), V or a dimension; axes of one dimension in the order of
    the mesh."""
    cuts = tuple(tuple(axis for axis in mesh if places.get(axis, R) == dim) for dim in range(dimensions))
    return State(tuple(mesh.items()), cuts, frozenset(axis for axis in mesh if places.get(axis, R) == V))


def refined(mesh: Mapping[str, int]) -> dict[str, int]:
    """Axes cut into prime factors (`tp` of 12 is `tp.0 tp.1 tp.2` of 2, 2, 3, outermost first)."""
    found = {}
    for axis, ranks in mesh.items():
        factors, divisor = [], 2
        while ranks > 1:
            if ranks % divisor:
                divisor += 1
            else:
                factors.append(divisor)
                ranks //= divisor
        names = [axis] if len(factors) < 2 else [f"{axis}.{index}" for index in range(len(factors))]
        found |= dict(zip(names, factors or [1], strict=True))
    return found


def steps(state: State, shape: tuple[int, ...], nbytes_per_number: float) -> Iterator[tuple[Step, State]]:
    """Every step from here and where it leads."""
    local = state.local_shape(shape)
    if local is None:
        raise TersorError(f"layout {state.describe()} does not divide {list(shape)}", "cut it in fewer parts")
    held = prod(local) * nbytes_per_number
    yield from _from_cuts(state, shape, held)
    yield from _from_partial(state, shape, held)
    for axis in state.replicated:
        group = Group(state.size(axis), (axis,))
        yield Step("keep", group, R, V, 0.0), State(state.mesh, state.cuts, state.partial | {axis})
        for dim in range(len(shape)):
            after = _with(state, {dim: (*state.cuts[dim], axis)})
            if after.local_shape(shape) is not None:
                yield Step("chunk", group, R, dim, 0.0), after


def _from_cuts(state: State, shape: tuple[int, ...], held: float) -> Iterator[tuple[Step, State]]:
    for dim, cut in enumerate(state.cuts):
        for count in range(1, len(cut) + 1):
            kept, moved = cut[:-count], cut[-count:]
            group = Group(state.ranks(moved), moved)
            yield Step("all_gather", group, dim, R, held * group.ranks), _with(state, {dim: kept})
            for other in range(len(shape)):
                if other == dim:
                    continue
                after = _with(state, {dim: kept, other: (*state.cuts[other], *moved)})
                if after.local_shape(shape) is not None:
                    yield Step("all_to_all", group, dim, other, held), after
        if 1 < len(cut) <= REORDERED_AT_MOST:
            for order in permutations(cut):
                if order != cut:
                    yield Step("send", Group(state.ranks(cut), cut), dim, dim, held), _with(state, {dim: order})


def _from_partial(state: State, shape: tuple[int, ...], held: float) -> Iterator[tuple[Step, State]]:
    """Several axes are reduced at once, which is one collective over all their ranks."""
    partial = tuple(axis for axis, _ in state.mesh if axis in state.partial)
    for count in range(1, len(partial) + 1):
        for moved in combinations(partial, count):
            group, rest = Group(state.ranks(moved), moved), state.partial - set(moved)
            yield Step("all_reduce", group, V, R, held), State(state.mesh, state.cuts, rest)
            for dim in range(len(shape)):
                after = _with(State(state.mesh, state.cuts, rest), {dim: (*state.cuts[dim], *moved)})
                if after.local_shape(shape) is not None:
                    yield Step("reduce_scatter", group, V, dim, held), after


def _with(state: State, cuts: Mapping[int, tuple[str, ...]]) -> State:
    changed = tuple(cuts.get(dim, cut) for dim, cut in enumerate(state.cuts))
    return State(state.mesh, changed, state.partial)

"""Which part of a stored tensor a rank holds, as boxes in the tensor's own coordinates.

A tensor is cut along one dimension, in segments that are each cut on their own: gate and up of a fused matrix, or queries,
keys and values. A rank of `n` holds one run of each segment; where there are fewer heads of keys and values than ranks,
several ranks hold the same head. Experts are dealt out by expert parallelism in runs of consecutive ones, and each is cut
inside by expert tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import Coordinates, Layout

Box = tuple[tuple[int, int], ...]
ROLES = ("column", "row", "vocab", "replicated")
VOCABULARY_MULTIPLE = 128  # rows of a vocabulary that one rank gets are a multiple of this, as in Megatron-LM


class Segment(NamedTuple):
    """Numbers [start, stop) of the dimension that is cut. `unit` consecutive numbers stay together: a head, and what one
    scale or one packed word speaks of.

    `what` the units are called. `groups`: heads of keys and values, each held by several ranks where there are more ranks than heads (None: no such
    copies). `inside`: how a group [queries | keys and values] is cut further where ranks share it: its parts in order, as
    (numbers, unit) to be cut or (numbers, 0) for what every one of these ranks holds.
    """

    start: int
    stop: int
    unit: int = 1
    groups: int | None = None
    inside: tuple[tuple[int, int], ...] = ()
    what: str = ""

    def misfit(self, n: int) -> str:
        """Why it cannot be cut in `n`; empty where it can."""
        size = self.stop - self.start
        if self.groups is not None and n > self.groups:
            if n % self.groups:
                return f"{n} is not a multiple of its {self.groups} heads of keys and values"
            if size // self.groups % self.unit:
                return f"a head of {size // self.groups} is not whole units of {self.unit}"
            share = n // self.groups
            for numbers, unit in self.inside:
                if unit and numbers % (share * unit):
                    return f"{numbers // unit} heads of queries in a group are not a multiple of {share}"
            return ""
        if self.groups is not None and self.groups % n:
            return f"{self.groups} heads of keys and values are not a multiple of {n}"
        if size % (n * self.unit):
            if self.unit > 1 and not self.what:
                return f"{size} does not make {n} equal parts of whole runs of {self.unit}, which are stored together"
            return f"{size // self.unit} {self.what or 'numbers'} are not a multiple of {n}"
        return ""

    def runs(self, n: int, rank: int) -> list[tuple[int, int]]:
        """What rank `rank` of `n` holds, in order. `misfit` must be empty."""
        size = self.stop - self.start
        if self.groups is None or n <= self.groups:
            share = size // n
            return [(self.start + rank * share, self.start + (rank + 1) * share)]
        group, share = size // self.groups, n // self.groups
        place = self.start + rank // share * group
        if not self.inside:
            return [(place, place + group)]
        found = []
        for numbers, unit in self.inside:
            if unit:
                part = numbers // share
                found.append((place + rank % share * part, place + (rank % share + 1) * part))
            else:
                found.append((place, place + numbers))
            place += numbers
        return found


@dataclass(frozen=True, slots=True)
class Rule:
    """How one stored tensor is cut. `role` is what its layer is to tensor parallelism: `column` (its outputs are cut), `row`
    (its inputs are, the results are partial sums), `vocab` (rows of the vocabulary, padded), or `replicated`.

    `dim` is the dimension that is cut along `segments` (None where it is not cut); of the tensor, also where it holds one
    fused set of experts. `expert` is the index of the expert that owns the tensor; `experts` how many the layer has, 0 for
    dense tensors. A tensor with `experts` but without `expert` holds all of them, `expert_rows` of dimension 0 each.
    `pad`: dimension 0 is padded to a multiple of this times tp; the padding is nobody's data. `blocked` says why the tensor
    is never cut although its layer could be. `source`: transformers' plan, names and shapes, or what was left: a copy each.
    """

    tensor: str
    shape: tuple[int, ...]
    role: str = "replicated"
    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    expert: int | None = None
    experts: int = 0
    expert_rows: int = 1
    pad: int = 0
    tied: bool = False  # the head reads the same table: with pipeline stages both ends hold it
    weight: str = ""  # the dense weight it belongs to: codes, scales and biases of one layer are cut alike
    source: str = "replicated"
    note: str = ""
    blocked: str = ""

    @property
    def is_expert(self) -> bool:
        return self.experts > 0

    @property
    def is_fused(self) -> bool:
        """Whether the tensor holds all experts of its layer."""
        return self.experts > 0 and self.expert is None

    @property
    def whole(self) -> Box:
        return tuple((0, extent) for extent in self.shape)


def divides(rule: Rule, n: int) -> str:
    """Why the tensor cannot be cut over `n` ranks (of tensor parallelism; expert tensor parallelism for experts); empty
    where it can, or is not cut at all."""
    if n == 1 or (rule.dim is None and not rule.blocked):
        return ""
    if rule.blocked:
        return rule.blocked
    if rule.role == "vocab":
        return ""
    return next(filter(None, (segment.misfit(n) for segment in rule.segments)), "")


def max_split(rule: Rule) -> int:
    """The most ranks that can hold different parts of the tensor (of an expert, for experts)."""
    if rule.dim is None or rule.blocked:
        return 1
    if rule.role == "vocab":
        return -(-rule.shape[rule.dim] // rule.pad)
    units = []
    for segment in rule.segments:
        size = segment.stop - segment.start
        if segment.inside:
            units.append(segment.groups * next(numbers // unit for numbers, unit in segment.inside if unit))
        elif segment.groups is None:
            units.append(size // segment.unit)
    return min(units, default=max((s.stop - s.start) // s.unit for s in rule.segments))


def boxes(rule: Rule, tp: int, rank: int, ep: int = 1, ep_rank: int = 0) -> tuple[Box, ...]:
    """What rank `rank` of `tp` holds: boxes in the order in which a runtime concatenates them along `rule.dim`.

    For experts `tp` and `rank` are those of expert tensor parallelism. Empty where the rank holds nothing: another rank's
    expert, or nothing but padding. Raises TersorError where the tensor cannot be cut so.
    """
    if why := divides(rule, tp):
        raise _refusal(rule, tp, why, "etp" if rule.is_expert else "tp")
    owned = range(rule.experts)
    if rule.is_expert:
        if rule.experts % ep:
            raise _refusal(rule, ep, f"{rule.experts} experts are not a multiple of {ep}", "ep")
        share = rule.experts // ep
        owned = range(ep_rank * share, (ep_rank + 1) * share)
        if rule.expert is not None and rule.expert not in owned:
            return ()
    whole = rule.whole
    if rule.is_fused:
        rows = rule.expert_rows
        if rule.dim == 0 and tp > 1:
            runs = [run for segment in rule.segments for run in segment.runs(tp, rank)]
            return _along(whole, 0, [(e * rows + start, e * rows + stop) for e in owned for start, stop in runs])
        whole = ((owned.start * rows, owned.stop * rows), *whole[1:])
    if rule.dim is None or tp == 1:
        return (whole,) if prod(rule.shape) or not rule.shape else ()
    return _along(whole, rule.dim, _runs(rule, tp, rank))


def _runs(rule: Rule, tp: int, rank: int) -> list[tuple[int, int]]:
    if rule.role == "vocab":
        rows = rule.shape[rule.dim]
        share = padded(rule, tp) // tp
        return [(min(rank * share, rows), min((rank + 1) * share, rows))]
    return [run for segment in rule.segments for run in segment.runs(tp, rank)]


def padded(rule: Rule, tp: int) -> int:
    """Rows of a vocabulary with the padding that makes the shares of all ranks equal."""
    step = rule.pad * tp
    return -(-rule.shape[rule.dim] // step) * step


def _along(whole: Box, dim: int, runs: list[tuple[int, int]]) -> tuple[Box, ...]:
    """Boxes with these runs of one dimension; runs that touch become one."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif start < stop:
            joined.append((start, stop))
    return tuple((*whole[:dim], run, *whole[dim + 1 :]) for run in joined)


def holds(rule: Rule, coordinates: Coordinates, layout: Layout) -> tuple[Box, ...]:
    """What a rank holds of a tensor of its own pipeline stage, before ZeRO cuts it further. Raises TersorError where the
    layout's degrees do not divide it."""
    if rule.is_expert:
        return boxes(rule, layout.etp, coordinates.etp, layout.ep, coordinates.ep)
    return boxes(rule, layout.tp, coordinates.tp)


def numbers(held: tuple[Box, ...]) -> int:
    return sum(prod(stop - start for start, stop in box) for box in held)


def local_shape(rule: Rule, held: tuple[Box, ...]) -> tuple[int, ...]:
    """Of the boxes put together along the dimension that is cut, as a runtime holds them."""
    if not held:
        return ()
    dim = 0 if rule.dim is None else rule.dim
    return tuple(
        sum(box[axis][1] - box[axis][0] for box in held) if axis == dim else stop - start
        for axis, (start, stop) in enumerate(held[0])
    )


def _refusal(rule: Rule, n: int, why: str, axis: str) -> TersorError:
    return TersorError(
        f"tensor {rule.tensor!r} {list(rule.shape)} cannot be cut with {axis}={n}: {why}",
        f"choose another {axis}, one that divides",
    )

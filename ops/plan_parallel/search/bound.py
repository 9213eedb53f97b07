"""Branch and bound over a space of layouts: what cannot be better than what is known is not priced.

`pricer.lower_bound(layout)` gives (seconds, bytes) that the layout's price never falls below. Groups are opened in the
order of their bounds, so that the first plans that are priced are good ones; one is closed unpriced when no layout in it can
  - enter the list: its bytes are more than a device has, or it is slower than the list's last, or than the best of its
    own kind (the list holds one plan for each division of the devices and schedule: equals in that teach little),
  - nor lie on the front of memory against time: a plan is known that is both smaller and faster than its bounds.
One thing is taken from the model of cost without asking for bounds: that recomputing only ever gives time for memory.
The result is that of pricing every layout; a test compares the two.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.search.price import Candidate, Pricer
from tersor.ops.plan_parallel.search.space import Degrees, Group, Space

Accepts = Callable[[Layout], bool]

MOST_REFUSED = 4000
SLOWEST = 2.0  # times the best plan's step: where the front of memory against time ends


@dataclass
class Counted:
    """How much of the space was looked at. `considered` layouts = `estimated` + `pruned`."""

    considered: int = 0
    estimated: int = 0
    pruned: int = 0
    bounds: int = 0
    seconds: float = 0.0


class Front:
    """Plans that no other beats in both time and bytes, by time."""

    def __init__(self):
        self.seconds: list[float] = []
        self.found: list[Candidate] = []

    def beats(self, seconds: float, nbytes: float) -> bool:
        """Whether a plan is known that is faster than so many seconds and takes no more, or smaller and no slower."""
        place = bisect.bisect_right(self.seconds, seconds) - 1
        if place < 0:
            return False
        known = self.found[place].estimate  # of those that are as fast, the smallest
        return known.peak_bytes < nbytes or (known.peak_bytes == nbytes and known.step_seconds < seconds)

    def add(self, candidate: Candidate) -> None:
        seconds, nbytes = candidate.estimate.step_seconds, candidate.estimate.peak_bytes
        place = bisect.bisect_right(self.seconds, seconds)
        if place:
            known = self.found[place - 1]
            if known.estimate.peak_bytes <= nbytes and known.rank < candidate.rank:
                return
            if known.estimate.step_seconds == seconds:
                place -= 1
        end = place
        while end < len(self.found) and self.found[end].estimate.peak_bytes >= nbytes:
            end += 1
        self.found[place:end] = [candidate]
        self.seconds[place:end] = [seconds]


def kind_of(layout: Layout | Group) -> tuple:
    """What only one plan of the list has: how devices are divided, and the schedule."""
    if isinstance(layout, Group):
        return layout.degrees, layout.schedule, layout.chunks
    degrees = Degrees(layout.tp, layout.pp, layout.dp, layout.cp, layout.ep, layout.etp)
    return degrees, layout.schedule, layout.chunks


class Known:
    """The plans that were found so far, `top` of them kept. `cutoff`: slower plans are not asked for."""

    def __init__(self, top: int, cutoff: float = math.inf, with_front: bool = True):
        self.top, self.cutoff = top, cutoff
        self.by_kind: dict[tuple, Candidate] = {}
        self.front = Front() if with_front else None
        self.last = math.inf  # seconds of the last plan in the list
        self.first = math.inf

    def add(self, candidate: Candidate) -> None:
        if candidate.estimate.step_seconds > self.cutoff:
            return
        if self.front is not None:
            self.front.add(candidate)
        kind = kind_of(candidate.layout)
        known = self.by_kind.get(kind)
        if known is None or candidate.rank < known.rank:
            self.by_kind[kind] = candidate
            listed = heapq.nsmallest(self.top, (other.estimate.step_seconds for other in self.by_kind.values()))
            self.first = listed[0]
            self.last = listed[-1] if len(listed) == self.top else math.inf

    def excludes(self, kind: tuple, seconds: float, nbytes: float) -> bool:
        """Whether a plan of this kind with at least so many seconds and bytes can be left out."""
        if seconds > self.cutoff:
            return True
        known = self.by_kind.get(kind)
        if seconds <= self.last and (known is None or seconds <= known.estimate.step_seconds):
            return False
        return self.front is None or seconds > SLOWEST * self.first or self.front.beats(seconds, nbytes)

    def best(self) -> list[Candidate]:
        return heapq.nsmallest(self.top, self.by_kind.values(), key=lambda candidate: candidate.rank)

    def pareto(self) -> list[Candidate]:
        found = self.front.found if self.front is not None else ()
        return [plan for plan in found if plan.estimate.step_seconds <= SLOWEST * self.first]


class Bounded(NamedTuple):
    """What a layout costs at least."""

    layout: Layout
    seconds: float
    nbytes: float


class BranchAndBound:
    """`accepts` says which layouts may be plans at all, of those that the space has; where it refuses MOST_REFUSED of them
    before one is found, none is expected."""

    def __init__(self, pricer: Pricer, space: Space, accepts: Accepts | None = None):
        self.pricer, self.space, self.limit = pricer, space, pricer.limit
        self.accepts, self.refused = accepts, 0
        self.counted = Counted()

    def fastest(self, devices: int, known: Known) -> Known:
        """Adds to `known` what can enter it."""
        counted, numbers, heap = self.counted, count(), []
        for group in self.space.groups(devices):
            choices = len(group.recompute)
            counted.considered += choices
            small = self._bounded(group, group.recompute[-1])
            if small.nbytes > self.limit:
                counted.pruned += choices
                continue
            fast = self._bounded(group, group.recompute[0]) if choices > 1 else small
            heap.append((fast.seconds, next(numbers), small.nbytes, group, (fast, small)))
        heapq.heapify(heap)
        while heap:
            seconds, _, nbytes, group, ends = heapq.heappop(heap)
            layouts, kind = len(group.recompute) if ends else 1, kind_of(group)
            if known.excludes(kind, seconds, nbytes):
                counted.pruned += layouts
            elif ends:
                for bounded in self._opened(group, ends):
                    if bounded.nbytes > self.limit or known.excludes(kind, *bounded[1:]):
                        counted.pruned += 1
                    else:
                        leaf = group._replace(recompute=(bounded.layout.recompute,))
                        heapq.heappush(heap, (bounded.seconds, next(numbers), bounded.nbytes, leaf, None))
            elif not self._accepted(group.layout(*group.recompute)):
                counted.pruned += 1
                if self.refused == MOST_REFUSED and not known.by_kind:
                    break
            else:
                candidate = self._price(group.layout(*group.recompute))
                if candidate.estimate.fits and self._accepted(candidate.layout):
                    known.add(candidate)
        return known

    def _accepted(self, layout: Layout) -> bool:
        if self.accepts is None or self.accepts(layout):
            return True
        self.refused += 1
        return False

    def nearest(self, devices: int) -> Candidate | None:
        """Where nothing fits: the plan whose fullest device lacks the least."""
        numbers, heap = count(), []
        for group in self.space.groups(devices):
            small = self._bounded(group, group.recompute[-1])
            heap.append((small.nbytes, next(numbers), group, small.layout))
        heapq.heapify(heap)
        best: Candidate | None = None
        while heap:
            nbytes, _, group, layout = heapq.heappop(heap)
            if best is not None and nbytes - self.limit > best.estimate.short_bytes:
                break
            candidate = self._price(layout)
            if best is None or candidate.shortage < best.shortage:
                best = candidate
            if group is not None:
                for recompute in group.recompute[:-1]:
                    other = self._bounded(group, recompute)
                    heapq.heappush(heap, (other.nbytes, next(numbers), None, other.layout))
        return best

    def _opened(self, group: Group, ends: tuple[Bounded, Bounded]) -> Iterator[Bounded]:
        for recompute in group.recompute:
            known = [bounded for bounded in ends if bounded.layout.recompute == recompute]
            yield known[0] if known else self._bounded(group, recompute)

    def _bounded(self, group: Group, recompute: str) -> Bounded:
        self.counted.bounds += 1
        layout = group.layout(recompute)
        return Bounded(layout, *self.pricer.lower_bound(layout))

    def _price(self, layout: Layout) -> Candidate:
        self.counted.estimated += 1
        return self.pricer.price(layout)

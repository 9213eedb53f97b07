"""The cheapest way from one layout of a tensor to another: Dijkstra over the steps of `layout`, by time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.dependencies.layout import FREE, Group, State, Step, steps

Cost = Callable[[str, float, Group], float]  # seconds of (collective, bytes of the full buffer, its ranks)


class Path(NamedTuple):
    steps: tuple[Step, ...]
    seconds: float

    @property
    def collectives(self) -> tuple[str, ...]:
        """Those that move bytes."""
        return tuple(step.collective for step in self.steps if step.collective not in FREE)


def cheapest(source: State, target: State, shape: tuple[int, ...], nbytes_per_number: float, cost: Cost) -> Path:
    """The steps that take least time, and of those that take the same the fewest.

    Raises TersorError where a layout does not divide the shape, or the two are not of one mesh.
    """
    if source.mesh != target.mesh or len(source.cuts) != len(target.cuts):
        raise TersorError("two layouts of different meshes or tensors", "lay both out on the same mesh")
    if target.local_shape(shape) is None:
        raise TersorError(f"layout {target.describe()} does not divide {list(shape)}", "cut it in fewer parts")
    order = count()  # so that equal times never compare states
    waiting = [(0.0, 0, next(order), source, ())]
    done: set[State] = set()
    while waiting:
        seconds, hops, _, state, taken = heappop(waiting)
        if state == target:
            return Path(taken, seconds)
        if state in done:
            continue
        done.add(state)
        for step, after in steps(state, shape, nbytes_per_number):
            if after not in done:
                price = 0.0 if step.collective in FREE else cost(step.collective, step.nbytes, step.group)
                heappush(waiting, (seconds + price, hops + 1, next(order), after, (*taken, step)))
    raise TersorError(f"no way from {source.describe()} to {target.describe()}", "lay the tensor out in another way")

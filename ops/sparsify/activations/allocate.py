"""How the zeros are spread over the layers of a block: TEAL's greedy search (Liu et al., arXiv 2408.14690, algorithm 1).

Every layer starts at the zeros it has anyway. The layer whose next step costs the least output error of the whole block
for each weight byte that it saves is raised, until the average over the bytes reaches the target. The costs are kept
between steps and only that of the cheapest layer is measured again before it is raised: layers hardly change each other's
cost, and a block is run a fourth as often as when all are measured each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

STEP = 0.1
MOST = 0.95  # of the inputs of one layer, where the target leaves the choice
Error = Callable[[Mapping[str, float]], float]


@dataclass
class Allocation:
    """`levels`: share of zeros by layer. The errors are the block's with these, and with the target in every layer."""

    levels: dict[str, float]
    error: float
    uniform_error: float


@dataclass
class _Step:
    level: float
    error: float
    cost: float
    after: int  # how many layers had been raised when it was measured


def average(levels: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    """Mean level, weighted by bytes."""
    return sum(sizes[name] * level for name, level in levels.items()) / sum(sizes[name] for name in levels)


def allocate(
    sizes: Mapping[str, float], start: Mapping[str, float], target: float, error: Error, step: float = STEP
) -> Allocation:
    """Levels whose average reaches `target` exactly, or those of `start` where they do already.

    `sizes` are bytes by layer, `start` the share of zeros that costs nothing, `error(levels)` the block's output error.
    Never worse than the target in every layer, which is tried as well.
    """
    levels = dict(start)
    uniform = {name: max(level, target) for name, level in start.items()}
    uniform_error = error(uniform)
    most = max(MOST, (1 + target) / 2)
    total = sum(sizes[name] for name in levels)
    current, raised = error(levels), 0
    steps: dict[str, _Step] = {}

    def measure(name: str, room: float) -> _Step:
        level = min(levels[name] + step, most, levels[name] + room / sizes[name])
        found = error(levels | {name: level})
        return _Step(level, found, (found - current) / (sizes[name] * (level - levels[name])), raised)

    while (room := (target - average(levels, sizes)) * total) > 1e-9 * total:
        candidates = [name for name in levels if levels[name] < most]
        for name in candidates:
            if name not in steps:
                steps[name] = measure(name, room)
        best = min(candidates, key=lambda name: steps[name].cost)
        if steps[best].after != raised:
            steps[best] = measure(best, room)
            continue
        levels[best], current = steps[best].level, steps[best].error
        raised += 1
        del steps[best]
    if uniform_error < current:
        return Allocation(uniform, uniform_error, uniform_error)
    return Allocation(levels, current, uniform_error)

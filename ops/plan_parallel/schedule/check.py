"""Is a grid of actions one that can run? Every micro-batch passes every stage once each way, and no rank waits for ever."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.schedule.builders import KINDS

if TYPE_CHECKING:
    from tersor.ops.plan_parallel.schedule.pipeline import Action, Grid

HINT = "this order of actions cannot run; use a schedule as it is built, or mend the order"


def check(grid: Grid) -> None:
    """Raises TersorError that names the first block found wrong: unknown, misplaced, missing, repeated, or waiting for
    ever."""
    _complete(grid)
    topological(grid)


def name(action: Action) -> str:
    what = {"F": "forward", "BW": "backward", "B": "input gradient", "W": "weight gradient"}
    return f"{what.get(action.kind, action.kind)} of micro-batch {action.micro} in stage {action.stage}"


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What must be done before: (kind, micro, stage), `B` standing for a whole backward too."""
    kind, micro, stage = action
    if kind == "F":
        return [("F", micro, stage - 1)] if stage else []
    if kind == "W":
        return [("B", micro, stage)]
    return [("F", micro, stage)] + ([("B", micro, stage + 1)] if stage + 1 < stages else [])


def topological(grid: Grid) -> list[tuple[int, Action]]:
    """(rank, action) in an order in which each comes after all that it needs; raises TersorError on a deadlock.

    Linear in the number of actions: a rank that must wait is taken up again by the action that it waits for.
    """
    stages, order = grid.stages, []
    done: set[tuple[str, int, int]] = set()
    waiting: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    place = [0] * grid.pp
    ready = list(range(grid.pp))
    while ready:
        rank = ready.pop()
        actions = grid.ranks[rank]
        while place[rank] < len(actions):
            action = actions[place[rank]]
            missing = [need for need in needs(action, stages) if need not in done]
            if missing:
                waiting[missing[0]].append(rank)
                break
            key = ("B" if action.kind == "BW" else action.kind, action.micro, action.stage)
            done.add(key)
            order.append((rank, action))
            place[rank] += 1
            if key in waiting:
                ready += waiting.pop(key)
    stuck = [
        f"rank {rank} waits with the {name(grid.ranks[rank][place[rank]])} for {_words(need)}"
        for need, ranks in waiting.items() for rank in ranks
    ]  # fmt: skip
    if stuck:
        raise TersorError(f"deadlock: {'; '.join(sorted(stuck)[:4])}", HINT)
    return order


def _words(need: tuple[str, int, int]) -> str:
    kind, micro, stage = need
    return f"the {'forward' if kind == 'F' else 'backward'} of micro-batch {micro} in stage {stage}"


def _complete(grid: Grid) -> None:
    if len(grid.ranks) != grid.pp:
        raise TersorError(f"the grid has the actions of {len(grid.ranks)} ranks, pp is {grid.pp}", HINT)
    count: Counter[tuple[str, int, int]] = Counter()
    for rank, actions in enumerate(grid.ranks):
        for action in actions:
            if action.kind not in KINDS or not 0 <= action.micro < grid.micro_batches:
                raise TersorError(f"rank {rank} has a {name(action)}, which is no action of this grid", HINT)
            if not 0 <= action.stage < grid.stages or grid.rank_of(action.stage) != rank:
                raise TersorError(f"rank {rank} has the {name(action)}, a stage that it does not hold", HINT)
            count[tuple(action)] += 1
    for stage in range(grid.stages):
        for micro in range(grid.micro_batches):
            forward, whole, first, second = (count[kind, micro, stage] for kind in ("F", "BW", "B", "W"))
            if forward != 1:
                raise TersorError(_wrong("forward", micro, stage, forward), HINT)
            if (whole, first, second) not in ((1, 0, 0), (0, 1, 1)):
                part = ("weight gradient", second) if not whole and first == 1 else ("backward", whole + first)
                raise TersorError(_wrong(part[0], micro, stage, part[1]), HINT)


def _wrong(what: str, micro: int, stage: int, times: int) -> str:
    return f"the {what} of micro-batch {micro} in stage {stage} is done {times} times, not once"

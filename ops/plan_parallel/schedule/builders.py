"""In which order a pipeline rank does its work, for each schedule.

A builder gives the work of one rank as (kind, micro-batch, chunk). Kinds: `F` forward, `BW` the whole backward, or `B` its
gradient of the input and `W` that of the weights where a schedule takes them apart. Orders say nothing of time: a rank
starts its next action as soon as what it needs has come.

    gpipe        Huang et al., GPipe, 2018
    1f1b         Narayanan et al., PipeDream-Flush, 2020; Megatron-LM's non-interleaved schedule
    interleaved  Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, 2021; Megatron-LM's order
    zb-h1, zbv   Qi et al., Zero Bubble Pipeline Parallelism, 2023, their hand-written schedules (section 6 for zbv)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from tersor.formats.errors import TersorError

KINDS = ("F", "B", "W", "BW")
Order = list[tuple[str, int, int]]  # kind, micro-batch, chunk


def gpipe(rank: int, pp: int, micro_batches: int, chunks: int) -> Order:
    """All forwards, then all backwards."""
    return [(kind, micro, 0) for kind in ("F", "BW") for micro in range(micro_batches)]


def one_forward_one_backward(rank: int, pp: int, micro_batches: int, chunks: int) -> Order:
    """As many forwards first as there are ranks behind this one, so that no rank holds more than `pp` micro-batches."""
    work = _Counted()
    warmup = min(pp - 1 - rank, micro_batches)
    work.add("F", times=warmup)
    for _ in range(micro_batches - warmup):
        work.add("F", "BW")
    work.add("BW", times=warmup)
    return work.order


def group_size(pp: int, micro_batches: int) -> int:
    """Micro-batches that an interleaved schedule sends through one chunk before it turns to the next; `pp` where it can.

    What is left for the last group must be none or `pp` at least, or its first rank waits for its last
    (Megatron-LM's rule for --microbatch-group-size-per-virtual-pipeline-stage).
    """
    return next(
        size for size in range(pp, micro_batches + 1) if micro_batches % size == 0 or micro_batches % size >= pp
    )


def interleaved(rank: int, pp: int, micro_batches: int, chunks: int) -> Order:
    """One forward, one backward over `chunks` model chunks a rank, round after round of `group_size` micro-batches."""
    group = group_size(pp, micro_batches)
    forwards, backwards = [], []
    for first in range(0, micro_batches, group):
        for chunk in range(chunks):
            members = range(first, min(first + group, micro_batches))
            forwards += [("F", micro, chunk) for micro in members]
            backwards += [("BW", micro, chunks - 1 - chunk) for micro in members]
    warmup = min(2 * (pp - 1 - rank) + (chunks - 1) * group, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - warmup :]


def zero_bubble_h1(rank: int, pp: int, micro_batches: int, chunks: int) -> Order:
    """1F1B whose weight gradients wait: rank r does them r micro-batches late, so each rank holds `pp` micro-batches,
    as the first rank of 1F1B does, and fills the time after its last backwards with them."""
    work = _Counted()
    warmup = min(pp - 1 - rank, micro_batches)
    work.add("F", times=warmup)
    for step in range(micro_batches):
        work.add(*("F",) if step < micro_batches - warmup else (), "B", *("W",) if step >= rank else ())
    work.add("W", times=min(rank, micro_batches))
    return work.order


def zero_bubble_v(rank: int, pp: int, micro_batches: int, chunks: int) -> Order:
    """Two chunks a rank, placed there and back, so that the rank of the first stage has the last one too.

    The order is that of 2 * pp - 1 micro-batches at least; of fewer, the others are left out.
    """
    count, work = max(micro_batches, 2 * pp - 1), _Counted()
    work.add("F", times=2 * (pp - rank) - 1)
    for _ in range(rank):
        work.add("F1", "F")
    for _ in range(pp - rank):
        work.add("F1", "B1", "W1")
    while work.done["F1"] < count:
        work.add(*("F",) if work.done["F"] < count else (), "B", "W", "F1", "B1", "W1")
    for _ in range(rank):
        work.add("B", "B1")
    for _ in range(pp - rank):
        work.add("B", "W")
    work.add("W1", times=count - work.done["W1"])
    work.add("W", times=count - work.done["W"])
    return [action for action in work.order if action[1] < micro_batches]


class _Counted:
    """An order in which each kind of work takes the micro-batches one after the other. "F1" is a forward of chunk 1."""

    def __init__(self):
        self.order: Order = []
        self.done: dict[str, int] = defaultdict(int)

    def add(self, *works: str, times: int = 1) -> None:
        for work in works * times:
            kind, chunk = work.rstrip("1"), int(work.endswith("1"))
            self.order.append((kind, self.done[work], chunk))
            self.done[work] += 1


BUILDERS: dict[str, Callable[[int, int, int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zero_bubble_h1,
    "zbv": zero_bubble_v,
}


def why_not(schedule: str, pp: int, micro_batches: int, chunks: int) -> str:
    """What keeps a schedule from running, with the numbers; empty where nothing does."""
    if schedule not in BUILDERS:
        return f"schedule {schedule!r} is not known; known are {', '.join(BUILDERS)}"
    if min(pp, micro_batches, chunks) < 1:
        return f"pp={pp}, {micro_batches} micro-batches and chunks={chunks} must be 1 at least"
    if schedule == "interleaved":
        if chunks < 2:
            return "interleaved needs 2 chunks at least on each rank, it has 1"
        if micro_batches < pp:
            return f"interleaved needs as many micro-batches as pp={pp} at least, it has {micro_batches}"
    elif schedule == "zbv" and chunks != 2:
        return f"zbv has 2 chunks on each rank, not {chunks}"
    elif schedule != "zbv" and chunks != 1:
        return f"{schedule} has 1 chunk on each rank, not {chunks}"
    return ""


def require(schedule: str, pp: int, micro_batches: int, chunks: int) -> None:
    """Raises TersorError where `why_not` has a reason."""
    if reason := why_not(schedule, pp, micro_batches, chunks):
        raise TersorError(reason, "choose another schedule, chunks, pp or micro_batch")

"""What a layout costs once its blocks are cut over the stages: the cut is found here, as it is no free choice.

Stages are cut so that the slowest is as fast as can be. Where that does not fit, the cut is made again with what each stage
has room for: the first stages keep more micro-batches, the last one the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.cost.memory import in_flight
from tersor.ops.plan_parallel.cost.states import states_of
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.schedule.stages import balance

GRAIN = 64  # parts of the longest block that times are rounded to, so that cuts are found once for many layouts
RUN_AT_MOST = (
    100_000  # forward blocks of a schedule that is run, which takes a few seconds; longer ones have small bubbles
)


class Candidate(NamedTuple):
    """A plan and what it costs (`cost.step.Estimate`)."""

    layout: Layout
    estimate: object

    @property
    def rank(self) -> tuple:
        """Faster is better, then smaller; the layout decides between equals, so that the order is always the same."""
        return self.estimate.step_seconds, self.estimate.peak_bytes, self.layout

    @property
    def shortage(self) -> tuple:
        """Nearer to fitting is better."""
        return self.estimate.short_bytes, self.estimate.step_seconds, self.layout


class Pricer:
    """`costs` has `estimate` and `lower_bound`; `limit` are the bytes of a device that a plan may take."""

    def __init__(self, costs, limit: float, cutter: StageCutter | None = None):
        self.costs, self.limit, self.cutter = costs, limit, cutter

    def lower_bound(self, layout: Layout) -> tuple[float, float]:
        return self.costs.lower_bound(layout)

    def price(self, layout: Layout) -> Candidate:
        """`layout` with its stages cut, where they are not given."""
        if self.cutter is None or layout.pp == 1 or layout.stages:
            return Candidate(layout, self.costs.estimate(layout))
        cut = self.cutter.fastest(layout)
        candidate = Candidate(cut, self.costs.estimate(cut))
        if not candidate.estimate.fits:
            fitting = self.cutter.fitting(candidate, self.limit)
            if fitting is not None:
                other = Candidate(fitting, self.costs.estimate(fitting))
                return min(candidate, other, key=lambda plan: plan.shortage)
        return candidate

    def exact(self, candidate: Candidate) -> Candidate:
        """With its schedule run block by block, where it has RUN_AT_MOST blocks or fewer."""
        layout = candidate.layout
        if layout.pp == 1 or layout.pp * layout.chunks * candidate.estimate.micro_batches > RUN_AT_MOST:
            return candidate
        return Candidate(candidate.layout, self.costs.estimate(candidate.layout, exact=True))


class StageCutter:
    """`costs` is `cost.step.Costs`: what one piece takes is asked of it."""

    def __init__(self, model, costs):
        self.costs = costs
        self.signatures: tuple[int, ...] = model.signatures
        self.layers = model.facts.layers
        self._known: dict[tuple, tuple[int, ...]] = {}

    def fastest(self, layout: Layout) -> Layout:
        """With the cut whose slowest stage is fastest. Even cuts are left unwritten."""
        seconds = {number: self.costs.piece(number, layout).seconds for number in set(self.signatures)}
        longest = max(seconds[number] for number in self.signatures[1:-1])
        grains = {number: round(GRAIN * value / longest) for number, value in seconds.items()}
        stages = layout.pp * layout.chunks
        key = (stages, *(grains[number] for number in sorted(grains)))
        if key not in self._known:
            times = [grains[number] for number in self.signatures]
            self._known[key] = balance(times, [0.0] * len(times), stages)
        return self._with(layout, self._known[key])

    def fitting(self, candidate: Candidate, limit: float) -> Layout | None:
        """With the fastest cut of those that fit, None where there is none, or where a rank holds several chunks."""
        layout, estimate = candidate
        if layout.chunks > 1:
            return None
        blocks = [stage.blocks for stage in estimate.stages]
        pieces = {number: self.costs.piece(number, layout) for number in set(self.signatures)}
        kept = self.costs.kept[layout.zero]
        sizes = {
            number: (
                states_of(self.costs.held(number, layout), kept, layout).total + piece.logit_bytes,
                piece.kept_bytes,
            )
            for number, piece in pieces.items()
        }
        flying = in_flight(layout.schedule, layout.pp, layout.chunks, estimate.micro_batches)
        sums = _stage_bytes([sizes[number] for number in self.signatures], blocks, flying)
        # what a stage takes besides the sum over its pieces (buffers, margin) is taken to stay
        limits = [limit - (stage.memory.total - own) for stage, own in zip(estimate.stages, sums, strict=True)]
        try:
            cut = balance(
                [pieces[number].seconds for number in self.signatures],
                [sizes[number] for number in self.signatures],
                layout.pp,
                limits,
                list(flying),
            )
        except TersorError:
            return None
        return None if list(cut) == blocks else self._with(layout, cut)

    def _with(self, layout: Layout, cut: tuple[int, ...]) -> Layout:
        return layout if len(set(cut)) == 1 else replace(layout, stages=cut)


def _stage_bytes(
    sizes: Sequence[tuple[float, float]], blocks: Sequence[int], in_flight: Sequence[float]
) -> list[float]:
    """Of every stage: what its pieces take always, and for each micro-batch in flight."""
    found, start = [], 1
    for stage, count in enumerate(blocks):
        first = start - (stage == 0)
        end = start + count + (stage == len(blocks) - 1)
        found.append(sum(fixed + in_flight[stage] * moving for fixed, moving in sizes[first:end]))
        start += count
    return found

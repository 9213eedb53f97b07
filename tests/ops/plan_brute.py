"""What a search should find, by pricing every layout and from the definitions."""

from __future__ import annotations

from tersor.ops.plan_parallel.search.bound import SLOWEST
from tersor.ops.plan_parallel.search.price import Pricer
from tersor.ops.plan_parallel.search.space import Space


def kind_of(layout) -> tuple:
    """The list has one plan of each kind."""
    return layout.tp, layout.pp, layout.dp, layout.cp, layout.ep, layout.etp, layout.schedule, layout.chunks


def brute_force(pricer: Pricer, space: Space, devices: int, top: int):
    """(list, front, nearest, how many layouts)"""
    priced = [pricer.price(layout) for layout in space.layouts(devices)]
    fitting = sorted((plan for plan in priced if plan.estimate.fits), key=lambda plan: plan.rank)
    best: dict = {}
    for plan in fitting:
        best.setdefault(kind_of(plan.layout), plan)
    front: list = []
    for plan in fitting:
        if plan.estimate.step_seconds <= SLOWEST * fitting[0].estimate.step_seconds and (
            not front or plan.estimate.peak_bytes < front[-1].estimate.peak_bytes
        ):
            front.append(plan)
    nearest = min(priced, key=lambda plan: plan.shortage) if priced and not fitting else None
    return list(best.values())[:top], front, nearest, len(priced)

"""How many weights each layer loses, so that all of them together lose what was asked.

`rd` measures what each layer's loss does to the output of its block, for some amounts, and lets the dynamic programme
choose (Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning", with the block's output in place
of the network's). A block's error counts relative to the size of its output, token by token: a few tokens of huge norm
would drown all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tersor.ops.model import allocation
from tersor.ops.model.blocks import TOKENS_PER_BATCH, BlockPass
from tersor.ops.model.patterns import Pattern, keep_mask
from tersor.ops.model.rate_distortion import Curve, allocate_rd
from tersor.ops.model.rewrite import set_weight
from tersor.ops.model.skeleton import weight_matrix
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.prune.job import Job
from tersor.ops.prune.weights.by_score import ByScore
from tersor.ops.prune.weights.methods import method
from tersor.ops.prune.weights.plan import Masks
from tersor.ops.prune.weights.wanda import Wanda
from torch import nn

OFFSETS = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)  # amounts that are measured, around the asked share
MOST = 0.98
EXPERT = re.compile(r"\.experts\.\d+\.")


def allocate(job: Job, masks: Masks) -> tuple[dict[str, float], dict]:
    """The share of zeros of each tensor, and what the report says of it."""
    kind, target = job.request.allocate, job.request.sparsity
    free = {name: linear.shape for name, linear in masks.linears.items() if name not in masks.fixed}
    sizes = {name: out * columns for name, (out, columns) in free.items()}
    if kind == "uniform" or not free:
        return masks.sparsity, {}
    if kind == "erk":
        found, numbers = allocation.erk(free, target), {}
    elif kind == "owl":
        found, numbers = _owl(job, sizes, target)
    else:
        found, numbers = _rate_distortion(job, sizes, target)
    numbers = {"allocation": {"kind": kind, **numbers, "sparsity": {name: round(found[name], 4) for name in found}}}
    return masks.sparsity | found, numbers


def _owl(job: Job, sizes: dict[str, int], target: float) -> tuple[dict[str, float], dict]:
    """One share for each block, by the outliers among its Wanda scores."""
    ratios: dict[str, float] = {}
    block_of: dict[str, str] = {}
    run = _first_batch(job)
    for index, _block, layers, statistics in _blocks(job, run, sizes, Wanda()):
        scores = [
            Wanda().scores(weight_matrix(layer).float(), statistics.get(name), name) for name, layer in layers.items()
        ]
        unit = job.skeleton.block_name(index)
        ratios[unit] = allocation.outlier_ratio(scores)
        block_of |= dict.fromkeys(layers, unit)
    totals = {unit: sum(sizes[name] for name in block_of if block_of[name] == unit) for unit in ratios}
    shares = allocation.owl(ratios, totals, target)
    return {name: shares[block_of[name]] if name in block_of else target for name in sizes}, {"outlier_ratio": ratios}


def _rate_distortion(job: Job, sizes: dict[str, int], target: float) -> tuple[dict[str, float], dict]:
    """Curves of every layer (all experts of a block as one), the programme's choice, and how well it was foretold."""
    scorer = method(job.request)
    scorer = scorer if isinstance(scorer, ByScore) else Wanda()
    amounts = sorted({0.0, *(min(max(target + offset, 0.0), MOST) for offset in OFFSETS)})
    curves: dict[str, Curve] = {}
    members: dict[str, list[str]] = {}
    for index, block, layers, statistics in _blocks(job, run := _first_batch(job), sizes, scorer):
        exact = run.probe(index, block)
        for name in layers:
            members.setdefault(EXPERT.sub(".experts.*.", name), []).append(name)
        for group, names in members.items():
            if names[0] not in layers:
                continue
            distortions = [0.0]
            for amount in amounts[1:]:
                with _masked({name: layers[name] for name in names}, statistics, scorer, lambda _, share=amount: share):
                    distortions.append(_distortion(run.probe(index, block), exact))
            curves[group] = Curve(sum(sizes[name] for name in names), amounts, distortions)
    groups = {group: members[group] for group in curves}
    total = sum(curve.size for curve in curves.values())
    budget = total - int(target * total)
    choice = allocate_rd({group: curve.options() for group, curve in curves.items()}, budget)
    found = {name: amounts[choice.index[group]] for group, names in groups.items() for name in names}
    measured = 0.0
    for index, block, layers, statistics in _blocks(job, run := _first_batch(job), sizes, scorer):
        exact = run.probe(index, block)
        with _masked(layers, statistics, scorer, found.__getitem__):
            measured += _distortion(run.probe(index, block), exact)
    found = dict.fromkeys(sizes, target) | found
    return found, {"predicted_distortion": choice.predicted, "measured_distortion": measured}


def _first_batch(job: Job) -> BlockPass:
    """The pass over as many windows as go through a block together: enough for a curve."""
    return BlockPass(job.skeleton, job.windows[: max(1, TOKENS_PER_BATCH // job.windows.shape[1])])


def _blocks(
    job: Job, run: BlockPass, names, scorer: ByScore
) -> Iterator[tuple[int, nn.Module, dict[str, nn.Module], dict[str, InputStatistics]]]:
    """Each dense block, filled, with its layers and their statistics; then the text goes on."""
    for index in range(len(run)):
        job.progress("allocation", index, len(run))
        with job.skeleton.filled(index) as block:
            layers = {name: layer for name, layer in job.skeleton.linears(index).items() if name in names}
            statistics: dict[str, InputStatistics] = {}
            if scorer.needs:
                run.run_staged(index, block, layers, scorer.needs, statistics.__setitem__, keep_inputs=True)
            yield index, block, layers, statistics
            run.run(index, block)


@contextmanager
def _masked(layers: dict[str, nn.Module], statistics: dict, scorer: ByScore, share: Callable[[str], float]):
    """Layers with the lowest scores zeroed, as they were again on leaving."""
    before = {name: layer.weight for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = weight_matrix(layer).float()
        scores = scorer.scores(weight, statistics.get(name), name)
        keep = keep_mask(scores.contiguous(), Pattern(), share(name), scorer.per_row)
        set_weight(layer, torch.where(keep, weight, 0).to(layer.weight.dtype))
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = before[name]


def _distortion(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over tokens of ||found - exact||^2 / ||exact||^2."""
    error = (found - exact).float().square().sum(-1)
    return float((error / exact.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean())

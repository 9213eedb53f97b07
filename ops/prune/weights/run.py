"""The run that masks weights: tensor by tensor without data, or block by block with calibration text."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.rewrite import BlockRewriter, set_weight
from tersor.ops.model.skeleton import weight_matrix
from tersor.ops.model.statistics import InputStatistics, is_starved, output_error, starved_warning
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.weights.allocate import allocate
from tersor.ops.prune.weights.methods import method
from tersor.ops.prune.weights.plan import DATA_FREE, Masks
from torch import nn

INSTEAD = "pruned without statistics"  # layers that hardly a token reached


def decide(job: Job, plan: Plan) -> Plan:
    """Spread the zeros over the layers as --allocate says, once it is known that --stats has what is needed."""
    if job.request.stats is not None:
        plan.details.collected = job.collected(plan.details.linears.values(), method(job.request).needs)
    plan.details.sparsity, plan.details.allocation = allocate(job, plan.details)
    return plan


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write every tensor. Returns what the allocation predicted and gave."""
    if job.request.method in DATA_FREE or plan.details.collected is not None:
        _stream(job, plan, writer)
        return plan.details.allocation
    run = job.block_pass(Path(writer.partial))
    pruner = _Pruner(job.checkpoint, plan.details, writer, run, method(job.request))
    pruner.rewrite_all(job.progress)
    run.pool.close()
    plan.warnings += starved_warning(pruner.starved, INSTEAD) + run.pool.warnings()
    return plan.details.allocation


def _stream(job: Job, plan: Plan, writer: CheckpointWriter) -> None:
    """Without data, or with statistics from a file: one tensor in memory at a time."""
    checkpoint, masks, chosen = job.checkpoint, plan.details, method(job.request)
    collected = masks.collected
    names = list(checkpoint.tensors) if collected is None else collected.in_order(checkpoint.tensors)
    starved = []
    for count, name in enumerate(names):
        job.progress("tensors", count, len(checkpoint.tensors))
        if name in writer.journal.done:
            continue
        numbers = None
        if name in masks.linears:
            statistics = None if collected is None else collected.statistics(name)
            if collected is not None and is_starved(statistics):
                statistics = None
                starved.append(name)
            numbers = {name: _prune_stored(checkpoint, name, masks, chosen, writer, statistics)}
        else:
            copy_tensor(checkpoint, name, writer)
        writer.finish(name, numbers)
    job.progress("tensors", len(checkpoint.tensors), len(checkpoint.tensors))
    plan.warnings += starved_warning(starved, INSTEAD)


def _prune_stored(
    checkpoint: Checkpoint,
    name: str,
    masks: Masks,
    chosen,
    writer: CheckpointWriter,
    statistics: InputStatistics | None = None,
) -> dict:
    """Prune one tensor of the file, where it is computed if there are statistics, and write it."""
    began = time.perf_counter()
    stored = checkpoint.read(name)
    transposed = is_transposed(checkpoint, name)
    weight = (stored.T if transposed else stored).float().contiguous()
    check_finite(weight, name, checkpoint)
    if statistics is not None:
        weight = weight.to(statistics.column_norms.device)
    pruned = chosen.prune(weight, statistics, masks.pattern, masks.sparsity[name], name)
    new = (pruned.T if transposed else pruned).to(stored.dtype).contiguous()
    writer.write(name, new)
    return _numbers(weight, pruned, statistics, began)


class _Pruner(BlockRewriter):
    """Writes masked weights, and sends the text on through them."""

    def __init__(self, checkpoint: Checkpoint, masks: Masks, writer: CheckpointWriter, run: BlockPass, chosen):
        super().__init__(checkpoint, masks.linears, writer, run)
        self.masks, self.chosen = masks, chosen
        self.needs = chosen.needs
        self.starved: list[str] = []

    def rewrite(self, name: str, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        began = time.perf_counter()
        weight = weight_matrix(layer).float().contiguous()
        reason = None
        if is_starved(statistics):
            statistics, reason = None, "too few calibration tokens, pruned without statistics"
            self.starved.append(name)
        pruned = self.chosen.prune(weight, statistics, self.masks.pattern, self.masks.sparsity[name], name)
        stored = pruned.to(self.stored_dtype(name))
        set_weight(layer, stored.to(layer.weight.dtype))
        self.writer.write(name, (stored.T if is_transposed(self.checkpoint, name) else stored).cpu().contiguous())
        numbers = _numbers(weight, stored.float(), statistics, began)
        return numbers if reason is None else numbers | {"reason": reason}

    def outside(self, name: str) -> dict:
        return {name: _prune_stored(self.checkpoint, name, self.masks, self.chosen, self.writer)}


def _numbers(weight: torch.Tensor, pruned: torch.Tensor, statistics: InputStatistics | None, began: float) -> dict:
    """What the report says of one layer."""
    difference = weight - pruned
    norm = float(weight.square().sum())
    error = {"relative_mse": float(difference.square().sum()) / norm if norm else 0.0}
    if statistics is not None and "hessian" in statistics.needs:
        error["output_relative_mse"] = output_error(weight, pruned, statistics.hessian)
    zeros = int((pruned == 0).sum())
    return {
        "error": error,
        "sparsity": zeros / max(pruned.numel(), 1),
        "seconds": round(time.perf_counter() - began, 4),
    }

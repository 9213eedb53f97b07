"""Measures the experts on calibration text, then writes those that stay under new numbers."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.prune.experts.choose import at_random, average_shares, by_score, merge_groups
from tersor.ops.prune.experts.plan import Details, Layer, assemble, renumbered
from tersor.ops.prune.experts.routing import RoutingStatistics
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan


def decide(job: Job, plan: Plan) -> Plan:
    """Choose the experts of every layer."""
    details: Details = plan.details
    if details.kept == details.count:
        return plan
    statistics = {} if job.request.method == "random" else measure(job, details)
    rows = []
    for number, layer in enumerate(details.layers):
        row: dict = {"layer": layer.module}
        if job.request.method == "random":
            layer.kept = at_random(details.count, details.kept, job.request.seed, number)
        else:
            found = statistics[layer.module]
            layer.kept = by_score(found.scores, details.kept)
            if job.request.method == "merge":
                layer.merged = merge_groups(found.similarity(), layer.kept)
                layer.shares = average_shares(found.tokens, layer.merged)
                row["merged_into"] = {str(centre): others for centre, others in layer.merged.items()}
            mass = float(found.mass.sum())
            row |= {
                "scores": [float(score) for score in found.scores],
                "tokens": [int(count) for count in found.tokens],
                "routed_mass_kept": float(found.mass[layer.kept].sum()) / mass if mass else None,
            }
        rows.append(row | {"kept": layer.kept})
    steps = assemble(job.checkpoint, details)
    steps.config, steps.warnings = plan.config, plan.warnings
    details.quality = {"config_key": details.key, "experts": details.count, "kept": details.kept, "layers": rows}
    return steps


def measure(job: Job, details: Details) -> dict[str, RoutingStatistics]:
    """Send the calibration text through the unpruned model: statistics by experts module."""
    run, skeleton = job.block_pass(), job.skeleton
    statistics = {
        layer.module: RoutingStatistics(details.count, job.request.method == "merge") for layer in details.layers
    }
    for index in range(len(run)):
        job.progress("experts", index, len(run))
        with skeleton.filled(index) as block, _watched(block, skeleton.block_name(index), statistics):
            run.run(index, block)
    job.progress("experts", len(run), len(run))
    for name, found in statistics.items():
        if not bool(torch.isfinite(found.scores).all()):
            raise TersorError(f"{name}: outputs are NaN or Inf", "the checkpoint is damaged: get a sound copy")
        if not int(found.tokens.sum()):
            raise TersorError(f"{name}: was not reached by the calibration text", "use --method random")
    return statistics


@contextmanager
def _watched(block, prefix: str, statistics: dict[str, RoutingStatistics]):
    """Have the experts modules of a block report where tokens go and what comes out."""
    watched = [
        (module, statistics[f"{prefix}.{name}"])
        for name, module in block.named_modules()
        if f"{prefix}.{name}" in statistics
    ]
    for module, found in watched:
        module.forward = _reporting(found, module.forward)
    try:
        yield
    finally:
        for module, _ in watched:
            del module.forward


def _reporting(found: RoutingStatistics, original):
    def forward(hidden_states, top_k_index, top_k_weights):
        return found.forward(original, hidden_states, top_k_index, top_k_weights)

    return forward


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write what stays. Returns the report's account of the choice."""
    details: Details = plan.details
    layers = {name: layer for layer in details.layers for name in (*layer.numbered, *layer.stacked)}
    for count, (name, action) in enumerate(plan.actions.items()):
        job.progress("write", count, len(plan.actions))
        if name in writer.journal.done or not action.outputs:
            continue
        began = time.perf_counter()
        numbers = None
        if action.action == "keep":
            copy_tensor(job.checkpoint, name, writer)
        else:
            value = _value(job.checkpoint, name, layers[name])
            writer.write(next(iter(action.outputs)), value)
            numbers = {name: {"seconds": round(time.perf_counter() - began, 4)}}
        writer.finish(name, numbers)
    job.progress("write", len(plan.actions), len(plan.actions))
    return {"experts": details.quality} if details.quality else {}


def _value(checkpoint: Checkpoint, name: str, layer: Layer) -> torch.Tensor:
    """What is written for `name`: a kept expert, or the kept part of a tensor of all experts."""
    if name in layer.numbered:
        expert = layer.numbered[name]
        parts = {part: _read(checkpoint, renumbered(name, expert, part)) for part in layer.parts(expert)}
        return _average(parts, layer, expert)
    tensor, axis = _read(checkpoint, name), layer.stacked[name]
    if not layer.merged or name in layer.router:
        return tensor.index_select(axis, torch.tensor(layer.kept))
    slices = [
        _average({part: tensor.select(axis, part) for part in layer.parts(expert)}, layer, expert)
        for expert in layer.kept
    ]
    return torch.stack(slices, dim=axis)


def _average(parts: dict[int, torch.Tensor], layer: Layer, expert: int) -> torch.Tensor:
    if len(parts) == 1:
        return parts[expert]
    total = sum(layer.shares[part] * tensor.float() for part, tensor in parts.items())
    return total.to(parts[expert].dtype)


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.read(name)
    check_finite(tensor, name, checkpoint)
    return tensor

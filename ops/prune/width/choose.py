"""Scores for all units of the model, and the choice of those that stay."""

from __future__ import annotations

import zlib

import torch
from tersor.ops.model import unit_scores as scores
from tersor.ops.model.copy import check_finite
from tersor.ops.model.gradients import backward, is_causal
from tersor.ops.model.skeleton import weight_matrix
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.model.unit_scores import Moments
from tersor.ops.model.units import Units
from tersor.ops.prune.job import Job
from tersor.ops.prune.width.cut import Details
from torch import nn


def choose(job: Job, details: Details) -> None:
    """Fill `details.choice` by what --method measures. Activation scores are made later, while the blocks are cut."""
    method = job.request.method
    if method == "activation" and details.kind != "channels":
        return
    if method == "random":
        ranked = [_random(units, job.request.seed) for units in details.units]
    elif method == "activation":
        ranked = [_channel_activations(job, units) for units in details.units]
    elif method == "magnitude":
        ranked = [scores.magnitude(_weights(job, units)) for units in details.units]
    else:
        moments = _gradients(job, details)
        if method == "taylor":
            ranked = [scores.taylor(found) for found in moments]
        else:
            ranked = scores.saliency([scores.five_scores(found) for found in moments])
        for number, found in enumerate(moments):
            if not bool(found.gradients.any()):  # an expert that no token reached
                ranked[number] = scores.magnitude(found)
    for units, found in zip(details.units, ranked, strict=True):
        details.choice[units.module] = scores.strongest(found, details.kept[units.count])


def _random(units: Units, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {units.module}".encode()))
    return torch.rand(units.count, generator=generator)


def _weights(job: Job, units: Units) -> Moments:
    moments = Moments(units.count)
    for slot in units.slots:
        tensor = job.checkpoint.read(slot.name)
        check_finite(tensor, slot.name, job.checkpoint)
        moments.add(slot.of_units(tensor))
    return moments


def _gradients(job: Job, details: Details) -> list[Moments]:
    """Moments of weights and gradients over all tensors of the blocks; what lies outside the blocks has no part."""
    moments = [Moments(units.count) for units in details.units]
    places: dict[str, list[tuple[Moments, object]]] = {}
    for found, units in zip(moments, details.units, strict=True):
        for slot in units.slots:
            places.setdefault(slot.name, []).append((found, slot))

    def take(index: int, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, (weight, gradient) in tensors.items():
            check_finite(weight, name, job.checkpoint)
            for found, slot in places[name]:
                found.add(_cpu(slot.of_units, weight), _cpu(slot.of_units, gradient))

    run = job.block_pass()
    loss = backward(run, places, take, job.progress)
    run.pool.close()
    details.quality["calibration_loss"] = loss
    details.quality["loss"] = (
        "next token" if is_causal(job.skeleton) else "half the mean square of the last block's output"
    )
    return moments


def _cpu(of_units, tensor: torch.Tensor) -> torch.Tensor:
    return of_units(tensor.cpu())


def _channel_activations(job: Job, units: Units) -> torch.Tensor:
    """Norm of each hidden channel at the input of a layer times the norm of the column that reads it, over all layers."""
    slots = {slot.name: slot for slot in units.slots}
    total = torch.zeros(units.count)
    run = job.block_pass()
    for index in range(len(run)):
        job.progress("activations", index, len(run))
        with job.skeleton.filled(index) as block:
            layers = {
                name: layer
                for name, layer in job.skeleton.linears(index).items()
                if name in slots and slots[name].axis == int(isinstance(layer, nn.Linear))
            }

            def ready(name: str, statistics: InputStatistics, layers=layers) -> None:
                columns = weight_matrix(layers[name]).float().square().sum(0)
                total.add_((statistics.column_norms.square() / statistics.tokens * columns).cpu())

            run.run_staged(index, block, layers, {"column_norms"}, ready)
    run.pool.close()
    return total.sqrt()

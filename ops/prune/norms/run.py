"""Folds the gains of norms into the linear layers that read them: the same function from fewer tensors."""

from __future__ import annotations

import time

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.statistics import weight_error
from tersor.ops.prune.job import Job
from tersor.ops.prune.norms.find import NormFinder
from tersor.ops.prune.norms.fold import folded_bias, folded_weight
from tersor.ops.prune.norms.plan import Details, Fold, Reader, assemble, chosen
from tersor.ops.prune.plan import Plan


def decide(job: Job, plan: Plan) -> Plan:
    """Look at what the model's code does with each norm. Raises TersorError when none can go."""
    finder = NormFinder(job.skeleton, chosen(job.checkpoint, job.request))
    details = finder.everything(job.progress)
    if not details.folds:
        name, reason = next(iter(details.kept.items()), ("none", "the model has no norm with a gain"))
        raise TersorError(f"{job.checkpoint.path}: no norm can be folded: {name}: {reason}", "nothing is to be done")
    return assemble(job.checkpoint, job.request, details)


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write every tensor. Returns how many norms went and why others stay."""
    details: Details = plan.details
    makers = {}
    for fold in details.folds:
        for leaf in filter(None, (fold.gain, fold.bias)):
            makers[leaf] = _norm_value, fold, None
        for reader in fold.readers:
            makers[reader.weight] = _weight_value, fold, reader
            if fold.bias and not fold.divided:
                makers[reader.bias] = _bias_value, fold, reader
    for count, (name, action) in enumerate(plan.actions.items()):
        job.progress("write", count, len(plan.actions))
        if name in writer.journal.done or not action.outputs:
            continue
        began = time.perf_counter()
        if action.action == "keep":
            copy_tensor(job.checkpoint, name, writer)
            writer.finish(name, None)
            continue
        make, fold, reader = makers[name]
        exact = make(job.checkpoint, name, fold, reader)
        stored = exact.to(getattr(torch, TORCH_DTYPES[job.checkpoint.tensors[name].dtype]))
        if not bool(torch.isfinite(stored).all()):
            raise TersorError(
                f"{name}: is too large for its dtype once {fold.gain} is folded in", "use --exclude for it"
            )
        writer.write(name, stored)
        numbers = {"error": weight_error(exact, stored), "seconds": round(time.perf_counter() - began, 4)}
        writer.finish(name, {name: numbers})
    job.progress("write", len(plan.actions), len(plan.actions))
    return {"norms": {"folded": len(details.folds), "kept": details.kept}}


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.read(name).float()
    check_finite(tensor, name, checkpoint)
    return tensor


def _factor(checkpoint: Checkpoint, fold: Fold) -> torch.Tensor:
    return _read(checkpoint, fold.gain) + fold.offset


def _norm_value(checkpoint: Checkpoint, name: str, fold: Fold, reader: None) -> torch.Tensor:
    if name == fold.gain:
        return torch.full(checkpoint.tensors[name].shape, 1.0 - fold.offset)
    bias = _read(checkpoint, name)
    return bias / _factor(checkpoint, fold) if fold.divided else torch.zeros_like(bias)


def _weight_value(checkpoint: Checkpoint, name: str, fold: Fold, reader: Reader) -> torch.Tensor:
    return folded_weight(_read(checkpoint, name), _factor(checkpoint, fold), reader.transposed)


def _bias_value(checkpoint: Checkpoint, name: str, fold: Fold, reader: Reader) -> torch.Tensor:
    weight = _read(checkpoint, reader.weight)
    return folded_bias(weight, _read(checkpoint, name), _read(checkpoint, fold.bias), reader.transposed)

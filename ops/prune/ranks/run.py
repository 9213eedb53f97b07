"""Factorise: tensor by tensor without data, or block by block while the calibration text passes through the factors."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from tersor.formats import low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.low_rank import COUNT_KEY, FILE_NAME, Factors
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.rewrite import BlockRewriter, set_weight
from tersor.ops.model.skeleton import weight_matrix
from tersor.ops.model.statistics import InputStatistics, is_starved, output_error, weight_error
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.ranks.kronecker import kronecker
from tersor.ops.prune.ranks.svd import Product, svd
from tersor.ops.prune.ranks.whitened import whitened
from tersor.ops.prune.request import Request
from torch import nn

MANY_ZEROS = 0.05


def decide(job: Job, plan: Plan) -> Plan:
    """Ranks are decided by headers; what is looked at here is whether text and model can be had at all."""
    if job.request.method == "whitened" and plan.details:
        _ = job.windows, job.skeleton
    return plan


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write every tensor, `lowrank.json` and, into the plan, what became of zeros. Returns the report's quality numbers."""
    checkpoint, request = job.checkpoint, job.request
    weights = _Weights(checkpoint, plan, request, writer)
    if request.method == "whitened" and plan.details:
        run = job.block_pass(Path(writer.partial))
        _Whitener(weights, run).rewrite_all(job.progress)
        run.pool.close()
        plan.warnings += run.pool.warnings()
    else:
        for count, name in enumerate(checkpoint.tensors):
            job.progress("tensors", count, len(checkpoint.tensors))
            if name in writer.journal.done:
                continue
            if name in plan.details:
                numbers = {name: weights.outside(name, job.device)}
            else:
                numbers = None
                copy_tensor(checkpoint, name, writer)
            writer.finish(name, numbers)
        job.progress("tensors", len(checkpoint.tensors), len(checkpoint.tensors))
    if plan.details and not request.merge:
        writer.add_json(FILE_NAME, low_rank.description(plan.details.values()))
    return _quality(plan, request, _numbers(writer))


class _Weights:
    """What is done with one weight, wherever it comes from."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, request: Request, writer: CheckpointWriter):
        self.checkpoint, self.plan, self.request, self.writer = checkpoint, plan, request, writer

    def factorise(
        self, name: str, weight: torch.Tensor, statistics: InputStatistics | None
    ) -> tuple[torch.Tensor, dict]:
        """Write the factors of `weight` `[out, in]`, or their product. Returns what a reader will see, float32, and numbers.

        Statistics are for --method whitened; without them it is a plain SVD.
        """
        began = time.perf_counter()
        factors: Factors = self.plan.details[name]
        product = self._product(name, weight, factors, statistics)
        tensors = low_rank.encode(factors, product.first.cpu(), product.second.cpu())
        decoded = low_rank.decode(factors, tensors.__getitem__)
        if self.request.merge:
            stored = decoded.to(getattr(torch, TORCH_DTYPES[factors.dtype]))
            decoded = stored.float()
            tensors = {name: stored.T if factors.transposed else stored}
        for tensor_name, tensor in tensors.items():
            self.writer.write(tensor_name, tensor)
        decoded = decoded.to(weight.device)
        numbers = {"error": weight_error(weight, decoded)}
        numbers["error"] |= {"kept_energy": product.energy, COUNT_KEY[factors.kind]: factors.count}
        if statistics is not None:
            numbers["error"]["output_relative_mse"] = output_error(weight, decoded, statistics.hessian)
        zeros = float((weight == 0).float().mean())
        if zeros > MANY_ZEROS:
            numbers["zeros_lost"] = zeros
        numbers["seconds"] = round(time.perf_counter() - began, 4)
        return decoded, numbers

    def _product(
        self, name: str, weight: torch.Tensor, factors: Factors, statistics: InputStatistics | None
    ) -> Product:
        if factors.grid is not None:
            return kronecker(weight.double(), factors.count, factors.grid)
        if statistics is None:
            return svd(weight, factors.count)
        try:
            return whitened(weight, factors.count, statistics, self.request.damping)
        except ValueError as error:
            raise TersorError(
                f"{name}: {error}", "use other calibration text, or --method svd, which needs none"
            ) from error

    def outside(self, name: str, device: torch.device) -> dict:
        """Factorise a weight straight from the file. Raises TersorError when it holds NaN or Inf."""
        weight = self.checkpoint.read(name).to(device).float()
        check_finite(weight, name, self.checkpoint)
        factors = self.plan.details[name]
        return self.factorise(name, weight.T.contiguous() if factors.transposed else weight, None)[1]


class _Whitener(BlockRewriter):
    """Truncates each layer for the inputs that the already truncated layers before it produce."""

    needs = frozenset({"hessian"})

    def __init__(self, weights: _Weights, run: BlockPass):
        super().__init__(weights.checkpoint, weights.plan.details, weights.writer, run)
        self.weights = weights

    def rewrite(self, name: str, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        starved = is_starved(statistics)
        decoded, numbers = self.weights.factorise(name, weight_matrix(layer).float(), None if starved else statistics)
        if starved:
            numbers["reason"] = f"{self.weights.plan.actions[name].reason}; too few calibration tokens, plain SVD"
            numbers["plain"] = True
        set_weight(layer, decoded.to(layer.weight.dtype))
        return numbers

    def stored(self, name: str) -> torch.Tensor:
        if self.weights.request.merge:
            return super().stored(name)
        return low_rank.decode(self.weights.plan.details[name], self.writer.read)

    def outside(self, name: str) -> dict | None:
        numbers = self.weights.outside(name, self.skeleton.device)
        reason = f"{self.weights.plan.actions[name].reason}; outside the blocks, plain SVD"
        return {name: numbers | {"reason": reason, "plain": True}}


def _numbers(writer: CheckpointWriter) -> dict[str, dict]:
    numbers: dict[str, dict] = {}
    for data in writer.journal.done.values():
        numbers |= data or {}
    return numbers


def _quality(plan: Plan, request: Request, numbers: dict[str, dict]) -> dict:
    """What the report says of the whole; adds a warning to the plan where pruned zeros are no more."""
    if not plan.details:
        return {}
    zeros = [found["zeros_lost"] for found in numbers.values() if "zeros_lost" in found]
    if zeros:
        plan.warnings.append(
            f"{len(zeros)} weights had up to {max(zeros):.0%} zeros, which a product of factors does not keep"
        )
    starved = [name for name, found in numbers.items() if "plain" in found]
    if starved:
        plan.warnings.append(
            f"{len(starved)} layers were not whitened but truncated by plain SVD, for example {starved[0]}"
        )
    all_factors: dict[str, Factors] = plan.details
    dense = sum(math.prod(factors.shape) for factors in all_factors.values())
    energies = [numbers[name]["error"]["kept_energy"] for name in all_factors]
    quality = {
        "factorised_layers": len(all_factors),
        "parameters_removed_share": 0.0 if request.merge else 1 - sum(f.params for f in all_factors.values()) / dense,
        "kept_energy_mean": sum(energies) / len(energies),
        "kept_energy_least": min(energies),
    }
    outputs = [found["error"].get("output_relative_mse") for found in numbers.values() if "error" in found]
    outputs = [value for value in outputs if value is not None]
    if outputs:
        quality["output_relative_mse_mean"] = sum(outputs) / len(outputs)
    return quality

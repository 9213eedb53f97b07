"""The calibrated run: one block in memory, quantized while the calibration text passes through it.

A finished block is journalled as a unit. On --resume its weights are read back from the unfinished output and the text
is sent through them, which gives the very activations of the first run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.copy import copy_tensor, not_finite
from tersor.ops.model.memory import parking_space
from tersor.ops.model.skeleton import Skeleton, weight_matrix
from tersor.ops.model.spill import SpillPool
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.quantize.awq import AWQ
from tersor.ops.quantize.data_free import quantize_tensor
from tersor.ops.quantize.errors import ErrorSums, output_error
from tersor.ops.quantize.gptq import GPTQ
from tersor.ops.quantize.plan import Plan, Step
from tersor.ops.quantize.rtn import FEWEST_TOKENS, RTN
from torch import nn


def quantize_blocks(
    checkpoint: Checkpoint,
    plan: Plan,
    writer: CheckpointWriter,
    request,
    prepared: tuple[torch.Tensor, Skeleton],
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Quantize every planned layer of every block, then what lies outside. Returns warnings."""
    windows, skeleton = prepared
    pool = SpillPool(parking_space(request.max_memory_bytes, skeleton), Path(writer.partial))
    run = BlockPass(skeleton, windows, pool)
    if request.method == "gptq":
        method = GPTQ(request.damping, request.activation_order, request.clip, request.keep_zeros)
    else:
        method = AWQ(request.clip)
    job = _Job(checkpoint, plan, writer, run, method, RTN(request.clip), device)
    for index in range(len(run)):
        progress("blocks", index, len(run))
        unit = skeleton.block_name(index)
        if unit in writer.journal.done:
            job.replay(index)
        else:
            job.block(index, unit)
    progress("blocks", len(run), len(run))
    job.remainder()
    pool.close()
    warnings = []
    if job.starved:
        warnings.append(
            f"{len(job.starved)} layers saw fewer than {FEWEST_TOKENS} calibration tokens and were rounded to nearest, "
            f"for example {job.starved[0]}"
        )
    if pool.peak_spilled_bytes:
        warnings.append(f"{pool.peak_spilled_bytes} bytes of activations went to disk to respect --max-memory")
    return warnings


class _Job:
    """What the blocks of one run share."""

    def __init__(self, checkpoint, plan, writer, run: BlockPass, method, rtn: RTN, device):
        self.checkpoint, self.plan, self.writer = checkpoint, plan, writer
        self.run, self.method, self.rtn, self.device = run, method, rtn, device
        self.skeleton = run.skeleton
        self.encoding = encodings.encoding(plan.format)
        self.starved: list[str] = []
        self.written: set[str] = set()

    def block(self, index: int, unit: str) -> None:
        numbers: dict[str, dict] = {}
        with self.skeleton.filled(index) as block:
            layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in self.plan.steps}
            for name, layer in layers.items():
                if not bool(torch.isfinite(layer.weight).all()):
                    raise not_finite(name, self.checkpoint)
            if isinstance(self.method, AWQ):
                changed = self._awq(index, block, layers, numbers)
            else:
                self._staged(index, block, layers, numbers)
                changed = {}
            for name in self.skeleton.checkpoint_names(index):
                if name in changed:
                    self.writer.write(name, changed[name])
                elif name not in self.plan.steps:
                    copy_tensor(self.checkpoint, name, self.writer)
                self.written.add(name)
        self.writer.finish(unit, numbers)

    def _staged(self, index: int, block: nn.Module, layers: dict[str, nn.Module], numbers: dict[str, dict]) -> None:
        def ready(name: str, statistics: InputStatistics) -> None:
            numbers[name] = self._quantize(self.plan.steps[name], layers[name], statistics)

        for name in self.run.run_staged(index, block, layers, self.method.needs, ready):
            numbers[name] = self._quantize(self.plan.steps[name], layers[name], None)

    def _awq(self, index: int, block: nn.Module, layers: dict[str, nn.Module], numbers: dict[str, dict]) -> dict:
        """Statistics of the unchanged block first, then scales folded and all layers rounded, then the text goes on."""
        statistics: dict[str, InputStatistics] = {}
        unreached = self.run.run_staged(
            index, block, layers, self.method.needs, statistics.__setitem__, keep_inputs=True
        )
        changed_modules, scaled = self.method.fold(self.run, index, block, layers, statistics, self.plan)
        for name, layer in layers.items():
            numbers[name] = self._quantize(
                self.plan.steps[name], layer, None if name in unreached else statistics[name]
            )
            if name in scaled:
                numbers[name]["reason"] = f"{self.plan.steps[name].reason}; inputs scaled, {self.method.notes[name]}"
        changed = self._folded_tensors(index, block, changed_modules)
        for name, value in changed.items():  # the text goes on through what is stored, so that --resume repeats it
            self._load(index, block, name, value)
        self.run.run(index, block)
        return changed

    def _folded_tensors(self, index: int, block: nn.Module, modules: set[str]) -> dict[str, torch.Tensor]:
        prefix = self.skeleton.block_name(index)
        changed = {}
        for name in self.skeleton.checkpoint_names(index):
            parameter = self.skeleton.sources[name].parameter.removeprefix(prefix + ".")
            if name not in self.plan.steps and parameter.rsplit(".", 1)[0] in modules:
                dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[name].dtype])
                changed[name] = block.get_parameter(parameter).detach().to(dtype)
        return changed

    def _load(self, index: int, block: nn.Module, name: str, value: torch.Tensor) -> None:
        parameter = self.skeleton.sources[name].parameter.removeprefix(self.skeleton.block_name(index) + ".")
        block.get_parameter(parameter).copy_(value.to(self.skeleton.dtype))

    def _quantize(self, step: Step, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        """Quantize one layer, put the decoded result into the module, write the codes. Returns its report numbers."""
        began = time.perf_counter()
        weight = weight_matrix(layer).float()
        starved = statistics is None or statistics.tokens < FEWEST_TOKENS
        method = self.rtn if starved else self.method
        quantized = method.quantize(weight, None if starved else statistics, step.scheme, _dtype(step.scale_dtype))
        decoded = encodings.dequantize(quantized, step.scheme)
        sums = ErrorSums()
        sums.add(weight, quantized, step.scheme)
        numbers = sums.numbers()
        if starved:
            self.starved.append(step.linear.name)
            numbers["reason"] = f"{step.reason}; too few calibration tokens, rounded to nearest"
        elif "hessian" in self.method.needs:
            hessian = statistics.hessian
            numbers["error"]["output_relative_mse"] = output_error(weight, decoded, hessian)
            numbers["calibration_tokens"] = statistics.tokens
        set_weight(layer, decoded.to(layer.weight.dtype))
        cpu = QuantizedWeight(*(part if part is None else part.cpu() for part in quantized))
        for name, tensor in self.encoding.encode(step.linear.module, cpu, step.scheme).items():
            self.writer.write(name, tensor)
        self.written.add(step.linear.name)
        numbers["seconds"] = round(time.perf_counter() - began, 4)
        return numbers

    def replay(self, index: int) -> None:
        """Send the text through a block that an interrupted run has finished."""
        with self.skeleton.filled(index) as block:
            layers = self.skeleton.linears(index)
            for name in self.skeleton.checkpoint_names(index):
                self.written.add(name)
                if name in self.plan.steps:
                    step = self.plan.steps[name]
                    quantized = self.encoding.decode(
                        step.linear.module, self.writer.read, set(self.plan.layout), step.scheme
                    )
                    set_weight(layers[name], encodings.dequantize(quantized, step.scheme).to(self.skeleton.dtype))
                elif self.skeleton.sources[name].expert is None:
                    self._load(index, block, name, self.writer.read(name))
            self.run.run(index, block)

    def remainder(self) -> None:
        """What no block holds: tables, heads, final norm; layers outside the blocks that were asked for."""
        for name in self.checkpoint.tensors:
            if name in self.written or name in self.writer.journal.done:
                continue
            numbers = None
            if name in self.plan.steps:
                found = quantize_tensor(
                    self.checkpoint, self.plan, self.plan.steps[name], self.writer, self.rtn, self.device
                )
                reason = f"{self.plan.steps[name].reason}; outside the blocks, rounded to nearest"
                numbers = {name: {**found, "reason": reason}}
            else:
                copy_tensor(self.checkpoint, name, self.writer)
            self.writer.finish(name, numbers)


def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Put `weight` `[out, in]` into a Linear or a Conv1D."""
    stored = weight if isinstance(layer, nn.Linear) else weight.T.contiguous()
    layer.weight = nn.Parameter(stored, requires_grad=False)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, TORCH_DTYPES[name])

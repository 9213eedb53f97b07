"""The calibrated run: one block in memory, quantized while the calibration text passes through it."""

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
from tersor.ops.model.memory import parking_space
from tersor.ops.model.rewrite import BlockRewriter, set_weight
from tersor.ops.model.skeleton import Skeleton, weight_matrix
from tersor.ops.model.spill import SpillPool
from tersor.ops.model.statistics import InputStatistics, is_starved, output_error, starved_warning
from tersor.ops.quantize.awq import AWQ
from tersor.ops.quantize.data_free import quantize_tensor
from tersor.ops.quantize.errors import ErrorSums
from tersor.ops.quantize.gptq import GPTQ
from tersor.ops.quantize.plan import Plan, Step
from tersor.ops.quantize.rtn import RTN
from torch import nn

INSTEAD = "rounded to nearest"  # of layers that hardly a token reached


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
    method = AWQ(request.clip) if request.method == "awq" else gptq_of(request)
    job = _Quantizer(checkpoint, plan, writer, run, method, RTN(request.clip), device)
    job.rewrite_all(progress)
    pool.close()
    return starved_warning(job.starved, INSTEAD) + pool.warnings()


def gptq_of(request) -> GPTQ:
    return GPTQ(request.damping, request.activation_order, request.clip, request.keep_zeros)


class _Quantizer(BlockRewriter):
    """Writes codes in place of the planned weights, and sends the text on through what they decode to."""

    def __init__(self, checkpoint, plan: Plan, writer, run: BlockPass, method, rtn: RTN, device):
        super().__init__(checkpoint, plan.steps, writer, run)
        self.plan, self.method, self.rtn, self.device = plan, method, rtn, device
        self.needs = method.needs
        self.encoding = encodings.encoding(plan.format)
        self.starved: list[str] = []

    def block(self, index: int, block: nn.Module, layers: dict[str, nn.Module], numbers: dict[str, dict]) -> dict:
        if isinstance(self.method, AWQ):
            return self._awq(index, block, layers, numbers)
        return super().block(index, block, layers, numbers)

    def _awq(self, index: int, block: nn.Module, layers: dict[str, nn.Module], numbers: dict[str, dict]) -> dict:
        """Statistics of the unchanged block first, then scales folded and all layers rounded, then the text goes on."""
        statistics: dict[str, InputStatistics] = {}
        unreached = self.run.run_staged(
            index, block, layers, self.method.needs, statistics.__setitem__, keep_inputs=True
        )
        changed_modules, scaled = self.method.fold(self.run, index, block, layers, statistics, self.plan)
        for name, layer in layers.items():
            numbers[name] = self.rewrite(name, layer, None if name in unreached else statistics[name])
            if name in scaled:
                numbers[name]["reason"] = f"{self.plan.steps[name].reason}; inputs scaled, {self.method.notes[name]}"
        changed = self._folded_tensors(index, block, changed_modules)
        for name, value in changed.items():  # the text goes on through what is stored, so that --resume repeats it
            self.load(index, block, name, value)
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

    def rewrite(self, name: str, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        """Quantize one layer, put the decoded result into the module, write the codes. Returns its report numbers."""
        step = self.plan.steps[name]
        weight = weight_matrix(layer).float()
        encoded, decoded, numbers = quantize_layer(weight, statistics, step, self.method, self.rtn, self.encoding)
        if is_starved(statistics):
            self.starved.append(step.linear.name)
        set_weight(layer, decoded.to(layer.weight.dtype))
        for stored, tensor in encoded.items():
            self.writer.write(stored, tensor)
        return numbers

    def stored(self, name: str) -> torch.Tensor:
        step = self.plan.steps[name]
        codes = self.encoding.decode(step.linear.module, self.writer.read, set(self.plan.layout), step.scheme)
        return encodings.dequantize(codes, step.scheme)

    def outside(self, name: str) -> dict:
        step = self.plan.steps[name]
        found = quantize_tensor(self.checkpoint, self.plan, step, self.writer, self.rtn, self.device)
        return {name: {**found, "reason": f"{step.reason}; outside the blocks, rounded to nearest"}}


def quantize_layer(
    weight: torch.Tensor, statistics: InputStatistics | None, step: Step, method, rtn: RTN, encoding
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    """What is stored for `weight` float32 `[out, in]`, what that decodes to, and the report's numbers.

    A layer that saw too few tokens is rounded to nearest, which its numbers give as the reason.
    """
    began = time.perf_counter()
    starved = is_starved(statistics)
    chosen = rtn if starved else method
    quantized = chosen.quantize(weight, None if starved else statistics, step.scheme, _dtype(step.scale_dtype))
    decoded = encodings.dequantize(quantized, step.scheme)
    sums = ErrorSums()
    sums.add(weight, quantized, step.scheme)
    numbers = sums.numbers()
    if starved:
        numbers["reason"] = f"{step.reason}; too few calibration tokens, rounded to nearest"
    elif "hessian" in method.needs:
        numbers["error"]["output_relative_mse"] = output_error(weight, decoded, statistics.hessian)
        numbers["calibration_tokens"] = statistics.tokens
    cpu = QuantizedWeight(*(part if part is None else part.cpu() for part in quantized))
    encoded = encoding.encode(step.linear.module, cpu, step.scheme)
    numbers["seconds"] = round(time.perf_counter() - began, 4)
    return encoded, decoded, numbers


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, TORCH_DTYPES[name])

"""The data-free run: tensor after tensor, a panel of rows at a time, on all cores.

Each worker holds one panel of weights and the codes of one tensor, so memory follows neither the model nor the shard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.quantize.errors import ErrorSums
from tersor.ops.quantize.plan import Plan, Step
from tersor.ops.quantize.rtn import RTN

PANEL_WEIGHTS = 1 << 19
MOST_WORKERS = 8


def quantize_streaming(
    checkpoint: Checkpoint,
    plan: Plan,
    writer: CheckpointWriter,
    clip: bool,
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> None:
    """Quantize what the plan names and copy the rest; tensors already in the journal are left alone."""
    todo = [name for name in checkpoint.tensors if name not in writer.journal.done]
    todo.sort(key=lambda name: -checkpoint.tensors[name].nbytes)  # the largest first, so that no core ends alone
    workers = 1 if device.type == "cuda" else min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    method = RTN(clip)

    def work(name: str) -> None:
        began = time.perf_counter()
        if name not in plan.steps:
            copy_tensor(checkpoint, name, writer)
            writer.finish(name, None)
            return
        numbers = quantize_tensor(checkpoint, plan, plan.steps[name], writer, method, device)
        writer.finish(name, {name: {**numbers, "seconds": round(time.perf_counter() - began, 4)}})

    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, name) for name in todo]
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    future.result()
                    progress("tensors", count + len(checkpoint.tensors) - len(todo), len(checkpoint.tensors))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


def quantize_tensor(
    checkpoint: Checkpoint, plan: Plan, step: Step, writer: CheckpointWriter, method: RTN, device: torch.device
) -> dict:
    """Quantize one layer panel by panel and write it. Returns its numbers for the report."""
    linear, scheme = step.linear, step.scheme
    scale_dtype = getattr(torch, TORCH_DTYPES[step.scale_dtype])
    sums = ErrorSums()
    codes: torch.Tensor | None = None  # filled panel by panel: joining panels at the end would take twice the memory
    scales, zero_points = [], []
    for start, weight in _panels(checkpoint, step):
        weight = weight.to(device, torch.float32)  # once, for the search, the codes and the errors
        part = method.quantize(weight, None, scheme, scale_dtype)
        check_finite(part.scale.float(), linear.name, checkpoint)
        sums.add(weight, part, scheme)
        if codes is None:
            codes = torch.empty(linear.shape, dtype=part.codes.dtype)
        codes[start : start + len(weight)] = part.codes
        scales.append(part.scale.cpu())
        if part.zero_point is not None:
            zero_points.append(part.zero_point.cpu())
    quantized = encodings.QuantizedWeight(codes, torch.cat(scales), torch.cat(zero_points) if zero_points else None)
    for name, tensor in encodings.encoding(plan.format).encode(linear.module, quantized, scheme).items():
        writer.write(name, tensor)
    return sums.numbers()


def _panels(checkpoint: Checkpoint, step: Step):
    """First row and rows `[rows, in]` of the layer, whole where the file holds the transpose or one scale serves all rows."""
    out, columns = step.linear.shape
    if step.linear.transposed:
        yield 0, checkpoint.read(step.linear.name).T.contiguous()
        return
    rows = max(128, PANEL_WEIGHTS // columns // 128 * 128)  # whole tiles of a block-wise scheme
    rows = out if step.scheme.strategy == "tensor" else rows
    for start in range(0, out, rows):
        yield start, checkpoint.read(step.linear.name, (start, min(start + rows, out)))

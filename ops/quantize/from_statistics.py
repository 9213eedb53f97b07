"""GPTQ with statistics from a file: layer after layer straight from the checkpoint, nothing is run.

The statistics are those of the dense model, while a calibrated run sees in each layer what the quantized layers before it
put out and makes up for that too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.collected import Collected
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.statistics import is_starved, starved_warning
from tersor.ops.quantize.calibrated import INSTEAD, gptq_of, quantize_layer
from tersor.ops.quantize.plan import Plan
from tersor.ops.quantize.rtn import RTN


def quantize_collected(
    checkpoint: Checkpoint,
    plan: Plan,
    writer: CheckpointWriter,
    request,
    collected: Collected,
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Quantize what the plan names and copy the rest. Returns warnings."""
    method, rtn, encoding = gptq_of(request), RTN(request.clip), encodings.encoding(plan.format)
    starved: list[str] = []
    for count, name in enumerate(collected.in_order(checkpoint.tensors)):
        progress("tensors", count, len(checkpoint.tensors))
        if name in writer.journal.done:
            continue
        if name not in plan.steps:
            copy_tensor(checkpoint, name, writer)
            writer.finish(name, None)
            continue
        step = plan.steps[name]
        stored = checkpoint.read(name)
        check_finite(stored, name, checkpoint)
        weight = (stored.T if step.linear.transposed else stored).to(device, torch.float32).contiguous()
        statistics = collected.statistics(name)
        encoded, _, numbers = quantize_layer(weight, statistics, step, method, rtn, encoding)
        if is_starved(statistics):
            starved.append(name)
        for part, tensor in encoded.items():
            writer.write(part, tensor)
        writer.finish(name, {name: numbers})
    progress("tensors", len(checkpoint.tensors), len(checkpoint.tensors))
    return starved_warning(starved, INSTEAD)

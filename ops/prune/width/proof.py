"""The proof at the end of a run: what was written, built from its own config.json, computes what the masked input does.

Block for block there is nothing new to learn, so one block of each kind is run on random activations. For hidden
channels the embeddings and the model's tail are compared as well: together they are the whole model.
"""

from __future__ import annotations

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.gradients import block_parameters, is_causal
from tersor.ops.model.skeleton import Skeleton, StoredDtype
from tersor.ops.model.units import block_signature, probe_pass
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.width.cut import Details, mask, put

TOLERANCE = 1e-4


@torch.no_grad()
def prove(job: Job, plan: Plan, writer: CheckpointWriter, kept: dict[str, torch.Tensor]) -> None:
    """Raises TersorError naming the first block whose output is another one. `kept`: module of units -> what stays."""
    if job.request.keep_shape:
        return
    writer.add_json("config.json", {**job.checkpoint.config, **plan.config})
    masked = job.skeleton
    sliced = Skeleton(DenseView(Checkpoint(writer.partial)), masked.device)
    before, after = probe_pass(masked), probe_pass(sliced)
    details: Details = plan.details
    channels = next((kept[units.module].to(masked.device) for units in details.units if units.block is None), None)
    if channels is not None:
        _compare(_first(before)[..., channels], _first(after), "the embeddings")
    seen = set()
    for new, index in enumerate(details.blocks or range(len(masked.blocks))):
        block = masked.blocks[index]
        if block_signature(block) in seen:
            continue
        seen.add(block_signature(block))
        x = torch.randn(_first(before).shape, generator=torch.Generator().manual_seed(index)).to(masked.device)
        if channels is not None:
            x = x * torch.zeros(x.shape[-1], device=x.device).index_fill(0, channels, 1)
        with masked.filled(index) as filled:
            _mask(job, plan, writer, kept, index, filled)
            expected = _run(before, index, filled, x)
        with sliced.filled(new) as filled:
            found = _run(after, new, filled, x if channels is None else x[..., channels])
        _compare(expected if channels is None else expected[..., channels], found, masked.block_name(index))

    if channels is not None and is_causal(masked):
        _compare_tails(job, details, writer, kept, before, after, channels)


def _compare_tails(job: Job, details: Details, writer: CheckpointWriter, kept, before, after, channels) -> None:
    """Logits from random activations after the last block."""
    masked, hidden = job.skeleton, _first(before)
    x = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    x = x * torch.zeros(x.shape[-1], device=x.device).index_fill(0, channels, 1)
    cuts = details.slots()
    for name, gain in details.gains.items():
        if masked.sources[name].parameter.startswith(masked.block_prefix + "."):
            continue
        weight = masked.model.get_parameter(masked.sources[name].parameter)
        weight.copy_(gain.masked(writer.read(name), weight.cpu(), cuts[name], kept).to(weight.device))
    before.hidden.take(0), after.hidden.take(0)
    before.hidden.put(0, x)
    after.hidden.put(0, x[..., channels].contiguous())
    for (_, expected), (_, found) in zip(before.logits(0), after.logits(0), strict=True):
        _compare(expected, found, "the output head")


def _first(run: BlockPass) -> torch.Tensor:
    hidden = run.hidden.take(0)
    run.hidden.put(0, hidden)
    return hidden


def _run(run: BlockPass, index: int, block, x: torch.Tensor) -> torch.Tensor:
    with StoredDtype(run.skeleton.dtype):
        return run._call(index, block, 0, x)


def _mask(job: Job, plan: Plan, writer: CheckpointWriter, kept, index: int, block) -> None:
    """Turn a filled block of the input into the masked one: zeros for what is gone, refitted weights as written."""
    details: Details = plan.details
    cuts = details.slots()
    for name, parameter in block_parameters(job.skeleton, index, block).items():
        for units, slot in cuts.get(name, ()):
            stays = kept[units.module]
            if name in units.readers:
                value = put(writer.read(plan.actions[name].written), slot, stays, parameter.shape[slot.axis])
            else:
                value = mask(parameter.cpu(), slot, stays)
            parameter.copy_(value.to(parameter.device, parameter.dtype))
        if name in details.gains:
            parameter.copy_(details.gains[name].masked(writer.read(name), parameter.cpu(), cuts[name], kept))


def _compare(expected: torch.Tensor, found: torch.Tensor, where: str) -> None:
    if expected.shape != found.shape:
        raise _differs(where, f"shapes {list(found.shape)} and {list(expected.shape)}")
    difference = (expected - found).abs().max()
    scale = expected.abs().max()
    if not bool(difference <= TOLERANCE * scale):
        raise _differs(where, f"by {float(difference / scale):.2g} of its largest value")


def _differs(where: str, how: str) -> TersorError:
    return TersorError(
        f"{where}: the smaller model does not compute what the masked one does ({how})",
        "keep the shapes and write zeros with --keep-shape",
    )

"""Measures blocks or branches with calibration text, and writes the checkpoint without the chosen ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model.block_importance import MeanCosine, OutputLoss
from tersor.ops.model.blocks import BlockPass, HiddenStates
from tersor.ops.model.branches import observed, silenced
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.memory import parking_space
from tersor.ops.model.spill import SpillPool
from tersor.ops.prune.depth.knapsack import least_loss
from tersor.ops.prune.depth.plan import Depth
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan

KNAPSACK_TOKENS = 2048  # each of n candidates is run through all later blocks: n^2 / 2 block passes


def decide(job: Job, plan: Plan) -> Plan:
    """The plan with the candidates that matter least by the calibration text."""
    depth: Depth = plan.details
    if job.request.method == "even":
        return plan
    if job.request.method == "cosine":
        scores = _cosine_scores(job, depth)
        chosen = sorted(sorted(scores, key=scores.get)[: depth.count])
        depth.quality = {"scores": scores}
        return depth.plan(chosen, "among the lowest 1 - cos of the residual stream without and with it")
    windows = job.windows[: max(1, KNAPSACK_TOKENS // job.windows.shape[1])]
    losses, dense = _output_losses(job, depth, windows)
    total = sum(candidate.size for candidate in depth.candidates.values())
    order = list(depth.candidates)
    sizes = [depth.candidates[index].size for index in order]
    chosen = order
    if depth.count < len(order):
        least = min(-(-total * depth.count // len(order)), total - min(sizes))
        chosen = [order[place] for place in least_loss([losses[index] for index in order], sizes, least)]
    predicted = sum(losses[index] for index in chosen)
    measured = _joint_loss(job, depth, windows, chosen, dense)
    depth.quality = {
        "scores": losses,
        "predicted_output_loss": predicted,
        "measured_output_loss": measured,
        "measured_over_predicted": measured / predicted if predicted else None,
        "output_loss_tokens": windows.numel(),
    }
    return depth.plan(chosen, "in the set whose removal should change the output least")


def _cosine_scores(job: Job, depth: Depth) -> dict[int, float]:
    """MeanCosine of every candidate, on the dense model."""
    run = job.block_pass()
    scores: dict[int, float] = {}
    for index, block in _blocks(job, run):
        score = MeanCosine()
        candidate = depth.candidates.get(index)
        branch = candidate.branch if candidate else None
        with observed(block, branch) if branch else contextlib.nullcontext({}) as seen:
            for batch in range(len(run.hidden)):
                hidden = run.hidden.take(batch)
                output = run.apply(index, block, batch, hidden)
                after = seen["sum"].reshape(output.shape) if branch and branch.place else output
                score.add(after - seen["added"].reshape(output.shape) if branch else hidden, after)
                run.hidden.put(batch, output)
        if candidate:
            scores[index] = score.score
    return scores


def _output_losses(job: Job, depth: Depth, windows: torch.Tensor) -> tuple[dict[int, float], list[torch.Tensor]]:
    """OutputLoss of removing each candidate alone, after the model's last norm; and the dense model's outputs there.

    The text goes through the blocks once for every candidate before them, each block filled once.
    """
    run = _pass(job, windows)
    streams: dict[int, HiddenStates] = {}
    for index, block in _blocks(job, run, "output losses"):
        candidate = depth.candidates.get(index)
        without = HiddenStates(run.pool)
        for batch in range(len(run.hidden)):
            for stream in streams.values():
                stream.put(batch, run.apply(index, block, batch, stream.take(batch)))
            hidden = run.hidden.take(batch)
            output = run.apply(index, block, batch, hidden)
            if candidate:
                without.append(_without(run, index, block, batch, hidden, candidate.branch))
            run.hidden.put(batch, output)
        if candidate:
            streams[index] = without
    dense = list(_outputs(run, run.hidden))
    losses = {index: _loss(_outputs(run, stream), dense) for index, stream in streams.items()}
    return losses, dense


def _joint_loss(job: Job, depth: Depth, windows: torch.Tensor, chosen: list[int], dense: list[torch.Tensor]) -> float:
    """OutputLoss of removing all of `chosen`."""
    run = _pass(job, windows)
    for index, block in _blocks(job, run, "joint loss"):
        for batch in range(len(run.hidden)):
            hidden = run.hidden.take(batch)
            if index in chosen:
                hidden = _without(run, index, block, batch, hidden, depth.candidates[index].branch)
            else:
                hidden = run.apply(index, block, batch, hidden)
            run.hidden.put(batch, hidden)
    return _loss(_outputs(run, run.hidden), dense)


def _without(run: BlockPass, index: int, block, batch: int, hidden: torch.Tensor, branch) -> torch.Tensor:
    """What leaves the block when the branch, or the block when that is None, is not there."""
    if branch is None:
        return hidden
    with silenced(block, branch):
        return run.apply(index, block, batch, hidden)


def _pass(job: Job, windows: torch.Tensor) -> BlockPass:
    space = parking_space(job.request.max_memory_bytes, job.skeleton)
    return BlockPass(job.skeleton, windows, SpillPool(space))


def _blocks(job: Job, run: BlockPass, stage: str = "blocks") -> Iterator[tuple[int, torch.nn.Module]]:
    for index in range(len(run)):
        job.progress(stage, index, len(run))
        with job.skeleton.filled(index) as block:
            _check_finite(job, index, block)
            yield index, block
    job.progress(stage, len(run), len(run))


def _check_finite(job: Job, index: int, block: torch.nn.Module) -> None:
    skeleton = job.skeleton
    layers = {id(layer.weight): name for name, layer in skeleton.linears(index).items()}
    for name, parameter in block.named_parameters():
        if not parameter.is_meta:
            whole = f"{skeleton.block_name(index)}.{name}"  # which a dropped sublayer has in no file: it is zero
            check_finite(
                parameter, layers.get(id(parameter)) or skeleton.by_parameter.get(whole, [whole])[0], job.checkpoint
            )


def _outputs(run: BlockPass, states: HiddenStates) -> Iterator[torch.Tensor]:
    for batch in range(len(states)):
        hidden = states.take(batch)
        yield run.final_states(batch, hidden)
        states.put(batch, hidden)


def _loss(outputs: Iterable[torch.Tensor], dense: list[torch.Tensor]) -> float:
    loss = OutputLoss()
    for output, reference in zip(outputs, dense, strict=True):
        loss.add(output, reference)
    return loss.loss


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Copies what stays, under its new name; writes zeros where the shape is kept."""
    depth: Depth = plan.details
    units: dict[str, list[str]] = {}
    for name, action in plan.actions.items():
        block = depth.numbers.block(name)
        if action.outputs:
            units.setdefault(name if block is None else f"block {block}", []).append(name)
    for count, (unit, names) in enumerate(units.items()):
        job.progress("tensors", count, len(units))
        if unit not in writer.journal.done:
            writer.finish(unit, {name: _write(job, plan, writer, name) for name in names})
    job.progress("tensors", len(units), len(units))
    removed = sorted(
        {depth.numbers.block(name) for name, action in plan.actions.items() if action.action in ("drop", "mask")}
    )
    scores = {str(index): score for index, score in depth.quality.get("scores", {}).items()}
    return {"removed": job.request.remove, "removed_from_blocks": removed, **depth.quality, "scores": scores}


def _write(job: Job, plan: Plan, writer: CheckpointWriter, name: str) -> dict:
    began = time.perf_counter()
    action, numbers = plan.actions[name], {}
    ((new, (dtype, shape)),) = action.outputs.items()
    if action.action == "mask":
        writer.write(new, torch.zeros(shape, dtype=getattr(torch, TORCH_DTYPES[dtype])))
        numbers["sparsity"] = 1.0
    else:
        copy_tensor(job.checkpoint, name, writer, new)
    return numbers | {"seconds": round(time.perf_counter() - began, 4)}

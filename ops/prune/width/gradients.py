"""Gradients of the calibration loss, block by block: the inputs of all blocks wait, the blocks are run again backwards.

The loss is that of the next token where the model is a causal language model. Others have no such loss: for them it is
half the mean square of what the last block puts out, so that a unit counts for how much of the output hangs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tersor.ops.model.blocks import BlockPass, HiddenStates
from tersor.ops.model.skeleton import Skeleton, StoredDtype
from torch import nn

LOGITS = 1 << 24  # held at once
Take = Callable[[int, dict[str, tuple[torch.Tensor, torch.Tensor]]], None]


def is_causal(skeleton: Skeleton) -> bool:
    """Whether transformers lists the model among those that predict the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in (names if isinstance(names, tuple) else (names,))
    }
    return type(skeleton.model).__name__ in known


def backward(run: BlockPass, wanted: Iterable[str], take: Take, progress: Callable[[str, int, int], None]) -> float:
    """Give `take(block, {checkpoint name: (weight, gradient)})` for the last block, then the one before, and so on.

    Only tensors of the blocks among `wanted` get a gradient. Returns the loss. Holds one block, its gradients, and the
    inputs of every block, which are parked past the memory cap.
    """
    skeleton, wanted = run.skeleton, set(wanted)
    inputs = [_forward(run, index, progress) for index in range(len(run))]
    gradients, loss = _loss(run)
    for index in reversed(range(len(run))):
        progress("gradients", len(run) - 1 - index, len(run))
        with skeleton.filled(index) as block:
            parameters = {
                name: parameter
                for name, parameter in block_parameters(skeleton, index, block).items()
                if name in wanted
            }
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for batch in range(len(run.batches)):
                x = inputs[index].take(batch).detach().requires_grad_()
                with torch.enable_grad(), StoredDtype(skeleton.dtype):
                    output = run._call(index, block, batch, x)
                output.backward(gradients.take(batch))
                gradients.put(batch, x.grad)
            inputs[index] = None
            take(
                index,
                {
                    name: (
                        parameter.detach(),
                        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad,
                    )
                    for name, parameter in parameters.items()
                },
            )
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
    return loss


def block_parameters(skeleton: Skeleton, index: int, block: nn.Module) -> dict[str, nn.Parameter]:
    """Checkpoint name -> parameter of a filled block, in the stored orientation."""
    prefix = skeleton.block_name(index) + "."
    found = {name: layer.weight for name, layer in skeleton.linears(index).items()}
    for name in skeleton.checkpoint_names(index):
        if name not in found and skeleton.sources[name].expert is None:
            found[name] = block.get_parameter(skeleton.sources[name].parameter.removeprefix(prefix))
    return found


@torch.no_grad()
def _forward(run: BlockPass, index: int, progress) -> HiddenStates:
    """Send every batch through a block. Returns what went in."""
    progress("blocks", index, len(run))
    kept = HiddenStates(run.pool)
    with run.skeleton.filled(index) as block, StoredDtype(run.skeleton.dtype):
        for batch in range(len(run.hidden)):
            x = run.hidden.take(batch)
            run.hidden.put(batch, run._call(index, block, batch, x))
            kept.append(x)
    return kept


def _loss(run: BlockPass) -> tuple[HiddenStates, float]:
    """The gradient of the mean loss with respect to what the last block puts out, and the loss."""
    gradients, total = HiddenStates(run.pool), 0.0
    causal = is_causal(run.skeleton)
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in run.batches)
    values = sum(run.hidden.take(batch).numel() for batch in range(len(run.hidden)))
    for batch, tokens in enumerate(run.batches):
        hidden = run.hidden.take(batch).detach()
        if not causal:
            total += hidden.square().sum().item() / values / 2
            gradients.append(hidden / values)
            continue
        leaf = hidden.clone().requires_grad_()
        run.hidden.put(batch, leaf)
        with torch.enable_grad():
            vocabulary = run.skeleton.model.get_output_embeddings().weight.shape[0]
            for where, logits in run.tail(batch, max(1, LOGITS // (vocabulary * len(tokens)))):
                targets = tokens[:, where.start + 1 : where.stop + 1]
                if not targets.shape[1]:
                    continue
                scored = logits[:, : targets.shape[1]].float()
                loss = nn.functional.cross_entropy(scored.flatten(0, 1), targets.flatten(), reduction="sum") / positions
                loss.backward()
                total += loss.item()
        run.hidden.put(batch, hidden)
        gradients.append(leaf.grad)
    return gradients, total

"""Gradients of the calibration loss, block by block: the inputs of all blocks wait, the blocks are run again backwards.

The loss is that of the next token where the model is a causal language model. Others have no such loss: for them it is
half the mean square of what the last block puts out, so that a unit counts for how much of the output hangs on it.
`sampled_gradients` is a loss for those who want its curvature instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from tersor.ops.model.blocks import BlockPass, HiddenStates
from tersor.ops.model.skeleton import Skeleton, StoredDtype
from torch import nn

LOGITS = 1 << 24  # held at once
Progress = Callable[[str, int, int], None]
Take = Callable[[int, dict[str, tuple[torch.Tensor, torch.Tensor]]], None]
Visit = Callable[[int, nn.Module], AbstractContextManager]
OutputGradients = Callable[[BlockPass], tuple[HiddenStates, float]]


def is_causal(skeleton: Skeleton) -> bool:
    """Whether transformers lists the model among those that predict the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in (names if isinstance(names, tuple) else (names,))
    }
    return type(skeleton.model).__name__ in known


def sweep_back(run: BlockPass, visit: Visit, progress: Progress, of_output: OutputGradients) -> float:
    """Send the text forward, then gradients back, block by block from the last one. Returns the loss.

    `of_output(run)` gives the gradients with respect to what the last block puts out. While the text goes through filled
    block `index` once more, now backwards too, the context `visit(index, block)` is open. Holds one block and the inputs
    of every block, which are parked past the memory cap.
    """
    skeleton = run.skeleton
    inputs = [_forward(run, index, progress) for index in range(len(run))]
    gradients, loss = of_output(run)
    for index in reversed(range(len(run))):
        progress("gradients", len(run) - 1 - index, len(run))
        with skeleton.filled(index) as block, visit(index, block):
            for batch in range(len(run.batches)):
                x = inputs[index].take(batch).detach().requires_grad_()
                with torch.enable_grad(), StoredDtype(skeleton.dtype):
                    output = run._call(index, block, batch, x)
                output.backward(gradients.take(batch))
                gradients.put(batch, x.grad)
            inputs[index] = None
    progress("gradients", len(run), len(run))
    return loss


def backward(run: BlockPass, wanted: Iterable[str], take: Take, progress: Progress) -> float:
    """Give `take(block, {checkpoint name: (weight, gradient)})` for the last block, then the one before, and so on.

    Only tensors of the blocks among `wanted` get a gradient. Returns the loss. Holds one block and its gradients.
    """
    wanted = set(wanted)

    @contextmanager
    def visit(index: int, block: nn.Module) -> Iterator[None]:
        found = block_parameters(run.skeleton, index, block)
        parameters = {name: parameter for name, parameter in found.items() if name in wanted}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
        take(
            index,
            {
                name: (parameter.detach(), torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                for name, parameter in parameters.items()
            },
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    return sweep_back(run, visit, progress, _loss)


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
    causal = is_causal(run.skeleton)
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in run.batches)
    values = sum(run.hidden.take(batch).numel() for batch in range(len(run.hidden)))
    gradients, total = HiddenStates(run.pool), 0.0
    for batch, tokens in enumerate(run.batches):
        if causal:

            def next_token(where: slice, logits: torch.Tensor, tokens=tokens) -> torch.Tensor:
                targets = tokens[:, where.start + 1 : where.stop + 1]
                return _cross_entropy(logits[:, : targets.shape[1]], targets) / positions

            gradient, loss = _through_tail(run, batch, next_token)
        else:
            hidden = run.hidden.take(batch).detach()
            gradient, loss = hidden / values, hidden.square().sum().item() / values / 2
        gradients.append(gradient)
        total += loss
    return gradients, total


def sampled_gradients(seed: int) -> OutputGradients:
    """Gradients whose expected square is the curvature of the output at no change at all.

    For a causal model the loss is the summed cross entropy with tokens drawn from the model's own prediction: the expected
    square of its gradient is the Fisher information, the second derivative of the KL divergence that a change causes. For
    others it is the last block's output times random signs, scaled such that half of the expected square foretells the
    squared change of that output, relative to its mean square norm.
    """

    def gradients_of(run: BlockPass) -> tuple[HiddenStates, float]:
        generator = torch.Generator(device=run.skeleton.device).manual_seed(seed)
        gradients, total = HiddenStates(run.pool), 0.0
        causal = is_causal(run.skeleton)
        energy = 0.0 if causal else _mean_square_norm(run)

        def drawn(_: slice, logits: torch.Tensor) -> torch.Tensor:
            rows = logits.detach().float().softmax(-1).flatten(0, 1)
            targets = torch.multinomial(rows, 1, generator=generator).view(logits.shape[:2])
            return _cross_entropy(logits, targets)

        for batch in range(len(run.batches)):
            if causal:
                gradient, loss = _through_tail(run, batch, drawn)
                total += loss
            else:
                shape = run.hidden.take(batch).shape
                signs = torch.randint(0, 2, shape, generator=generator, device=run.skeleton.device).mul_(2).sub_(1)
                gradient = signs.to(run.skeleton.dtype) * (2 / energy) ** 0.5
            gradients.append(gradient)
        return gradients, total

    return gradients_of


def _mean_square_norm(run: BlockPass) -> float:
    """Mean over positions of ||h||^2 of the last block's output."""
    total = positions = 0
    for batch in range(len(run.hidden)):
        hidden = run.hidden.take(batch)
        total += float(hidden.square().sum())
        positions += hidden[..., 0].numel()
        run.hidden.put(batch, hidden)
    return total / positions


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over logits `[windows, positions, vocab]` and targets `[windows, positions]`."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def _through_tail(
    run: BlockPass, batch: int, loss_of: Callable[[slice, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """The gradient of a loss of the logits with respect to the last block's output, and the loss, some positions at a time."""
    hidden, total = run.hidden.take(batch).detach(), 0.0
    leaf = hidden.clone().requires_grad_()
    run.hidden.put(batch, leaf)
    with torch.enable_grad():
        vocabulary = run.skeleton.model.get_output_embeddings().weight.shape[0]
        for where, logits in run.tail(batch, max(1, LOGITS // (vocabulary * len(hidden)))):
            loss = loss_of(where, logits)
            loss.backward()
            total += loss.item()
    run.hidden.put(batch, hidden)
    return leaf.grad, total

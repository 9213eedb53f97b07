"""Bytes that training takes, counted, next to what plain AdamW with eager activations takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tersor.ops.distill.optimizers.base import local
from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors` in this process, each once."""
    storages = {}
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        storages[storage._cdata] = storage
    return sum(storage.nbytes() for storage in storages.values())


def state_bytes(optimizer) -> int:
    """Bytes of all tensors that an optimizer, or a forward-only method, holds besides weights and gradients."""
    states = optimizer.state.values()
    return storage_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))


def saved_activations(loss_fn: Callable[[], Tensor], outside: Iterable[Tensor]) -> tuple[Tensor, int]:
    """The loss, and the bytes that its graph keeps for the backward pass, without storages of `outside` (weights).

    What `save_for_backward` gets is seen as it is saved, in recomputed parts only their inputs; what else an autograd
    function keeps on its context is found by walking the graph."""
    known = {local(tensor.detach()).untyped_storage()._cdata for tensor in outside}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address is used twice

    def see(tensor: Tensor) -> Tensor:
        storage = local(tensor.detach()).untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = loss_fn()
    for tensor in _on_contexts(loss):
        see(tensor)
    return loss, sum(storage.nbytes() for storage in kept.values())


def _on_contexts(loss: Tensor) -> Iterable[Tensor]:
    """Tensors that Python autograd functions keep as attributes."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [function for function, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            items = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in items if isinstance(item, Tensor))


def memory_report(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    optimizer,
    loss_fn: Callable[[], Tensor],
    eager_loss_fn: Callable[[], Tensor] | None = None,
) -> dict:
    """Bytes of weights, gradients, optimizer state and activations, in this process, and the same of plain AdamW.

    Call it after a step, when states exist; it runs one forward and backward pass of `loss_fn`, the scalar loss of one
    micro-batch, and puts gradients back as they were. `parameters` are all that train. `eager_loss_fn` is the same loss
    with activations as eager torch keeps them; it runs forward once, everything unfrozen, so that it needs the memory that
    it measures: None leaves AdamW's activations and total None. A forward-only method in place of the optimizer keeps no
    graph and has no gradients.

    Keys: `weights_bytes gradients_bytes optimizer_bytes activations_bytes total_bytes trained_weights
    optimizer_bytes_per_weight adamw{the first five}`. Weights are parameters and buffers; those of AdamW are the same, its
    gradients and moments those of all that train. Not counted: what exists only inside a forward or backward pass.
    """
    parameters = list(parameters)
    weights = [*model.parameters(), *model.buffers()]
    shards = [local(parameter.detach()) for parameter in parameters]
    gradients, activations, plain = 0, 0, None
    if getattr(optimizer, "needs_gradients", True):
        gradients, activations = _one_pass(parameters, weights, loss_fn)
    if eager_loss_fn is not None:
        plain = _eager(parameters, weights, eager_loss_fn)
    held = storage_bytes(weights)
    result = _sum(held, gradients, state_bytes(optimizer), activations)
    state = sum(2 * shard.nbytes + 4 for shard in shards)  # two moments, and a float32 count of steps
    adamw = _sum(held, sum(shard.nbytes for shard in shards), state, plain)
    count = sum(shard.numel() for shard in shards)
    per_weight = result["optimizer_bytes"] / max(1, count)
    return result | {"trained_weights": count, "optimizer_bytes_per_weight": per_weight, "adamw": adamw}


def _sum(weights: int, gradients: int, optimizer: int, activations: int | None) -> dict[str, int | None]:
    parts = {
        "weights_bytes": weights,
        "gradients_bytes": gradients,
        "optimizer_bytes": optimizer,
        "activations_bytes": activations,
    }
    return parts | {"total_bytes": None if activations is None else sum(parts.values())}


def _one_pass(parameters: list[nn.Parameter], weights: list[Tensor], loss_fn: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes of gradients and of saved activations of one pass, leaving gradients as they are."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        loss, activations = saved_activations(loss_fn, weights)
        loss.backward()
        return storage_bytes(p.grad for p in parameters if p.grad is not None), activations
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _eager(parameters: list[nn.Parameter], weights: list[Tensor], loss_fn: Callable[[], Tensor]) -> int:
    """Bytes of saved activations when all of `parameters` train."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        return saved_activations(loss_fn, weights)[1]
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)

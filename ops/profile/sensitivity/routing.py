"""Where the router of each mixture of experts sends tokens, and from which expert of the mixture before they came."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tersor.ops.model.skeleton import EXPERTS
from torch import nn


def expert_modules(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that are told where each token goes, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if "top_k_index" in inspect.signature(type(module).forward).parameters
    }


def _experts(module: nn.Module) -> int:
    """A list of experts while the block is filled, or tensors `[experts, …]`."""
    if hasattr(module, EXPERTS):
        return len(getattr(module, EXPERTS))
    return next(parameter.shape[0] for parameter in module.parameters() if parameter.dim() == 3)


def transitions(before: torch.Tensor, after: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """How often a token with expert i `before` `[tokens, k]` has expert j `after` `[tokens, k']`: int64 `shape`."""
    pairs = (before[:, :, None] * shape[1] + after[:, None, :]).flatten()
    return torch.bincount(pairs, minlength=shape[0] * shape[1]).view(shape)


class Routing:
    """Counts over all batches. Mixtures are met in the order in which the model runs them."""

    def __init__(self) -> None:
        self.counts: dict[str, torch.Tensor] = {}
        self.transitions: dict[str, torch.Tensor] = {}
        self.before: dict[str, str] = {}
        self._last: dict[int, tuple[str, torch.Tensor]] = {}  # by batch: the mixture before, and where its tokens went
        self._batch = 0

    @contextmanager
    def watching(self, block: nn.Module, prefix: str) -> Iterator[Routing]:
        """Count in a filled block called `prefix`; `start` says which batch is next."""
        handles = []
        for name, module in expert_modules(block).items():
            count = _experts(module)
            full = f"{prefix}.{name}" if name else prefix
            hook = self._hook(
                full, count, list(inspect.signature(type(module).forward).parameters).index("top_k_index")
            )
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def start(self, batch: int) -> None:
        self._batch = batch

    def _hook(self, name: str, count: int, place: int):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[place - 1]  # less self
            index = index.detach().reshape(-1, index.shape[-1]).cpu().long()
            self.counts.setdefault(name, torch.zeros(count, dtype=torch.int64)).add_(
                torch.bincount(index.flatten(), minlength=count)
            )
            last = self._last.get(self._batch)
            if last is not None and len(last[1]) == len(index):
                shape = (len(self.counts[last[0]]), count)
                self.before[name] = last[0]
                self.transitions.setdefault(name, torch.zeros(shape, dtype=torch.int64)).add_(
                    transitions(last[1], index, shape)
                )
            self._last[self._batch] = name, index

        return hook

    def numbers(self, name: str) -> dict:
        """What a report says of one mixture."""
        counts = self.counts[name].double()
        share = counts / counts.sum().clamp_min(1)
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
        found = {
            "counts": self.counts[name].tolist(),
            "busiest_share": float(share.max()),
            "unused": int((self.counts[name] == 0).sum()),
            "effective_experts": float(torch.tensor(entropy).exp()),
        }
        if name in self.transitions:
            found |= {"before": self.before[name], "transitions": self.transitions[name].tolist()}
        return found

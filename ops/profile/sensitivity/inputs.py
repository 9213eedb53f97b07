"""Statistics of the inputs of all linear layers of a block while the text runs through it unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from tersor.ops.model.statistics import InputStatistics
from torch import nn


class InputCollector:
    """One `InputStatistics` per input: layers that read the very same tensor share it, `owner` says with whom."""

    def __init__(self, needs: Set[str]):
        self.needs = needs
        self.owner: dict[str, str] = {}
        self.statistics: dict[str, InputStatistics] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    @contextmanager
    def watching(self, layers: dict[str, nn.Module]) -> Iterator[InputCollector]:
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            yield self
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0]
            if self._last is not None and self._last[1] is x and self.owner.get(name, self._last[0]) == self._last[0]:
                self.owner[name] = self._last[0]
                return
            self.owner[name] = name
            self.statistics.setdefault(name, InputStatistics(self.needs)).add(x)
            self._last = name, x

        return hook

    def of(self, name: str) -> InputStatistics | None:
        """None for a layer that no token reached."""
        return self.statistics.get(self.owner.get(name))

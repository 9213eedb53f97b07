"""LISA: a few blocks at a time (Pan et al., Layerwise Importance Sampled AdamW, arXiv:2403.17919)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.optimizers.base import derived_seed
from torch import nn


class Lisa:
    """Trains `count` of the blocks for `every` steps, then others. What is in no block (embeddings, final norm, output
    layer) always trains.

    Gradients and optimizer state exist for what trains only: a block that is frozen loses both, and starts with fresh
    moments when it comes back; one that is drawn twice in a row keeps them. The draw is a function of `seed` and step, so
    that a resumed run goes on with the same blocks and nothing needs saving.

    The optimizer must have been built over all parameters. Built over those that train at the time, it would go on
    stepping them alone, and the blocks drawn later would never move: construction checks it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        blocks: Sequence[Sequence[str]],
        count: int,
        every: int = 20,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ):
        """`blocks`: names of the parameters of each block, in order. `weights`, one per block: how likely it is drawn (the
        damage that a report saw, say); 0 is never. Raises TersorError when the numbers do not fit each other, and
        ValueError when a parameter is not the optimizer's."""
        weights = [1.0] * len(blocks) if weights is None else [float(weight) for weight in weights]
        possible = sum(weight > 0 for weight in weights)
        if len(weights) != len(blocks) or not all(0 <= weight < float("inf") for weight in weights):
            raise TersorError(f"{len(weights)} sampling weights for {len(blocks)} blocks", "one each, none below 0")
        if not 1 <= count <= possible:
            raise TersorError(f"{count} of {possible} blocks cannot train at a time", f"--lisa from 1 to {possible}")
        if every < 1:
            raise TersorError(f"blocks cannot change every {every} steps", "--lisa-every 1 or more")
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, parameter in parameters.items() if id(parameter) not in known]
        if missing:
            raise ValueError(f"{missing[0]}: not a parameter of the optimizer, which would never train it")
        self._optimizer = optimizer
        self._blocks = [[parameters[name] for name in names if name in parameters] for names in blocks]
        inside = {id(parameter) for block in self._blocks for parameter in block}
        self._always = [parameter for parameter in parameters.values() if id(parameter) not in inside]
        self._count, self._every, self._seed, self._weights = count, every, seed, weights
        self._period: int | None = None
        self.blocks: tuple[int, ...] = ()  # that train now
        self.log: list[dict] = []  # {"step", "blocks"} of each change

    def draw(self, step: int) -> tuple[int, ...]:
        """Blocks that train at `step` (from 1 on), in order: `count` without replacement, by Efraimidis and Spirakis."""
        numbers = random.Random(derived_seed("lisa", self._seed, (step - 1) // self._every))
        keys = [numbers.random() ** (1 / weight) if weight else -1.0 for weight in self._weights]
        return tuple(sorted(sorted(range(len(keys)), key=lambda block: -keys[block])[: self._count]))

    def before_step(self, step: int) -> bool:
        """Freeze and unfreeze as `step` wants it, before its forward pass; True when blocks changed."""
        period = (step - 1) // self._every
        if period == self._period:
            return False
        self._period, self.blocks = period, self.draw(step)
        chosen = {id(parameter) for index in self.blocks for parameter in self._blocks[index]}
        for parameter in self._always:
            parameter.requires_grad_(True)
        for parameter in (parameter for block in self._blocks for parameter in block):
            parameter.requires_grad_(id(parameter) in chosen)
            if id(parameter) not in chosen:
                parameter.grad = None
                self._optimizer.state.pop(parameter, None)
        self.log.append({"step": step, "blocks": list(self.blocks)})
        return True

    def release(self) -> None:
        """Let everything train again."""
        for parameter in (*self._always, *(parameter for block in self._blocks for parameter in block)):
            parameter.requires_grad_(True)
        self._period, self.blocks = None, ()

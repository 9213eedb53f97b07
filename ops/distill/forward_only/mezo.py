"""MeZO: Malladi et al., Fine-Tuning Language Models with Just Forward Passes (arXiv:2305.17333)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch
from tersor.formats.errors import TersorError
from tersor.kernels.perturb import perturb_
from tersor.ops.distill.optimizers.base import derived_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Mezo:
    """A step: the loss at theta + eps z and at theta - eps z, `g` their difference over 2 eps, `theta <- theta - lr g z`.

    z is normal and never stored: element i of the parameters, in the order of their names, gets number i of the step's
    seed, however the work is cut. So a step is a seed, a scalar and a learning rate; `apply` of these, in order, to the
    parameters that a run started from gives the bytes that the run gave.

    That needs theta back exactly after both losses, which taking eps z off again does not give: float32 rounds, bfloat16
    so much that the residue adds up. So there is one copy of the parameters, theta itself; both perturbed models and the
    new theta are made from it. Memory is that of inference and this copy (`state`).

    `loss_fn` returns the same number for the same weights: no dropout. Under several processes each holds all parameters
    and `loss_fn` returns the loss of the global batch, the same in all.
    """

    method = "mezo"
    needs_gradients = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], seed: int = 0, eps: float = 1e-3, keep_zeros: Collection[str] = ()
    ):
        """`keep_zeros` names parameters whose exact zeros stay: those of pruned layers. Raises TersorError for parameters
        that are sharded, not contiguous or of a dtype that is not float32, bfloat16 or float16."""
        self.parameters = {name: parameters[name] for name in sorted(parameters)}
        self.seed, self.eps, self.keep_zeros = seed, eps, frozenset(keep_zeros) & self.parameters.keys()
        self.state: dict[str, dict[str, Tensor]] = {}
        self._offsets, offset = {}, 0
        for name, parameter in self.parameters.items():
            _check(name, parameter)
            self._offsets[name] = offset
            offset += parameter.numel()

    def settings(self) -> dict:
        """What `from_settings` and a log need, as JSON holds it."""
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        return {"seed": self.seed, "eps": self.eps, "keep_zeros": sorted(self.keep_zeros), "parameters": shapes}

    @classmethod
    def from_settings(cls, parameters: Mapping[str, nn.Parameter], settings: Mapping) -> Mezo:
        """The method that wrote `settings`, over `parameters`. Raises TersorError where names or shapes are others."""
        shapes = settings.get("parameters", {})
        settings = {key: value for key, value in settings.items() if key != "parameters"}
        here = {name: list(parameter.shape) for name, parameter in parameters.items()}
        if here != shapes:
            name = min(name for name in here.keys() | shapes.keys() if here.get(name) != shapes.get(name))
            raise TersorError(
                f"{name}: {here.get(name, 'not trained')} here, {shapes.get(name, 'not trained')} in the log",
                "use the checkpoint and the arguments that the log was written with",
            )
        try:
            return cls(parameters, **settings)
        except TypeError as error:
            raise TersorError(f"settings of {cls.method} in the log: {error}", "the log is damaged") from None

    def step(self, loss_fn: Callable[[], Tensor | float], lr: float, step: int) -> dict:
        """Take step `step` (from 1 on) and return `step seed scalar lr loss`, the loss being the mean of the two.

        Raises TersorError when a loss is not a finite number, the parameters being those before the step then."""
        seed, losses = derived_seed("forward-only", self.seed, step), []
        for name, parameter in self.parameters.items():
            held = self.state.setdefault(name, {})
            if "copy" not in held:
                held["copy"] = torch.empty_like(parameter, requires_grad=False)
            held["copy"].copy_(parameter.detach())
        try:
            with torch.no_grad():
                for sign in (1, -1):
                    self._move(seed, sign * self.eps, self.state)
                    losses.append(float(loss_fn()))
            if not all(map(math.isfinite, losses)):
                raise TersorError(f"step {step}: the losses are {losses[0]} and {losses[1]}", "lower the learning rate")
        finally:
            for name, parameter in self.parameters.items():
                parameter.detach().copy_(self.state[name]["copy"])
        scalar = self.limit((losses[0] - losses[1]) / (2 * self.eps))
        self.apply(seed, scalar, lr)
        return {"step": step, "seed": seed, "scalar": scalar, "lr": lr, "loss": sum(losses) / 2}

    def apply(self, seed: int, scalar: float, lr: float) -> None:
        """`theta <- theta - lr * scalar * z`; nothing at all where that is 0."""
        if lr * scalar != 0:
            self._move(seed, -lr * scalar)

    def limit(self, scalar: float) -> float:
        """What is made of a step's scalar before it is used and logged."""
        return scalar

    def bounds(self, name: str) -> tuple[float | None, float | None]:
        """Weights of `name` move where `low < |w| <= high`."""
        return (0.0 if name in self.keep_zeros else None), None

    def _move(self, seed: int, scale: float, states: Mapping[str, dict[str, Tensor]] | None = None) -> None:
        for name, parameter in self.parameters.items():
            source = states[name]["copy"] if states else None
            low, high = self.bounds(name)
            perturb_(parameter.detach(), seed, self._offsets[name], scale, low, high, source)


def _check(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise TersorError(f"{name}: forward-only training does not shard", "run it without FSDP: it needs no gradients")
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not parameter.is_contiguous():
        raise TersorError(
            f"{name}: forward-only training cannot perturb {parameter.dtype}", "leave it out by --exclude"
        )

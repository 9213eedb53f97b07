"""How a norm uses its parameters, found by trying: names and classes play no part.

`y = normalised(x) * (offset + gain) + bias`: the offset is 0 for most, 1 for Gemma, whose neutral gain is therefore 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

SAME = 1e-4


@dataclass(frozen=True)
class GainLaw:
    """`gain` and `bias` are names of parameters of the module."""

    gain: str
    bias: str | None
    offset: float

    @property
    def neutral(self) -> float:
        """The stored value that multiplies by one."""
        return 1.0 - self.offset

    def factor(self, stored: torch.Tensor) -> torch.Tensor:
        """What the output is multiplied by, in float32."""
        return stored.float() + self.offset


def may_have_gain(module: nn.Module) -> bool:
    """Whether the module holds one or two vectors and nothing else."""
    parameters = list(module.parameters())
    return not list(module.children()) and 1 <= len(parameters) <= 2 and all(p.dim() == 1 for p in parameters)


@torch.no_grad()
def gain_law(module: nn.Module, args: tuple, kwargs: dict) -> GainLaw | None:
    """The law of a module for a sample of its arguments; None when its parameters do anything else."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}

    def output(**values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, zeros | values, args, kwargs)

    nothing = output()
    if any(zero.shape != nothing.shape[-1:] for zero in zeros.values()):
        return None
    biases = [
        name for name, zero in zeros.items() if _close(output(**{name: zero + 1}) - nothing, torch.ones_like(nothing))
    ]
    gains = [name for name in zeros if name not in biases]
    if len(gains) != 1 or len(biases) > 1:
        return None
    (gain,) = gains
    slope = output(**{gain: zeros[gain] + 1}) - nothing
    squares = float(slope.square().sum())
    if not squares:
        return None
    offset = round(float((nothing * slope).sum()) / squares, 3)
    trial = torch.linspace(-2, 2, len(zeros[gain]), device=slope.device)
    expected = slope * (trial + offset)
    values = {gain: trial}
    if biases:
        values[biases[0]] = trial.flip(0)
        expected = expected + trial.flip(0)
    if not _close(nothing, offset * slope) or not _close(output(**values), expected):
        return None
    return GainLaw(gain, biases[0] if biases else None, offset)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= SAME * max(float(wanted.abs().max()), 1.0))

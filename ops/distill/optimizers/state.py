"""Optimizer state as named tensors and numbers, to be kept in safetensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.optimizers.base import LocalOptimizer, local
from torch import Tensor
from torch.distributed.tensor import DTensor


def pack_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`<parameter>/<key>` → what this process holds of it: tensors, and numbers. Learning rates are not state."""
    tensors, numbers = {}, {}
    for name, parameter in _named(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = local(value.detach())
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def unpack_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    """Give the optimizer, and only these, the states that `pack_state` made, bit for bit.

    Raises TersorError for a parameter that it does not have, and for moments of torch's AdamW of another shard."""
    named = _named(optimizer)
    optimizer.state.clear()
    for label, value in [*tensors.items(), *numbers.items()]:
        name, _, key = label.rpartition("/")
        if name not in named:
            raise TersorError(
                f"saved optimizer state of {name!r}, which is not trained now", "resume with the same arguments"
            )
        parameter = named[name]
        if isinstance(value, Tensor):
            value = value.to(parameter.device, copy=True)
            if key in ("exp_avg", "exp_avg_sq") and not isinstance(optimizer, LocalOptimizer):
                value = _placed(name, value, parameter)
        optimizer.state[parameter][key] = value


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _placed(name: str, value: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """torch's AdamW keeps the moments of a DTensor as DTensors."""
    if value.shape != local(parameter.detach()).shape:
        raise TersorError(
            f"{name}: saved optimizer state {list(value.shape)} of a shard {list(local(parameter.detach()).shape)}",
            "resume with the same number of processes",
        )
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, shape=parameter.shape, stride=parameter.stride())

"""What no checkpoint holds: values made by the model's own initialisation, as transformers does when it loads.

These are rotary tables and other buffers, and norms whose gain was folded into the next layers. The latter are named in
config.json, so that a damaged checkpoint which lacks a norm is still found out.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from tersor.formats.errors import TersorError
from torch import nn

FOLDED = "folded_norms"


def folded_names(config: dict | None) -> list[str]:
    """The tensors that config.json lists as folded away. Raises TersorError for a bad list."""
    names = (config or {}).get(FOLDED) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TersorError(f"{FOLDED} in config.json is {str(names)[:80]}", "it should list the names of tensors")
    return names


def folded_parameters(model: nn.Module, config: dict | None) -> set[str]:
    """The parameters of `model` that config.json lists as folded away."""
    from tersor.ops.model.skeleton import map_names

    listed = SimpleNamespace(tensors=folded_names(config))
    return {source.parameter for source in map_names(model, listed).values()}


@torch.no_grad()
def initial_value(model: nn.Module, owner: nn.Module, leaf: str) -> torch.Tensor:
    """What a loader gives to parameter `leaf` of `owner`, a norm of `model`, that the file has no tensor for.

    NaN where the model's initialisation leaves it alone.
    """
    module = copy.deepcopy(owner)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.full(parameter.shape, torch.nan), requires_grad=False)
    model._init_weights(module)
    return module._parameters[leaf].detach()


def fill_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Rotary tables and other buffers that no checkpoint holds: made on the CPU by the model's own initialisation."""
    names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    if not names:
        return
    for name in names:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
    parameters = dict(module._parameters)
    for name, parameter in parameters.items():  # on meta, so that initialisation leaves loaded weights alone
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    try:
        model._init_weights(module)
    finally:
        module._parameters.update(parameters)
    for name in names:
        module._buffers[name] = module._buffers[name].to(device)

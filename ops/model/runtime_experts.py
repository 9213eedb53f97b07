"""Experts that transformers fuses into one tensor, as linear layers of their own: what thresholds and packed weights need."""

from __future__ import annotations

from tersor.ops.model.skeleton import EXPERTS, ExpertLayers, Source, expert_roles, register_experts
from torch import nn


def modules_of(sources: dict[str, Source]) -> dict[str, list[str]]:
    """Fused experts module → the checkpoint tensors of its experts."""
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source.expert is not None:
            found.setdefault(source.parameter.rpartition(".")[0], []).append(name)
    return found


def unfuse(
    model: nn.Module, sources: dict[str, Source], fused: dict[str, list[str]], layers: dict[str, nn.Module]
) -> None:
    """Put `layers`, by weight name, in the place of the fused tensors of the modules `fused`."""
    if not fused:
        return
    register_experts()
    for path, names in fused.items():
        module = model.get_submodule(path)
        experts = nn.ModuleList(ExpertLayers() for _ in range(1 + max(sources[name].expert for name in names)))
        for name in names:
            experts[sources[name].expert].add_module(name.split(".")[-2], layers[name])
        setattr(module, EXPERTS, experts)
        module.tersor_gate_up, module.tersor_down = expert_roles(model, sources, names)
        for parameter in {sources[name].parameter for name in names}:
            module.register_parameter(parameter.rpartition(".")[2], None)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = EXPERTS

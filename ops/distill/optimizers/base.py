"""What the optimizers of this package share: a step per parameter, on the part of it that this process holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def derived_seed(*parts: object) -> int:
    """A seed in 0..2^63-1 that is a function of `parts` alone, in every process and on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LocalOptimizer(torch.optim.Optimizer):
    """A subclass gives `start` and `update`; parameters without a gradient are left alone, bytes and all.

    State is made at a parameter's first step and dropped with `optimizer.state.pop(parameter)`, after which the parameter
    starts anew. It holds plain tensors of this process's shard and numbers, `step` among them, which counts from 1.
    """

    def start(self, parameter: nn.Parameter, group: dict) -> dict:
        """State of a parameter before its first step, without `step`."""
        raise NotImplementedError

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, state: dict, group: dict) -> None:
        """Step `parameter` in place. `gradient` is this process's shard; `state["step"]` counts this step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.start(parameter, group), step=0)
                state["step"] += 1
                self.update(name, parameter, local(parameter.grad), state, group)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but no tensor changes its dtype: torch would cast codes and float32 moments to the weight's."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    device = parameter.device
                    self.state[parameter] = {
                        key: value.to(device, copy=True) if isinstance(value, Tensor) else value
                        for key, value in state_dict["state"][index].items()
                    }


def start_adamw(parameter: nn.Parameter) -> dict:
    """float32 moments of AdamW for this process's shard."""
    weight = local(parameter.detach())
    return {key: torch.zeros_like(weight, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}


def update_adamw(parameter: nn.Parameter, gradient: Tensor, state: dict, group: dict) -> None:
    """One step of torch's AdamW in float32, whatever the weight's dtype."""
    weight = local(parameter.detach())
    if not weight.numel():
        return
    wide = weight.float()  # the weight itself where it is float32
    adamw(
        [wide],
        [gradient.float()],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [torch.full((), state["step"] - 1.0, device=weight.device)],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if wide is not weight:
        weight.copy_(wide)

"""Lion: Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675), algorithm 2."""

from __future__ import annotations

import torch
from tersor.ops.distill.optimizers.base import LocalOptimizer, local
from torch import Tensor, nn


class Lion(LocalOptimizer):
    """`w <- w - lr * (sign(b1 m + (1 - b1) g) + weight_decay * w)`, then `m <- b2 m + (1 - b2) g`; m in float32.

    4 bytes of state per weight. Every weight moves by `lr`, which is why its learning rate is 3 to 10 times smaller than
    AdamW's and its weight decay as many times larger, so the paper.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def start(self, parameter: nn.Parameter, group: dict) -> dict:
        return {"momentum": torch.zeros_like(local(parameter.detach()), dtype=torch.float32)}

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, state: dict, group: dict) -> None:
        weight, gradient, momentum = local(parameter.detach()), gradient.float(), state["momentum"]
        direction = momentum.lerp(gradient, 1 - group["betas"][0]).sign_()
        wide = weight.float()  # the weight itself where it is float32
        wide.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        if wide is not weight:
            weight.copy_(wide)
        momentum.lerp_(gradient, 1 - group["betas"][1])

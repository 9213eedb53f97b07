"""AdamW with 8-bit moments: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861)."""

from __future__ import annotations

from tersor.kernels.adam8bit import adam8bit_step, zero_state
from tersor.ops.distill.optimizers.base import LocalOptimizer, local, start_adamw, update_adamw
from torch import Tensor, nn

FEWEST = 4096  # weights of a tensor whose moments are coded; what is smaller is not worth the error
CODES = "m_codes", "m_absmax", "v_codes", "v_absmax"


class AdamW8bit(LocalOptimizer):
    """2.03 bytes of state per weight, against 8.

    Vectors and tensors of fewer than 4096 weights keep float32 moments. Embeddings are coded too: in a small model they are
    most of the state, and distillation moves them little; the paper keeps them in 32 bits for training from scratch.

    Blocks of 256 weights are cut from the shard that a process holds. With another number of processes they start
    elsewhere, so that runs agree to the error of the code, not to that of float32.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def start(self, parameter: nn.Parameter, group: dict) -> dict:
        if parameter.ndim < 2 or parameter.numel() < FEWEST:
            return start_adamw(parameter)
        return dict(zip(CODES, zero_state(local(parameter.detach())), strict=True))

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, state: dict, group: dict) -> None:
        if "exp_avg" in state:
            update_adamw(parameter, gradient, state, group)
            return
        numbers = group["lr"], group["betas"], group["eps"], group["weight_decay"], state["step"]
        adam8bit_step(local(parameter.detach()), gradient, *(state[key] for key in CODES), *numbers)

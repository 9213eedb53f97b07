"""The arithmetic of folding: W (g * x + b) + c = (W diag(g)) x + (c + W b)."""

from __future__ import annotations

import torch


def folded_weight(weight: torch.Tensor, factor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`weight` `[out, in]`, or `[in, out]` when transposed, with its inputs multiplied by `factor` `[in]`, in float32."""
    return weight.float() * (factor[:, None] if transposed else factor)


def folded_bias(weight: torch.Tensor, bias: torch.Tensor, addend: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`bias` `[out]` of a layer whose inputs lose `addend` `[in]`, in float32. `weight` is the one before folding."""
    matrix = weight.float().T if transposed else weight.float()
    return bias.float() + matrix @ addend.float()

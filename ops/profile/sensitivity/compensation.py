"""What GPTQ leaves of the error that rounding to nearest makes, told from the inputs alone.

Rounding to nearest errs by the sum over inputs j of d_j^2 H_jj, d_j the rounding error. GPTQ makes up for what the later
columns can express, so that only the part of input j that they do not foretell counts: its conditional variance, which is
1 / U_jj^2 with the factor U of the inverse that GPTQ works with. As the d_j are of one size, the ratio of the two sums
does not depend on the scheme.
"""

from __future__ import annotations

import torch
from tersor.ops.model.inverse_hessian import DAMPING, inverse_factor


def gptq_share(hessian: torch.Tensor) -> float:
    """In (0, 1]: for inputs with X^T X `[in, in]`, taken in GPTQ's order of falling energy. 1 where none of them correlate."""
    energy = hessian.diagonal()
    if not bool((energy > 0).any()):
        return 1.0
    order = torch.argsort(energy, descending=True, stable=True)
    order = order[energy[order] > 0]
    factor = inverse_factor(hessian[order][:, order], DAMPING)
    left = factor.diagonal().double().pow(-2).sum()
    damped = energy[order].double().sum() * (1 + DAMPING)
    return min(1.0, float(left / damped))

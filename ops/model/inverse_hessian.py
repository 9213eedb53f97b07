"""The factor of the inverse Hessian that error compensation (GPTQ, SparseGPT) works with."""

from __future__ import annotations

import torch
from tersor.formats.errors import TersorError

DAMPING = 0.01
LEAST_DAMPING = 1e-4  # after none was not enough
MOST_DAMPING = 10.0
SMALL_TRIANGLE = 256


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse, H^-1 = U^T U, of the damped Hessian `[in, in]`.

    Damping adds a share of the mean diagonal; it grows tenfold while the matrix is not positive definite (fewer tokens
    than inputs). An input that was never active gets a unit diagonal, which leaves its column without influence.
    Raises TersorError when even the largest damping does not help.
    """
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal().mean()
    diagonal = torch.where(dead, mean if mean > 0 else 1.0, hessian.diagonal())
    share = damping
    while True:
        # Rows and columns in reverse turn the lower factor of H = L L^T into an upper one, whose inverse is U.
        damped = hessian.flip(0, 1)
        damped.diagonal().copy_((diagonal + share * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = _inverse_of_upper(lower.flip(0, 1))
            if bool(torch.isfinite(upper).all()):
                return upper
        if share >= MOST_DAMPING:
            raise TersorError(
                f"the Hessian of {len(hessian)} inputs is not positive definite with damping {share}",
                "look for NaN or huge activations, or use more calibration text",
            )
        share = max(10 * share, LEAST_DAMPING)


def _inverse_of_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix by halves: a third of the work of solving for the unit matrix."""
    n = len(matrix)
    if n <= SMALL_TRIANGLE:
        return torch.linalg.solve_triangular(matrix, torch.eye(n, device=matrix.device, dtype=matrix.dtype), upper=True)
    half = n // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ matrix[:half, half:] @ inverse[half:, half:]
    return inverse

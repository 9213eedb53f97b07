"""Which 8-bit format fits a tensor: INT8 and the FP8 variants, each with one scale per row.

"FP8 versus INT8 for efficient deep learning inference" (van Baalen et al., arXiv:2303.17951): the formats differ in how
their codes are spread, so heavy tails decide. All codes are values here (no NaN or Inf), and the scale is any real number.
"""

from __future__ import annotations

import torch

# name -> (exponent bits, mantissa bits); no exponent bits: 255 integers around zero.
FORMATS = {"INT8": (0, 7), "E2M5": (2, 5), "E3M4": (3, 4), "E4M3": (4, 3), "E5M2": (5, 2)}
STORED = ("INT8", "E4M3", "E5M2")  # the others are for comparison: no file format has them
RATIOS = tuple(2 ** (-step / 8) for step in range(40))  # of the largest magnitude, down to a 29th
MARGIN_DB = 1.0  # a float format must be so much better to be worth its hardware


def largest(exponent: int, mantissa: int) -> float:
    """The largest value when the smallest subnormal step is 2^(1 - mantissa)."""
    return 127.0 if not exponent else 2.0 ** (2**exponent - 1) * (2 - 2.0**-mantissa)


def rounded(values: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest value of the format, ties to even, in its own unit: 0 to `largest`."""
    exponent, mantissa = FORMATS[name]
    limit = largest(exponent, mantissa)
    if not exponent:
        return values.round().clamp(-limit, limit)
    power = torch.floor(torch.log2(values.abs().clamp_min(2.0))).clamp_max(2**exponent - 1)
    step = torch.exp2(power - mantissa)
    return (values / step).round().mul_(step).clamp_(-limit, limit)


def sqnr_db(values: torch.Tensor, name: str, search: bool = True) -> float | None:
    """10 log10(sum w^2 / sum (w - q)^2) of `values` `[rows, columns]`; None where nothing is lost or all are zero.

    One scale per row, from its largest magnitude; with `search`, that times whichever of `RATIOS` errs least in the row.
    """
    values = values.float()
    peak = values.abs().amax(1, keepdim=True) / largest(*FORMATS[name])
    error = torch.full((len(values),), torch.inf, device=values.device)
    for ratio in RATIOS if search else (1.0,):
        scale = (peak * ratio).clamp_min(torch.finfo(torch.float32).tiny)
        found = rounded(values / scale, name).mul_(scale).sub_(values).square_().sum(1)
        error = torch.minimum(error, found)
    energy, lost = float(values.double().square().sum()), float(error.double().sum())
    return float(10 * torch.log10(torch.tensor(energy / lost))) if lost > 0 and energy > 0 else None


def kurtosis(values: torch.Tensor) -> float:
    """E[(w - mean)^4] / E[(w - mean)^2]^2: 1.8 uniform, 3 Gaussian, 6 Laplace, more with heavier tails."""
    centred = values.double() - values.double().mean()
    variance = float(centred.square().mean())
    return float(centred.pow(4).mean()) / variance**2 if variance > 0 else 0.0


def compare(weight: torch.Tensor, rows: int) -> dict:
    """Kurtosis of a weight `[out, in]`, the SQNR of every format on at most `rows` evenly spaced rows, and which to take."""
    sample = weight[:: max(1, len(weight) // rows)][:rows]
    found = {name: sqnr_db(sample, name) for name in FORMATS}
    best = max(STORED[1:], key=lambda name: found[name] or 0.0)
    chosen = best if (found[best] or 0.0) > (found["INT8"] or torch.inf) + MARGIN_DB else "INT8"
    return {"kurtosis": kurtosis(weight), "sqnr_db": found, "choice": chosen}

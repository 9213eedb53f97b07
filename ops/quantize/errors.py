"""How far the quantized weight is from the original: the numbers of the report."""

from __future__ import annotations

import math

import torch
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.scheme import Scheme

CHUNK_WEIGHTS = 1 << 17


class ErrorSums:
    """Sums over the panels of one tensor."""

    def __init__(self):
        self.squares = self.error = 0.0
        self.zeros = self.count = 0

    def add(self, weight: torch.Tensor, quantized: QuantizedWeight, scheme: Scheme) -> None:
        """`weight` `[rows, in]` and what became of it, compared in pieces that stay in the cache."""
        rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
        if scheme.strategy in ("tensor", "block"):
            rows = weight.shape[0]
        for start in range(0, weight.shape[0], rows):
            piece = slice(start, start + rows)
            part = QuantizedWeight(
                quantized.codes[piece],
                quantized.scale[piece] if scheme.strategy in ("group", "channel") else quantized.scale,
                None if quantized.zero_point is None else quantized.zero_point[piece],
            )
            original = weight[piece].float()
            difference = dequantize(part, scheme).sub_(original)
            self.error += float(torch.linalg.vector_norm(difference)) ** 2
            self.squares += float(torch.linalg.vector_norm(original)) ** 2
            self.zeros += original.numel() - int(torch.count_nonzero(original))
            self.count += original.numel()

    def numbers(self) -> dict:
        relative = self.error / self.squares if self.squares else 0.0
        decibel = -10 * math.log10(relative) if relative > 0 else None
        return {
            "error": {"relative_mse": relative, "sqnr_db": decibel},
            "sparsity": self.zeros / max(self.count, 1),
        }


def output_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 from X^T X `[in, in]`: the error of the layer's output on the calibration text."""
    difference = weight - decoded
    reference = float((weight @ hessian * weight).sum())
    return float((difference @ hessian * difference).sum()) / reference if reference > 0 else 0.0

"""How far the quantized weight is from the original: the numbers of the report."""

from __future__ import annotations

import torch
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.scheme import Scheme
from tersor.kernels.quantization_error import quantization_error
from tersor.ops.model.statistics import in_decibels


class ErrorSums:
    """Sums over the panels of one tensor."""

    def __init__(self):
        self.squares = self.error = 0.0
        self.zeros = self.count = 0

    def add(self, weight: torch.Tensor, quantized: QuantizedWeight, scheme: Scheme) -> None:
        """`weight` `[rows, in]` and what became of it."""
        if scheme.kind == "int" and scheme.strategy in ("group", "channel") and quantized.group_index is None:
            error, squares, zeros = quantization_error(weight, *quantized[:3])
        else:
            original = weight.float()
            error = float((dequantize(quantized, scheme) - original).square().sum())
            squares, zeros = float(original.square().sum()), int((original == 0).sum())
        self.error += error
        self.squares += squares
        self.zeros += zeros
        self.count += weight.numel()

    def numbers(self) -> dict:
        relative = self.error / self.squares if self.squares else 0.0
        return {"error": in_decibels(relative), "sparsity": self.zeros / max(self.count, 1)}

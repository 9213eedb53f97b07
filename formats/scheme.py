"""How a weight is quantized: the numbers that a format must record so that a reader can undo it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """Quantization of one linear layer. Weights are `[out, in]`.

    `strategy` says what shares a scale: `group` (`group_size` consecutive columns of one row), `channel` (a row),
    `tensor` (everything), `block` (a tile of `block` rows by columns).
    `activations` is what a runtime does to the layer's input: nothing (None), or dynamic quantization per token
    to int8 or fp8, or per token and 128 columns to fp8 (`fp8-group`, what block-wise fp8 weights pair with).
    `least_zero_point` is the smallest zero point, counted from the lowest code, that the encoding can hold.
    `gptq_v2` marks zero points read from a GPTQ v2 file, which holds them as they are; v1 holds them less one.
    """

    bits: int
    kind: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel", "tensor", "block"] = "group"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    activations: Literal["int8", "fp8", "fp8-group"] | None = None
    least_zero_point: int = 0
    gptq_v2: bool = False

    def groups(self, columns: int) -> int:
        """Number of scales along a row of `columns` weights."""
        return columns // self.group_size if self.strategy == "group" else 1

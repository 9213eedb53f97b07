"""What the stored values of packed sparse weights stand for, in plain torch; shared by the kernels that multiply them."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import check
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def decode_values(values: Tensor, bits: int | None) -> Tensor:
    """The definition: float32 numbers that stored `values` stand for; `bits` as in `bitmap_matmul`."""
    if bits is None:
        return values.float()
    codes = (values.int()[..., None] >> torch.arange(0, 8, bits, device=values.device)) & (2**bits - 1)
    return ((codes.flatten(-2) ^ 2 ** (bits - 1)) - 2 ** (bits - 1)).float()


def unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    """The definition: bool `[N, K]` of uint8 `[N, ceil(K / 8)]`."""
    bits = (bitmask[..., None] >> torch.arange(8, device=bitmask.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :columns].bool()


def times_scale(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The definition: `weight` `[N, K]` times `scale` `[N, G]` per group of columns."""
    return weight if scale is None else weight * scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)


def check_values(values: Tensor, scale: Tensor | None, bits: int | None, shape: tuple[int, int], multiple: int) -> None:
    """Raise ValueError unless stored values and scales can be those of weights of `shape`; groups hold a `multiple`."""
    rows, columns = shape
    check(rows >= 0 and columns > 0, f"weights of {rows} rows and {columns} columns")
    check(bits in (None, 2, 4), f"bits must be 2, 4 or None, not {bits}")
    known = (*FLOATS, torch.int8, torch.float8_e4m3fn) if bits is None else (torch.uint8,)
    check(values.dtype in known, f"values must be one of {known}, not {values.dtype}")
    if scale is not None:
        check(scale.ndim == 2 and len(scale) == rows, f"scale must be [{rows}, G], not {tuple(scale.shape)}")
        groups = scale.shape[1]
        fits = groups > 0 and columns % groups == 0 and (groups == 1 or columns // groups % multiple == 0)
        check(fits, f"scale has {groups} groups of {columns} columns, which must hold a multiple of {multiple}")


def check_operand(x: Tensor, values: Tensor) -> None:
    """Raise ValueError unless `x` is a matrix whose dtype holds every value exactly."""
    check(x.ndim == 2 and x.dtype in FLOATS, f"x must be a matrix of one of {FLOATS}, not {x.ndim}-D {x.dtype}")
    exact = values.dtype not in FLOATS or torch.promote_types(values.dtype, x.dtype) == x.dtype
    check(exact, f"x of {x.dtype} does not hold values of {values.dtype}")

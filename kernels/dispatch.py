"""Which implementation runs a kernel family, decided in one place.

`TERSOR_KERNELS=reference` forces the plain-torch definitions, `TERSOR_KERNELS=triton` forces the Triton kernels (on
CPU tensors only together with `TRITON_INTERPRET=1`, set before this module is imported). Otherwise CUDA and ROCm
tensors go to Triton and everything else to the torch path.

Kernel files take `triton` and `tl` from here, so that they also import where Triton is not installed.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not a Linux machine: the torch paths do all the work

    class _Absent:
        """Stands in for `triton` and `triton.language` while kernel files are imported; no kernel can be launched."""

        constexpr = object

        @staticmethod
        def jit(function=None, **_):
            return function if function is not None else (lambda f: f)

    triton = tl = _Absent

HAVE_TRITON = triton.__name__ == "triton"

Backend = Literal["reference", "triton", "torch"]


def backend(tensor: torch.Tensor) -> Backend:
    """Name of the implementation that should process `tensor`.

    Raises ValueError when `TERSOR_KERNELS` has another value than `reference`, `triton` or nothing, or asks for Triton
    where it cannot run."""
    forced = os.environ.get("TERSOR_KERNELS", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"TERSOR_KERNELS={forced!r}: expected 'reference' or 'triton'")
    if forced == "reference":
        return "reference"
    if forced == "triton":
        if not HAVE_TRITON:
            raise ValueError("TERSOR_KERNELS=triton, but triton is not installed")
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("TERSOR_KERNELS=triton needs a GPU, or TRITON_INTERPRET=1 from the start of the process")
        return "triton"
    return "triton" if tensor.is_cuda and HAVE_TRITON else "torch"


def dot_dtype(dtype: torch.dtype):
    """Triton type in which `tl.dot` should take operands of a floating `dtype`.

    The interpreter keeps bfloat16 as raw bits and multiplies those, so there it becomes float32.
    """
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def split_k(tiles: int, blocks: int, device: torch.device, per_processor: int = 4) -> int:
    """Slices of K that give each processor of a GPU so many of `tiles` output tiles; a slice has 4 `blocks` at least."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(per_processor * processors // tiles, blocks // 4))


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits (1 to 8)."""
    check(1 <= bits <= 8, f"bits must be 1 to 8, not {bits}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1

"""W8A8: int8 activations with a scale per token times int8 weights with a scale per output channel, int32
accumulation."""

from __future__ import annotations

from functools import cache

import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.group_range import round_half_even
from torch import Tensor

_EXACT = 1024  # longest sum of int8 products that float32 holds exactly: 1024 * 128 * 128 = 2^24
LONGEST = 131072  # a sum of this many could overflow int32: 131072 * 128 * 128 = 2^31


def reference_quantize_tokens(x):
    """The definition: scale `max|x| * 2 / 255` of each row (1e-7 at least), codes rounded half to even; the dynamic
    quantization of compressed-tensors."""
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) * 2 / 255).clamp(min=1e-7)
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


@triton.jit
def _quantize_tokens_kernel(x_ptr, codes_ptr, scale_ptr, K, x_row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.abs(tl.load(x_ptr + row * x_row_stride + k, mask=k < K, other=0.0).to(tl.float32)))
    largest = tl.max(peak, axis=0)
    scale = tl.maximum(tl.div_rn(largest * 2, largest * 0 + 255.0), 1e-7)
    tl.store(scale_ptr + row, scale)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row_stride + k, mask=k < K, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.div_rn(x, scale + x * 0), -128.0), 127.0)
        tl.store(codes_ptr + row * K + k, round_half_even(code).to(tl.int8), mask=k < K)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8 quantization of `x` `[M, K]` (float32, bfloat16, float16): codes int8 `[M, K]`, scale
    float32 `[M, 1]`. Raises ValueError for a matrix without columns."""
    check(x.ndim == 2 and x.shape[1] > 0, f"x must be [M, K] with columns, not {tuple(x.shape)}")
    if backend(x) != "triton":
        return reference_quantize_tokens(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, device=x.device)
    block = min(2048, triton.next_power_of_2(x.shape[1]))
    _quantize_tokens_kernel[(x.shape[0],)](x, codes, scale, x.shape[1], x.stride(0), BLOCK=block)
    return codes, scale


def reference_int8_matmul(x, weight, x_scale, weight_scale, dtype=torch.bfloat16):
    """The definition; float64 holds the integer sums exactly."""
    return ((x.double() @ weight.double().t()).float() * x_scale * weight_scale.float().t()).to(dtype)


@triton.jit
def _int8_matmul_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    x_row_stride,
    weight_row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_k = k < K
        x = tl.load(x_ptr + m[:, None] * x_row_stride + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0)
        at = n[None, :] * weight_row_stride + k[:, None]
        w = tl.load(weight_ptr + at, mask=in_k[:, None] & in_n[None, :], other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=in_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    out = accumulator.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    at = m[:, None] * N + n[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@cache
def int_mm_is_exact() -> bool:
    """Whether torch's int8 product is: without VNNI instructions it may add pairs of products in 16 bits."""
    low, high = torch.full((32, 64), -128, dtype=torch.int8), torch.full((32, 64), 127, dtype=torch.int8)
    pairs = ((low, low), (low, high), (high, high))
    return all(torch.equal(torch._int_mm(a, b.t()), _int_mm_in_pieces(a, b)) for a, b in pairs)


def _int_mm_in_pieces(x, weight):
    """`x @ W^T` in int32, in float32 products short enough to be exact."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for k in range(0, x.shape[1], _EXACT):
        total += (x[:, k : k + _EXACT].float() @ weight[:, k : k + _EXACT].float().t()).int()
    return total


def launch_options(tokens: int) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942)."""
    if tokens <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def int8_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`[M, N]` in `dtype` from int8 `x` `[M, K]`, `weight` `[N, K]`, scales `[M, 1]` float32 and `[N, 1]`.

    Sums are exact in int32 (K below 131072), then scaled in float32. Raises ValueError when shapes or dtypes disagree.
    """
    check(x.dtype == weight.dtype == torch.int8, f"operands must be int8, not {x.dtype} and {weight.dtype}")
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]
    check(fits, f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not multiply")
    check(x.shape[1] < LONGEST, f"{x.shape[1]} columns may overflow int32: fewer than {LONGEST} are safe")
    (tokens, columns), rows = x.shape, weight.shape[0]
    check(x_scale.shape == (tokens, 1), f"x_scale must be [{tokens}, 1], not {tuple(x_scale.shape)}")
    check(weight_scale.shape == (rows, 1), f"weight_scale must be [{rows}, 1], not {tuple(weight_scale.shape)}")
    kind = backend(x)
    if kind == "reference":
        return reference_int8_matmul(x, weight, x_scale, weight_scale, dtype)
    if kind == "torch":
        whole = tokens > 0 and rows > 0 and columns >= 32 and int_mm_is_exact()  # torch 2.13 is wrong for one column
        total = torch._int_mm(x, weight.t()) if whole else _int_mm_in_pieces(x, weight)
        return (total.float() * x_scale * weight_scale.float().t()).to(dtype)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    options = launch_options(tokens)
    _int8_matmul_kernel[(triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(rows, options["BLOCK_N"]))](
        x,
        weight,
        x_scale.float().contiguous(),
        weight_scale.contiguous(),
        out,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        **options,
    )
    return out

"""FP8 (E4M3FN) matmul: per-token times per-channel scales, or per token and 128 columns times per 128x128 block.

GPUs differ in what they know of E4M3FN (1 sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinities, NaN =
S.1111.111): sm_89 and later multiply it natively; sm_80 has no 8-bit floats, and gfx942 has only the FNUZ variant with
another bias. Where it is not native, kernels get the raw bytes: moved 7 bits left they are a float16 of 1/256 of the
value, subnormals included, so one exact multiplication decodes them and the product runs in float16 with float32
accumulation. Quantizers encode with integer operations everywhere."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from torch import Tensor

MAXIMUM = 448.0
BLOCK = 128  # rows and columns that share a scale in block-wise weights, columns in block-wise activations
_SMALLEST = 1e-12  # scale of an all-zero token


def reference_quantize_fp8(x, group_size=None):
    """The definition: scale `max|x| / 448` of each group of columns, codes `cast(clamp(x / scale))`."""
    columns = x.shape[1]
    size = columns if group_size is None else group_size
    padded = torch.nn.functional.pad(x.float(), (0, -columns % size)).unflatten(1, (-1, size))
    scale = (padded.abs().amax(2) / MAXIMUM).clamp(min=_SMALLEST)
    codes = (padded / scale[..., None]).clamp(-MAXIMUM, MAXIMUM).flatten(1)[:, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


@triton.jit
def _encode_e4m3(x):
    """E4M3FN bytes (uint8) nearest to float32 `x`, ties to even; |x| <= 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded - (120 << 23)) >> 20  # exponent bias 127 to 7, mantissa 23 bits to 3
    subnormal = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # multiples of 2^-9; 8 is the first normal
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _decode_e4m3(code):
    """Float16 value of E4M3FN bytes (uint8)."""
    wide = code.to(tl.int16)
    magnitude = wide & 0x7F
    value = (((wide & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _quantize_fp8_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    K,
    group_size,
    groups,
    x_row_stride,
    SMALLEST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    start = group * group_size
    stop = tl.minimum(start + group_size, K)
    peak = tl.zeros([BLOCK_K], tl.float32)
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_row_stride + k, mask=k < stop, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
    largest = tl.max(peak, axis=0)
    scale = tl.maximum(tl.div_rn(largest, largest * 0 + 448.0), SMALLEST)
    tl.store(scale_ptr + row * groups + group, scale)
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_row_stride + k, mask=k < stop, other=0.0).to(tl.float32)
        x = tl.minimum(tl.maximum(tl.div_rn(x, scale + x * 0), -448.0), 448.0)
        tl.store(codes_ptr + row * K + k, _encode_e4m3(x), mask=k < stop)


def quantize_fp8(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Dynamic E4M3FN quantization of `x` `[M, K]` (float32, bfloat16, float16): codes `[M, K]`, scale float32 `[M,
    ceil(K / group_size)]`.

    `group_size=None`: one scale per token, `[M, 1]`; 128: what block-wise weights are multiplied with. Raises
    ValueError for a matrix without columns.
    """
    check(x.ndim == 2 and x.shape[1] > 0, f"x must be [M, K] with columns, not {tuple(x.shape)}")
    check(group_size is None or group_size > 0, f"group_size must be positive, not {group_size}")
    if backend(x) != "triton":
        return reference_quantize_fp8(x, group_size)
    tokens, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    size = columns if group_size is None else group_size
    groups = triton.cdiv(columns, size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, groups, device=x.device)
    _quantize_fp8_kernel[(tokens, groups)](
        x,
        codes,
        scale,
        columns,
        size,
        groups,
        x.stride(0),
        SMALLEST=_SMALLEST,
        BLOCK_K=min(2048, triton.next_power_of_2(size)),
        num_warps=1 if size <= 128 else 4,
    )
    return codes.view(torch.float8_e4m3fn), scale


def _spread(scale, block_rows, block_columns, shape):
    """One scale per tile to one per element."""
    scale = scale.float().repeat_interleave(block_rows, 0) if block_rows > 1 else scale.float()
    scale = scale.repeat_interleave(block_columns, 1) if scale.shape[1] > 1 else scale
    return scale[: shape[0], : shape[1]]


def reference_fp8_matmul(x, weight, x_scale, weight_scale, dtype=torch.bfloat16):
    """The definition: dequantize both in float32, multiply in float32."""
    if weight_scale.numel() == 1:
        weight_scale = weight_scale.reshape(1, 1).expand(weight.shape[0], 1)
    blocks = weight_scale.shape[0] != weight.shape[0] or weight_scale.shape[1] > 1
    dense_x = x.float() * _spread(x_scale, 1, BLOCK, x.shape)
    dense_weight = weight.float() * _spread(weight_scale, BLOCK if blocks else 1, BLOCK, weight.shape)
    return (dense_x @ dense_weight.t()).to(dtype)


@triton.jit
def _fp8_matmul_kernel(
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
    x_scale_row_stride,
    weight_scale_row_stride,
    NATIVE: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One `[BLOCK_M, BLOCK_N]` tile. Block-wise scales cover exactly `BLOCK_K` columns and a multiple of `BLOCK_N`
    rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(0, tl.cdiv(K, BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < K
        x_at = x_ptr + m[:, None] * x_row_stride + k[None, :]
        weight_at = weight_ptr + n[None, :] * weight_row_stride + k[:, None]
        x_mask, weight_mask = in_m[:, None] & in_k[None, :], in_k[:, None] & in_n[None, :]
        if NATIVE:
            x = tl.load(x_at, mask=x_mask, other=0.0)
            w = tl.load(weight_at, mask=weight_mask, other=0.0)
        else:
            x = _decode_e4m3(tl.load(x_at, mask=x_mask, other=0))
            w = _decode_e4m3(tl.load(weight_at, mask=weight_mask, other=0))
        # Hopper's tensor cores keep about 14 bits while they sum 8-bit floats: leave them after every BLOCK_K columns.
        product = tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
        if BLOCKWISE:
            x_scale = tl.load(x_scale_ptr + m * x_scale_row_stride + block, mask=in_m, other=0.0)
            row = tl.program_id(1) * BLOCK_N // 128
            weight_scale = tl.load(weight_scale_ptr + row * weight_scale_row_stride + block).to(tl.float32)
            product *= x_scale[:, None] * weight_scale
        accumulator += product
    if not BLOCKWISE:
        x_scale = tl.load(x_scale_ptr + m * x_scale_row_stride, mask=in_m, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + n * weight_scale_row_stride, mask=in_n, other=0.0).to(tl.float32)
        accumulator = accumulator * x_scale[:, None] * weight_scale[None, :]
    at = m[:, None] * N + n[None, :]
    tl.store(out_ptr + at, accumulator.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def launch_options(tokens: int) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942)."""
    block_m, block_n = (16, 64) if tokens <= 16 else (64, 128)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK, "num_warps": 4, "num_stages": 3}


def native_e4m3(device: torch.device) -> bool:
    """Whether the GPU multiplies E4M3FN itself: NVIDIA from sm_89 on. CDNA3's 8-bit floats are the FNUZ kind."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`[M, N]` in `dtype` from E4M3FN `x` `[M, K]` and `weight` `[N, K]`, accumulated in float32.

    Scales: `x_scale` `[M, 1]` with `weight_scale` `[N, 1]` (channel) or `[1]` (tensor); or `[M, ceil(K / 128)]` with
    `[ceil(N / 128), ceil(K / 128)]` (blocks of 128 x 128). Raises ValueError when shapes or dtypes disagree.
    """
    check(x.dtype == weight.dtype == torch.float8_e4m3fn, f"operands are {x.dtype} and {weight.dtype}, not E4M3FN")
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]
    check(fits, f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not multiply")
    (tokens, columns), rows = x.shape, weight.shape[0]
    if weight_scale.numel() == 1 and x_scale.shape == (tokens, 1):
        weight_scale = weight_scale.reshape(1, 1).expand(rows, 1)
    tiles = -(-rows // BLOCK), -(-columns // BLOCK)
    channelwise = x_scale.shape == (tokens, 1) and weight_scale.shape == (rows, 1)
    blockwise = not channelwise and x_scale.shape == (tokens, tiles[1]) and weight_scale.shape == tiles
    check(
        channelwise or blockwise,
        f"scales {tuple(x_scale.shape)} and {tuple(weight_scale.shape)} fit neither channels nor blocks",
    )
    kind = backend(x)
    if kind != "triton":
        return reference_fp8_matmul(x, weight, x_scale, weight_scale, dtype)
    x, weight = x.contiguous(), weight.contiguous()
    native = native_e4m3(x.device)
    if not native:
        x, weight = x.view(torch.uint8), weight.view(torch.uint8)
    x_scale = x_scale.float().contiguous()
    weight_scale = weight_scale if channelwise else weight_scale.contiguous()
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    options = launch_options(tokens)
    _fp8_matmul_kernel[(triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(rows, options["BLOCK_N"]))](
        x,
        weight,
        x_scale,
        weight_scale,
        out,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        x_scale.stride(0),
        weight_scale.stride(0),
        NATIVE=native,
        BLOCKWISE=blockwise,
        **options,
    )
    return out

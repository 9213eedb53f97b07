"""`x @ W^T` where most inputs of a few tokens are (nearly) zero: only the rows of W^T that meet the others are read.

The index of active inputs is built in front of each product, as PIT (SOSP'23) builds its index online; but each segment
of inputs keeps a list of its own, ascending, so that nothing is counted atomically and the segments' sums, added in
their order, repeat exactly. With a threshold this is what TEAL (arXiv 2408.14690) does to activations.

Bound by reading the active rows of W^T, `[K, N]`: stored that way each is contiguous."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import backend, check, dot_dtype, tl, triton
from tersor.kernels.tile_loops import add_active
from torch import Tensor

TOKENS = 16  # of a GPU product; more tokens have hardly an input that is zero in all of them
SEGMENT = 512  # inputs that share a list
SPLITS = 16  # slices of the segments that are summed apart, at most

# On a CPU, 4096 x 4096 and one core: loops over the active rows take less time than the whole product while at most so
# many of the inputs are active, whatever the number of tokens up to 32 (1 token, 50 %: 8 against 14 ms in float32, 6.5
# against 7.3 in bfloat16; 32 tokens, 50 %: 43 against 52 and 135 against 160). With more tokens a copy of the active
# rows pays while they are few (32 tokens, 25 %: 25 against 52 and 36 against 160).
LOOPS_TO, LOOPS_TOKENS, GATHER_TO = 0.6, 32, 0.25


def reference_active_matmul(x, weight_columns, threshold=0.0):
    """The definition: zeros for what is small, then a product in float32."""
    x = x.float()
    return torch.where(x.abs() <= threshold, 0, x) @ weight_columns.float()


@triton.jit
def _find_active_kernel(
    x_ptr,
    index_ptr,
    count_ptr,
    threshold,
    M,
    K,
    x_row_stride,
    BLOCK_M: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """One program: the inputs of one segment that some token has, ascending, and how many."""
    segment = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    k = segment * SEGMENT + tl.arange(0, SEGMENT)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_row_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    small = (tl.abs(x) <= threshold).to(tl.int32)  # NaN is not small
    active = 1 - tl.min(small, axis=0)
    position = tl.cumsum(active, axis=0) - active
    tl.store(index_ptr + segment * SEGMENT + position, k, mask=active != 0)
    tl.store(count_ptr + segment, tl.sum(active, axis=0))


@triton.jit
def _active_matmul_kernel(
    x_ptr,
    weight_ptr,
    index_ptr,
    count_ptr,
    out_ptr,
    threshold,
    M,
    N,
    segments,
    per_split,
    x_row_stride,
    weight_row_stride,
    split_stride,
    DOT: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: all tokens times `BLOCK_N` columns of W^T, for the lists of `per_split` segments."""
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    in_m, in_n = m < M, n < N
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * per_split
    for segment in range(first, tl.minimum(first + per_split, segments)):
        count = tl.load(count_ptr + segment)
        for begin in range(0, count, BLOCK_K):
            entry = begin + tl.arange(0, BLOCK_K)
            in_k = entry < count
            k = tl.load(index_ptr + segment * SEGMENT + entry, mask=in_k, other=0)
            x = tl.load(
                x_ptr + m[:, None] * x_row_stride + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0
            ).to(tl.float32)
            x = tl.where(tl.abs(x) <= threshold, 0.0, x)
            at = k.to(tl.int64)[:, None] * weight_row_stride + n[None, :]
            w = tl.load(weight_ptr + at, mask=in_k[:, None] & in_n[None, :], other=0.0)
            accumulator = tl.dot(x.to(DOT), w.to(DOT), accumulator, input_precision="ieee")
    out = out_ptr + split.to(tl.int64) * split_stride + m[:, None] * N + n[None, :]
    tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def launch_options(dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps that fit the shared memory of every supported GPU (64 KiB on gfx942). Loads of the weight wait for
    the index, which takes half of the stages."""
    stages = 2 if dtype == torch.float32 else 5
    return {"BLOCK_M": TOKENS, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}


def _on_torch(x, weight_columns, threshold):
    tokens, columns = x.shape
    kept = torch.where(x.float().abs() <= threshold, 0, x)
    active = (kept != 0).any(0).nonzero()[:, 0]
    share = len(active) / columns
    if share <= LOOPS_TO and tokens <= LOOPS_TOKENS and x.device.type == "cpu":
        return add_active(kept, weight_columns, active)
    if share <= GATHER_TO:
        return kept.float().index_select(1, active) @ weight_columns.index_select(0, active).float()
    # Converting all weights costs more than what torch loses on bfloat16, while tokens are few.
    native = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and tokens <= LOOPS_TOKENS)
    return kept @ weight_columns if native else kept.float() @ weight_columns.float()


def active_matmul(x: Tensor, weight_columns: Tensor, threshold: float = 0.0) -> Tensor:
    """`[M, N]` in the dtype of `x` `[M, K]` (bfloat16, float16, float32) times `weight_columns` `[K, N]`, W transposed;
    accumulated in float32.

    Inputs of a magnitude up to `threshold` count as zero; rows of `weight_columns` whose input is zero for every token are
    not read. For up to 16 tokens on a GPU: more take the whole product, where inputs are zero in large parts
    `sparse_index.pack_tiles` and `tile_matmul`. Results do not vary from run to run. Raises ValueError when shapes or
    dtypes disagree, or for a negative threshold."""
    fits = x.ndim == weight_columns.ndim == 2 and x.shape[1] == weight_columns.shape[0]
    check(fits, f"x {tuple(x.shape)} and weight_columns {tuple(weight_columns.shape)} do not multiply")
    check(x.dtype == weight_columns.dtype, f"x is {x.dtype}, weight_columns are {weight_columns.dtype}")
    threshold = float(threshold)
    check(threshold >= 0, f"threshold {threshold} is negative")
    (tokens, columns), rows = x.shape, weight_columns.shape[1]
    if tokens == 0 or columns == 0 or rows == 0:
        return x.new_zeros(tokens, rows)
    kind = backend(x)
    if kind == "reference":
        return reference_active_matmul(x, weight_columns, threshold).to(x.dtype)
    if kind == "torch":
        return _on_torch(x, weight_columns, threshold).to(x.dtype)
    if tokens > TOKENS:
        return torch.where(x.float().abs() <= threshold, 0, x) @ weight_columns
    x, weight_columns = x.contiguous(), weight_columns.contiguous()
    segments = triton.cdiv(columns, SEGMENT)
    index = torch.empty(segments, SEGMENT, dtype=torch.int32, device=x.device)
    count = torch.empty(segments, dtype=torch.int32, device=x.device)
    block_m = triton.next_power_of_2(tokens)
    _find_active_kernel[(segments,)](
        x, index, count, threshold, tokens, columns, x.stride(0), BLOCK_M=block_m, SEGMENT=SEGMENT
    )
    per_split = triton.cdiv(segments, min(segments, SPLITS))
    splits = triton.cdiv(segments, per_split)
    out = torch.empty(splits, tokens, rows, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    options = launch_options(x.dtype)
    _active_matmul_kernel[(triton.cdiv(rows, options["BLOCK_N"]), splits)](
        x,
        weight_columns,
        index,
        count,
        out,
        threshold,
        tokens,
        rows,
        segments,
        per_split,
        x.stride(0),
        weight_columns.stride(0),
        tokens * rows,
        DOT=dot_dtype(x.dtype),
        SEGMENT=SEGMENT,
        **options,
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)

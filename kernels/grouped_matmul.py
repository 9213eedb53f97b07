"""`x @ W[e]^T` for many small groups of rows, each with a weight of its own, in one launch and without padding.

A mixture of experts gathers the tokens of each expert while x is loaded and scatters the results while they are stored
(PIT, SOSP'23, section on dynamic sparsity: a token is a micro-tile). Every pair of token and expert has an output row of
its own, so nothing is added atomically; a layer sums the rows of a token afterwards, in a fixed order. A ragged batch is
the same with offsets of batches instead of experts and nothing to gather.

Many rows per expert: bound by the tensor cores. Few: by reading each weight that has rows once."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from tersor.kernels.dispatch import backend, check, dot_dtype, tl, triton
from torch import Tensor

GEMV = 4  # rows up to which a CPU multiplies 16-bit weights as they are faster than converted to float32
GROUP_M = 8  # blocks of rows that walk through W together, so that both operands stay in the L2 cache


class Groups(NamedTuple):
    """Pairs of token and expert, ordered by expert. `token` int32 `[P]`; `pair` int32 `[P]`, the pair's number `token *
    k + slot` before they were ordered; `expert_ptr` int32 `[E + 1]`."""

    token: Tensor
    pair: Tensor
    expert_ptr: Tensor


def group_by_expert(experts: Tensor, count: int) -> Groups:
    """Groups of the router's choice `experts` `[T, k]` among `count` experts.

    With `down` applied to the pairs' hidden states `[P, H]`, a layer's output is

        grouped_matmul(hidden, down, None, groups.expert_ptr, weights.flatten()[groups.pair], groups.pair)
            .view(T, k, -1).sum(1)
    """
    check(experts.ndim == 2, f"experts must be [T, k], not {tuple(experts.shape)}")
    flat = experts.flatten().long()
    order = torch.argsort(flat, stable=True)
    bounds = torch.arange(count + 1, device=flat.device)
    expert_ptr = torch.searchsorted(flat[order], bounds)
    return Groups((order // max(1, experts.shape[1])).int(), order.int(), expert_ptr.int())


def reference_grouped_matmul(x, weights, token_index, expert_ptr, pair_weights=None, out_index=None):
    """The definition, in float32."""
    rows = x.float() if token_index is None else x.float()[token_index.long()]
    expert = torch.arange(len(weights), device=x.device).repeat_interleave(expert_ptr.diff().long())
    result = torch.empty(len(rows), weights.shape[1], device=x.device)
    for e in range(len(weights)):
        result[expert == e] = rows[expert == e] @ weights[e].float().t()
    if pair_weights is not None:
        result *= pair_weights.float()[:, None]
    if out_index is not None:
        result = torch.empty_like(result).index_copy_(0, out_index.long(), result)
    return result.to(x.dtype)


@triton.jit
def _grouped_matmul_kernel(
    x_ptr,
    weights_ptr,
    token_ptr,
    expert_start_ptr,
    pair_weight_ptr,
    out_row_ptr,
    out_ptr,
    N,
    K,
    experts,
    blocks_m,
    blocks_n,
    x_row_stride,
    weight_row_stride,
    expert_stride,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCATTER: tl.constexpr,
    DOT: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_M` rows of one expert times `BLOCK_N` rows of its weight. Which expert, each finds by itself:
    `blocks_m` is only a bound of the number of row blocks, which is not known on the host."""
    program = tl.program_id(0)
    together = program // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - together, GROUP)
    block_m = together + program % (GROUP * blocks_n) % height
    block_n = program % (GROUP * blocks_n) // height

    e = tl.arange(0, EXPERTS)
    begin = tl.load(expert_start_ptr + e, mask=e < experts, other=0)
    end = tl.load(expert_start_ptr + e + 1, mask=e < experts, other=0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(blocks, axis=0)
    expert = tl.sum((until <= block_m).to(tl.int32), axis=0)
    if expert < experts:
        before = tl.sum(tl.where(e < expert, blocks, 0), axis=0)
        start = tl.load(expert_start_ptr + expert)
        stop = tl.load(expert_start_ptr + expert + 1)
        row = start + (block_m - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = row < stop
        source = row
        if GATHER:
            source = tl.load(token_ptr + row, mask=in_m, other=0)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        x_row = x_ptr + source.to(tl.int64)[:, None] * x_row_stride
        w_row = weights_ptr + expert.to(tl.int64) * expert_stride + n.to(tl.int64)[None, :] * weight_row_stride
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0.0)
            w = tl.load(w_row + k[:, None], mask=(k < K)[:, None] & in_n[None, :], other=0.0)
            accumulator = tl.dot(x.to(DOT), w.to(DOT), accumulator, input_precision="ieee")
        if WEIGHTED:
            weight = tl.load(pair_weight_ptr + row, mask=in_m, other=0.0).to(tl.float32)
            accumulator *= weight[:, None]
        target = row
        if SCATTER:
            target = tl.load(out_row_ptr + row, mask=in_m, other=0)
        out = out_ptr + target.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, accumulator.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def launch_options(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps for experts of `rows` rows on average, that fit the shared memory of every supported GPU (64 KiB on
    gfx942)."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16 if rows <= 16 else 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if rows <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _on_torch(x, weights, token_index, expert_ptr, pair_weights, out_index):
    """A product per expert that has rows."""
    pairs = len(x) if token_index is None else len(token_index)
    out = torch.empty(pairs, weights.shape[1], dtype=x.dtype, device=x.device)
    bounds = expert_ptr.tolist()
    check(bounds[0] == 0 and bounds[-1] == pairs, f"expert_ptr goes from {bounds[0]} to {bounds[-1]}, not 0 to {pairs}")
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        check(begin <= end, f"expert_ptr falls from {begin} to {end}")
        if begin == end:
            continue
        rows = x[begin:end] if token_index is None else x.index_select(0, token_index[begin:end])
        native = x.dtype == torch.float32 or end - begin <= GEMV
        weight = weights[expert]
        result = rows @ weight.t() if native else rows.float() @ weight.float().t()
        if pair_weights is not None:
            result = result.float() * pair_weights[begin:end, None].float()
        if out_index is None:
            out[begin:end] = result
        else:
            out.index_copy_(0, out_index[begin:end].long(), result.to(x.dtype))
    return out


def grouped_matmul(
    x: Tensor,
    weights: Tensor,
    token_index: Tensor | None,
    expert_ptr: Tensor,
    pair_weights: Tensor | None = None,
    out_index: Tensor | None = None,
) -> Tensor:
    """`[P, N]` in the dtype of `x` (bfloat16, float16, float32), accumulated in float32.

    Row p, of expert e where `expert_ptr[e] <= p < expert_ptr[e + 1]`, is `x[token_index[p]] @ weights[e]^T`, times
    `pair_weights[p]`, and stands at `out_index[p]`. `weights` `[E, N, K]`; index tensors int32, `expert_ptr` `[E + 1]`
    from 0 to P; without `token_index` x has P rows, in order of experts; `out_index` is a permutation of P. Offsets and
    indices are not searched for wrong entries on a GPU. Raises ValueError when shapes or dtypes disagree."""
    check(x.ndim == 2 and weights.ndim == 3, "x must be [T, K], weights [E, N, K]")
    check(x.dtype == weights.dtype, f"x is {x.dtype}, weights are {weights.dtype}")
    fits = x.shape[1] == weights.shape[2] > 0
    check(fits, f"x {tuple(x.shape)} and weights {tuple(weights.shape)} do not multiply")
    experts, rows, columns = weights.shape
    check(expert_ptr.shape == (experts + 1,), f"expert_ptr {tuple(expert_ptr.shape)}, expected [{experts + 1}]")
    check(token_index is None or token_index.ndim == 1, "token_index must be a vector")
    pairs = len(x) if token_index is None else len(token_index)
    for name, tensor in (("pair_weights", pair_weights), ("out_index", out_index)):
        check(tensor is None or tensor.shape == (pairs,), f"{name} must have one entry per pair, [{pairs}]")
    kind = backend(x)
    if kind == "reference":
        return reference_grouped_matmul(x, weights, token_index, expert_ptr, pair_weights, out_index)
    if kind == "torch":
        return _on_torch(x, weights, token_index, expert_ptr, pair_weights, out_index)
    out = torch.empty(pairs, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weights = x.contiguous(), weights.contiguous()
    options = launch_options(triton.cdiv(pairs, experts), x.dtype)
    # An expert's rows fill all of its blocks but the last.
    blocks_m = (pairs + min(experts, pairs) * (options["BLOCK_M"] - 1)) // options["BLOCK_M"]
    blocks_n = triton.cdiv(rows, options["BLOCK_N"])
    _grouped_matmul_kernel[(blocks_m * blocks_n,)](
        x,
        weights,
        expert_ptr if token_index is None else token_index.contiguous(),
        expert_ptr.contiguous(),
        x if pair_weights is None else pair_weights.contiguous(),
        expert_ptr if out_index is None else out_index.contiguous(),
        out,
        rows,
        columns,
        experts,
        blocks_m,
        blocks_n,
        x.stride(0),
        weights.stride(1),
        weights.stride(0),
        GATHER=token_index is not None,
        WEIGHTED=pair_weights is not None,
        SCATTER=out_index is not None,
        DOT=dot_dtype(x.dtype),
        EXPERTS=triton.next_power_of_2(experts),
        GROUP=GROUP_M,
        **options,
    )
    return out

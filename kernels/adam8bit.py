"""AdamW with 8-bit moments: the block-wise dynamic code of 8-bit Optimizers (arXiv:2110.02861).

A tensor is cut, in memory order, into blocks of 256 numbers; each is divided by its largest magnitude, and what is left is
the nearest of 256 entries of `dynamic_map`: 7 decades, each with twice the entries of the one below. The step reads codes,
does Adam's arithmetic in float32 with moments that are not rounded yet, and writes new codes: 2 + 8 / 256 = 2.03 bytes of
state per weight.

One thing differs from bitsandbytes: a second moment above 0 never gets the code of 0. A weight whose gradients are small
beside the largest of its block would lose its second moment at every step, keep its first, and move up to 1 / sqrt(1 -
beta2) = 31 times too far."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor

BLOCK = 256
_PANEL = 1 << 8  # blocks of a bfloat16 weight that the CPU holds in float32 at a time
_FEWEST = 256  # blocks per thread


@functools.cache
def _entries(signed: bool) -> tuple[float, ...]:
    entries = [0.0, 1.0]
    for decade in range(7):
        points = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (points[:-1] + points[1:]) / 2 * 10.0 ** (decade - 6)
        entries += [*middles, *(-middles if signed else ())]
    return tuple(sorted(entries))


def dynamic_map(signed: bool) -> Tensor:
    """The code's 256 entries, float32, ascending: -0.993..1 when `signed` (there is no -1), else 0..1."""
    return torch.tensor(_entries(signed), dtype=torch.float32)


@functools.lru_cache(8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries and midpoints of the signed map, of the unsigned one. Midpoint 255 is infinite: nothing is above it."""
    tables = []
    for signed in (True, False):
        entries = dynamic_map(signed)
        middles = (entries[1:].double() + entries[:-1].double()) / 2
        tables += [entries, torch.cat([middles.float(), torch.tensor([math.inf])])]
    return tuple(table.to(device) for table in tables)


# ---------------------------------------------------------------- the code


def quantize_blocks(values: Tensor, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes uint8 of the shape of `values`, and `absmax` float32 `[ceil(numel / block)]`.

    The nearest entry, the lower one of two equally near. The map has no -1, so that each round trip shrinks a block whose
    largest magnitude is negative by 0.7 %: moments are decoded once and encoded once per step."""
    middles = _tables(values.device)[1 if signed else 3]
    flat = values.float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(1) if padded.numel() else padded.new_empty(0)
    scaled = padded / torch.where(absmax > 0, absmax, 1)[:, None]
    codes = torch.searchsorted(middles[:255], scaled.contiguous()).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(values.shape), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, signed: bool, block: int = BLOCK) -> Tensor:
    """float32 numbers of the shape of `codes`."""
    entries = _tables(codes.device)[0 if signed else 2]
    return entries[codes.long()] * absmax.repeat_interleave(block)[: codes.numel()].view(codes.shape)


def zero_state(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`m_codes`, `m_absmax`, `v_codes`, `v_absmax` of a weight that has not been stepped."""
    blocks = -(-weight.numel() // BLOCK)
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    absmax = torch.zeros(blocks, device=weight.device)
    return codes + _entries(True).index(0.0), absmax, codes, absmax.clone()


# ---------------------------------------------------------------- the step


def reference_adam8bit_step(weight, gradient, m_codes, m_absmax, v_codes, v_absmax, lr, betas, eps, weight_decay, step):
    """The definition: decode, one step of torch's AdamW, encode."""
    g, w = gradient.float(), weight.float()
    m = betas[0] * dequantize_blocks(m_codes, m_absmax, True) + (1 - betas[0]) * g
    v = betas[1] * dequantize_blocks(v_codes, v_absmax, False) + (1 - betas[1]) * g * g
    denominator = v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
    weight.copy_(w * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * m / denominator)
    for codes, absmax, (new, largest) in (
        (m_codes, m_absmax, quantize_blocks(m, True)),
        (v_codes, v_absmax, quantize_blocks(v, False)),
    ):
        codes.copy_(torch.where(v > 0, new.clamp(min=1), new) if codes is v_codes else new)
        absmax.copy_(largest)


@triton.jit
def _encode(x, absmax, middles_ptr):
    """Number of midpoints below `x / absmax`, by bisection."""
    x = tl.div_rn(x, tl.where(absmax > 0, absmax, 1.0) + x * 0)
    code = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(8):
        code += tl.where(x > tl.load(middles_ptr + code + ((128 >> i) - 1)), 128 >> i, 0)
    return code


@triton.jit
def _adam8bit_kernel(
    weight_ptr,
    gradient_ptr,
    m_codes_ptr,
    m_absmax_ptr,
    v_codes_ptr,
    v_absmax_ptr,
    m_entries_ptr,
    m_middles_ptr,
    v_entries_ptr,
    v_middles_ptr,
    numbers_ptr,
    n,
    BLOCK: tl.constexpr,
):
    """One program: one block. `numbers`: see `_numbers`."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    beta1, beta2 = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    rest1, rest2 = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    step_size, correction = tl.load(numbers_ptr + 4), tl.load(numbers_ptr + 5)
    eps, decay = tl.load(numbers_ptr + 6), tl.load(numbers_ptr + 7)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_entries_ptr + tl.load(m_codes_ptr + at, mask=inside, other=0).to(tl.int32))
    v = tl.load(v_entries_ptr + tl.load(v_codes_ptr + at, mask=inside, other=0).to(tl.int32))
    m = beta1 * (m * tl.load(m_absmax_ptr + block)) + rest1 * g
    v = beta2 * (v * tl.load(v_absmax_ptr + block)) + rest2 * g * g
    m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
    w = w * decay - step_size * m / (tl.sqrt(v) * correction + eps)
    tl.store(weight_ptr + at, w.to(weight_ptr.dtype.element_ty), mask=inside)
    m_absmax, v_absmax = tl.max(tl.abs(m), 0), tl.max(v, 0)
    code = _encode(v, v_absmax, v_middles_ptr)
    code = tl.where((v > 0) & (code == 0), 1, code)
    tl.store(v_codes_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(m_codes_ptr + at, _encode(m, m_absmax, m_middles_ptr).to(tl.uint8), mask=inside)
    tl.store(m_absmax_ptr + block, m_absmax)
    tl.store(v_absmax_ptr + block, v_absmax)


# The CPU reads no tables, which vector code does slowly: in each of its 7 decades the code is a line, and so is its inverse.


def _lines(signed):
    """Starts, slopes, offsets and ends of the 7 lines from rank (0 for the smallest entry above 0) to entry, of those from
    entry to rank (whole part: the nearest), and what is nearest to 0 below and to 1 above."""
    above = [entry for entry in _entries(signed) if entry > 0]
    middles = [above[0] / 2, *((a + b) / 2 for a, b in itertools.pairwise(above))]
    decode, encode = [], []
    for decade in range(7):
        count, power = 2 ** (decade + (not signed)), 10.0 ** (decade - 6)
        first = count - 1 if signed else count - 2
        slope = 0.9 * power / count
        low = 0.1 * power - first * slope
        decode.append((first, slope, low + slope / 2, math.inf))
        encode.append((middles[first], 1 / slope, -low / slope, first + count - 1))
    decode, encode = (
        tuple(tuple(np.float32(x) for x in kind) for kind in zip(*p, strict=True)) for p in (decode, encode)
    )
    return decode, encode, np.float32(middles[0]), np.float32(middles[-1])


F, I32 = np.float32, np.int32
M_DECODE, M_ENCODE, M_ZERO, M_ONE = _lines(True)
V_DECODE, V_ENCODE, V_ZERO, V_ONE = _lines(False)


@compiled
def _follow(x, lines):
    """At `x`, the line that starts last, up to its end."""
    starts, slopes, offsets, ends = lines
    slope, offset, end = slopes[0], offsets[0], ends[0]
    for i in range(1, 7):
        later = x >= starts[i]
        slope = slopes[i] if later else slope
        offset = offsets[i] if later else offset
        end = ends[i] if later else end
    return min(x * slope + offset, end)


@compiled
def _decode_moments(m_codes, v_codes, m_absmax, v_absmax, m, v):
    for i in range(len(m_codes)):
        code = F(m_codes[i]) - F(127)
        rank = abs(code) - F(1)
        size = _follow(rank, M_DECODE)
        size = F(1) if rank > F(126.5) else size
        size = F(0) if rank < F(0) else size
        m[i] = m_absmax * (-size if code < F(0) else size)
    for i in range(len(v_codes)):
        rank = F(v_codes[i]) - F(1)
        size = _follow(rank, V_DECODE)
        size = F(1) if rank > F(253.5) else size
        v[i] = v_absmax * (F(0) if rank < F(0) else size)


@compiled
def _encode_moments(m, v, m_absmax, v_absmax, m_codes, v_codes):
    m_inverse = F(1) / m_absmax if m_absmax > F(0) else F(0)
    v_inverse = F(1) / v_absmax if v_absmax > F(0) else F(0)
    for i in range(len(m_codes)):
        x = m[i] * m_inverse
        rank = _follow(abs(x), M_ENCODE)
        rank = I32(F(127) if x > M_ONE else rank)
        code = I32(128) + rank if x > F(0) else I32(126) - rank
        m_codes[i] = I32(127) if abs(x) <= M_ZERO else code
    for i in range(len(v_codes)):
        x = v[i] * v_inverse
        rank = max(_follow(x, V_ENCODE), F(0))
        rank = I32(F(254) if x > V_ONE else rank)
        v_codes[i] = I32(1) + rank if v[i] > F(0) else I32(0)


@compiled
def _step_moments(w, g, m, v, numbers):
    beta1, beta2, rest1, rest2, step_size, correction, eps, decay = numbers
    for i in range(len(w)):
        first = beta1 * m[i] + rest1 * g[i]
        second = beta2 * v[i] + rest2 * g[i] * g[i]
        m[i], v[i] = first, second
        w[i] = w[i] * decay - step_size * first / (np.sqrt(second) * correction + eps)


@compiled
def _step_blocks(w, g, m_codes, m_absmax, v_codes, v_absmax, numbers):
    """One step of all blocks of flat float32 `w`."""
    m, v = np.empty(BLOCK, F), np.empty(BLOCK, F)
    m_bits, v_bits, largest = m.view(I32), v.view(I32), np.empty(2, I32)
    for block in range(len(m_absmax)):
        items = slice(block * BLOCK, min((block + 1) * BLOCK, len(w)))
        count = items.stop - items.start
        _decode_moments(m_codes[items], v_codes[items], m_absmax[block], v_absmax[block], m, v)
        _step_moments(w[items], g[items], m, v, numbers)
        m_top, v_top = I32(0), I32(0)
        for i in range(count):  # as integers: numbers that are not negative compare like their bits
            m_top, v_top = max(m_top, m_bits[i] & I32(0x7FFFFFFF)), max(v_top, v_bits[i])
        largest[0], largest[1] = m_top, v_top
        m_absmax[block], v_absmax[block] = largest.view(F)[0], largest.view(F)[1]
        _encode_moments(m, v, m_absmax[block], v_absmax[block], m_codes[items], v_codes[items])


def _numbers(lr, betas, eps, weight_decay, step):
    """beta1, beta2, 1 - beta1, 1 - beta2, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), eps, 1 - lr * weight_decay."""
    beta1, beta2 = betas
    corrected = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    return [beta1, beta2, 1 - beta1, 1 - beta2, *corrected, eps, 1 - lr * weight_decay]


def adam8bit_step(
    weight: Tensor,
    gradient: Tensor,
    m_codes: Tensor,
    m_absmax: Tensor,
    v_codes: Tensor,
    v_absmax: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW in place: `weight` and all state.

    `weight` and `gradient` have one shape, any floating dtype; `m_codes` and `v_codes` uint8 of that shape and `m_absmax`
    and `v_absmax` float32 `[ceil(numel / 256)]` come from `zero_state`. All but the gradient are contiguous. `step` counts
    from 1. The arithmetic is torch's AdamW in float32 (decoupled weight decay), with moments rounded after their use.
    Raises ValueError when shapes or dtypes disagree."""
    blocks = -(-weight.numel() // BLOCK)
    check(gradient.shape == weight.shape, f"gradient {tuple(gradient.shape)} of a weight {tuple(weight.shape)}")
    for codes, absmax in ((m_codes, m_absmax), (v_codes, v_absmax)):
        check(codes.shape == weight.shape and codes.dtype == torch.uint8, "codes must be uint8 of the weight's shape")
        check(absmax.shape == (blocks,) and absmax.dtype == torch.float32, f"absmax must be float32 [{blocks}]")
        check(codes.is_contiguous() and absmax.is_contiguous(), "codes and absmax must be contiguous")
    check(weight.is_contiguous(), "weight must be contiguous")
    check(step >= 1, f"step {step}: steps count from 1")
    numbers = _numbers(lr, betas, eps, weight_decay, step)
    weight, kind = weight.detach(), backend(weight)
    state = m_codes, m_absmax, v_codes, v_absmax
    if kind == "triton":
        if blocks:
            tensor = torch.tensor(numbers, dtype=torch.float32).to(weight.device, non_blocking=True)
            _adam8bit_kernel[(blocks,)](
                weight,
                gradient.detach().contiguous(),
                *state,
                *_tables(weight.device),
                tensor,
                weight.numel(),
                BLOCK=BLOCK,
                num_warps=2,
            )
        return
    if kind == "reference" or weight.device.type != "cpu":
        reference_adam8bit_step(weight, gradient.detach(), *state, lr, betas, eps, weight_decay, step)
        return
    numbers = tuple(np.float32(number) for number in numbers)
    flat, slope = weight.view(-1), gradient.detach().reshape(-1)
    codes = m_codes.view(-1), v_codes.view(-1)

    def work(first, last):
        step_blocks = _PANEL if weight.dtype != torch.float32 else last - first
        for begin in range(first, last, max(1, step_blocks)):
            end = min(last, begin + step_blocks)
            part, items = slice(begin, end), slice(begin * BLOCK, min(flat.numel(), end * BLOCK))
            values = flat[items].float()
            _step_blocks(
                values.numpy(),
                array(slope[items], torch.float32, 1),
                codes[0][items].numpy(),
                m_absmax[part].numpy(),
                codes[1][items].numpy(),
                v_absmax[part].numpy(),
                numbers,
            )
            if weight.dtype != torch.float32:
                flat[items] = values

    over_rows(work, blocks, _FEWEST)

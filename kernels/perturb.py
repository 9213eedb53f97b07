"""Normal numbers that a counter makes, and steps along them: zeroth-order training needs no stored direction (MeZO,
arXiv:2305.17333).

Number n of a seed is a function of (seed, n) alone: Philox 4x32-10 (Salmon et al., SC 2011) with the seed as key and n
// 4 as counter gives four words, Box-Muller makes four normal numbers of them. It does not matter how a range is cut, nor
how many threads work on it.

Logarithm, sine and cosine are polynomials (those of Cephes) in float32 operations that IEEE 754 rounds, none of them
fused: the reference, the CPU's loops and Triton's interpreter agree bit for bit, and so does any GPU whose compiler is
told not to fuse, as it is here. Numbers lie within +-5.77, the radius of the smallest uniform number, 2^-24.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from tersor.kernels.dispatch import backend, check, tl, triton
from tersor.kernels.loops import over_rows
from torch import Tensor

PANEL = 1 << 16  # numbers a thread works on at a time; a multiple of 4
BLOCK = 64  # counters the CPU turns into numbers together, all in registers and the first cache
QUARTER = math.pi / 2 * 2.0**-24  # radians of 2^-26 turns

# ---------------------------------------------------------------- the definition


def reference_philox(counter, key):
    """Philox 4x32-10 of `counter` (four arrays uint32) under `key` (two words): four arrays uint32."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def _reference_pair(a, b):
    """Two normal numbers of two words: radius sqrt(-2 log((a / 256 + 1) / 2^24)), angle b / 2^32 turns."""
    f = np.float32
    bits = (((a >> 8) + 1).astype(f) * f(2.0**-24)).view(np.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of a mantissa in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).view(f) - f(1)
    p = f(7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1):
        p = p * m + f(c)
    for c in (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):
        p = p * m + f(c)
    exponent, square = exponent.astype(f), m * m
    p = p * m * square + exponent * f(-2.12194440e-4) - f(0.5) * square
    radius = np.sqrt(f(-2) * (m + p + exponent * f(0.693359375)))
    quadrant = (b + np.uint32(1 << 29)) >> 30
    t = ((b - (quadrant << 30)).view(np.int32) >> 6).astype(f) * f(QUARTER)  # within 1/8 turn
    q = t * t
    sine = ((f(-1.9515295891e-4) * q + f(8.3321608736e-3)) * q + f(-1.6666654611e-1)) * q * t + t
    cosine = (f(2.443315711809948e-5) * q + f(-1.388731625493765e-3)) * q + f(4.166664568298827e-2)
    cosine = cosine * (q * q) - f(0.5) * q + f(1)
    odd = quadrant & 1 == 1
    x, y = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    return radius * np.where((quadrant + 1) & 2, -x, x), radius * np.where(quadrant & 2, -y, y)


def reference_normal(seed, offset, count):
    """The definition: float32 `[count]`, numbers `offset` to `offset + count` of `seed`, as a numpy array."""
    counter = np.arange(offset // 4, (offset + count + 3) // 4, dtype=np.uint64)
    words = counter & 0xFFFFFFFF, counter >> 32, np.zeros_like(counter), np.zeros_like(counter)
    a, b, c, d = reference_philox(words, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack([*_reference_pair(a, b), *_reference_pair(c, d)], 1).reshape(-1)[offset % 4 :][:count]


def reference_perturb(source, seed, offset, scale, low=None, high=None):
    """The definition of what `perturb_` writes."""
    z = torch.from_numpy(reference_normal(seed, offset, source.numel())).view(source.shape).to(source.device)
    values = source.float()
    size = values.abs()
    chosen = (size > (-1.0 if low is None else low)) & (size <= (math.inf if high is None else high))
    return torch.where(chosen, values + torch.tensor(scale, dtype=torch.float32) * z, values).to(source.dtype)


# ---------------------------------------------------------------- Triton


@triton.jit
def _pair(a, b):
    a, b = a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)
    bits = (((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = m * 7.0376836292e-2 + -1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m + -1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m + -1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m + -2.4999993993e-1
    p = p * m + 3.3333331174e-1
    square = m * m
    e = exponent.to(tl.float32)
    p = p * m * square + e * -2.12194440e-4 - square * 0.5
    radius = tl.sqrt_rn((m + p + e * 0.693359375) * -2.0)
    quadrant = (b + 536870912) >> 30
    t = ((b - (quadrant << 30)).to(tl.int32, bitcast=True) >> 6).to(tl.float32) * 9.362675707309822e-08
    q = t * t
    sine = ((q * -1.9515295891e-4 + 8.3321608736e-3) * q + -1.6666654611e-1) * q * t + t
    cosine = (q * 2.443315711809948e-5 + -1.388731625493765e-3) * q + 4.166664568298827e-2
    cosine = cosine * (q * q) - q * 0.5 + 1.0
    odd = (quadrant & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) == 2, -x, x)
    return radius * x, radius * tl.where((quadrant & 2) == 2, -y, y)


@triton.jit(do_not_specialize=["seed", "first", "lead", "count"])
def _perturb_kernel(
    out_ptr, source_ptr, seed, first, lead, count, scale, low, high, FILL: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the numbers of `BLOCK` counters from `first` on; `lead` numbers of the first one come before the range.
    FILL: numbers alone are written, `scale` times."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, item + first)
    z0, z1 = _pair(a, b)
    z2, z3 = _pair(c, d)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * BLOCK]) * scale
    at = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - lead
    inside = (at >= 0) & (at < count)
    if not FILL:
        w = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
        chosen = (tl.abs(w) > low) & (tl.abs(w) <= high)
        z = tl.where(chosen, w + z, w)
    tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(out, source, seed, offset, scale, low, high):
    count, fill = out.numel(), source is None
    if count == 0:
        return
    block = 256
    grid = (triton.cdiv(offset % 4 + count, 4 * block),)
    _perturb_kernel[grid](
        out,
        out if fill else source,
        seed,
        offset // 4,
        offset % 4,
        count,
        float(scale),
        float(low),
        float(high),
        FILL=fill,
        BLOCK=block,
        enable_fp_fusion=False,
    )


# ---------------------------------------------------------------- the CPU's loops


def _exact(function):
    """Compile a loop without any freedom in its arithmetic; the result is kept on disk where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


F, U32, U64, I32 = np.float32, np.uint32, np.uint64, np.int32
QUARTER32 = np.float32(QUARTER)


@_exact
def _words(counter, key0, key1, words):
    """`words` uint32 `[4, BLOCK]` of `BLOCK` counters."""
    low = U64(0xFFFFFFFF)
    for i in range(BLOCK):
        n = U64(counter) + U64(i)
        c0, c1, c2, c3 = n & low, n >> U64(32), U64(0), U64(0)
        k0, k1 = U64(key0), U64(key1)
        for _ in range(10):
            first, second = c0 * U64(0xD2511F53), c2 * U64(0xCD9E8D57)
            c0, c1 = (second >> U64(32)) ^ c1 ^ k0, second & low
            c2, c3 = (first >> U64(32)) ^ c3 ^ k1, first & low
            k0, k1 = (k0 + U64(0x9E3779B9)) & low, (k1 + U64(0xBB67AE85)) & low
        words[0, i], words[1, i], words[2, i], words[3, i] = U32(c0), U32(c1), U32(c2), U32(c3)


@_exact
def _pairs(a, b, x, bits, exponent, z0, z1):
    """`_reference_pair` of `BLOCK` words. `x` float32 and `bits` int32 are views of the same memory; each loop uses one of
    them only, without which no loop would become vector code."""
    for i in range(BLOCK):
        x[i] = F((a[i] >> U32(8)) + U32(1)) * F(2.0**-24)
    for i in range(BLOCK):
        e = (bits[i] - I32(0x3F3504F3)) >> I32(23)
        bits[i] -= e << I32(23)
        exponent[i] = e
    for i in range(BLOCK):
        m, e = x[i] - F(1), F(exponent[i])
        p = F(7.0376836292e-2) * m + F(-1.1514610310e-1)
        p = p * m + F(1.1676998740e-1)
        p = p * m + F(-1.2420140846e-1)
        p = p * m + F(1.4249322787e-1)
        p = p * m + F(-1.6668057665e-1)
        p = p * m + F(2.0000714765e-1)
        p = p * m + F(-2.4999993993e-1)
        p = p * m + F(3.3333331174e-1)
        square = m * m
        p = p * m * square + e * F(-2.12194440e-4) - F(0.5) * square
        x[i] = np.sqrt(F(-2) * (m + p + e * F(0.693359375)))
    for i in range(BLOCK):
        quadrant = (b[i] + U32(1 << 29)) >> U32(30)
        t = F(I32(b[i] - (quadrant << U32(30))) >> I32(6)) * QUARTER32
        q = t * t
        sine = ((F(-1.9515295891e-4) * q + F(8.3321608736e-3)) * q + F(-1.6666654611e-1)) * q * t + t
        cosine = (F(2.443315711809948e-5) * q + F(-1.388731625493765e-3)) * q + F(4.166664568298827e-2)
        cosine = cosine * (q * q) - F(0.5) * q + F(1)
        odd = (quadrant & U32(1)) != 0
        u, v = sine if odd else cosine, cosine if odd else sine
        z0[i] = x[i] * (-u if ((quadrant + U32(1)) & U32(2)) != 0 else u)
        z1[i] = x[i] * (-v if (quadrant & U32(2)) != 0 else v)


@_exact
def _numbers(seed, offset, out):
    """Fill float32 `out` with numbers of `seed` from `offset` on."""
    words, z = np.empty((4, BLOCK), np.uint32), np.empty((4, BLOCK), np.float32)
    x, exponent = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    bits = x.view(np.int32)
    lead = offset % 4
    for start in range(-lead, len(out), 4 * BLOCK):
        _words((offset + start) // 4, seed & 0xFFFFFFFF, seed >> 32, words)
        _pairs(words[0], words[1], x, bits, exponent, z[0], z[1])
        _pairs(words[2], words[3], x, bits, exponent, z[2], z[3])
        if start >= 0 and start + 4 * BLOCK <= len(out):
            for i in range(BLOCK):
                for j in range(4):
                    out[start + 4 * i + j] = z[j, i]
        else:
            for i in range(max(0, -start), min(4 * BLOCK, len(out) - start)):
                out[start + i] = z[i % 4, i // 4]


@_exact
def _add(out, source, z, scale, low, high):
    for i in range(len(out)):
        w = source[i]
        size = abs(w)
        out[i] = w + scale * z[i] if (size > low) & (size <= high) else w


def _over_panels(count, work):
    """Call `work(first, last)` on panels of 0..count, on all of torch's threads."""

    def panels(begin, end):
        for panel in range(begin, end):
            work(panel * PANEL, min(count, (panel + 1) * PANEL))

    over_rows(panels, -(-count // PANEL), 1)


# ---------------------------------------------------------------- public


def _check_range(seed, offset):
    check(0 <= seed < 1 << 63, f"seed {seed} is not within 0..2^63-1")
    check(0 <= offset < 1 << 62, f"offset {offset} is not within 0..2^62-1")


def normal(seed: int, offset: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers `offset` to `offset + count` of `seed`, float32 `[count]`; the same ones wherever and however they are
    made."""
    _check_range(seed, offset)
    out = torch.empty(count, device=device)
    kind = backend(out)
    if kind == "triton":
        _launch(out, None, seed, offset, 1.0, 0.0, 0.0)
    elif kind == "reference" or out.device.type != "cpu":
        out.copy_(torch.from_numpy(reference_normal(seed, offset, count)))
    else:
        values = out.numpy()
        _over_panels(count, lambda first, last: _numbers(seed, offset + first, values[first:last]))
    return out


def perturb_(
    weight: Tensor,
    seed: int,
    offset: int,
    scale: float,
    low: float | None = None,
    high: float | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """`weight <- source + scale * z` in place, element i with number `offset + i` of `seed`; returns `weight`.

    `weight` is contiguous, of any shape, float32, bfloat16 or float16; the sum is made in float32 and rounded once. Only
    elements with `low < |w| <= high` move, the others become the source's: `low=0` leaves exact zeros, `high` is the
    threshold of Sparse MeZO (arXiv:2402.15751). `source` (default: `weight` itself) is what is added to and what bounds
    are compared with: `weight` may be a scratch copy, so that +e and -e start from the same numbers, move the same
    elements, and the source never has to be restored. Raises ValueError for other layouts and dtypes."""
    _check_range(seed, offset)
    source = weight if source is None else source
    check(weight.dtype in (torch.float32, torch.bfloat16, torch.float16), f"cannot perturb {weight.dtype}")
    check(weight.is_contiguous() and source.is_contiguous(), "weight and source must be contiguous")
    check(source.shape == weight.shape and source.dtype == weight.dtype, "weight and source differ in shape or dtype")
    with torch.no_grad():
        kind = backend(weight)
        low, high = -1.0 if low is None else low, math.inf if high is None else high
        if kind == "triton":
            _launch(weight, source, seed, offset, scale, low, high)
            return weight
        if kind == "reference" or weight.device.type != "cpu":
            return weight.copy_(reference_perturb(source, seed, offset, scale, low, high))
        out, start = weight.detach().view(-1), source.detach().view(-1)
        scale, low, high = F(scale), F(low), F(high)

        def work(first, last):
            z = np.empty(last - first, np.float32)
            _numbers(seed, offset + first, z)
            if weight.dtype == torch.float32:
                _add(out[first:last].numpy(), start[first:last].numpy(), z, scale, low, high)
            else:
                values = start[first:last].float()
                _add(values.numpy(), values.numpy(), z, scale, low, high)
                out[first:last] = values

        _over_panels(weight.numel(), work)
    return weight

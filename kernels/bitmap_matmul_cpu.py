"""The CPU path of `bitmap_matmul` and `semi_structured_matmul`: rows of packed values become rows of float32, 16 columns
an instruction.

A row is spread in a buffer that stays in the nearest cache, so a product with few tokens reads the packed bytes only. At 80 %
zeros and on one AVX-512 core that is about the speed of the dense float32 product of torch for any number of tokens (5.4
against 5.9 ms for one token and 4096 x 4096, 18.8 against 22.8 ms for 16), from a seventh of its bytes. LLVM's expanding load
is one instruction there; elsewhere a loop over the set bits takes its place, five times as slow."""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic
from tersor.kernels.dispatch import check
from tersor.kernels.loops import array, compiled, over_rows
from torch import Tensor

FEW = (
    4  # up to this many tokens rows are multiplied where they are spread; more are left to the matrix product of torch
)
PANEL = 1 << 20  # weights that are spread before such a product
WIDE = bool(binding.get_host_cpu_features().get("avx512f", False))


@intrinsic
def _expand_16(typing, source, at, mask, out, to):
    """out[to : to + 16] = the next of source[at:] where a bit of `mask` (uint16) is set, 0 elsewhere; float32 arrays."""

    def generate(context, builder, signature, arguments):
        source, at, mask, out, to = arguments
        number, bits = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(1), 16)
        read = context.make_array(signature.args[0])(context, builder, source).data
        written = context.make_array(signature.args[3])(context, builder, out).data
        kind = ir.FunctionType(number, [ir.FloatType().as_pointer(), bits, number])
        load = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.expandload.v16f32")
        zero = ir.Constant(number, None)
        spread = builder.call(load, [builder.gep(read, [at]), builder.bitcast(mask, bits), zero])
        store = builder.store(spread, builder.bitcast(builder.gep(written, [to]), number.as_pointer()))
        store.align = 4
        return context.get_dummy_value()

    return numba.void(source, numba.intp, numba.uint16, out, numba.intp), generate


@intrinsic
def _ones(typing, word):
    """Number of set bits of a uint16."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.ctpop(arguments[0]), context.get_value_type(numba.intp))

    return numba.intp(numba.uint16), generate


@intrinsic
def _lowest(typing, word):
    """Position of the lowest set bit of a uint16 that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.zext(
            builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), context.get_value_type(numba.intp)
        )

    return numba.intp(numba.uint16), generate


@compiled
def _word(mask, w):
    return np.uint16(mask[2 * w]) | np.uint16(np.uint16(mask[2 * w + 1]) << 8)


@compiled
def _spread(values, held, first, last, shift, bits, table, mask, wide, buffer, out):
    """One row, of values `first..last`: `out` float32, as long as whole words of `mask` need. False when that is not as
    many as `mask` has bits, or past the end.

    `values` unsigned: raw bits of a float, `shift` to the left; or, with a `table`, an index into it, `bits` wide if not
    0."""
    count = last - first
    if first < 0 or last > held or not 0 <= count <= len(buffer):
        return False
    if bits:
        for i in range(count):
            place = (first + i) * bits
            buffer[i] = table[(values[place >> 3] >> (place & 7)) & ((1 << bits) - 1)]
    elif len(table):
        for i in range(count):
            buffer[i] = table[values[first + i]]
    else:
        raw = buffer.view(np.uint32)
        for i in range(count):
            raw[i] = np.uint32(values[first + i]) << np.uint32(shift)
    at, words = 0, len(mask) // 2
    if wide:
        for w in range(words):
            word = _word(mask, w)
            _expand_16(buffer, at, word, out, 16 * w)
            at += _ones(word)
        if len(mask) % 2:
            _expand_16(buffer, at, np.uint16(mask[-1]), out, 16 * words)
            at += _ones(np.uint16(mask[-1]))
    else:
        out[:] = 0
        for b in range(len(mask)):
            byte = np.uint16(mask[b])
            while byte:
                out[8 * b + _lowest(byte)] = buffer[at]
                at += 1
                byte = np.uint16(byte & np.uint16(byte - np.uint16(1)))
    return at == count


@compiled
def _expand_rows(values, held, starts, shift, bits, table, bitmask, scale, size, wide, out):
    """Rows into `out` `[rows, 16 * words]`, times `scale` `[rows, G]` of `size` columns where it is not empty."""
    buffer = np.empty(out.shape[1], np.float32)
    for n in range(len(bitmask)):
        if not _spread(values, held, starts[n], starts[n + 1], shift, bits, table, bitmask[n], wide, buffer, out[n]):
            return False
        for g in range(scale.shape[1]):
            factor, part = scale[n, g], out[n, g * size : (g + 1) * size]
            for k in range(size):
                part[k] *= factor
    return True


@compiled
def _multiply_rows(values, held, starts, shift, bits, table, bitmask, scale, size, wide, x, out):
    """`out` `[M, rows]` of `x` `[M, K]`; as `_expand_rows`, but a row never leaves the cache."""
    width = (bitmask.shape[1] + 1) // 2 * 16
    buffer, row = np.empty(width, np.float32), np.empty(width, np.float32)
    for n in range(len(bitmask)):
        if not _spread(values, held, starts[n], starts[n + 1], shift, bits, table, bitmask[n], wide, buffer, row):
            return False
        for m in range(x.shape[0]):
            total = np.float32(0)
            for first in range(0, x.shape[1], size):
                w, a, part = row[first : first + size], x[m, first : first + size], np.float32(0)
                for k in range(size):
                    part += w[k] * a[k]
                total += part * scale[n, first // size] if scale.shape[1] else part
            out[m, n] = total
    return True


@functools.cache
def _table(dtype: torch.dtype) -> np.ndarray:
    """Float32 value of every code of a dtype of 8 or 16 bits."""
    codes = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    return codes.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).float().numpy()


def _rows(values, starts, bitmask, scale, bits, columns):
    """What both loops take first, up to the size of a group."""
    table, shift = np.empty(0, np.float32), 0
    if bits is not None:
        table = np.arange(1 << bits, dtype=np.float32)
        table[1 << bits - 1 :] -= 1 << bits
    elif values.dtype == torch.bfloat16:
        shift = 16
    elif values.dtype != torch.float32:
        table = _table(values.dtype)
    raw = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[values.dtype.itemsize]
    held = values.numel() * 8 // bits if bits else values.numel()
    scale = torch.empty(len(bitmask), 0) if scale is None else scale
    stored, bitmask = values.contiguous().view(raw).numpy(), array(bitmask, torch.uint8, 2)
    starts = np.append(array(starts, torch.int64, 1), 0)
    starts[-1] = starts[-2] + np.unpackbits(bitmask[-1]).sum() if len(bitmask) else 0
    scale = array(scale, torch.float32, 2)
    return stored, held, bits or 0, shift, table, starts, bitmask, scale, columns // max(scale.shape[1], 1)


def _run(loop, rows, first, last, *written):
    """`loop` over rows `first..last` on all threads; `written` takes a run of rows, counted from `first`."""
    stored, held, bits, shift, table, starts, bitmask, scale, size = rows
    fits = []

    def work(begin, end):
        a, b = first + begin, first + end
        own = (starts[a : b + 1], shift, bits, table, bitmask[a:b], scale[a:b], size, WIDE)
        fits.append(loop(stored, held, *own, *(part(begin, end) for part in written)))

    over_rows(work, last - first)
    check(all(fits), "values, offsets and bitmask do not belong together")


def expand_rows(values, starts, bitmask, columns: int, scale, bits, dtype: torch.dtype) -> Tensor:
    """Dense weights `[N, K]` in `dtype`. `values` 1-D, `starts` int64 `[N]`, `bitmask` uint8 `[N, ceil(K / 8)]`, `scale`
    `[N, G]` or None; `bits` as in `bitmap_matmul`. Raises ValueError when values would be read past their end."""
    rows = _rows(values, starts, bitmask, scale, bits, columns)
    out = torch.empty(len(bitmask), columns, dtype=dtype)
    for first, last, panel in _panels(rows, len(bitmask), columns):
        out[first:last] = panel
    return out


def _panels(rows, count, columns):
    """(first, last, float32 `[last - first, K]`) for all rows; a panel lives until the next."""
    height = max(64, PANEL // max(columns, 1))
    panel = torch.empty(min(height, count), -(-columns // 16) * 16)
    whole = panel.numpy()
    for first in range(0, count, height):
        last = min(first + height, count)
        _run(_expand_rows, rows, first, last, lambda begin, end: whole[begin:end])
        yield first, last, panel[: last - first, :columns]


def multiply_rows(x, values, starts, bitmask, scale, bits) -> Tensor:
    """`x @ W^T` `[M, N]` in the dtype of `x` `[M, K]`; the rest as in `expand_rows`."""
    tokens, columns = x.shape
    rows = _rows(values, starts, bitmask, scale, bits, columns)
    if tokens <= FEW:
        out = np.empty((tokens, len(bitmask)), np.float32)
        dense = array(x, torch.float32, 2)
        _run(_multiply_rows, rows, 0, len(bitmask), lambda *_: dense, lambda begin, end: out[:, begin:end])
        return torch.from_numpy(out).to(x.dtype)
    result = torch.empty(len(bitmask), tokens)
    transposed = x.float().t()
    for first, last, panel in _panels(rows, len(bitmask), columns):
        torch.mm(panel, transposed, out=result[first:last])
    return result.t().to(x.dtype).contiguous()

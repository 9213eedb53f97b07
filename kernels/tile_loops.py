"""CPU loops of `tile_matmul` and `active_matmul` for few tokens, where reading the weights once is the whole cost."""

from __future__ import annotations

import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from tersor.kernels.loops import compiled, over_rows
from torch import Tensor

STRIP = 1024  # outputs that are summed at a time: they stay in the first cache


def _wide(value):
    """Float32 of a weight as `_stored` hands it over; inside compiled loops only."""
    raise NotImplementedError


@register_jitable
def _wide_bfloat16(value):
    return np.uint32(np.uint32(value) << 16).view(np.float32)


@register_jitable
def _wide_float16(value):
    bits = np.uint32(value)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << 13)
    # 2^112 makes up for the exponents' bias, of subnormals too; infinity and NaN take the highest exponent.
    finite = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    magnitude = np.uint32(magnitude | 0x7F800000) if magnitude >= np.uint32(0x0F800000) else finite
    return np.uint32(magnitude | np.uint32((bits & np.uint32(0x8000)) << 16)).view(np.float32)


@overload(_wide, inline="always")
def _wide_of(value):
    if value == types.float32:
        return lambda value: value
    return (lambda value: _wide_bfloat16(value)) if value == types.uint16 else (lambda value: _wide_float16(value))


def _stored(weight: Tensor):
    """A numpy view whose dtype tells the loops what the bits are: float32, uint16 (bfloat16), int16 (float16)."""
    integer = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(weight.dtype)
    return weight.contiguous().view(weight.dtype if integer is None else integer).numpy()


@compiled
def _add_vectors(x, values, index, start, y, first, last):
    """Fibres `first..last`, row blocks of R x 1 tiles: `y[m, fibre * R + r] += x[m, index] * values[., r]`; four tiles at
    a time, so that sums move less."""
    height = values.shape[1]
    for fibre in range(first, last):
        begin, end = start[fibre], start[fibre + 1]
        whole = begin + (end - begin) // 4 * 4
        for t in range(begin, whole, 4):
            i, j, k, l = index[t], index[t + 1], index[t + 2], index[t + 3]  # noqa: E741
            a, b, c, d = values[t], values[t + 1], values[t + 2], values[t + 3]
            for m in range(len(x)):
                p, q, r, s, sums = x[m, i], x[m, j], x[m, k], x[m, l], y[m, fibre * height : fibre * height + height]
                for n in range(height):
                    sums[n] += p * _wide(a[n]) + q * _wide(b[n]) + r * _wide(c[n]) + s * _wide(d[n])
        for t in range(whole, end):
            a = values[t]
            for m in range(len(x)):
                p, sums = x[m, index[t]], y[m, fibre * height : fibre * height + height]
                for n in range(height):
                    sums[n] += p * _wide(a[n])


@compiled
def _add_blocks(x, values, index, start, y, first, last):
    """Fibres `first..last`, row blocks of R x C tiles: `y[m, fibre * R + r] = sum of x[m, index * C + c] * values[., r,
    c]`, one sum per c until the end."""
    _, height, width = values.shape
    total = np.zeros((len(x), height, width), np.float32)
    for fibre in range(first, last):
        total[:] = 0
        for t in range(start[fibre], start[fibre + 1]):
            column = index[t] * width
            for m in range(len(x)):
                piece = x[m, column : column + width]
                for r in range(height):
                    tile, sums = values[t, r], total[m, r]
                    for c in range(width):
                        sums[c] += piece[c] * _wide(tile[c])
        for m in range(len(x)):
            for r in range(height):
                y[m, fibre * height + r] = total[m, r].sum()


@compiled
def _add_rows(x, values, start, order, block, y, first, last):
    """Rows `first..last` of W: `y[m, n] = sum over the row's tiles of x[m, block * C + c] * values[order, c]`."""
    width = values.shape[1]
    for n in range(first, last):
        for i in range(start[n], start[n + 1]):
            tile, column = values[order[i]], block[i] * width
            for m in range(len(x)):
                piece, total = x[m, column : column + width], np.float32(0)
                for c in range(width):
                    total += piece[c] * _wide(tile[c])
                y[m, n] += total


@compiled
def _add_active(x, weight, active, y, first, last):
    """Outputs `first..last` of y += x[:, active] @ weight[active]; four inputs at a time, so that sums move less."""
    whole = len(active) // 4 * 4
    for begin in range(first, last, STRIP):
        end = min(begin + STRIP, last)
        for a in range(0, whole, 4):
            i, j, k, l = active[a], active[a + 1], active[a + 2], active[a + 3]  # noqa: E741
            u, v, w, z = weight[i, begin:end], weight[j, begin:end], weight[k, begin:end], weight[l, begin:end]
            for m in range(len(x)):
                p, q, r, s, sums = x[m, i], x[m, j], x[m, k], x[m, l], y[m, begin:end]
                for n in range(end - begin):
                    sums[n] += p * _wide(u[n]) + q * _wide(v[n]) + r * _wide(w[n]) + s * _wide(z[n])
        for a in range(whole, len(active)):
            u = weight[active[a], begin:end]
            for m in range(len(x)):
                p, sums = x[m, active[a]], y[m, begin:end]
                for n in range(end - begin):
                    sums[n] += p * _wide(u[n])


def add_columns(x: Tensor, values: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """`[M, fibres * R]` float32 for tiles `[count, R, C]` in row blocks. `x` `[M, columns]` covers every tile."""
    fibres = len(start) - 1
    loop, values = (_add_vectors, values[:, :, 0]) if values.shape[2] == 1 else (_add_blocks, values)
    y = torch.zeros(len(x), fibres * values.shape[1])
    arrays = x.float().contiguous().numpy(), _stored(values), index.long().numpy(), start.long().numpy(), y.numpy()
    over_rows(lambda first, last: loop(*arrays, first, last), fibres, fewest=8)
    return y


def add_rows(x: Tensor, values: Tensor, start: Tensor, order: Tensor, block: Tensor) -> Tensor:
    """`[M, N]` float32 for tiles `[count, C]`, listed by row of W. `x` `[M, columns]` covers every tile."""
    y = torch.zeros(len(x), len(start) - 1)
    lists = (tensor.long().numpy() for tensor in (start, order, block))
    arrays = x.float().contiguous().numpy(), _stored(values), *lists, y.numpy()
    over_rows(lambda first, last: _add_rows(*arrays, first, last), y.shape[1])
    return y


def add_active(x: Tensor, weight_columns: Tensor, active: Tensor) -> Tensor:
    """`x[:, active] @ weight_columns[active]` in float32, `[M, N]`, with each active row read once."""
    y = torch.zeros(len(x), weight_columns.shape[1])
    arrays = x.float().contiguous().numpy(), _stored(weight_columns), active.long().numpy(), y.numpy()
    over_rows(lambda first, last: _add_active(*arrays, first, last), y.shape[1], fewest=STRIP)
    return y

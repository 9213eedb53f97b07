"""A hash of one tensor that can be taken box by box, in any order: what proves that shards reassemble to their source.

Element i of a tensor (its index in row-major order) adds `w(i) (x + 1)` to a sum modulo 2^64, x being its bits read as an
unsigned number; two sums with independent weights make the 128-bit hash. Sums do not care for order and add over disjoint
boxes, so that every holder of a box hashes what it has. All weights are odd, hence any single change of an element
changes both sums for certain, and what is more than a single change slips through with a chance of about 2^-62. The
`+ 1` makes zeros count: a box that is missing or doubled shows even where it holds nothing else. (Multilinear hashing;
Carter and Wegman, JCSS 1981, Lemire and Kaser, Comput. J. 2014. It finds damage, it does not resist forgery.)

`w(i) = high(i div 4096) * low(i mod 4096)`: the low part comes from a table that stays in the first cache, 32 bits wide so
that vector units multiply it in one instruction. Elements of 8 bytes count as two of 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np

BITS = 12
RUN = 1 << BITS
MASK = (1 << 64) - 1
SEED = 0x7465727365  # any; part of the format from now on
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}

Hash = tuple[int, int]
Box = tuple[tuple[int, int], ...]
ZERO: Hash = (0, 0)


def add(first: Hash, second: Hash) -> Hash:
    return (first[0] + second[0]) & MASK, (first[1] + second[1]) & MASK


def to_text(value: Hash) -> str:
    return f"{value[0]:016x}{value[1]:016x}"


def from_text(text: str) -> Hash:
    return int(text[:16], 16), int(text[16:], 16)


def of_box(data: np.ndarray, box: Box, shape: Sequence[int]) -> Hash:
    """Of the elements in `box` of a tensor of `shape`.

    data: unsigned integers with the extents of the box; its last dimension, or all those in which the box spans the
    tensor, contiguous where it should be fast.
    """
    if data.size == 0:
        return ZERO
    words = 2 if data.dtype.itemsize == 8 else 1
    whole = len(shape)  # first of the dimensions that lie in one run
    while whole > 0 and box[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    outer, inner = data.shape[: max(whole - 1, 0)], data.shape[max(whole - 1, 0) :]
    starts = np.zeros(outer, np.uint64)
    for dimension in range(len(shape)):
        stride = prod(shape[dimension + 1 :])
        start, stop = box[dimension]
        if dimension < len(outer):
            steps = np.arange(start, stop, dtype=np.uint64) * np.uint64(stride)
            starts += steps.reshape(-1, *[1] * (len(outer) - dimension - 1))
        else:
            starts += np.uint64(start * stride)
    width = prod(inner)
    flat, pitch = _lines(data, prod(outer), width)
    flat = flat.view(WORDS[data.dtype.itemsize])
    sums = _loop()(
        flat, pitch * words, starts.reshape(-1) * np.uint64(words), width * words, *_tables()
    )  # fmt: skip
    return int(sums[0]), int(sums[1])


def of_pieces(hashes: Sequence[Hash]) -> Hash:
    """Of a tensor from those of boxes that tile it."""
    return functools.reduce(add, hashes, ZERO)


def _lines(data: np.ndarray, lines: int, width: int) -> tuple[np.ndarray, int]:
    """`data` as a flat array and the distance of its `lines` in it, without a copy where strides allow."""
    if data.flags.c_contiguous:
        return data.reshape(-1), width
    size = data.itemsize
    inner = data.ndim
    while inner > 0 and data.strides[inner - 1] == prod(data.shape[inner:]) * size:
        inner -= 1
    regular = prod(data.shape[inner:]) >= width and inner > 0
    pitches = [stride for extent, stride in zip(data.shape[:inner], data.strides[:inner], strict=True) if extent > 1]
    extents = [extent for extent in data.shape[:inner] if extent > 1]
    regular &= all(wide == extent * step for (wide, step), extent in zip(pairwise(pitches), extents[1:], strict=True))
    if not regular or prod(data.shape[inner:]) != width or (pitches and pitches[-1] % size):
        return np.ascontiguousarray(data).reshape(-1), width
    pitch = pitches[-1] // size if pitches else width
    flat = np.lib.stride_tricks.as_strided(data, ((lines - 1) * pitch + width,), (size,))
    return flat, pitch


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """Odd 32-bit weights of the low part for both sums, and their prefix sums: what the `+ 1` adds to a run."""
    numbers = [_mix(SEED + index) for index in range(2 * RUN)]
    tables = [np.array([number >> 32 | 1 for number in numbers[part::2]], np.uint32) for part in range(2)]
    sums = [np.concatenate([np.zeros(1, np.uint64), np.cumsum(table, dtype=np.uint64)]) for table in tables]
    return tables[0], tables[1], sums[0], sums[1]


def _mix(value: int) -> int:
    """splitmix64."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def _weigh(flat, pitch, starts, width, low0, low1, sums0, sums1):
    """The two sums over lines of `width` words, `pitch` apart in `flat`; `starts` are the indices of their first."""
    total0 = total1 = np.uint64(0)
    one = np.uint64(1)
    for line in range(len(starts)):
        at, left, index = line * pitch, width, starts[line]
        while left > 0:
            inside = np.int64(index & np.uint64(4095))
            count = min(left, 4096 - inside)
            part0 = sums0[inside + count] - sums0[inside]
            part1 = sums1[inside + count] - sums1[inside]
            words, first, second = flat[at : at + count], low0[inside : inside + count], low1[inside : inside + count]
            for word in range(count):
                value = np.uint64(words[word])
                part0 += value * np.uint64(first[word])
                part1 += value * np.uint64(second[word])
            high = index >> np.uint64(12)
            for lane in range(2):
                mixed = (np.uint64(2) * high + np.uint64(lane) + one) * np.uint64(0x9E3779B97F4A7C15)
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                mixed = (mixed ^ (mixed >> np.uint64(31))) | one
                if lane:
                    total1 += mixed * part1
                else:
                    total0 += mixed * part0
            at, left, index = at + count, left - count, index + np.uint64(count)
    return total0, total1


@functools.cache
def _loop():
    """Compiled on first use, kept on disk where a folder can be written."""
    import numba

    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(_weigh)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(nogil=True, error_model="numpy")(_weigh)

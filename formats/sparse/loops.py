"""Compiled loops of the sparse formats, and the threads they run on.

All work on unsigned numpy arrays: elements `[rows, columns]` of uint8, uint16 or uint32. A *stream* holds values of `bits`
bits: an array of the elements' own dtype where bits fill it, else bytes in which value i takes bits [i bits, i bits + bits)
from bit 0 of byte 0 upwards. Random zeros would mispredict every second branch, so values are squeezed and spread without
one: each is written (or read) at a cursor, and the cursor moves on where there was a value. Such a cursor runs one place
past the end, hence the small buffers, and is unsigned: an index that may be negative costs a third of the speed. Loops
trust their arguments; sums, ranges and shapes are checked before they start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numba
import numpy as np
import torch

Result = TypeVar("Result")
RUN_ELEMENTS = 1 << 17  # fewest for a thread
BITS_SET = np.array([value.bit_count() for value in range(256)], np.uint8)
# Of the four bits of a 2:4 group: the two that are stored, nonzeros then the first zeros (0 where there are more than two).
STORED_PAIR = np.array([0b0011, 3, 3, 3, 5, 5, 6, 0, 9, 9, 10, 0, 12, 0, 0, 0], np.uint8)
# Of a stored pair: the columns of its two values.
FIRST_OF_PAIR = np.array([0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0], np.uint8)
SECOND_OF_PAIR = np.array([0, 0, 0, 1, 0, 2, 2, 0, 0, 3, 3, 0, 3, 0, 0, 0], np.uint8)


def compiled(function: Callable) -> Callable:
    """Compile a loop on first use; the result is kept on disk where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(nogil=True, error_model="numpy")(function)


def over_runs(
    work: Callable[[int, int], Result], count: int, elements: int, may_start: np.ndarray | None = None
) -> list[Result]:
    """`work(first, last)` on runs of `count` rows that have `elements` elements in all, one run for each thread of torch.

    may_start: bool `[count]`, the rows at which a run may begin, where not all of them start a byte.
    """
    threads = max(1, min(torch.get_num_threads(), count, elements // RUN_ELEMENTS))
    cuts = [0]
    for part in range(1, threads):
        cut = count * part // threads
        if may_start is not None:
            there = np.flatnonzero(may_start[cut:])
            cut = cut + int(there[0]) if len(there) else count
        if cuts[-1] < cut < count:
            cuts.append(cut)
    if len(cuts) == 1:
        return [work(0, count)]
    return list(_pool(threads).map(work, cuts, [*cuts[1:], count]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def period(bits: int) -> int:
    """Values after which a stream is back at a byte border, and at which loops may cut it."""
    return 8 if bits < 8 else 1


@compiled
def _masks(bits):
    """Of eight codes in a 64-bit word: one in each byte, two in each 16 bits, four in each 32 bits, eight in a row."""
    one = np.uint64(1)
    return (
        ((one << np.uint64(bits)) - one) * np.uint64(0x0101010101010101),
        ((one << np.uint64(2 * bits)) - one) * np.uint64(0x0001000100010001),
        ((one << np.uint64(4 * bits)) - one) * np.uint64(0x0000000100000001),
        (one << np.uint64(8 * bits)) - one,
    )


@compiled
def copy(target, source):
    """Source or target is a slice: with a start added to each index instead, no vector code comes of it."""
    for i in range(min(len(target), len(source))):
        target[i] = source[i]


@compiled
def pack(values, count, bits, stream, at):
    """values[:count] to a stream, from its value `at` on, a multiple of the period; the last byte is filled with zeros.

    The size of `values` in bytes is a multiple of 8. Eight codes, a byte each, are brought together in three steps.
    """
    if bits >= 8:
        copy(stream[at : at + count], values)
        return
    _, twos, fours, eights = _masks(bits)
    gap, low = np.uint64(8 - bits), np.uint64(255)
    words = values.view(np.uint64)
    start, whole = at // 8 * bits, count // 8
    for i in range(whole):
        byte = start + i * bits
        word = (words[i] | (words[i] >> gap)) & twos
        word = (word | (word >> (gap + gap))) & fours
        word = (word | (word >> np.uint64(4) * gap)) & eights
        stream[byte] = word & low
        stream[byte + 1] = (word >> np.uint64(8)) & low
        if bits > 2:
            stream[byte + 2] = (word >> np.uint64(16)) & low
        if bits > 3:
            stream[byte + 3] = (word >> np.uint64(24)) & low
    word = 0
    for k in range(count % 8):
        word |= np.int64(values[8 * whole + k]) << (bits * k)
    for k in range((count % 8 * bits + 7) // 8):
        stream[start + whole * bits + k] = (word >> (8 * k)) & 255


@compiled
def unpack(stream, at, count, bits, values):
    """Values [at, at + count) of a stream; returns the place of the first in `values`.

    `values` has room for 14 values more than `count`, and a size in bytes that is a multiple of 8.
    """
    if bits >= 8:
        copy(values, stream[at : at + count])
        return 0
    ones, twos, fours, _ = _masks(bits)
    gap = np.uint64(8 - bits)
    words = values.view(np.uint64)
    start, chunks = at // 8 * bits, (at + count + 7) // 8 - at // 8
    whole = min(chunks, (len(stream) - start) // bits)  # the last chunk of a stream may be short
    for i in range(whole):
        byte = start + i * bits
        word = np.uint64(stream[byte]) | np.uint64(stream[byte + 1]) << np.uint64(8)
        if bits > 2:
            word |= np.uint64(stream[byte + 2]) << np.uint64(16)
        if bits > 3:
            word |= np.uint64(stream[byte + 3]) << np.uint64(24)
        word = (word | (word << np.uint64(4) * gap)) & fours
        word = (word | (word << (gap + gap))) & twos
        words[i] = (word | (word << gap)) & ones
    for i in range(8 * whole, 8 * chunks):
        value = 0
        for bit in range(i * bits, i * bits + bits):
            if start + bit // 8 < len(stream):
                value |= ((np.int64(stream[start + bit // 8]) >> (bit % 8)) & 1) << (bit - i * bits)
        values[i] = value
    return at % 8


@compiled
def buffer_for(count, like):
    """Room for `count` values of the dtype of `like`, as `pack` and `unpack` need it."""
    return np.empty((count + 23) // 8 * 8, like.dtype)


@compiled
def _subtract(codes, zero, mask, out):
    for i in range(len(out)):
        out[i] = np.uint8(codes[i] - zero) & mask


@compiled
def codes_to_elements(stored, bits, zeros, out, first, last):
    """Bytes of stored rows to codes less their zero points (uint8 `[rows, G]` or `[1, G]`) modulo 2^bits."""
    columns, mask = out.shape[1], np.uint8((1 << bits) - 1)
    group = columns // zeros.shape[1]
    codes = buffer_for(columns, out)
    for r in range(first, last):
        unpack(stored[r], 0, columns, bits, codes)
        for g in range(zeros.shape[1]):
            cut = slice(g * group, g * group + group)
            _subtract(codes[cut], zeros[r % len(zeros), g], mask, out[r, cut])


@compiled
def elements_to_codes(elements, bits, zeros, out, first, last):
    """The inverse of `codes_to_elements`; bytes of `out` that hold no code are left alone."""
    columns, mask = elements.shape[1], np.uint8((1 << bits) - 1)
    group = columns // zeros.shape[1]
    codes = buffer_for(columns, elements)
    for r in range(first, last):
        for g in range(zeros.shape[1]):
            cut = slice(g * group, g * group + group)
            _subtract(elements[r, cut], np.uint8(256 - zeros[r % len(zeros), g]), mask, codes[cut])
        pack(codes, columns, bits, out[r], 0)


@compiled
def count_nonzero(elements, counts, first, last):
    """Nonzeros of each row."""
    for r in range(first, last):
        total = 0
        for c in range(elements.shape[1]):
            total += elements[r, c] != 0
        counts[r] = total


@compiled
def count_set_bits(bitmask, columns, counts, first, last):
    """Set bits of each row; returns the first row with one beyond the last column, or -1."""
    for r in range(first, last):
        total = 0
        for byte in range(bitmask.shape[1]):
            total += BITS_SET[bitmask[r, byte]]
        counts[r] = total
        if columns % 8 and bitmask[r, bitmask.shape[1] - 1] >> (columns % 8):
            return r
    return -1


@compiled
def write_bitmask(elements, bitmask, first, last):
    """Bit c of a row, from bit 0 of byte 0 upwards: whether its element c is not 0."""
    columns = elements.shape[1]
    for r in range(first, last):
        for byte in range(columns // 8):
            mask = 0
            for k in range(8):
                mask |= np.int64(elements[r, 8 * byte + k] != 0) << k
            bitmask[r, byte] = mask
        if columns % 8:
            mask = 0
            for k in range(columns % 8):
                mask |= np.int64(elements[r, columns - columns % 8 + k] != 0) << k
            bitmask[r, columns // 8] = mask


@compiled
def squeeze(elements, starts, bits, period, bitmask, stream, first, last):
    """Nonzeros of rows [first, last) to a stream, each row from value `starts[row]`, and their bitmask."""
    columns = elements.shape[1]
    buffer = buffer_for(columns + 8, elements)
    at, waiting = starts[first], 0  # values in the stream, values that wait for their byte to be full
    for r in range(first, last):
        place = np.uint64(waiting)
        for c in range(columns):
            x = elements[r, c]
            buffer[place] = x
            place += np.uint64(x != 0)
        held = np.int64(place)
        waiting = held % period
        pack(buffer, held - waiting, bits, stream, at)
        at += held - waiting
        for i in range(waiting):
            buffer[i] = buffer[held - waiting + i]
        write_bitmask(elements, bitmask, r, r + 1)
    pack(buffer, waiting, bits, stream, at)


@compiled
def spread(stream, bitmask, starts, bits, out, first, last):
    """The inverse of `squeeze`; starts `[rows + 1]`. Returns the first row with a stored value of 0, or -1."""
    columns = out.shape[1]
    buffer = buffer_for(columns + 1, out)
    one = np.uint64(1)
    for r in range(first, last):
        count = starts[r + 1] - starts[r]
        place = np.uint64(unpack(stream, starts[r], count, bits, buffer))
        buffer[place + np.uint64(count)] = 0
        for byte in range(columns // 8):
            mask = np.uint64(bitmask[r, byte])
            for k in range(8):
                there = (mask >> np.uint64(k)) & one
                out[r, 8 * byte + k] = buffer[place] * there
                place += there
        for c in range(columns - columns % 8, columns):
            there = (np.uint64(bitmask[r, c // 8]) >> np.uint64(c % 8)) & one
            out[r, c] = buffer[place] * there
            place += there
        nonzero = 0
        for c in range(columns):
            nonzero += out[r, c] != 0
        if nonzero != count:
            return r
    return -1


@compiled
def first_crowded(elements, first, last):
    """The first row of [first, last) that has a group of four with more than two nonzeros, or -1."""
    for r in range(first, last):
        most = 0
        for g in range(elements.shape[1] // 4):
            nonzero = np.int64(elements[r, 4 * g] != 0) + np.int64(elements[r, 4 * g + 1] != 0)
            nonzero += np.int64(elements[r, 4 * g + 2] != 0) + np.int64(elements[r, 4 * g + 3] != 0)
            most = max(most, nonzero)
        if most > 2:
            return r
    return -1


@compiled
def squeeze_pairs(elements, bits, bitmask, streams, first, last):
    """Two values of every group of four to a stream for each row, and their bitmask. Returns as `first_crowded`."""
    groups = elements.shape[1] // 4
    buffer = buffer_for(2 * groups, elements)
    for r in range(first, last):
        least = 255
        for g in range(groups):
            mask = 0
            for k in range(4):
                mask |= np.int64(elements[r, 4 * g + k] != 0) << k
            pair = STORED_PAIR[mask]
            least = min(least, pair)
            buffer[2 * g] = elements[r, 4 * g + FIRST_OF_PAIR[pair]]
            buffer[2 * g + 1] = elements[r, 4 * g + SECOND_OF_PAIR[pair]]
            if g % 2:
                bitmask[r, g // 2] |= pair << 4
            else:
                bitmask[r, g // 2] = pair
        if least == 0:
            return r
        pack(buffer, 2 * groups, bits, streams[r], 0)
    return -1


@compiled
def spread_pairs(streams, bitmask, bits, out, first, last):
    """The inverse of `squeeze_pairs`; returns the first row whose bitmask and values it cannot have written, or -1."""
    groups = out.shape[1] // 4
    buffer = buffer_for(2 * groups, out)
    for r in range(first, last):
        unpack(streams[r], 0, 2 * groups, bits, buffer)
        wrong = False
        for g in range(groups):
            pair = (bitmask[r, g // 2] >> (4 * (g % 2))) & 15
            low, high = buffer[2 * g], buffer[2 * g + 1]
            for k in range(4):
                out[r, 4 * g + k] = 0
            out[r, 4 * g + FIRST_OF_PAIR[pair]] = low
            out[r, 4 * g + SECOND_OF_PAIR[pair]] = high
            # Zeros are stored from column 0 on, so that a second one has only another before it.
            wrong |= (BITS_SET[pair] != 2) | ((high == 0) & (pair != 3)) | ((low == 0) & (FIRST_OF_PAIR[pair] != 0))
        if wrong:
            return r
    return -1

"""Compiled loops over tiles: micro-tiles and blocks, and Flash-LLM's Tiled-CSL. What `loops.py` says of its own holds here."""

from __future__ import annotations

import numpy as np
from tersor.formats.sparse.loops import buffer_for, compiled, copy, pack, unpack

PANEL_COLUMNS = 256  # of a row block, brought together in cache before its columns are read one by one
CSL_ROWS, CSL_COLUMNS, CSL_VECTOR, CSL_LANES = 128, 64, 4, 32


@compiled
def _merge(line, row):
    for c in range(len(row)):
        line[c] |= row[c]


@compiled
def _nonzeros(row):
    total = 0
    for c in range(len(row)):
        total += row[c] != 0
    return total


@compiled
def _all_zero(row):
    """As `_nonzeros`, for a row that ought to begin with a nonzero soon."""
    for c in range(len(row)):  # noqa: SIM110, which numba compiles to something slow
        if row[c] != 0:
            return False
    return True


@compiled
def _take(panel, start, width, values):
    """A tile of a panel, from column `start` on, to values row by row."""
    if width == 1:  # no loop within the loop
        for r in range(len(panel)):
            values[r] = panel[r, start]
        return
    for r in range(len(panel)):
        copy(values[r * width : r * width + width], panel[r, start : start + width])


@compiled
def _put(panel, start, width, values):
    """The inverse of `_take`."""
    if width == 1:
        for r in range(len(panel)):
            panel[r, start] = values[r]
        return
    for r in range(len(panel)):
        copy(panel[r, start : start + width], values[r * width : r * width + width])


@compiled
def count_tiles(elements, height, width, counts, first, last):
    """Tiles that are not all zero in each of the row blocks [first, last)."""
    rows, columns = elements.shape
    blocks = max(1, 4096 // width)
    line = np.empty(blocks * width, elements.dtype)
    for block in range(first, last):
        total = 0
        for left in range(0, columns, blocks * width):
            right = min(columns, left + blocks * width)
            line[:] = 0
            for r in range(block * height, min(rows, block * height + height)):
                _merge(line, elements[r, left:right])
            if width == 1:
                total += _nonzeros(line[: right - left])
            else:
                for start in range(0, right - left, width):
                    total += _nonzeros(line[start : start + width]) != 0
        counts[block] = total


@compiled
def count_strips(elements, width, counts, first, last):
    """Tiles of one row that are not all zero in each of the column blocks [first, last)."""
    rows, columns = elements.shape
    counts[first:last] = 0
    for r in range(rows):
        for block in range(first, last):
            left, right = block * width, min(columns, block * width + width)
            counts[block] += _nonzeros(elements[r, left:right]) != 0


@compiled
def gather_tiles(elements, height, width, starts, bits, index, stream, first, last):
    """Column-block numbers and values of the nonzero tiles of row blocks [first, last), from tile `starts[block]` on."""
    rows, columns = elements.shape
    blocks = max(1, PANEL_COLUMNS // width)
    panel = np.empty((height, blocks * width), elements.dtype)
    line = np.empty(blocks * width, elements.dtype)
    size = height * width
    codes = buffer_for(blocks * size, elements)  # of the tiles of a panel
    tile = packed = starts[first]
    for block in range(first, last):
        for left in range(0, columns, blocks * width):
            right = min(columns, left + blocks * width)
            line[:] = 0
            for r in range(height):
                row = block * height + r
                if row < rows:
                    copy(panel[r], elements[row, left:right])
                    _merge(line, elements[row, left:right])
                    panel[r, right - left :] = 0
                else:
                    panel[r] = 0
            for start in range(0, right - left, width):
                if line[start] == 0 and (width == 1 or _nonzeros(line[start : start + width]) == 0):
                    continue
                if bits < 8:
                    _take(panel, start, width, codes[(tile - packed) * size :])
                else:
                    _take(panel, start, width, stream[tile * size : tile * size + size])
                index[tile] = (left + start) // width
                tile += 1
            if bits < 8:
                pack(codes, (tile - packed) * size, bits, stream, packed * size)
            packed = tile


@compiled
def gather_strips(elements, width, starts, bits, index, stream, first, last):
    """Row numbers and values of the nonzero tiles `[1, width]` of column blocks [first, last), as `gather_tiles`."""
    rows, columns = elements.shape
    places = starts[first:last].copy()
    codes = buffer_for(width, elements)
    for r in range(rows):
        for block in range(first, last):
            left, right = block * width, min(columns, block * width + width)
            if _nonzeros(elements[r, left:right]) == 0:
                continue
            tile = places[block - first]
            values = codes[:width] if bits < 8 else stream[tile * width : tile * width + width]
            copy(values, elements[r, left:right])
            values[right - left :] = 0
            if bits < 8:
                pack(codes, width, bits, stream, tile * width)
            index[tile] = r
            places[block - first] = tile + 1


@compiled
def first_unordered(index, starts, extent):
    """The first tile whose index is not below `extent`, or not above the one before it in its fibre; or -1."""
    for fibre in range(len(starts) - 1):
        before = -1
        for tile in range(starts[fibre], starts[fibre + 1]):
            number = np.int64(index[tile])
            if number <= before or number >= extent:
                return tile
            before = number
    return -1


@compiled
def scatter_tiles(stream, index, starts, height, width, bits, out, first, last):
    """The inverse of `gather_tiles`; returns the first tile that it cannot have written, all zero or past an edge, or -1."""
    rows, columns = out.shape
    blocks = max(1, PANEL_COLUMNS // width)
    panel = np.empty((height, blocks * width), out.dtype)
    size = height * width
    codes = buffer_for(blocks * size, out)  # of the tiles of a panel
    for block in range(first, last):
        tile = starts[block]
        bottom = min(height, rows - block * height)
        for left in range(0, columns, blocks * width):
            right = min(columns, left + blocks * width)
            panel[:] = 0
            end = tile
            while end < starts[block + 1] and np.int64(index[end]) * width < right:
                end += 1
            values = stream[tile * size : end * size]
            if bits < 8:
                unpack(stream, tile * size, (end - tile) * size, bits, codes)
                values = codes
            for i in range(end - tile):
                start = np.int64(index[tile + i]) * width - left
                one = values[i * size : i * size + size]
                if _all_zero(one) or not _all_zero(one[bottom * width :]):
                    return tile + i
                _put(panel, start, width, one)
                if start + width > right - left:
                    for r in range(bottom):
                        if not _all_zero(panel[r, right - left : start + width]):
                            return tile + i
            tile = end
            for r in range(bottom):
                copy(out[block * height + r, left:right], panel[r, : right - left])
    return -1


@compiled
def scatter_strips(stream, index, starts, width, bits, out, first, last):
    """The inverse of `gather_strips`; returns as `scatter_tiles`."""
    rows, columns = out.shape
    places = starts[first:last].copy()
    codes = buffer_for(width, out)
    for r in range(rows):
        for block in range(first, last):
            left, right = block * width, min(columns, block * width + width)
            tile = places[block - first]
            if tile == starts[block + 1] or np.int64(index[tile]) != r:
                out[r, left:right] = 0
                continue
            if bits < 8:
                unpack(stream, tile * width, width, bits, codes)
            values = codes[:width] if bits < 8 else stream[tile * width : tile * width + width]
            if _all_zero(values) or not _all_zero(values[right - left :]):
                return tile
            copy(out[r, left:right], values[: right - left])
            places[block - first] = tile + 1
    return -1


@compiled
def count_csl(elements, counts, first, last):
    """Nonzeros of each tile of the tile rows [first, last); counts `[tile rows, tile columns]`."""
    rows, columns = elements.shape
    counts[first:last] = 0
    for row in range(first * CSL_ROWS, min(rows, last * CSL_ROWS)):
        for j in range(counts.shape[1]):
            left = j * CSL_COLUMNS
            counts[row // CSL_ROWS, j] += _nonzeros(elements[row, left : min(columns, left + CSL_COLUMNS)])


@compiled
def _pad_place(tile, bank):
    """The first zero of a tile in a bank of shared memory: a bank holds two columns of each row."""
    for row in range(CSL_ROWS):
        for swizzled in range(2 * bank, 2 * bank + 2):
            if tile[row, swizzled ^ ((row % 8) << 3)] == 0:
                return row * CSL_COLUMNS + swizzled
    return 0  # not reached: the emptiest bank of a tile that needs padding is not full


@compiled
def gather_csl(elements, starts, items, first, last):
    """Items of the tile rows [first, last); starts: of each tile, in items.

    Their order is that of Flash-LLM's own writer, which takes the last item of the fullest of the 32 banks (the first of
    several) until none is left. That is level by level: the k-th item of a bank is taken when it holds k.
    """
    rows, columns = elements.shape
    across = (columns + CSL_COLUMNS - 1) // CSL_COLUMNS
    tile = np.empty((CSL_ROWS, CSL_COLUMNS), elements.dtype)
    banks = np.empty((2 * CSL_ROWS + 1, CSL_LANES), np.uint32)
    taken = np.empty(CSL_ROWS * CSL_COLUMNS + 1, np.uint32)
    held = np.empty(CSL_LANES, np.int64)
    for number in range(first * across, last * across):
        top, left = number // across * CSL_ROWS, number % across * CSL_COLUMNS
        right = min(columns, left + CSL_COLUMNS)
        tile[:] = 0
        for row in range(min(CSL_ROWS, rows - top)):
            copy(tile[row], elements[top + row, left:right])
        held[:] = 0
        for row in range(CSL_ROWS):
            for bank in range(CSL_LANES):
                count = np.uint64(held[bank])
                for c in range(2 * bank, 2 * bank + 2):
                    x = tile[row, c ^ ((row % 8) << 3)]
                    banks[count, bank] = np.uint32(x) | np.uint32((row * CSL_COLUMNS + c) << 16)
                    count += np.uint64(x != 0)
                held[bank] = count
        total = starts[number + 1] - starts[number]
        for _ in range(total - held.sum()):
            bank = np.argmin(held)
            banks[held[bank], bank] = np.uint32(_pad_place(tile, bank) << 16)
            held[bank] += 1
        end = np.uint64(0)
        for level in range(held.max(), 0, -1):
            for bank in range(CSL_LANES):
                taken[end] = banks[level - 1, bank]
                end += np.uint64(held[bank] >= level)
        # What does not fill a vector of four for every lane is taken first and stored last. A lane stores its items in
        # the reverse of the order in which they were taken.
        vectors = total // CSL_VECTOR
        repeats, remaining = vectors // CSL_LANES, vectors % CSL_LANES
        main, i = starts[number], 0
        tail = main + repeats * CSL_LANES * CSL_VECTOR
        for turn in range(CSL_VECTOR - 1, -1, -1):
            for lane in range(remaining):
                items[tail + lane * CSL_VECTOR + turn] = taken[i]
                i += 1
        for turn in range(CSL_VECTOR * repeats - 1, -1, -1):
            place = main + turn // CSL_VECTOR * CSL_VECTOR * CSL_LANES + turn % CSL_VECTOR
            for lane in range(CSL_LANES):
                items[place + lane * CSL_VECTOR] = taken[i]
                i += 1


@compiled
def scatter_csl(items, starts, out, first, last):
    """The inverse of `gather_csl`; returns the first item that it cannot have written, or -1."""
    rows, columns = out.shape
    across = (columns + CSL_COLUMNS - 1) // CSL_COLUMNS
    tile = np.empty((CSL_ROWS, CSL_COLUMNS), out.dtype)
    padding = np.empty(CSL_VECTOR, np.int64)
    for number in range(first * across, last * across):
        top, left = number // across * CSL_ROWS, number % across * CSL_COLUMNS
        height, right = min(CSL_ROWS, rows - top), min(columns, left + CSL_COLUMNS)
        tile[:] = 0
        pads = 0
        for i in range(starts[number], starts[number + 1]):
            place = np.int64(items[i] >> np.uint32(16))
            row = place // CSL_COLUMNS
            if row >= CSL_ROWS:
                return i
            c = (place % CSL_COLUMNS) ^ ((row % 8) << 3)
            value = items[i] & np.uint32(0xFFFF)
            if value == 0:
                if pads == CSL_VECTOR - 1:
                    return i
                padding[pads] = i
                pads += 1
                continue
            if tile[row, c] != 0 or row >= height or left + c >= right:
                return i
            tile[row, c] = value
        for k in range(pads):
            place = np.int64(items[padding[k]] >> np.uint32(16))
            row = place // CSL_COLUMNS
            if tile[row, (place % CSL_COLUMNS) ^ ((row % 8) << 3)] != 0:
                return padding[k]
        for row in range(height):
            copy(out[top + row, left:right], tile[row, : right - left])
    return -1

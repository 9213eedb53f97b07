"""The loops of the packers, compiled. Blocks are rows of arrays: `start`, `end` (events, alive in [start, end)), `size`.

All are int64 and equally long; `order` is a permutation of the rows and `offset` what is found.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np


def compiled(function: Callable) -> Callable:
    """As kernels.loops.compiled, without importing torch, and with exact integers only."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(nogil=True)(function)


@compiled
def first_fit(order, start, end, size, offset, width, window, begin):
    """Place blocks in `order`, each at the lowest free address. Returns the peak.

    Blocks that are placed are kept sorted by offset, in lists for windows of time: on level k, window j is
    `[j * width[k], (j + 2) * width[k])`, so that a block that lives no longer than `width[k]` meets only what is in one of
    them. `window[k]` is the number of the level's first window, `begin` where in memory each window's list begins. The
    first level is one window for everything, and widths fall.
    """
    lists = np.empty(begin[-1], np.int32)
    count = np.zeros(begin.size - 1, np.int64)
    box = np.empty((start.size, 4), np.int64)  # offset, top, start, end: one cache line
    peak = 0
    for block in order:
        low, wanted, first, last = 0, size[block], start[block], end[block]
        level = 0
        while level + 1 < width.size and last - first <= width[level + 1]:
            level += 1
        at = window[level] + first // width[level]
        for k in range(begin[at], begin[at] + count[at]):
            other = lists[k]
            if box[other, 0] >= low + wanted:
                break  # all further ones lie higher still
            if box[other, 1] > low and box[other, 2] < last and first < box[other, 3]:
                low = box[other, 1]
        box[block, 0], box[block, 1], box[block, 2], box[block, 3] = low, low + wanted, first, last
        offset[block] = low
        peak = max(peak, low + wanted)
        for level in range(width.size):
            for at in range(max(0, first // width[level] - 1), (last - 1) // width[level] + 1):
                at += window[level]
                left, right = begin[at], begin[at] + count[at]
                stop = right
                while left < right:
                    middle = (left + right) // 2
                    if box[lists[middle], 0] <= low:
                        left = middle + 1
                    else:
                        right = middle
                lists[left + 1 : stop + 1] = lists[left:stop].copy()  # faster than moving them one by one
                lists[left] = block
                count[at] += 1
    return peak


@compiled
def skyline(by_life, start, end, size, offset):
    """Best-fit on the skyline: into the lowest valley goes the longest-lived block that lies within it in time.

    `by_life` are the rows by falling lifetime. A valley that nothing fits is filled up to its lower neighbour.
    """
    count = by_life.size
    left = np.empty(2 * count + 3, np.int64)  # valleys from left to right: [left[k], left[k + 1]) at height[k]
    height = np.zeros(2 * count + 3, np.int64)
    waiting = by_life.copy()
    left[0], left[1] = 0, end.max()
    valleys, peak, remaining = 1, 0, count
    while remaining:
        lowest = 0
        for k in range(1, valleys):
            if height[k] < height[lowest]:
                lowest = k
        first, last = left[lowest], left[lowest + 1]
        found = -1
        for k in range(remaining):
            if start[waiting[k]] >= first and end[waiting[k]] <= last:
                found = k
                break
        if found < 0:
            # As high as the lower neighbour, and one valley with it.
            before = height[lowest - 1] if lowest > 0 else np.int64(1) << 62
            after = height[lowest + 1] if lowest + 1 < valleys else np.int64(1) << 62
            height[lowest] = min(before, after)
            write = 0
            for k in range(valleys):
                if write and height[write - 1] == height[k]:
                    continue
                left[write], height[write] = left[k], height[k]
                write += 1
            left[write] = left[valleys]
            valleys = write
            continue
        block, base = waiting[found], height[lowest]
        for k in range(found, remaining - 1):
            waiting[k] = waiting[k + 1]
        remaining -= 1
        offset[block] = base
        top = base + size[block]
        peak = max(peak, top)
        more = (1 if start[block] > first else 0) + (1 if end[block] < last else 0)
        for k in range(valleys, lowest, -1):
            left[k + more] = left[k]
            if k < valleys:
                height[k + more] = height[k]
        at = lowest
        if start[block] > first:
            left[at], height[at] = first, base
            at += 1
        left[at], height[at] = start[block], top
        if end[block] < last:
            left[at + 1], height[at + 1] = end[block], base
        valleys += more
    return peak


@compiled
def split_and_fuse(by_size, start, end, size, offset):
    """STWeaver's split-and-fuse. `by_size` are the rows by falling size, equal sizes by rising start.

    Blocks of one size first go, in order, onto the skyline of the lanes that are there, as far as a lane is high; what is
    left forms new lanes of its own height on top, each block behind the one whose end is nearest before its start.
    """
    count = by_size.size
    lane_base = np.empty(count, np.int64)
    lane_size = np.empty(count, np.int64)
    lane_end = np.empty(count, np.int64)
    newest = np.full(count, -1, np.int64)  # the last block put into a lane, and before each block the one before it
    before = np.full(count, -1, np.int64)
    over = np.empty(count, np.int64)
    lanes, peak, at = 0, 0, 0
    while at < count:
        wanted = size[by_size[at]]
        leftover = 0
        while at < count and size[by_size[at]] == wanted:
            over[leftover] = by_size[at]
            leftover += 1
            at += 1
        for lane in range(lanes):
            kept = 0
            for k in range(leftover):
                block = over[k]
                top = lane_base[lane]
                other = newest[lane]
                while other >= 0:
                    if start[other] < end[block] and start[block] < end[other]:
                        top = max(top, offset[other] + size[other])
                    other = before[other]
                if top + wanted <= lane_base[lane] + lane_size[lane]:
                    offset[block] = top
                    before[block], newest[lane] = newest[lane], block
                else:
                    over[kept] = block
                    kept += 1
            leftover = kept
            if not leftover:
                break
        fresh = lanes
        for k in range(leftover):
            block = over[k]
            best = -1
            for lane in range(fresh, lanes):
                if lane_end[lane] <= start[block] and (best < 0 or lane_end[lane] > lane_end[best]):
                    best = lane
            if best < 0:
                best = lanes
                lane_base[best], lane_size[best] = peak, wanted
                peak += wanted
                lanes += 1
            lane_end[best] = end[block]
            offset[block] = lane_base[best]
            before[block], newest[best] = newest[best], block
    return peak

"""The loops of the permutation search: what it gains to let two channels change places, for all pairs of two stripes.

A stripe is a set of channels that share groups (N:M) or tiles. Channels lie in memory one after another, `[channels,
profiles]`, so that the inner loops run over profiles.
"""

from __future__ import annotations

import numpy as np
from tersor.kernels.loops import compiled

CHUNK = 512  # profiles at a time: the buffers of two stripes stay in the first cache


@compiled
def n_of_m_gains(values, stripes, pairs, n, gains, first, last):
    """gains[p, i, j]: how much more N:M keeps when place i of stripe A and place j of stripe B change, (A, B) = pairs[p].

    values `[channels, rows]` importance >= 0; stripes `[stripes, m]` the channels that are neighbours in every row.
    A row keeps the n largest of a stripe; let v1 >= v2 >= ... be all m. Without the value a, the n-th largest is v(n+1) if a
    was among the n largest, else v(n): the threshold t that a newcomer b has to pass. So the row gains
    max(b - t, 0) - max(a - v(n+1), 0).
    """
    m, rows = stripes.shape[1], values.shape[1]
    none = np.float32(0)
    top = np.empty((n + 1, CHUNK), np.float32)
    rest = np.empty(CHUNK, np.float32)
    limits = np.empty((2, m, CHUNK), np.float32)
    lost = np.empty((2, m), np.float64)
    for pair in range(first, last):
        lost[:] = 0
        gains[pair] = 0
        for start in range(0, rows, CHUNK):
            size = min(CHUNK, rows - start)
            for side in range(2):
                stripe = stripes[pairs[pair, side]]
                top[:] = -1
                for c in range(m):
                    rest[:size] = values[stripe[c], start : start + size]
                    for k in range(n + 1):
                        best = top[k]
                        for i in range(size):
                            x, y = best[i], rest[i]
                            best[i] = x if x > y else y
                            rest[i] = y if x > y else x
                least, following = top[n - 1], top[n]
                for c in range(m):
                    value, limit = values[stripe[c], start : start + size], limits[side, c]
                    total = none
                    for i in range(size):
                        limit[i] = least[i] if least[i] > value[i] else following[i]
                        over = value[i] - following[i]
                        total += over if over > none else none
                    lost[side, c] += total
            for a in range(m):
                left, left_limit = values[stripes[pairs[pair, 0], a], start : start + size], limits[0, a]
                for b in range(m):
                    right, right_limit = values[stripes[pairs[pair, 1], b], start : start + size], limits[1, b]
                    total = none
                    for i in range(size):
                        come, go = right[i] - left_limit[i], left[i] - right_limit[i]
                        total += (come if come > none else none) + (go if go > none else none)
                    gains[pair, a, b] += total
        for a in range(m):
            for b in range(m):
                gains[pair, a, b] -= lost[0, a] + lost[1, b]


@compiled
def n_of_m_kept(values, source, n, m):
    """The sum of the n largest of every m neighbours of values[:, source]; values `[rows, places]`, source `[places]`."""
    total = 0.0
    top = np.empty(n, np.float32)
    for r in range(len(values)):
        row, part = values[r], 0.0
        for start in range(0, len(source), m):
            top[:] = 0
            for j in range(start, start + m):
                rest = row[source[j]]
                for k in range(n):
                    best = top[k]
                    top[k] = best if best > rest else rest
                    rest = rest if best > rest else best
            for k in range(n):
                part += top[k]
        total += part
    return total


@compiled
def tile_gains(values, stripes, tiles, sums, limit, pairs, gains, first, last):
    """Adds to gains[p, i, j] what tiles above `limit` gain when place i of stripe A and place j of stripe B change.

    values `[channels, profiles]` energies; sums `[tiles, profiles]` those of the tiles as they are; tiles `[stripes]` the
    tile that each stripe lies in. With the limit (energy of the least tile that stays) held, max(sum - limit, 0) is what a
    tile adds to the kept energy.
    """
    width, profiles = stripes.shape[1], values.shape[1]
    none = np.float32(0)
    for pair in range(first, last):
        one, other = sums[tiles[pairs[pair, 0]]], sums[tiles[pairs[pair, 1]]]
        if tiles[pairs[pair, 0]] == tiles[pairs[pair, 1]]:
            continue
        for start in range(0, profiles, CHUNK):
            stop = min(start + CHUNK, profiles)
            before = none
            for i in range(start, stop):
                x, y = one[i] - limit, other[i] - limit
                before += (x if x > none else none) + (y if y > none else none)
            here, there = one[start:stop], other[start:stop]
            for a in range(width):
                left = values[stripes[pairs[pair, 0], a], start:stop]
                for b in range(width):
                    right = values[stripes[pairs[pair, 1], b], start:stop]
                    total = none
                    for i in range(stop - start):
                        moved = right[i] - left[i]
                        x, y = here[i] + moved - limit, there[i] - moved - limit
                        total += (x if x > none else none) + (y if y > none else none)
                    gains[pair, a, b] += total - before


@compiled
def exchange(worth, by_group, group, order, classes, least):
    """Let channels change places while the sum of worth[channel, group of its place] grows by more than `least`.

    worth `[channels, groups]`, by_group its transpose; group `[places]`; order `[places]` the channel at each place, changed
    in place; classes `[channels]`: only channels of one class change. Returns the number of swaps.
    """
    count, swaps = len(order), 0
    now = np.empty(count, worth.dtype)
    for place in range(count):
        now[place] = worth[order[place], group[place]]
    for one in range(count):
        a, g = order[one], group[one]
        for other in range(one + 1, count):
            b, h = order[other], group[other]
            if worth[a, h] + by_group[g, b] - now[one] - now[other] > least and g != h and classes[a] == classes[b]:
                order[one], order[other] = b, a
                now[one], now[other] = by_group[g, b], worth[a, h]
                a = b
                swaps += 1
    return swaps

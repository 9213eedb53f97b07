"""The cheapest way to give rows to columns that take equally many each, exactly.

Successive shortest paths with potentials (the Jonker-Volgenant form of the Hungarian method), where a column takes
`capacity` rows instead of one: a path is looked for among the columns, so that 256 experts on 8 devices cost
256 * 256 * 8 steps and not 256 ** 3.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True)
def _transport(cost: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = cost.shape
    place = np.full(rows, -1, np.int64)
    filled = np.zeros(columns, np.int64)
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    distance, came = np.empty(columns), np.empty(columns, np.int64)
    done = np.empty(columns, np.bool_)
    for new in range(rows):
        row_price[new] = np.min(cost[new] - column_price)
        for column in range(columns):
            distance[column] = cost[new, column] - row_price[new] - column_price[column]
            came[column] = new
            done[column] = False
        while True:
            nearest = -1
            for column in range(columns):
                if not done[column] and (nearest < 0 or distance[column] < distance[nearest]):
                    nearest = column
            if filled[nearest] < capacity:
                break
            done[nearest] = True
            for row in range(new):  # a row may leave the full column for another
                if place[row] == nearest:
                    for column in range(columns):
                        if not done[column]:
                            slack = cost[row, column] - row_price[row] - column_price[column]
                            if distance[nearest] + slack < distance[column]:
                                distance[column] = distance[nearest] + slack
                                came[column] = row
        shortest = distance[nearest]
        row_price[new] += shortest
        for row in range(new):
            if done[place[row]]:
                row_price[row] += shortest - distance[place[row]]
        for column in range(columns):
            if done[column]:
                column_price[column] += distance[column] - shortest
        filled[nearest] += 1
        while True:
            row = came[nearest]
            before = place[row]
            place[row] = nearest
            if row == new:
                break
            nearest = before
    return place, row_price, column_price


def assign(cost: np.ndarray, capacity: int = 1) -> np.ndarray:
    """The column of each row for `cost` `[rows, rows / capacity]`, each column taken `capacity` times: int64 `[rows]`."""
    rows, columns = cost.shape
    if rows != columns * capacity:
        raise ValueError(f"{rows} rows do not fill {columns} columns of {capacity}")
    return _transport(np.ascontiguousarray(cost, np.float64), capacity)[0]


def assign_in_groups(cost: np.ndarray, size: int, capacity: int = 1) -> np.ndarray:
    """The same where `size` neighbouring rows stay together: they fill `size / capacity` neighbouring columns.

    First every group is given to every such block of columns, then the groups are given to the blocks.
    """
    rows, columns = cost.shape
    if size in (rows, 1):
        return assign(cost, capacity)
    if size < capacity:  # several groups share a column: whole groups are given to it
        return np.repeat(assign(cost.reshape(-1, size, columns).sum(1), capacity // size), size)
    groups, wide = rows // size, size // capacity
    inner = np.empty((groups, groups, size), np.int64)
    total = np.empty((groups, groups))
    for group in range(groups):
        for block in range(groups):
            part = cost[group * size : (group + 1) * size, block * wide : (block + 1) * wide]
            inner[group, block] = assign(part, capacity)
            total[group, block] = part[np.arange(size), inner[group, block]].sum()
    blocks = assign(total)
    return np.concatenate([inner[group, blocks[group]] + blocks[group] * wide for group in range(groups)])

"""The CPU path of `error_compensation`: one block of columns, as a loop over tiles of rows that stay in the cache."""

from __future__ import annotations

import numpy as np
import torch
from tersor.kernels.dispatch import integer_range
from tersor.kernels.loops import array, compiled, over_rows

TILE = 64  # rows that go through all columns of a block together: 128 columns of them fill a 32 kB cache


@compiled
def _fix_rows(work, factor, scale, zero_point, group_index, keep, lowest, highest, codes, error, begin, end):
    """Rows `begin..end` of `work` `[B, rows]`, in place. `scale`, `zero_point` `[G, rows]` and `keep` `[B, rows]` may be
    empty."""
    columns = work.shape[0]
    tile = np.zeros((columns, TILE), np.float32)
    e, no_zero_point = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        tile[:, :count] = work[:, first : first + count]
        for j in range(columns):
            w, kept = tile[j], keep[j : j + 1, first : first + count]
            inverse = np.float32(1) / factor[j, j]
            if len(scale):
                s, code = scale[group_index[j], first : first + count], codes[j, first : first + count]
                z = zero_point[group_index[j], first : first + count] if len(zero_point) else no_zero_point
                for r in range(count):
                    c = min(max(np.rint(w[r] / s[r] + z[r]), lowest), highest)
                    if len(kept) and not kept[0, r]:
                        c = z[r]  # a pruned weight is exactly zero, whose code is the zero point
                    code[r] = np.int8(c)
                    q = (c - z[r]) * s[r]
                    e[r] = (w[r] - q) * inverse
                    w[r] = q
            else:
                for r in range(count):
                    q = np.float32(0) if len(kept) and not kept[0, r] else w[r]
                    e[r] = (w[r] - q) * inverse
                    w[r] = q
            error[j, first : first + count] = e[:count]
            for k in range(j + 1, columns):
                share = factor[j, k]
                for r in range(TILE):
                    tile[k, r] -= e[r] * share
        work[:, first : first + count] = tile[:, :count]


def fix_columns(work, factor, scale, zero_point, group_index, keep, bits, codes, error) -> None:
    """Fix the columns of `work` float32 `[B, rows]` in place; `codes` int8 and `error` float32 are `[B, rows]`.

    `factor` `[B, B]`, `scale` and `zero_point` `[rows, G]`, `group_index` `[B]`, `keep` bool `[rows, B]`. `work`, `codes`
    and `error` must have contiguous rows of columns."""
    lowest, highest = (np.float32(value) for value in integer_range(bits))
    inputs = (
        array(factor, torch.float32, 2),
        array(None if scale is None else scale.t(), torch.float32, 2),
        array(None if zero_point is None else zero_point.t(), torch.float32, 2),
        array(group_index if scale is not None else None, torch.int64, 1),
        array(None if keep is None else keep.t(), torch.bool, 2),
    )
    written = (array(codes, torch.int8, 2), error.numpy())
    over_rows(
        lambda first, last: _fix_rows(work.numpy(), *inputs, lowest, highest, *written, first, last),
        work.shape[1],
        TILE,
    )

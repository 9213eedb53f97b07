"""The CPU path of `error_compensation`: one block of columns, a few torch calls per column into buffers made once."""

from __future__ import annotations

import torch
from tersor.kernels.dispatch import integer_range

SUB = 16  # columns whose updates are applied one by one before a small matmul updates the rest of the block (CPU)
ROWS = 4096  # rows processed together on a CPU: `SUB` columns of them and of their results stay in a 1 MB cache


class Workspace:
    """Buffers of the CPU path and every view of them that the column loop needs: making a view costs as much as using
    it.

    `pair[j]` is `[2, rows]`: column j before (0) and after (1) it was fixed. Because the error is their difference,
    the update of a later column k is one vector-matrix product of `signed[k]` = (U_jk / U_jj, -U_jk / U_jj, ...) with
    all pairs before it."""

    def __init__(self, columns: int, rows: int, device: torch.device):
        self.pair = torch.empty(columns, 2, rows, device=device)
        self.scale, self.zero_point, self.codes, self.keep = torch.empty(4, columns, rows, device=device)
        self.signed = torch.empty(columns, 2 * columns, device=device)
        flat = self.pair.view(2 * columns, rows)
        start = [j - j % SUB for j in range(columns)]
        self.before = self.pair[:, 0].unbind(0)
        self.before_row = [self.pair[j, :1] for j in range(columns)]
        self.after = self.pair[:, 1].unbind(0)
        self.done = [flat[2 * i : 2 * j] for j, i in enumerate(start)]
        self.coefficients = [self.signed[j : j + 1, 2 * i : 2 * j] for j, i in enumerate(start)]
        self.scales, self.zero_points = self.scale.unbind(0), self.zero_point.unbind(0)
        self.code, self.kept = self.codes.unbind(0), self.keep.unbind(0)


def fix_columns(work, factor, scale, zero_point, group_index, keep, bits, codes, error, space):
    """Fix the columns of `work` `[B, rows]` in place; `error` and `codes` are `[B, rows]`, `scale` `[rows, G]`, `keep`
    `[rows, B]`.

    When the columns share one group they are divided by its scale beforehand, which leaves rounding and clamping as
    the only work per column; otherwise (activation order) every column is divided on its own."""
    low, high = integer_range(bits)
    columns, rows = work.shape
    diagonal = factor.diagonal()[:, None]
    scaled = (factor / diagonal).t()
    space.signed[:columns, : 2 * columns].copy_(torch.stack((scaled, -scaled), 2).view(columns, 2 * columns))
    before, after = space.pair[:columns, 0], space.pair[:columns, 1]
    groups = None if scale is None else group_index.unique()
    one_group = scale is not None and groups.numel() == 1
    mixed = scale is not None and not one_group
    if one_group:
        s = scale[:, int(groups)].float()
        z = None if zero_point is None else zero_point[:, int(groups)].float()
        torch.div(work, s, out=before)
        if z is not None:
            before.add_(z)
    else:
        before.copy_(work)
    if mixed:
        torch.index_select(scale.t().float(), 0, group_index, out=space.scale[:columns])
        if zero_point is not None:
            torch.index_select(zero_point.t().float(), 0, group_index, out=space.zero_point[:columns])
    if keep is not None:
        space.keep[:columns].copy_(keep.t())

    for begin in range(0, columns, SUB):
        end = min(begin + SUB, columns)
        for j in range(begin, end):
            w, q = space.before[j], space.after[j]
            if j > begin:
                space.before_row[j].addmm_(space.coefficients[j], space.done[j], alpha=-1)
            if one_group:
                torch.round(w, out=q)
                q.clamp_(low, high)
                if keep is not None:  # a pruned weight is exactly zero, whose code is the zero point
                    if z is not None:
                        q.sub_(z).mul_(space.kept[j]).add_(z)
                    else:
                        q.mul_(space.kept[j])
            elif mixed:
                code = space.code[j]
                torch.div(w, space.scales[j], out=code)
                if zero_point is not None:
                    code.add_(space.zero_points[j]).round_().clamp_(low, high)
                    torch.sub(code, space.zero_points[j], out=q)
                    q.mul_(space.scales[j])
                else:
                    code.round_().clamp_(low, high)
                    torch.mul(code, space.scales[j], out=q)
                if keep is not None:
                    q.mul_(space.kept[j])
            elif keep is not None:
                torch.mul(w, space.kept[j], out=q)
            else:
                q.copy_(w)
        if end < columns:
            rest, signed = before[end:], space.signed[end:columns, 2 * begin : 2 * end]
            rest.addmm_(signed, space.pair[begin:end].view(2 * (end - begin), rows), alpha=-1)
        # Results leave the buffers now, while they are in cache.
        part = slice(begin, end)
        q, e = after[part], error[part]
        torch.sub(before[part], q, out=e)
        if one_group:
            codes[part].copy_(q)
            if z is not None:
                q.sub_(z)
            torch.mul(q, s, out=work[part])
            e.mul_(s)
        else:
            work[part].copy_(q)
            if mixed:
                code = space.codes[part]
                if keep is not None:
                    zeros = space.zero_point[part] if zero_point is not None else torch.zeros((), device=work.device)
                    code = torch.where(space.keep[part] != 0, code, zeros)
                codes[part].copy_(code)
        e.div_(diagonal[part])

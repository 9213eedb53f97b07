"""Hidden states of the student's blocks against those of the teacher's.

Loss of one token: mean over the pairs of the layer map of ||P s - t||^2 / ||t||^e, s and t the block outputs. With the
exponent e = 2 a term is the error relative to the feature, whatever the layer's scale, so that no layer dominates
(LAPTOP-Diff, arXiv:2404.11098, weighs by the norm of the teacher's feature; its exponent is not stated in a form that could
be checked, hence the parameter). Norms are those of the token: what a token counts does not depend on its micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tersor.ops.distill.losses.layer_map import Pairs
from torch import Tensor, nn

SMALLEST = 1e-12  # squared norm of a feature that is all zero


class HiddenLoss(nn.Module):
    """Holds the projection from the student's width to the teacher's, where they differ: one for all pairs, since blocks
    share the residual stream. It is trained along and belongs to no checkpoint."""

    def __init__(self, pairs: Pairs, student_width: int, teacher_width: int, exponent: float = 2.0, seed: int = 0):
        super().__init__()
        self.pairs, self.exponent = pairs, exponent
        self.projection: nn.Linear | None = None
        if student_width != teacher_width:
            self.projection = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
            nn.init.orthogonal_(self.projection.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], keep: Tensor) -> Tensor:
        """Sum over the tokens of `keep` `[B, T]` of block outputs `[B, T, H]` by block number."""
        with torch.autocast(keep.device.type, enabled=False):
            return sum(self._pair(student[s][keep], teacher[t][keep]) for s, t in self.pairs) / len(self.pairs)

    def _pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        student, teacher = student.to(wide), teacher.to(wide)
        if self.projection is not None:
            student = nn.functional.linear(student, self.projection.weight.to(student))
        error = (student - teacher).square().sum(-1)
        return (error * teacher.square().sum(-1).clamp(min=SMALLEST) ** (-self.exponent / 2)).sum()

"""Sparse MeZO: Liu et al., Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning (arXiv:2402.15751)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.forward_only.mezo import Mezo
from torch import nn

SHARE = 0.25  # of the weights of a matrix: 75 % stay


class SparseMezo(Mezo):
    """MeZO on the weights of small magnitude: `0 < |w| <= threshold`, the threshold of a matrix being that below which
    `share` of its weights were when training began. The noise of the estimate hurts large weights most; without them the
    learning rate may be larger.

    Who moves is read off the weights again at every step, from theta, so that +eps, -eps and the update move the same
    ones. Exact zeros are left out of threshold and steps: pruning made them. Vectors move whole.
    """

    method = "sparse-mezo"

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        seed: int = 0,
        eps: float = 1e-3,
        keep_zeros: Collection[str] = (),
        share: float = SHARE,
        thresholds: Mapping[str, float] | None = None,
    ):
        """`thresholds` by name: those of the run that is resumed or replayed; None reads them off the parameters. Raises
        TersorError for a share that is not within (0, 1]."""
        super().__init__(parameters, seed, eps, keep_zeros)
        if not 0 < share <= 1:
            raise TersorError(f"sparse-mezo cannot move a share of {share} of the weights", "above 0, at most 1")
        self.share = share
        if thresholds is None:
            matrices = ((name, parameter) for name, parameter in self.parameters.items() if parameter.ndim > 1)
            thresholds = {name: _threshold(parameter.detach(), share) for name, parameter in matrices}
        self.thresholds = dict(thresholds)

    def settings(self) -> dict:
        return super().settings() | {"share": self.share, "thresholds": self.thresholds}

    def bounds(self, name: str) -> tuple[float | None, float | None]:
        if name in self.thresholds:
            return 0.0, self.thresholds[name]
        return super().bounds(name)


def _threshold(weight: torch.Tensor, share: float) -> float:
    """The magnitude that `share` of the weights other than 0 do not exceed."""
    sizes = weight.float().abs().view(-1)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 0.0
    return float(sizes.kthvalue(max(1, min(len(sizes), round(share * len(sizes))))).values)

"""How much a block or a residual branch matters, and which ones to take without asking."""

from __future__ import annotations

import torch


class MeanCosine:
    """1 - mean over tokens of cos(X, X + f(X)): how far a branch turns the residual stream.

    He et al., "What Matters in Transformers? Not All Attention is Needed" (2024); for whole blocks the same between a
    block's input and its output, as in EfficientVLA and ShortGPT. `before` is the stream without what is judged, `after`
    with it. Low: little is lost without it.
    """

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Both `[..., hidden]`."""
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self._sum += float(cosine.double().sum())
        self._tokens += cosine.numel()

    @property
    def score(self) -> float:
        return 1 - self._sum / max(self._tokens, 1)


class OutputLoss:
    """||out' - out||^2 summed over tokens, relative to ||out||^2. Both `[..., hidden]`."""

    def __init__(self) -> None:
        self._error, self._norm = 0.0, 0.0

    def add(self, output: torch.Tensor, dense: torch.Tensor) -> None:
        self._error += float((output.float() - dense.float()).square().sum(dtype=torch.float64))
        self._norm += float(dense.float().square().sum(dtype=torch.float64))

    @property
    def loss(self) -> float:
        return self._error / max(self._norm, 1e-300)


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` of `total` positions with even gaps; the first and the last are never taken.

    Raises ValueError when there are not that many between them.
    """
    if not 0 <= count <= total - 2:
        raise ValueError(f"{count} positions of {total} cannot be taken without the first and the last")
    return [1 + int((place + 0.5) * (total - 2) / count) for place in range(count)]

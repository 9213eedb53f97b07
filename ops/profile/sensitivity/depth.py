"""What a block or a residual branch does to the stream: how much it adds, how far it turns it.

Residual contribution as in Csordás et al., "Do Language Models Use Their Depth Efficiently?" (arXiv:2505.13898); cosine of
the stream without and with what is judged as in He et al., "What Matters in Transformers?" (arXiv:2406.15786).
"""

from __future__ import annotations

import torch

TINY = torch.finfo(torch.float32).tiny


class Contribution:
    """Means over tokens of ||after - before|| / ||before|| and of cos(before, after)."""

    def __init__(self) -> None:
        self._share = self._cosine = 0.0
        self._tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """The stream without and with what is judged, `[..., hidden]`."""
        before, after = before.float(), after.float()
        share = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(TINY)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self._share += float(share.double().sum())
        self._cosine += float(cosine.double().sum())
        self._tokens += cosine.numel()

    def numbers(self) -> dict:
        tokens = max(self._tokens, 1)
        return {"residual_contribution": self._share / tokens, "cosine": self._cosine / tokens}

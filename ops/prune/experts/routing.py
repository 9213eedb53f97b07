"""What calibration learns about the experts of one layer.

The score of an expert is its routing frequency times its output norm: the sum, over the tokens routed to it, of gate
weight times the L2 norm of its output. That is an upper bound of what leaving it out takes from the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

SAMPLED_TOKENS = 128


class RoutingStatistics:
    """Sums per expert `[experts]` over all tokens, and the outputs of all experts for the first few tokens."""

    def __init__(self, experts: int, sample: bool):
        self.scores = torch.zeros(experts, dtype=torch.float64)
        self.mass = torch.zeros(experts, dtype=torch.float64)  # sum of gate weights
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.sample = sample
        self._outputs: list[torch.Tensor] = []
        self._sampled = 0

    def forward(
        self, original: Callable, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Stands in for an experts module: hidden `[tokens, hidden]`, index and weights `[tokens, k]`.

        `original` is asked for one expert at a time, so that each one's output is seen before it is weighted.
        """
        result = torch.zeros_like(hidden)
        for expert in range(len(self.scores)):
            token, position = torch.where(index == expert)
            if not len(token):
                continue
            output = _one(original, hidden[token], expert, index, weights)
            gate = weights[token, position].float()
            self.scores[expert] += float((gate * output.float().norm(dim=-1)).double().sum())
            self.mass[expert] += float(gate.double().sum())
            self.tokens[expert] += len(token)
            result.index_add_(0, token, output * gate[:, None].to(output.dtype))
        if self.sample and self._sampled < SAMPLED_TOKENS:
            rows = hidden[: SAMPLED_TOKENS - self._sampled]
            outputs = [_one(original, rows, expert, index, weights) for expert in range(len(self.scores))]
            self._outputs.append(torch.stack(outputs).float())
            self._sampled += len(rows)
        return result

    def similarity(self) -> torch.Tensor:
        """Cosine `[experts, experts]` between the outputs of two experts for the same sampled tokens."""
        outputs = torch.cat(self._outputs, dim=1).flatten(1)
        outputs = outputs / outputs.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return outputs @ outputs.T


def _one(original: Callable, rows: torch.Tensor, expert: int, index: torch.Tensor, weights: torch.Tensor):
    """The unweighted output of one expert for all `rows`."""
    chosen = torch.full((len(rows), 1), expert, dtype=index.dtype, device=index.device)
    return original(rows, chosen, torch.ones(len(rows), 1, dtype=weights.dtype, device=weights.device))

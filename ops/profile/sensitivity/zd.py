"""ZD: how many of a block's weights stand out, a measure of its importance that needs no data.

Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels"
(arXiv:2406.17415): the share of the weights with a z-score above 1. Fewer of them: a more important block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def zd_score(panels: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Share of weights w with (w - mean) / std > 1 over all tensors that `panels()` gives, any shapes; it is asked thrice.

    0 where all weights are equal.
    """
    count = total = 0
    for panel in panels():
        count += panel.numel()
        total += float(panel.sum(dtype=torch.float64))
    mean = total / max(count, 1)
    squares = sum(float((panel.float() - mean).square().sum(dtype=torch.float64)) for panel in panels())
    deviation = (squares / max(count, 1)) ** 0.5
    if deviation == 0:
        return 0.0
    return sum(int((panel.float() > mean + deviation).sum()) for panel in panels()) / count

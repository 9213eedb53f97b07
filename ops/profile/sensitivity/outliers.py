"""Input channels of a layer that are far larger than the others: what makes activations hard to quantize.

Dettmers et al., "LLM.int8()" (arXiv:2208.07339), look for features of magnitude above 6 in some hidden states; here a
channel is an outlier when its norm is above 6 times the median norm, which no scaling of the model changes.
"""

from __future__ import annotations

import torch

THRESHOLD = 6.0
LISTED = 8


def outlier_channels(norms: torch.Tensor) -> dict:
    """`norms` `[in]`: root of the sum of squares of each input. Channels are listed by falling norm, at most eight."""
    median = float(norms.median())
    order = torch.argsort(norms, descending=True, stable=True)
    above = norms > THRESHOLD * median
    count = int(above.sum()) if median > 0 else 0
    return {
        "max_to_median": float(norms.max()) / median if median > 0 else None,
        "above_6_medians": count,
        "channels": order[: min(count, LISTED)].tolist(),
    }

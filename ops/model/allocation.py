"""How much each layer gives up when a model is to lose a given share: the rules that need no search.

All of them return `{name: share of its weights to remove}`; the shares, weighted with the sizes, average to `sparsity`
up to float rounding. A layer without weights gets `sparsity` and counts for nothing.
The search over measured distortions is in `rate_distortion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def uniform(sizes: dict[str, int], sparsity: float) -> dict[str, float]:
    """The same share of every layer. Raises ValueError for a sparsity outside [0, 1)."""
    _check(sizes, sparsity)
    return dict.fromkeys(sizes, sparsity)


def erk(shapes: dict[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel (Evci et al., RigL, arXiv 1911.11134): small and narrow layers stay denser.

    `shapes` are `[out, in]`. The density of a layer is `scale * (out + in) / (out * in)`, with one scale for all, such that
    the total is met. A layer that would be denser than dense is kept whole and the scale solved again for the others.
    Raises ValueError for a sparsity outside [0, 1) or a negative size.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    _check(sizes, sparsity)
    free = {name for name, size in sizes.items() if size}
    kept = (1 - sparsity) * sum(sizes.values())  # weights that stay in the layers that are not whole
    scale = 0.0
    while free:
        # density * size = scale * (out + in): what a layer keeps
        scale = kept / sum(sum(shapes[name]) for name in free)
        # A layer made whole took less than its rule gave it, so the scale only grows: whole layers stay whole.
        whole = {name for name in free if scale * sum(shapes[name]) >= sizes[name]}
        if not whole:
            break
        free -= whole
        kept -= sum(sizes[name] for name in whole)
    return {
        name: sparsity if not size else 1 - scale * sum(shapes[name]) / size if name in free else 0.0
        for name, size in sizes.items()
    }


def owl(
    outlier_ratios: dict[str, float], sizes: dict[str, int], sparsity: float, spread: float = 0.08
) -> dict[str, float]:
    """Outlier weighed layerwise sparsity (Yin et al., OWL, arXiv 2310.05175): layers with more outliers lose less.

    `outlier_ratios` are those of `outlier_ratio`; only their differences relative to the largest count. In the paper a
    "layer" is a decoder block whose linears all get the block's share, with `spread` (lambda) 0.08.

    This is the normalisation of the published code: `kept = 2 * spread * (D - min D) / (max D - min D)`, then all are moved
    by the same amount so that the mean is `1 - sparsity`. So the most and the least pruned block are exactly `2 * spread`
    apart. The paper says "within [S - spread, S + spread]"; with lopsided ratios its code leaves that interval on one side,
    and so does this. Different from the code: the mean is weighted with the sizes; equal ratios give equal shares (the code
    divides by zero); and where a share would be negative, or a block would lose more than half of what `uniform` leaves it
    (a share above (1 + S) / 2; the code lets it pass 1), all differences shrink by one factor until it does not.

    Raises ValueError for a sparsity outside [0, 1), a negative spread, ratios that are not finite, or other names than in `sizes`.
    """
    _check(sizes, sparsity)
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread {spread} is not a finite number >= 0")
    if outlier_ratios.keys() != sizes.keys():
        raise ValueError(f"ratios and sizes name different layers: {sorted(outlier_ratios.keys() ^ sizes.keys())[:3]}")
    for name, ratio in outlier_ratios.items():
        if not math.isfinite(ratio):
            raise ValueError(f"{name}: outlier ratio {ratio}")
    counted = [name for name, size in sizes.items() if size]
    low = min((outlier_ratios[name] for name in counted), default=0.0)
    high = max((outlier_ratios[name] for name in counted), default=0.0)
    if low == high:
        return dict.fromkeys(sizes, sparsity)
    scaled = {name: 2 * spread * ((outlier_ratios[name] - low) / (high - low)) for name in counted}
    mean = math.fsum(scaled[name] * sizes[name] for name in counted) / sum(sizes.values())
    change = {name: mean - scaled[name] for name in counted}  # what is removed beyond `sparsity`
    down, up = -min(change.values()), max(change.values())
    factor = 1.0
    if down > sparsity:
        factor = sparsity / down
    if up > (1 - sparsity) / 2:
        factor = min(factor, (1 - sparsity) / 2 / up)
    return {name: min(max(sparsity + factor * change.get(name, 0.0), 0.0), 1.0) for name in sizes}


def outlier_ratio(scores: torch.Tensor | Sequence[torch.Tensor], threshold: float = 5.0) -> float:
    """Share of the scores, in [0, 1], that lie above `threshold` times their mean (M in OWL; 5 in most of its results).

    OWL takes Wanda's scores `|weight| * norm of the input column` of all linears of a block as one pool: give a list of
    them, of any shapes. None at all is 0. Raises ValueError for scores that are not finite.
    """
    pool = list(scores) if isinstance(scores, list | tuple) else [scores]
    count = sum(part.numel() for part in pool)
    if not count:
        return 0.0
    mean = math.fsum(float(part.float().sum()) for part in pool) / count
    if not math.isfinite(mean):
        raise ValueError(f"scores have the mean {mean}")
    return sum(int((part > threshold * mean).sum()) for part in pool) / count


def _check(sizes: dict[str, int], sparsity: float) -> None:
    if not 0 <= sparsity < 1:  # NaN too
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}: size {size} is negative")

"""Which candidates to remove together, when the losses of removing each alone nearly add up.

Zhang et al., "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models" (2024): a 0-1
knapsack over parameter counts, the weight of a candidate being what the network's output loses without it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.ops.model.rate_distortion import Options, allocate_rd

CELLS = 20_000


def least_loss(losses: Sequence[float], sizes: Sequence[int], least: int) -> list[int]:
    """The candidates with the least sum of `losses` among the sets whose `sizes` sum to at least `least`; never all.

    Losses are not negative. Exact as long as the greatest common divisor of the sizes is not tiny beside their sum: see
    `allocate_rd`. Raises ValueError when only all of them together are enough.
    """
    if least > sum(sizes) - min(sizes):
        raise ValueError(f"{least} of {sum(sizes)} parameters are only reached by removing every candidate")
    smallest = max(max(losses) * 1e-12, 1e-30)  # what costs nothing is not removed for the fun of it
    options = {
        str(index): Options([size, 0], [0.0, max(loss, smallest)])
        for index, (loss, size) in enumerate(zip(losses, sizes, strict=True))
    }
    choice = allocate_rd(options, sum(sizes) - least, CELLS)
    return [index for index in range(len(sizes)) if choice.index[str(index)]]

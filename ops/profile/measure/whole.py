"""The real thing to hold predictions against: the whole model reads a prompt and generates greedily with its cache."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from tersor.ops.model.bare import BareModel, free_bytes
from tersor.ops.model.timer import seconds
from tersor.ops.profile.measure.runtime import Fits
from tersor.ops.profile.measure.stand import forward_options

HEADROOM = 1.3  # for activations and the cache
LONGEST_SECONDS = 30.0  # what takes longer is run once


def why_not(bare: BareModel) -> str | None:
    """Why the whole model cannot be run here, None if it can."""
    needed = HEADROOM * sum(parameter.numel() for parameter in bare.model.parameters()) * bare.dtype.itemsize
    free = free_bytes(bare.device)
    if needed > free:
        return f"the whole model takes about {needed / 1e9:.1f} GB as it is run here, {free / 1e9:.1f} GB are free"
    return None


@torch.no_grad()
def generate(bare: BareModel, ids: torch.Tensor, tokens: int) -> None:
    """`tokens` new ones for `ids` `[batch, prompt]`; a model that does not generate reads them once."""
    cache = bare.new_cache() if bare.causal else None
    name, options = bare.model.base_model.main_input_name, forward_options(bare, cache)
    output = bare.model(**{name: ids}, **options)
    for _ in range(tokens - 1 if bare.causal else 0):
        scores = output.logits if hasattr(output, "logits") else output[0]
        output = bare.model(**{name: scores[:, -1].argmax(-1, keepdim=True)}, **options)


def held_out_pairs(bare: BareModel, sizes: list[int], prompt: int, generated: int) -> list[tuple[int, int]]:
    """(prompt, generated) that no point of the fit is: prompts between its sizes, and the workload itself."""
    between = [(low + high) // 2 for low, high in pairwise(sizes) if high - low > 1]
    if not bare.causal:
        return [(size, 0) for size in between[-3:]]
    answers = (max(generated // 8, 2), max(generated // 4, 3), max(generated // 2, 4))
    asked = zip(between[-3:], answers[::-1], strict=False)
    pairs = [(size, min(answer, sizes[-1] - size)) for size, answer in asked if sizes[-1] - size > 1]
    return [*pairs, (prompt, generated)] if generated > 1 and prompt + generated <= sizes[-1] + 1 else pairs


class Check:
    """Runs the pairs in turn, one after each round, so that a machine that slows down slows both sides of the comparison."""

    def __init__(self, bare: BareModel, batch: int, pairs: list[tuple[int, int]]):
        self.bare, self.batch, self.pairs = bare, batch, pairs
        self.times: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        for index in range(len(bare.blocks)):
            bare.fill(index)
        generate(bare, self._ids(pairs[0][0]), 2)

    def _ids(self, prompt: int) -> torch.Tensor:
        return next(iter(self.bare.inputs(self.batch, prompt).values()))

    def run_next(self, number: int) -> None:
        prompt, generated = pair = self.pairs[number % len(self.pairs)]
        if self.times[pair] and self.times[pair][0] > LONGEST_SECONDS:
            return
        ids = self._ids(prompt)
        self.times[pair].append(seconds(lambda: generate(self.bare, ids, generated), self.bare.device))

    def rows(self, fits: Fits) -> list[dict]:
        """Predicted and measured seconds of each pair, the median of its runs."""
        rows = []
        for (prompt, generated), times in self.times.items():
            predicted, low, high = fits.total(prompt, generated)
            measured = float(np.median(times)) if times else None
            rows.append(
                {
                    "prompt": prompt,
                    "generate": generated,
                    "predicted_seconds": predicted,
                    "interval_seconds": [low, high],
                    "measured_seconds": measured,
                    "runs": len(times),
                    "error": predicted / measured - 1 if measured else None,
                }
            )
        return rows

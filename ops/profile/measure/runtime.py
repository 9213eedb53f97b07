"""The time of any prompt and answer from the times of single blocks.

T(p, o) = T_prompt(p) + sum of t_token(context) over the o - 1 steps after the first token, T_prompt piecewise linear in p,
t_token linear in what is in the cache ("Cheaply Evaluating Inference Efficiency", arXiv 2305.02440). Both are times of
blocks times how many there are, plus embedding and head. All points are measured in rounds, each of which gives a fit of its
own, so that the spread of the fits has in it how the machine wavers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tersor.ops.model.bare import BareModel, Kind
from tersor.ops.profile.measure.stand import Stand

PROMPTS, CONTEXTS = 6, 3
MIN_ROUNDS, MAX_ROUNDS = 5, 15
BUDGET_SECONDS = 60.0
LONG_SECONDS = 0.05  # blocks that take longer run one at a time
SMALLEST_PROMPT = 8
# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True)
class Steps:
    """`count` equal parts of a step that takes base + slope * min(context, window) seconds each."""

    count: int
    base: float
    slope: float
    window: int | None = None

    def at(self, context: np.ndarray) -> np.ndarray:
        seen = context if self.window is None else np.minimum(context, self.window)
        return self.count * np.maximum(self.base + self.slope * seen, 0.0)


@dataclass(frozen=True)
class Fit:
    """`prompt_seconds` at `sizes` tokens; `steps` is empty for a model that does not generate."""

    sizes: tuple[int, ...]
    prompt_seconds: tuple[float, ...]
    steps: tuple[Steps, ...]

    def prompt(self, tokens: int) -> float:
        """Piecewise linear; beyond the ends the first and last pieces go on."""
        sizes, times = self.sizes, self.prompt_seconds
        if len(sizes) == 1:
            return times[0] * tokens / sizes[0]
        place = min(max(int(np.searchsorted(sizes, tokens)), 1), len(sizes) - 1)
        low, high = place - 1, place
        slope = (times[high] - times[low]) / (sizes[high] - sizes[low])
        return max(times[low] + slope * (tokens - sizes[low]), 0.0)

    def step(self, context: float) -> float:
        """Seconds of the token that is added when `context` tokens are in the cache."""
        return float(sum(part.at(np.array([context], dtype=float))[0] for part in self.steps))

    def total(self, prompt: int, generate: int) -> float:
        """Reading `prompt` tokens, which gives the first token, and `generate` - 1 further steps."""
        if not self.steps or generate < 2:
            return self.prompt(prompt)
        contexts = np.arange(prompt, prompt + generate - 1, dtype=float)
        return self.prompt(prompt) + float(sum(part.at(contexts).sum() for part in self.steps))


class Fits:
    """One fit per round; numbers are the median over the rounds, intervals hold the next run with 95 %."""

    def __init__(self, fits: list[Fit]):
        self.fits = fits

    def interval(self, value: Callable[[Fit], float]) -> tuple[float, float, float]:
        """(median, lower, upper) of `value` over the rounds, with Student's t on a spread that outliers do not blow up."""
        values = np.array([value(fit) for fit in self.fits])
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        runs = len(values)
        half = 0.0 if runs < 2 else T_95[min(runs, len(T_95) + 1) - 2] * (high - low) / 1.349 * math.sqrt(1 + 1 / runs)
        return float(middle), float(max(middle - half, 0.0)), float(middle + half)

    def total(self, prompt: int, generate: int) -> tuple[float, float, float]:
        return self.interval(lambda fit: fit.total(prompt, generate))


def prompt_sizes(bare: BareModel, longest: int) -> list[int]:
    """About PROMPTS sizes in a geometric row up to `longest`, which the model's context limits."""
    limit = getattr(bare.text_config, "max_position_embeddings", None) or longest + 2
    top = max(min(longest, limit - 2), 2)
    bottom = min(max(SMALLEST_PROMPT, top // 32), top)
    return sorted({int(size) for size in np.geomspace(bottom, top, PROMPTS).round()})


def measure_rounds(
    bare: BareModel,
    kinds: list[Kind],
    stands: list[Stand],
    progress: Callable[[int, int], None] = lambda done, total: None,
    after_round: Callable[[int], None] = lambda number: None,
    budget_seconds: float = BUDGET_SECONDS,
) -> tuple[list[Fit], dict]:
    """A fit per round, and the samples: (kind, "prompt" or "step") → tokens → seconds of one block in each round."""
    contexts = stands[1::2][-CONTEXTS:] if len(stands) > CONTEXTS else stands
    samples: dict[tuple[str, str], dict[int, list[float]]] = {}

    def note(part: str, what: str, tokens: int, value: float) -> float:
        samples.setdefault((part, what), {}).setdefault(tokens, []).append(value)
        return value

    fits: list[Fit] = []
    began = time.perf_counter()
    while len(fits) < MIN_ROUNDS or (len(fits) < MAX_ROUNDS and time.perf_counter() - began < budget_seconds):
        progress(len(fits), MAX_ROUNDS)
        prompts, steps = [], []
        for stand in stands:
            total = note("shell", "prompt", stand.tokens, stand.prompt_shell())
            for kind in kinds:
                seen = samples.get((kind.name, "prompt"), {}).get(stand.tokens)
                blocks = stand.chosen[kind.name]
                if not seen or seen[0] > LONG_SECONDS:  # one block, another one each round
                    blocks = [blocks[len(fits) % len(blocks)]]
                total += len(kind.layers) * note(kind.name, "prompt", stand.tokens, stand.prompt(kind.name, blocks))
            prompts.append(total)
        if bare.causal:
            for kind in kinds:
                times = [note(kind.name, "step", stand.tokens, stand.step(kind.name)) for stand in contexts]
                steps.append(fit_steps(len(kind.layers), [s.tokens for s in contexts], times, _window(bare, kind)))
            times = [note("shell", "step", stand.tokens, stand.step_shell()) for stand in contexts]
            steps.append(fit_steps(1, [s.tokens for s in contexts], times, None))
        fits.append(Fit(tuple(stand.tokens for stand in stands), tuple(prompts), tuple(steps)))
        after_round(len(fits) - 1)
    return fits, samples


def fit_steps(count: int, contexts: list[int], times: list[float], window: int | None) -> Steps:
    """Least squares; a slope below zero is noise and becomes zero."""
    seen = np.minimum(contexts, window) if window else np.array(contexts)
    if len(set(seen.tolist())) < 2:
        return Steps(count, float(np.mean(times)), 0.0, window)
    slope, base = np.polyfit(seen, times, 1)
    if slope < 0:
        return Steps(count, float(np.mean(times)), 0.0, window)
    return Steps(count, float(base), float(slope), window)


def _window(bare: BareModel, kind: Kind) -> int | None:
    """What the blocks of this kind see of the past, where the model says so."""
    for module in bare.blocks[kind.layers[0]].modules():
        window = getattr(module, "sliding_window", None)
        if isinstance(window, int) and window > 0 and getattr(module, "is_sliding", True):
            return window
    return None

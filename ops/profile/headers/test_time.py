"""What answers cost when many are sampled and each is long: Kinetics (arXiv 2506.05333), with exact sums.

Cost is in equivalent FLOPs: arithmetic, plus bytes times the FLOPs that the device could do while it reads one byte. Per
generated token a model does 2 FLOPs for each active weight and reads the cache of everything attended to. Two things
differ from the published code: sums over tokens are exact instead of integrals, and the budget of a top-k attention is
corrected: for C tokens of prompt and G generated, sum of min(C + t, B) is about B G - (B - C)^2 / 2, where the
published plain top-k has plus. The bytes of the weights, left out there, are shared by the sequences of a batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tersor.ops.model.facts import Attention, Facts


@dataclass(frozen=True)
class Sparse:
    """Attention that reads `budget` tokens a step; with `block`, it looks for them by one vector per `block` tokens."""

    budget: int
    block: int | None = None


@dataclass(frozen=True)
class Cost:
    """Of `trials` answers to one prompt."""

    linear_flops: float
    attention_flops: float
    weight_bytes: float
    cache_bytes: float

    def equivalent_flops(self, flops_per_byte: float) -> float:
        return self.linear_flops + self.attention_flops + flops_per_byte * (self.weight_bytes + self.cache_bytes)

    def attention_share(self, flops_per_byte: float) -> float:
        return (self.attention_flops + flops_per_byte * self.cache_bytes) / self.equivalent_flops(flops_per_byte)


def attended(context: int, generate: int, budget: int | None = None) -> int:
    """Tokens that `generate` steps attend to after `context`: the sum of min(context + t, budget) for t = 0 …"""
    growing = generate if budget is None else max(0, min(generate, budget - context))
    return growing * context + growing * (growing - 1) // 2 + (generate - growing) * (budget or 0)


def answers(
    attention: dict[Attention, int],
    active_params: float,
    context: int,
    generate: int,
    trials: int = 1,
    sparse: Sparse | None = None,
    cache_bytes_per_number: float = 2,
    weight_bytes: float = 0,
    batch: int = 1,
) -> Cost:
    """`trials` answers of `generate` tokens to a prompt of `context`, whose cache they share and read together.

    `attention` counts layers by their kind; a layer's window is a budget of its own. Tokens that a sparse attention picks
    differ from answer to answer, so nothing is shared then. `batch` prompts are answered at once.
    """
    flops = read = 0.0
    for spec, layers in attention.items():
        if spec.recurrent:
            continue
        limits = [limit for limit in (spec.window, sparse and sparse.budget) if limit]
        budget = min(limits, default=None)
        pairs = attended(context, generate, budget)
        width = 2 * spec.latent[0] + spec.latent[1] if spec.latent else spec.key_dim + spec.value_dim
        flops += layers * trials * 2 * spec.heads * width * pairs
        if sparse and sparse.block:
            flops += (
                layers
                * trials
                * 2
                * spec.heads
                * spec.key_dim
                * attended(context, generate, spec.window)
                / sparse.block
            )
        own = attended(0, generate, budget)  # of the answer's own tokens, which come first where a window closes
        tokens = trials * pairs if sparse else (pairs - own) + trials * own
        read += layers * spec.cached_numbers * cache_bytes_per_number * tokens
    return Cost(
        linear_flops=trials * 2 * active_params * generate,
        attention_flops=flops,
        weight_bytes=generate * weight_bytes / batch,
        cache_bytes=read,
    )


def crossover_tokens(facts: Facts, weight_bytes: float, batch: int) -> int | None:
    """The context at which a step of `batch` sequences reads as much cache as weights; None where it never does."""
    numbers = Counter(facts.attends)

    def cache(context: int) -> float:
        return (
            batch
            * facts.cache_bytes_per_number
            * sum(
                layers * spec.cached_numbers * min(context, spec.window or context) for spec, layers in numbers.items()
            )
        )

    growing = sum(layers * spec.cached_numbers for spec, layers in numbers.items() if spec.window is None)
    if not growing:
        return None
    low, high = 0, int(weight_bytes / (batch * facts.cache_bytes_per_number * growing)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cache(middle) >= weight_bytes else (middle, high)
    return high


def answer_costs(
    facts: Facts,
    active_params: float,
    weight_bytes: float,
    flops_per_byte: float,
    batch: int,
    context: int,
    lengths: list[int],
    trials: list[int],
) -> dict:
    """The report's `test_time`: a row per length and number of trials, and what smaller weights or cache would save."""
    attention = Counter(facts.attends)
    rows = []
    for generate in lengths:
        for number in trials:
            usual = (attention, active_params, context, generate, number, None)
            whole = answers(*usual, facts.cache_bytes_per_number, weight_bytes, batch)
            weights = answers(*usual, facts.cache_bytes_per_number, weight_bytes / 4, batch)
            cache = answers(*usual, facts.cache_bytes_per_number / 2, weight_bytes, batch)
            cost = whole.equivalent_flops(flops_per_byte)
            rows.append(
                {
                    "generated_tokens": generate,
                    "trials": number,
                    "equivalent_flops": cost,
                    "attention_share": whole.attention_share(flops_per_byte),
                    "share_left_with_quarter_weights": weights.equivalent_flops(flops_per_byte) / cost,
                    "share_left_with_half_cache": cache.equivalent_flops(flops_per_byte) / cost,
                }
            )
    return {
        "flops_per_byte": flops_per_byte,
        "batch": batch,
        "prompt_tokens": context,
        "crossover_tokens": crossover_tokens(facts, weight_bytes, batch),
        "rows": rows,
    }

"""What attention keeps per token, and how long a context fits next to the weights."""

from __future__ import annotations

from collections import Counter

from tersor.formats.hardware import Hardware
from tersor.ops.model.facts import Facts

USABLE = 0.9  # of a device's memory; the rest is for activations, the runtime and what cannot be used in between
LONGEST = 1 << 40


def cache_bytes(facts: Facts, context: int) -> int:
    """Of one sequence with `context` tokens: layers with a window keep that many."""
    numbers = sum(
        attention.cached_numbers * (context if attention.window is None else min(context, attention.window))
        for attention in facts.attends
    )
    return numbers * facts.cache_bytes_per_number


def per_token_bytes(facts: Facts) -> int:
    """What one more token takes while it is inside every window."""
    return cache_bytes(facts, 1)


def devices_needed(facts: Facts, weight_bytes: int, hardware: Hardware, batch: int, context: int) -> int:
    """The smallest power of two that holds the weights and the cache of `batch` sequences."""
    need = weight_bytes + (batch * cache_bytes(facts, context) if facts.causal else 0)
    devices = 1
    while devices * hardware.memory_bytes * USABLE < need:
        devices *= 2
    return devices


def longest_context(facts: Facts, weight_bytes: int, hardware: Hardware, batch: int, devices: int) -> int | None:
    """Tokens of each of `batch` sequences that fit; None where length does not matter, 0 where nothing fits."""
    room = devices * hardware.memory_bytes * USABLE - weight_bytes
    if room < batch * cache_bytes(facts, 1):
        return 0
    low, high = 1, LONGEST
    if batch * cache_bytes(facts, high) <= room:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if batch * cache_bytes(facts, middle) <= room else (low, middle)
    return low


def kv_cache(facts: Facts, weight_bytes: int, hardware: Hardware, batch: int, context: int, devices: int) -> dict:
    """The report's `kv_cache`: by kind of layer, for the workload, and what fits."""
    kinds = Counter(facts.attends)
    layers = [
        {
            "kind": attention.kind,
            "layers": count,
            "bytes_per_token": count * attention.cached_numbers * facts.cache_bytes_per_number,
            "window_tokens": attention.window,
            "kv_heads": attention.kv_heads,
            "latent": list(attention.latent) if attention.latent else None,
        }
        for attention, count in kinds.items()
    ]
    growing = sum(row["bytes_per_token"] for row in layers if row["window_tokens"] is None)
    return {
        "layers": layers,
        "bytes_per_token": per_token_bytes(facts),
        "bytes_per_token_past_windows": growing,
        "bytes_per_number": facts.cache_bytes_per_number,
        "workload_bytes": batch * cache_bytes(facts, context),
        "longest_context_tokens": longest_context(facts, weight_bytes, hardware, batch, devices),
        "trained_context_tokens": facts.context,
        "usable_share": USABLE,
    }

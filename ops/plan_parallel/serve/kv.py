"""What a sequence keeps in the cache, on one device, and what it takes to bring it to another.

Keys and values are cut over tensor-parallel ranks by heads; where there are more ranks than heads they are copied, unless
decode context parallelism cuts them by tokens. What latent attention keeps has no heads, so that every rank holds it.
Layers with a window keep that many tokens; recurrent layers keep a state of fixed size, which is not counted.
"""

from __future__ import annotations

from tersor.ops.model.facts import Attention


def kept_tokens(attention: Attention, context: int) -> int:
    return context if attention.window is None else min(context, attention.window)


def sequence_bytes(attention: Attention | None, context: int, number_bytes: int) -> int:
    """Of one layer and one sequence with `context` tokens, all devices together and without copies."""
    if attention is None:
        return 0
    return attention.cached_numbers * kept_tokens(attention, context) * number_bytes


def cache_share(attention: Attention, tp: int, dcp: int = 1) -> float:
    """The part of it on one rank."""
    heads = 1 if attention.latent else attention.kv_heads
    return 1 / (min(tp, heads) * dcp)


def transfer_seconds(nbytes: float, senders: int, receivers: int, gbps: float) -> float:
    """Until the cache of a prompt has gone from the devices that read it to those that answer: every device of the side
    with fewer works at `gbps` (10^9 bytes a second) on its part."""
    return nbytes / (min(senders, receivers) * gbps * 1e9)

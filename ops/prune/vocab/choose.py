"""Which tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def choose_tokens(
    counts: Mapping[int, int],
    tokens: set[int],
    essential: set[int],
    closure: Callable[[int], set[int]],
    room: int,
    rows: int,
) -> list[int]:
    """`room` of `rows` ids, in order: the essential ones, then the most frequent of `tokens` with all they are made of.

    Among equals the lower id goes first, which is the one that the tokenizer's own training found more useful. A token
    that does not fit with its parts gives way to the next. Rows without a token fill what is left. Raises ValueError
    when the essential ones do not fit.
    """
    kept: set[int] = set().union(*(closure(number) for number in essential)) if essential else set()
    if len(kept) > room:
        raise ValueError(f"{len(kept)} tokens have to stay")
    order = sorted(tokens - kept, key=lambda number: (-counts.get(number, 0), number))
    added = True
    while added and len(kept) < room:  # again, since a token may fit once another has brought its parts
        added = False
        for number in order:
            if number not in kept:
                needed = closure(number) - kept
                if len(kept) + len(needed) <= room:
                    kept |= needed
                    added = True
            if len(kept) == room:
                break
    spare = (number for number in range(rows) if number not in tokens and number not in kept)
    while len(kept) < room:
        kept.add(next(spare))
    return sorted(kept)

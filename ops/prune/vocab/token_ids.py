"""Token ids in config.json, generation_config.json and the tokenizer's own settings."""

from __future__ import annotations

import re

IS_ID = re.compile(r"_token_ids?$|_token_index$|_token_indexes$|^(begin_)?suppress_tokens$|^bad_words_ids$")
POSITIONED = "forced_decoder_ids"  # pairs of a position and an id


def find_ids(value: object) -> set[int]:
    """Every token id that a JSON value speaks of."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _map(value, note)
    return found


def map_ids(value: object, numbers: dict[int, int]) -> object:
    """A copy with new ids; what is no id of the old vocabulary (-1, None) stays."""
    return _map(value, lambda number: numbers.get(number, number))


def _map(value: object, change, inside: bool = False) -> object:
    if isinstance(value, dict):
        return {key: _map_entry(key, item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change, inside) for item in value]
    return change(value) if inside and type(value) is int else value


def _map_entry(key: str, item: object, change) -> object:
    if key == POSITIONED and isinstance(item, list):
        return [[pair[0], *_map(pair[1:], change, True)] if isinstance(pair, list) else pair for pair in item]
    if key == "added_tokens_decoder" and isinstance(item, dict):  # of tokenizer_config.json: ids are the keys
        return {str(change(int(number))): token for number, token in item.items()}
    return _map(item, change, bool(IS_ID.search(key)))

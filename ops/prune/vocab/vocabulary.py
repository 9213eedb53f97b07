"""The tokens of a tokenizer.json: which of them others are made from, which must stay, and the file without the rest.

A text can still be written with what is left, since whatever a removed token stood for can be written with shorter ones:
byte-pair merges start from single characters or bytes, and for WordPiece and Unigram a token goes only when each of its
characters is a token as well.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path

from tersor.formats.errors import TersorError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
HINT = "load it once with transformers' AutoTokenizer and call save_pretrained, which writes a tokenizer.json"


class Vocabulary:
    """`tokens`: id -> string, added tokens included. `essential`: ids that stay whatever the text says."""

    def __init__(self, folder: Path):
        """Raises TersorError when there is no tokenizer.json, or one whose tokens cannot be removed one by one."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TersorError(f"{folder}: has no tokenizer.json, and only that kind of tokenizer can be cut", HINT)
        try:
            self.content = json.loads(path.read_text("utf-8"))
            self.model = self.content["model"]
            self.added = {token["id"]: token["content"] for token in self.content.get("added_tokens") or []}
            self._read(self.model.get("type") or ("BPE" if "merges" in self.model else "WordPiece"))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise TersorError(f"{path}: is not a tokenizer that can be read ({error!r})", HINT) from error
        self.tokens |= self.added

    def _read(self, kind: str) -> None:
        self.kind = kind
        self.parts: dict[int, tuple[int, int]] = {}  # a token that two others are merged into -> these two
        if kind == "Unigram":
            self.tokens = {number: piece for number, (piece, _) in enumerate(self.model["vocab"])}
        elif kind in ("BPE", "WordPiece"):
            self.tokens = {number: token for token, number in self.model["vocab"].items()}
        else:
            raise TersorError(
                f"a tokenizer of kind {kind} has no shorter tokens to write a removed one with", "keep its vocabulary"
            )
        self.ids = {token: number for number, token in self.tokens.items()}
        self.essential = set(self.added) | _template_ids(self.content.get("post_processor"))
        unknown = self.model.get("unk_id") if kind == "Unigram" else self.ids.get(self.model.get("unk_token"))
        if unknown is not None:
            self.essential.add(unknown)
        singles = {token for token in self.tokens.values() if len(self.core(token)) == 1}
        bytes_ = {token for token in self.tokens.values() if self.model.get("byte_fallback") and BYTE.fullmatch(token)}
        self.essential |= {self.ids[token] for token in singles | bytes_}
        if kind == "BPE":
            self._read_merges()
        elif len(bytes_) < 256:
            self.essential |= {number for number, token in self.tokens.items() if not self._spelled(token, singles)}

    def core(self, token: str) -> str:
        """A token without the marks that say whether it begins or ends a word."""
        prefix, suffix = self.model.get("continuing_subword_prefix"), self.model.get("end_of_word_suffix")
        if prefix and token.startswith(prefix) and token != prefix:
            token = token.removeprefix(prefix)
        return token.removesuffix(suffix) if suffix and token != suffix else token

    def _spelled(self, token: str, singles: set[str]) -> bool:
        """Whether every character of a WordPiece or Unigram token is a token in its place."""
        if self.kind == "Unigram":
            return all(character in singles for character in token)
        prefix = self.model.get("continuing_subword_prefix") or ""
        inside = token.startswith(prefix) and bool(prefix)
        return all(
            (prefix + character if inside or place else character) in singles
            for place, character in enumerate(self.core(token))
        )

    def _read_merges(self) -> None:
        pairs = [
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in self.model["merges"]
        ]
        prefix = self.model.get("continuing_subword_prefix") or ""
        self.merges = [(left, right, left + right.removeprefix(prefix)) for left, right in pairs]
        ways: dict[str, list[int]] = {}
        for rank, (_, _, result) in enumerate(self.merges):
            ways.setdefault(result, []).append(rank)
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        for token, ranks in ways.items():
            rank = ranks[0] if len(ranks) == 1 else self._last_merge(token)
            if rank is not None:
                left, right, _ = self.merges[rank]
                self.parts[self.ids[token]] = self.ids[left], self.ids[right]

    def _last_merge(self, token: str) -> int | None:
        """The merge that completes `token` when it is written by itself; None when it is not reached."""
        prefix, suffix = self.model.get("continuing_subword_prefix") or "", self.model.get("end_of_word_suffix") or ""
        characters = list(self.core(token))
        if prefix:
            inside = token.startswith(prefix)
            characters = [prefix + c if inside or place else c for place, c in enumerate(characters)]
        if suffix and token.endswith(suffix):
            characters[-1] += suffix
        last = None
        while len(characters) > 1:
            ranked = [self._ranks.get(pair) for pair in itertools.pairwise(characters)]
            best = min((rank for rank in ranked if rank is not None), default=None)
            if best is None:
                return None
            place, last = ranked.index(best), best
            characters[place : place + 2] = [self.merges[best][2]]
        return last

    def closure(self, number: int) -> set[int]:
        """A token and all it is merged from."""
        found, waiting = set(), [number]
        while waiting:
            token = waiting.pop()
            if token not in found:
                found.add(token)
                waiting += self.parts.get(token, ())
        return found

    def rewritten(self, numbers: dict[int, int]) -> dict:
        """tokenizer.json with the tokens of `numbers` only, old id -> new id."""
        content = copy.deepcopy(self.content)
        model = content["model"]
        kept = {token: numbers[number] for token, number in self.ids.items() if number in numbers}
        if self.kind == "Unigram":
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
            if model.get("unk_id") is not None:
                model["unk_id"] = numbers[model["unk_id"]]
        else:
            model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
        if self.kind == "BPE":
            model["merges"] = [
                merge
                for merge, parts in zip(model["merges"], self.merges, strict=True)
                if all(part in kept for part in parts)
            ]
        for token in content.get("added_tokens") or []:
            token["id"] = numbers[token["id"]]
        if (content.get("padding") or {}).get("pad_id") in numbers:
            content["padding"]["pad_id"] = numbers[content["padding"]["pad_id"]]
        content["post_processor"] = _with_template_ids(content.get("post_processor"), numbers)
        return content


def _template_ids(node: object) -> set[int]:
    """Ids that a post-processor puts around a text."""
    found: set[int] = set()
    _with_template_ids(node, _Collector(found))
    return found


class _Collector(dict):
    """A map that notes what it is asked for and gives it back."""

    def __init__(self, found: set[int]):
        super().__init__()
        self.found = found

    def __getitem__(self, key: int) -> int:
        self.found.add(key)
        return key


def _with_template_ids(node: object, numbers: dict[int, int]) -> object:
    """A copy of a post-processor with new ids: `ids` of templates, `sep` and `cls` of BERT's and RoBERTa's."""
    if isinstance(node, list):
        return [_with_template_ids(item, numbers) for item in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        if key == "ids" and isinstance(value, list):
            result[key] = [numbers[number] for number in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            result[key] = [value[0], numbers[value[1]]]
        else:
            result[key] = _with_template_ids(value, numbers)
    return result

"""The sub-networks that are trained: shares of neurons and heads, the same in all blocks or one for each, and depths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from tersor.formats.elastic import KEYS, WIDTHS, SubNetwork, kept_count
from tersor.formats.errors import TersorError
from tersor.ops.distill.elastic.costs import Costs
from tersor.ops.distill.elastic.order import Order

SHARES = {"neurons": (1.0, 0.75, 0.5), "heads": (1.0, 0.75, 0.5), "depth": (1.0, 0.75, 0.5)}
LEVELS = 8
TRIES = 64  # random sub-networks that are looked at for one of the wanted size


class Space:
    """All sub-networks of a model, their sizes, and levels of FLOPs: the range from the smallest to the largest in equal
    parts, level 0 the smallest. Levels in which no sub-network was found are not used."""

    def __init__(
        self,
        order: Order,
        shares: dict[str, Sequence[float]] | None = None,
        per_block: bool = False,
        multiple_of: int = 1,
        seq_len: int = 256,
        levels: int = LEVELS,
    ):
        """Raises TersorError for shares that are none, or that leave nothing to choose."""
        self.nesting = order.nesting
        self.nesting.multiple_of, self.nesting.per_block = multiple_of, per_block
        self.per_block = per_block
        shares = SHARES | dict(shares or {})
        self.options = {key: self._distinct(key, shares[key], order) for key in KEYS}
        self.nesting.options = self.options
        if all(len(found) == 1 for found in self.options.values()):
            why = "; ".join(order.reasons) or "the shares that are asked for keep everything"
            raise TersorError(f"--elastic: there is one network only: {why}", "train without --elastic")
        self.costs = Costs(order, seq_len)
        self.largest = self.nesting.network()
        self.smallest = self.nesting.network(*(self.options[key][-1] for key in KEYS))
        self.nesting.networks = {"largest": self.largest, "smallest": self.smallest}
        self.uniform = sorted(dict.fromkeys(self._uniform()), key=self.costs.flops)
        low, high = self.costs.flops(self.smallest), self.costs.flops(self.largest)
        self.edges = [low + (high - low) * level / levels for level in range(levels + 1)]
        self.members: dict[int, list[SubNetwork]] = {}
        for network in self.uniform:
            self.members.setdefault(self.level(network), []).append(network)
        if per_block:
            for level in range(levels):
                found = self._search(level, Random(f"level {level}"))
                if found is not None and level not in self.members:
                    self.members[level] = [found]
        self.levels = sorted(self.members)

    def _distinct(self, key: str, shares: Sequence[float], order: Order) -> tuple[float, ...]:
        """Descending, from 1 on, without those that keep no fewer units than a larger one."""
        for share in shares:
            if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
                raise TersorError(f"--elastic: {key} {share!r} is not a share", "above 0 and at most 1")
        if key == "depth":
            counts = {len(self.nesting.blocks): 1}
        else:
            counts = {group.count: self.nesting.multiple_of for group in order.units.get(key, ())}
        result, seen = [], set()
        for share in sorted({1.0, *map(float, shares)}, reverse=True):
            kept = tuple(kept_count(count, share, multiple) for count, multiple in counts.items())
            if kept not in seen:
                seen.add(kept)
                result.append(share)
        return tuple(result)

    def _uniform(self) -> Iterator[SubNetwork]:
        for shares in itertools.product(*(self.options[key] for key in KEYS)):
            yield self.nesting.network(*shares)

    def level(self, network: SubNetwork) -> int:
        """Which part of the range of FLOPs it is in."""
        flops, count = self.costs.flops(network), len(self.edges) - 1
        span = self.edges[-1] - self.edges[0]
        return min(count - 1, max(0, int((flops - self.edges[0]) / span * count)))

    def draw(self, level: int, rng: Random) -> SubNetwork:
        """A random sub-network of a level that is among `levels`."""
        if self.per_block:
            found = self._search(level, rng)
            if found is not None:
                return found
        return rng.choice(self.members[level])

    def anything(self, rng: Random) -> SubNetwork:
        """A sub-network with random shares."""
        depth = rng.choice(self.options["depth"])
        if not self.per_block:
            return self.nesting.network(*(rng.choice(self.options[kind]) for kind in WIDTHS), depth)
        widths = ([rng.choice(self.options[kind]) for _ in self.nesting.blocks] for kind in WIDTHS)
        return self.nesting.network(*widths, depth)

    def _search(self, level: int, rng: Random) -> SubNetwork | None:
        """A random sub-network, moved step by step towards the level where it is not in it."""
        steps = 2 * len(WIDTHS) * len(self.nesting.blocks) * max(map(len, self.options.values()))
        for _ in range(TRIES):
            network = self.anything(rng)
            direction = 0
            for _ in range(steps):
                found = self.level(network)
                if found == level:
                    return network
                towards = 1 if found < level else -1
                if direction == -towards:
                    break  # it jumped over the level
                direction = towards
                moved = self._moved(network, towards, rng)
                if moved is None:
                    break
                network = moved
        return None

    def _moved(self, network: SubNetwork, towards: int, rng: Random) -> SubNetwork | None:
        """The sub-network with one share a step larger (1) or smaller (-1); None where none can be."""
        choices = []
        for kind in WIDTHS:
            options = self.options[kind]
            for block, share in enumerate(network.shares(kind)):
                place = options.index(share) - towards if share else -1
                if 0 <= place < len(options):
                    choices.append((kind, block, options[place]))
        place = self.options["depth"].index(network.depth) - towards
        if 0 <= place < len(self.options["depth"]):
            choices.append(("depth", 0, self.options["depth"][place]))
        if not choices:
            return None
        kind, block, share = rng.choice(choices)
        if kind == "depth":
            widths = ([share_ or rng.choice(self.options[k]) for share_ in network.shares(k)] for k in WIDTHS)
            return self.nesting.network(*widths, share)
        shares = list(network.shares(kind))
        shares[block] = share
        return replace(network, **{kind: tuple(shares)})

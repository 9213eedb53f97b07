"""Which sub-networks train in each step.

Sandwich rule (Yu and Huang, ICCV 2019): the largest, a smallest, and random ones in between. From ElasticViT (Tang et al.,
ICCV 2023): the FLOPs of the random ones change by few levels from step to step, so that steps that follow each other do
not pull towards very different sizes; the smallest one is that of the size class in which the level lies, of several; and
a bank keeps the best sub-networks of each level, from which more and more of the random ones are taken, rather those whose
widths differ from what was drawn last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tersor.formats.elastic import WIDTHS, SubNetwork
from tersor.ops.distill.elastic.space import Space

LEAST = 0.1  # weight of a sub-network of the bank that is just what was drawn last
NEWEST = 0.5  # share of the newest loss in the mean of a sub-network that is seen again
RECENT = 4
REDRAWS = 8


@dataclass(frozen=True)
class Draw:
    """A sub-network of a step. `role` is largest, smallest, random or bank."""

    network: SubNetwork
    role: str


@dataclass
class Entry:
    """A sub-network of the bank and by how much its loss exceeds that of the largest in the same step, on the mean."""

    network: SubNetwork
    loss: float


class Sampler:
    """`sample()` gives the sub-networks of the step at hand, `record(losses)` takes what they lost and goes to the next.

    The same seed and losses give the same sub-networks: every process of a run has to be told the losses of the whole batch.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        steps: int,
        *,
        randoms: int = 2,
        reach: int = 1,
        classes: int = 3,
        bank_size: int = 8,
        most_from_bank: float = 0.8,
    ):
        """`reach`: by how many of the levels in use the next step's may differ. `most_from_bank`: the share of random
        ones that come from the bank at the end of `steps`."""
        self.space, self.seed, self.steps = space, seed, steps
        self.randoms, self.reach, self.bank_size, self.most_from_bank = randoms, reach, bank_size, most_from_bank
        self.smallest = self._smallest_of_classes(classes)
        self.step = 0
        self.level = self._rng("level").choice(space.levels)
        self.bank: dict[int, list[Entry]] = {}
        self.recent: list[SubNetwork] = []

    def _rng(self, what: str) -> Random:
        """Random numbers of this step, whatever was drawn before."""
        return Random(f"{self.seed} {self.step} {what}")

    def _smallest_of_classes(self, classes: int) -> list[SubNetwork]:
        """The smallest uniform sub-network of each size class that has one, ascending; the smallest of all first."""
        space, found = self.space, {}
        low, high = space.edges[0], space.edges[-1]
        for network in space.uniform:  # ascending in FLOPs
            place = min(classes - 1, int((space.costs.flops(network) - low) / (high - low) * classes))
            if network != space.largest:
                found.setdefault(place, network)
        return list(found.values())

    @property
    def bank_probability(self) -> float:
        """Rises from 0 in the first step to `most_from_bank` in the last."""
        return self.most_from_bank * min(1.0, self.step / max(1, self.steps - 1))

    def sample(self) -> list[Draw]:
        """The largest, the smallest of a size class, and random ones of the step's level. The same until `record`."""
        rng, space = self._rng("networks"), self.space
        draws = [Draw(space.largest, "largest"), Draw(self._smallest(), "smallest")]
        recent = list(self.recent)
        for _ in range(self.randoms):
            entries = self.bank.get(self.level)
            if entries and rng.random() < self.bank_probability:
                weights = [LEAST + distance(entry.network, recent) for entry in entries]
                draws.append(Draw(rng.choices(entries, weights)[0].network, "bank"))
            else:
                draws.append(Draw(self._new(draws, rng), "random"))
            recent = [*recent, draws[-1].network][-RECENT:]
        return draws

    def _new(self, draws: list[Draw], rng: Random) -> SubNetwork:
        """A random sub-network of the level that the step does not have yet, if one is found."""
        for _ in range(REDRAWS):
            network = self.space.draw(self.level, rng)
            if all(draw.network != network for draw in draws):
                break
        return network

    def _smallest(self) -> SubNetwork:
        """The largest of the classes' smallest that is no larger than the step's level."""
        ceiling = self.space.edges[self.level + 1]
        return [network for network in self.smallest if self.space.costs.flops(network) < ceiling][-1]

    def record(self, losses: Sequence[float]) -> None:
        """The losses of the sub-networks of `sample()`, in its order. Raises ValueError for another number of them."""
        draws = self.sample()
        if len(losses) != len(draws):
            raise ValueError(f"{len(losses)} losses for {len(draws)} sub-networks")
        for draw, loss in zip(draws[1:], losses[1:], strict=True):
            if math.isfinite(loss - losses[0]):
                self._keep(draw.network, loss - losses[0])
        self.recent = [*self.recent, *(draw.network for draw in draws[2:])][-RECENT:]
        self.step += 1
        levels = self.space.levels
        place = levels.index(self.level)
        self.level = self._rng("level").choice(levels[max(0, place - self.reach) : place + self.reach + 1])

    def _keep(self, network: SubNetwork, loss: float) -> None:
        entries = self.bank.setdefault(self.space.level(network), [])
        known = next((entry for entry in entries if entry.network == network), None)
        if known is not None:
            known.loss += NEWEST * (loss - known.loss)
        else:
            entries.append(Entry(network, loss))
        entries.sort(key=lambda entry: entry.loss)
        del entries[self.bank_size :]

    def best(self) -> dict[str, SubNetwork]:
        """`largest`, `smallest`, and the best of the bank at each level as `level0` and so on."""
        found = {f"level{level}": self.bank[level][0].network for level in sorted(self.bank)}
        return {"largest": self.space.largest, "smallest": self.space.smallest, **found}

    def bank_entries(self) -> list[dict]:
        """The bank as elastic.json has it, networks as SubNetwork."""
        costs = self.space.costs
        return [
            {
                "level": level,
                "loss": entry.loss,
                "parameters": costs.parameters(entry.network),
                "flops": costs.flops(entry.network),
                "network": entry.network,
            }
            for level in sorted(self.bank)
            for entry in self.bank[level]
        ]

    def state_dict(self) -> dict:
        """For JSON."""
        return {
            "step": self.step,
            "level": self.level,
            "bank": {
                str(level): [{"network": _listed(entry.network), "loss": entry.loss} for entry in entries]
                for level, entries in self.bank.items()
            },
            "recent": [_listed(network) for network in self.recent],
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.level = state["step"], state["level"]
        self.bank = {
            int(level): [Entry(_network(entry["network"]), entry["loss"]) for entry in entries]
            for level, entries in state["bank"].items()
        }
        self.recent = [_network(network) for network in state["recent"]]


def distance(network: SubNetwork, others: Sequence[SubNetwork]) -> float:
    """How much the widths differ, blocks that do not run counting as 0: the mean over blocks, kinds and `others`."""
    differences = [
        abs(mine - theirs)
        for other in others
        for kind in WIDTHS
        for mine, theirs in zip(network.shares(kind), other.shares(kind), strict=True)
    ]
    return sum(differences) / len(differences) if differences else 1.0


def _listed(network: SubNetwork) -> dict:
    return {"neurons": list(network.neurons), "heads": list(network.heads), "depth": network.depth}


def _network(content: dict) -> SubNetwork:
    return SubNetwork(tuple(content["neurons"]), tuple(content["heads"]), content["depth"])

"""The order of channels under which a structured pattern keeps most.

N:M (Pool and Yu 2021, "Channel permutations for N:M sparsity"): pairs of stripes of M channels, every pair once in a
sweep, change the two channels with the largest exact gain, if there is one. Where a sweep finds none, a few random swaps
lead out of the optimum and the search goes on; the best order seen counts.

Tiles: what is kept is the largest energy under any mask with the number of tiles that may stay. With the mask held, a
channel is worth a number at each tile, and channels change places while the sum grows; with the order held, the best mask
is the largest tiles. Neither step lowers what is kept. From where this ends, swaps with an exact gain go on, as for N:M.

All work is counted in advance, none is timed: the same importance and seed give the same order on any machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tersor.kernels.loops import over_rows
from tersor.ops.model.fold import gather_index
from tersor.ops.model.patterns import Pattern, removed
from tersor.ops.sparsify.permutation.swaps import exchange, n_of_m_gains, n_of_m_kept, tile_gains

ROUNDS = 64  # in a round every stripe meets one other: most of the gain comes in the first ones
MOST_ROUNDS = 400
SMALL_WORK = 20_000_000  # values times rounds that a small matrix may take, which is less than 0.1 s
ESCAPES = 16  # in a row that lead nowhere better: the end
TILE_WORK = 800_000_000  # multiplications of all swaps of tiles
ITERATIONS = 8
SWEEPS = 2
CLUSTER_PROFILES = 512
LEAST = 1e-6  # share of a stripe's importance below which a gain is rounding
ROUNDING = 1e-12


@dataclass
class Face:
    """How one masked tensor sees the channels.

    `values` `[profiles, places]`: for N:M the importance `[out, in]` itself, for tiles the energies (squares) summed
    over the other side of each tile. `index` `[channels, k]`: the places of each channel.
    """

    values: torch.Tensor
    index: torch.Tensor
    width: int  # neighbouring places that share a group or a tile

    def sums(self, order: torch.Tensor) -> torch.Tensor:
        """Energies of the tiles `[profiles, tiles]` with channel order[c] at the places of channel c."""
        moved = self.values.index_select(1, gather_index(self.index, order, self.values.shape[1]))
        return moved.unflatten(1, (-1, self.width)).sum(2)


def face(importance: torch.Tensor, axis: int, index: torch.Tensor, pattern: Pattern) -> Face | None:
    """The face of a tensor whose channels lie along `axis` of its importance `[out, in]`; None where their order has no
    effect on what the pattern keeps, or the pattern does not fit."""
    if pattern.kind == "unstructured" or pattern.misfit(tuple(importance.shape)):
        return None
    importance = importance.detach().float().clamp_min(0).cpu()
    if pattern.kind == "n:m":
        return None if axis == 0 else Face(importance, index, pattern.m)
    width, across = (pattern.columns, pattern.rows) if axis else (pattern.rows, pattern.columns)
    if width == 1:
        return None
    energy = importance.square() if axis else importance.T.square()
    return Face(energy.unflatten(0, (-1, across)).sum(1).contiguous(), index, width)


def kept(faces: list[Face], order: torch.Tensor, pattern: Pattern, sparsity: float) -> float:
    """What the pattern keeps: the sum of the importance, or for tiles, which are chosen by it, of its square."""
    total = 0.0
    for found in faces:
        if pattern.kind == "n:m":
            source = gather_index(found.index, order, found.values.shape[1]).numpy()
            total += n_of_m_kept(found.values.contiguous().numpy(), source, pattern.n, pattern.m)
        else:
            sums = found.sums(order).flatten()
            stay = sums.numel() - removed(sums.numel(), sparsity)
            total += float(sums.topk(stay, sorted=False).values.sum(dtype=torch.float64))
    return total


def kept_by(importance: torch.Tensor, pattern: Pattern, sparsity: float) -> float:
    """What the pattern keeps of one importance matrix `[out, in]`, as in `kept`."""
    importance = importance.float().clamp_min(0).contiguous()
    if pattern.kind == "n:m":
        return n_of_m_kept(importance.numpy(), np.arange(importance.shape[1]), pattern.n, pattern.m)
    sums = importance.square().unflatten(1, (-1, pattern.columns)).sum(2).unflatten(0, (-1, pattern.rows)).sum(1)
    stay = sums.numel() - removed(sums.numel(), sparsity)
    return float(sums.flatten().topk(stay, sorted=False).values.sum(dtype=torch.float64))


def best_order(
    faces: list[Face], pattern: Pattern, sparsity: float, classes: torch.Tensor | None = None, seed: int = 0
) -> torch.Tensor:
    """The order of the channels `[channels]`: order[c] is the channel that comes to the places of channel c.

    Channels change places only within their class (`classes` `[channels]`; all with all by default). What is kept is
    more than before, or the order is that of now.
    """
    count = faces[0].index.shape[0] if faces else 0 if classes is None else len(classes)
    identity = torch.arange(count)
    if not faces:
        return identity
    classes = torch.zeros(count, dtype=torch.long) if classes is None else classes
    search = _NOfM(faces, pattern, classes, seed) if pattern.kind == "n:m" else _Tiles(faces, sparsity, classes, seed)
    found = search.run()
    before, after = (kept(faces, order, pattern, sparsity) for order in (identity, found))
    return found if after > before * (1 + ROUNDING) else identity


def search(
    readers: list[torch.Tensor],
    writers: list[torch.Tensor],
    pattern: Pattern,
    sparsity: float = 0.5,
    seed: int = 0,
) -> torch.Tensor:
    """`best_order` for channels that are all columns of `readers` and all rows of `writers`, given their importance."""
    count = readers[0].shape[1] if readers else writers[0].shape[0]
    index = torch.arange(count)[:, None]
    sides = [(item, 1) for item in readers] + [(item, 0) for item in writers]
    faces = [found for item, axis in sides if (found := face(item, axis, index, pattern))]
    return best_order(faces, pattern, sparsity, torch.zeros(count, dtype=torch.long), seed)


class _Search:
    """Stripes (places that share all their groups) and the rounds in which they meet."""

    def __init__(self, faces: list[Face], classes: torch.Tensor, seed: int):
        self.faces, self.classes = faces, classes.numpy()
        self.random = np.random.default_rng(seed)
        self.count = len(self.classes)
        groups = [self.classes, *((column // found.width).numpy() for found in faces for column in found.index.T)]
        _, self.group = np.unique(np.stack(groups), axis=1, return_inverse=True)
        self.group = self.group.reshape(-1)
        order = np.argsort(self.group, kind="stable")
        places = np.split(order, np.unique(self.group[order], return_index=True)[1][1:])
        self.places = places  # of every group
        sizes = np.array([len(item) for item in places])
        width = int(np.bincount(sizes).argmax())
        self.stripes = np.stack([item for item in places if len(item) == width])
        self.stripe_class = self.classes[self.stripes[:, 0]]
        self.width = width

    def channels(self) -> list[tuple[torch.Tensor, Face, int]]:
        """(`[channels, profiles]`, the face, which of its places) for every place that a channel has."""
        return [
            (found.values.T.index_select(0, found.index[:, k]).contiguous(), found, k)
            for found in self.faces
            for k in range(found.index.shape[1])
        ]

    def sweep(self) -> Iterator[np.ndarray]:
        """Rounds of disjoint pairs of stripes `[pairs, 2]`; each pair of stripes of one class once (circle method)."""
        rings = []
        for which in np.unique(self.stripe_class):
            ring = self.random.permutation(np.flatnonzero(self.stripe_class == which))
            if len(ring) > 1:
                rings.append(np.append(ring, -1) if len(ring) % 2 else ring)
        for turn in range(max((len(ring) for ring in rings), default=1) - 1):
            met = []
            for ring in rings:
                if turn < len(ring) - 1:
                    turned = np.concatenate([ring[:1], np.roll(ring[1:], turn)])
                    half = len(ring) // 2
                    met.append(np.stack([turned[:half], turned[::-1][:half]], 1))
            pairs = np.concatenate(met)
            yield pairs[(pairs >= 0).all(1)]

    def swap(self, order: np.ndarray, pairs: np.ndarray, gains: np.ndarray, least: float) -> float:
        """Make the best swap of every pair that gains more than `least`. Returns the sum of the gains."""
        flat = gains.reshape(len(pairs), -1)
        best = flat.argmax(1)
        gain = flat[np.arange(len(pairs)), best]
        good = gain > least
        left = self.stripes[pairs[good, 0], best[good] // self.width]
        right = self.stripes[pairs[good, 1], best[good] % self.width]
        order[left], order[right] = order[right], order[left]
        return float(gain[good].sum())

    def shake(self, order: np.ndarray) -> None:
        """A few random swaps: the way out of a local optimum."""
        for _ in range(max(2, len(self.stripes) // 8)):
            one = self.random.integers(len(self.stripes))
            others = np.flatnonzero(self.stripe_class == self.stripe_class[one])
            other = others[self.random.integers(len(others))]
            left, right = self.stripes[[one, other], self.random.integers(self.width, size=2)]
            order[left], order[right] = order[right], order[left]

    def climb(self, order: np.ndarray, rounds: int, total: float) -> np.ndarray:
        """Rounds of best swaps from `order`, with escapes. Returns the best order seen."""
        if not any(np.sum(self.stripe_class == which) > 1 for which in np.unique(self.stripe_class)):
            return order
        least = LEAST * total / max(1, len(self.stripes))
        best, most, now, fruitless = order.copy(), 0.0, 0.0, 0
        while rounds > 0 and fruitless < ESCAPES:
            gained = 0.0
            for pairs in self.sweep():
                gained += self.swap(order, pairs, self.gains(order, pairs), least)
                rounds -= 1
                if rounds <= 0:
                    break
            now += gained
            if now > most + least:
                best, most, fruitless = order.copy(), now, 0
            elif gained == 0:
                fruitless += 1
            if gained == 0 and rounds > 0:
                order = best.copy()
                before = self.kept(order)
                self.shake(order)
                now = most + self.kept(order) - before
        return best

    def sorted_by(self, strength: np.ndarray, snake: bool) -> np.ndarray:
        """Channels of each class by falling strength: into one group after another, or dealt out to all in turns."""
        order = np.arange(self.count)
        for which in np.unique(self.classes):
            groups = [item for item in self.places if self.classes[item[0]] == which]
            channels = np.flatnonzero(self.classes == which)
            channels = channels[np.argsort(-strength[channels], kind="stable")]
            if snake:
                turns = range(max(len(item) for item in groups))
                places = [item[k] for k in turns for item in groups[:: -1 if k % 2 else 1] if k < len(item)]
            else:
                places = np.concatenate(groups)
            order[np.array(places)] = channels
        return order


class _NOfM(_Search):
    def __init__(self, faces: list[Face], pattern: Pattern, classes: torch.Tensor, seed: int):
        super().__init__(faces, classes, seed)
        self.pattern = pattern
        self.values = torch.cat([values for values, _, _ in self.channels()], 1).numpy()
        self.stripes = self.stripes if self.width == pattern.m else self.stripes[:0]

    def kept(self, order: np.ndarray) -> float:
        return kept(self.faces, torch.from_numpy(order), self.pattern, 0.0)

    def gains(self, order: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        gains = np.empty((len(pairs), self.width, self.width))
        view = self.values, order[self.stripes], pairs, self.pattern.n, gains
        over_rows(functools.partial(n_of_m_gains, *view), len(pairs), 16)
        return gains

    def run(self) -> torch.Tensor:
        identity = np.arange(self.count)
        if not len(self.stripes):
            return torch.from_numpy(identity)
        starts = [identity]
        if len(self.stripes) == len(self.places):  # all groups are whole
            starts.append(self.sorted_by(self.values.sum(1, dtype=np.float64), snake=True))
        order = max(starts, key=self.kept)
        rounds = int(min(MOST_ROUNDS, max(ROUNDS, SMALL_WORK // self.values.size)))
        return torch.from_numpy(self.climb(order, rounds, float(self.values.sum(dtype=np.float64))))


class _Tiles(_Search):
    def __init__(self, faces: list[Face], sparsity: float, classes: torch.Tensor, seed: int):
        super().__init__(faces, classes, seed)
        self.sparsity = sparsity
        self.views = self.channels()
        self.first = np.array([item[0] for item in self.places])  # a place of every group
        self.total = sum(float(found.values.sum(dtype=torch.float64)) for found in faces)

    def masks(self, order: np.ndarray) -> tuple[dict[int, torch.Tensor], float]:
        """For each face (by its id) the tiles that stay, float `[profiles, tiles]`; and the energy that they keep."""
        masks, total = {}, 0.0
        for found in self.faces:
            sums = found.sums(torch.from_numpy(order))
            stay = sums.numel() - removed(sums.numel(), self.sparsity)
            largest = sums.flatten().topk(stay, sorted=False)
            masks[id(found)] = torch.zeros(sums.numel()).index_fill(0, largest.indices, 1).view_as(sums)
            total += float(largest.values.sum(dtype=torch.float64))
        return masks, total

    def kept(self, order: np.ndarray) -> float:
        return self.masks(order)[1]

    def alternate(self, order: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
        """Best mask, best places under it, and so on."""
        masks, most = self.masks(order)
        for _ in range(iterations):
            worth = torch.zeros(self.count, len(self.places))
            for values, found, k in self.views:
                tiles = found.index[torch.from_numpy(self.first), k] // found.width
                worth += values @ masks[id(found)].index_select(1, tiles)
            moved, least = order.copy(), np.float32(LEAST * self.total / self.count)
            tables = worth.numpy(), worth.T.contiguous().numpy()
            for _ in range(SWEEPS):
                if not exchange(*tables, self.group, moved, self.classes, least):
                    break
            masks, now = self.masks(moved)
            if now <= most:
                break
            order, most = moved, now
        return order, most

    def clustered(self) -> np.ndarray:
        """One group after another gets the strongest channel that is left and those that are strong where it is."""
        values = torch.cat([values for values, _, _ in self.views], 1)
        if values.shape[1] > CLUSTER_PROFILES:
            chosen = self.random.choice(values.shape[1], CLUSTER_PROFILES, replace=False)
            values = values[:, torch.from_numpy(np.sort(chosen))]
        share = max(1, round(values.shape[1] * (1 - self.sparsity)))
        strength, order = values.sum(1), np.arange(self.count)
        left = torch.ones(self.count, dtype=torch.bool)
        classes = torch.from_numpy(self.classes)
        for places in self.places:
            candidates = (left & (classes == self.classes[places[0]])).nonzero()[:, 0]
            pool = values[candidates]
            profile = pool[int(strength[candidates].argmax())]
            for _ in range(2):
                where = torch.zeros_like(profile).index_fill(0, profile.topk(share).indices, 1)
                chosen = (pool @ where).topk(len(places)).indices
                profile = pool[chosen].sum(0)
            order[places] = candidates[chosen].numpy()
            left[candidates[chosen]] = False
        return order

    def gains(self, order: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        gains = np.zeros((len(pairs), self.width, self.width))
        channels, sums = order[self.stripes], {}
        for found in self.faces:
            now = found.sums(torch.from_numpy(order))
            stay = now.numel() - removed(now.numel(), self.sparsity)
            limit = float(now.flatten().kthvalue(now.numel() - stay + 1).values)
            sums[id(found)] = now.T.contiguous().numpy(), np.float32(limit)
        for values, found, k in self.views:
            tiles = found.index[torch.from_numpy(self.stripes[:, 0]), k].numpy() // found.width
            view = values.numpy(), channels, tiles, *sums[id(found)], pairs, gains
            over_rows(functools.partial(tile_gains, *view), len(pairs), 4)
        return gains

    def climb_exactly(self, order: np.ndarray, most: float) -> np.ndarray:
        """Swaps gain exactly while the limit stands; as it moves with them, what is kept is looked at after each sweep."""
        work = sum(values.shape[1] for values, _, _ in self.views) * len(self.stripes) // 2 * self.width**2
        rounds = int(min(MOST_ROUNDS, TILE_WORK // max(1, work)))
        best, fruitless = order.copy(), 0
        least = LEAST * self.total / max(1, len(self.stripes))
        while rounds > 0 and fruitless < ESCAPES:
            gained = 0.0
            for pairs in self.sweep():
                if rounds <= 0:
                    break
                gained += self.swap(order, pairs, self.gains(order, pairs), least)
                rounds -= 1
            now = self.kept(order)
            if now > most + least:
                best, most, fruitless = order.copy(), now, 0
            elif gained == 0 or now < most:
                fruitless += 1
                order = best.copy()
                self.shake(order)
            rounds -= 1  # also where there are no two stripes that could meet
        return best

    def run(self) -> torch.Tensor:
        strength = sum(values.sum(1, dtype=torch.float64) for values, _, _ in self.views).numpy()
        starts = [np.arange(self.count), self.sorted_by(strength, snake=False), self.clustered()]
        tried = [self.alternate(start, 2) for start in starts]
        order, _ = max(tried, key=lambda found: found[1])
        order, most = self.alternate(order, ITERATIONS)
        return torch.from_numpy(self.climb_exactly(order.copy(), most))

"""Which sub-networks train in each step: sandwich, levels and bank, over a space whose costs are simple."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import pytest
from tersor.formats.elastic import Nesting
from tersor.ops.distill.elastic.order import rank_blocks
from tersor.ops.distill.elastic.sampling import Sampler, distance
from tersor.ops.distill.elastic.space import Space


class Costs:
    """12 blocks; a block costs what it has of 10 neurons and 10 heads."""

    def flops(self, network):
        return 20 + sum(10 * n + 10 * h for n, h in zip(network.neurons, network.heads, strict=True))

    parameters = flops


def simple_space(monkeypatch, per_block=False):
    units = {
        kind: [SimpleNamespace(count=8, module=f"{kind}{b}", block=b) for b in range(12)]
        for kind in ("neurons", "heads")
    }
    nesting = Nesting("magnitude", {}, tuple(rank_blocks(12, {})), [])
    order = SimpleNamespace(nesting=nesting, units=units, reasons=[])
    monkeypatch.setattr("tersor.ops.distill.elastic.space.Costs", lambda order, seq_len: Costs())
    return Space(order, per_block=per_block)


@pytest.mark.parametrize("per_block", [False, True])
def test_sandwich_and_level_walk(monkeypatch, per_block):
    """Every step: the largest, a smallest of several classes, others of one level; that level moves by one at most, over
    all levels."""
    space = simple_space(monkeypatch, per_block)
    sampler = Sampler(space, 3, 300, randoms=3)
    levels, smallest = [], Counter()
    for _ in range(300):
        draws = sampler.sample()
        assert draws == sampler.sample()
        assert [draw.role for draw in draws[:2]] == ["largest", "smallest"] and len(draws) == 5
        assert draws[0].network == space.largest and draws[1].network in sampler.smallest
        assert space.costs.flops(draws[1].network) <= space.edges[sampler.level + 1]
        assert {space.level(draw.network) for draw in draws[2:]} == {sampler.level}
        smallest[draws[1].network] += 1
        levels.append(sampler.level)
        sampler.record([0.0, 0.0, 1.0, 1.0, 1.0])
    assert set(levels) == set(space.levels) and len(space.levels) >= 7
    places = [space.levels.index(level) for level in levels]
    assert max(abs(b - a) for a, b in pairwise(places)) == 1
    assert len(smallest) == len(sampler.smallest) == 3 and min(smallest.values()) > 30
    assert space.smallest in smallest
    if per_block:
        assert any(len(set(draw.network.neurons) - {0}) > 1 for draw in sampler.sample()[2:])


def test_levels_of_a_large_space_are_all_reached(monkeypatch):
    space = simple_space(monkeypatch, per_block=True)
    rng = Random(0)
    assert space.levels == list(range(8))
    for level in space.levels:
        found = {space.draw(level, rng) for _ in range(10)}
        assert len(found) > 5 and {space.level(network) for network in found} == {level}


def test_bank_keeps_the_best_and_is_used_more_and_more(monkeypatch):
    space = simple_space(monkeypatch, per_block=True)
    sampler = Sampler(space, 0, 400, randoms=4, bank_size=5)
    quality, roles = {}, []
    for _ in range(400):
        draws = sampler.sample()
        roles.append(Counter(draw.role for draw in draws))
        # The largest has another loss in each step, which must not matter.
        base = 5.0 + 0.01 * sampler.step
        for draw in draws:
            quality.setdefault(draw.network, sum(draw.network.heads) / 100)
        for draw in draws[2:]:
            if draw.role == "bank":
                assert draw.network in [entry.network for entry in sampler.bank[sampler.level]]
        sampler.record([base] + [base + quality[draw.network] for draw in draws[1:]])
    for level, entries in sampler.bank.items():
        losses = [entry.loss for entry in entries]
        assert losses == sorted(losses) and len(entries) <= 5
        assert losses[0] == pytest.approx(
            min(v for n, v in quality.items() if space.level(n) == level and n != space.largest), abs=1e-9
        )
        assert all(loss == pytest.approx(quality[entry.network]) for loss, entry in zip(losses, entries, strict=True))
    shares = [sum(found["bank"] for found in roles[start : start + 100]) / 400 for start in (0, 100, 200, 300)]
    for share, expected in zip(shares, (0.1, 0.3, 0.5, 0.7), strict=True):
        assert abs(share - expected) < 0.09, shares
    assert roles[0]["bank"] == 0


def test_bank_prefers_other_widths(monkeypatch):
    space = simple_space(monkeypatch)
    sampler = Sampler(space, 0, 2, randoms=1, most_from_bank=1.0)
    near, far = space.nesting.network(1, 0.5), space.nesting.network(0.5, 1)
    assert space.level(near) == space.level(far) and distance(far, [near]) == 0.5
    counts = Counter()
    for seed in range(300):
        sampler.seed, sampler.step, sampler.level = seed, 1, space.level(near)
        sampler.bank, sampler.recent = {}, [near]
        sampler._keep(near, 0.1), sampler._keep(far, 0.1)
        counts[sampler.sample()[2].network] += 1
    assert counts[near] + counts[far] == 300
    assert abs(counts[far] / 300 - 0.6 / 0.7) < 0.07  # weights 0.1 + distance


def test_a_loss_that_is_no_number_is_not_kept(monkeypatch):
    sampler = Sampler(simple_space(monkeypatch), 0, 4)
    sampler.record([1.0, float("nan"), float("inf"), float("nan")])
    assert not any(sampler.bank.values())
    with pytest.raises(ValueError, match="1 losses for 4"):
        sampler.record([1.0])


def test_same_seed_same_networks_and_a_restored_sampler_goes_on(monkeypatch):
    def run(sampler, steps):
        found = []
        for _ in range(steps):
            draws = sampler.sample()
            found.append(draws)
            sampler.record([1.0, *(1 + 0.1 * sum(draw.network.neurons) for draw in draws[1:])])
        return found

    space = simple_space(monkeypatch, per_block=True)
    whole = run(Sampler(space, 7, 40), 40)
    first = Sampler(space, 7, 40)
    assert run(first, 23) == whole[:23]
    second = Sampler(space, 7, 40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, 17) == whole[23:]
    assert run(Sampler(space, 8, 40), 40) != whole

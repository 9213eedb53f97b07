"""The layout algebra: every path, run on arrays of simulated ranks, turns one layout into the other; and it is cheapest."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.dependencies.layout import FREE, R, State, V, placed, refined, steps
from tersor.ops.plan_parallel.dependencies.path import cheapest

SHAPE = (24, 12)


def ring(collective: str, nbytes: float, group) -> float:
    """Ring algorithms at 100 GB/s and 10 microseconds a hop."""
    n = group.ranks
    if collective == "send":
        return 1e-5 + nbytes / 1e11
    passes = {"all_gather": n - 1, "reduce_scatter": n - 1, "all_reduce": 2 * (n - 1), "all_to_all": n - 1}
    return passes[collective] * (1e-5 + nbytes / n / 1e11)


class Ranks:
    """What each rank of a mesh holds."""

    def __init__(self, state: State, held: dict[tuple[int, ...], np.ndarray]):
        self.state, self.held = state, held

    @classmethod
    def of(cls, full: np.ndarray, state: State) -> Ranks:
        generator = np.random.default_rng(0)
        partial = [axis for axis, _ in state.mesh if axis in state.partial]
        values = {}
        for key in product(*(range(state.size(axis)) for axis in partial)):
            values[key] = generator.standard_normal(full.shape)
        last = next(iter(values))
        values[last] = full - sum(value for key, value in values.items() if key != last)
        held = {}
        for place in product(*(range(ranks) for _, ranks in state.mesh)):
            at = dict(zip((axis for axis, _ in state.mesh), place, strict=True))
            array = values[tuple(at[axis] for axis in partial)]
            held[place] = array[tuple(cls.run(state, dim, at, full.shape[dim]) for dim in range(full.ndim))].copy()
        return cls(state, held)

    @staticmethod
    def run(state: State, dim: int, at: dict[str, int], extent: int) -> slice:
        start, size = 0, extent
        for axis in state.cuts[dim]:
            size //= state.size(axis)
            start += at[axis] * size
        return slice(start, start + size)

    def take(self, step, after: State) -> Ranks:
        """Run one collective, in terms of what ranks send to each other only."""
        axes = [axis for axis, _ in self.state.mesh]
        moved = [axes.index(axis) for axis in step.group.axes]
        held = {}
        for place in self.held:
            others = list(product(*(range(self.state.mesh[index][1]) for index in moved)))
            peers = []
            for other in others:
                peer = list(place)
                for index, value in zip(moved, other, strict=True):
                    peer[index] = value
                peers.append(self.held[tuple(peer)])
            mine = others.index(tuple(place[index] for index in moved))
            n = len(peers)
            if step.collective == "all_gather":
                held[place] = np.concatenate(peers, axis=step.source)
            elif step.collective == "all_reduce":
                held[place] = sum(peers)
            elif step.collective == "reduce_scatter":
                held[place] = np.split(sum(peers), n, axis=step.target)[mine]
            elif step.collective == "all_to_all":
                held[place] = np.concatenate([np.split(p, n, axis=step.target)[mine] for p in peers], axis=step.source)
            elif step.collective == "chunk":
                held[place] = np.split(self.held[place], n, axis=step.target)[mine]
            elif step.collective == "keep":
                held[place] = self.held[place] if mine == 0 else np.zeros_like(self.held[place])
            else:  # send: each rank gets the block that its place in the new order stands for
                cut, order = self.state.cuts[step.source], after.cuts[step.source]
                at = dict(zip(axes, place, strict=True))
                wanted = self.run(after, step.source, at, prod(after.size(axis) for axis in order)).start
                for other, peer in zip(others, peers, strict=True):
                    theirs = at | {axes[index]: value for index, value in zip(moved, other, strict=True)}
                    block = self.run(self.state, step.source, theirs, prod(self.state.size(axis) for axis in cut)).start
                    if block == wanted:
                        held[place] = peer
        return Ranks(after, held)

    def check(self, full: np.ndarray) -> None:
        axes = [axis for axis, _ in self.state.mesh]
        partial = [axes.index(axis) for axis in self.state.partial]
        sums: dict[tuple, np.ndarray] = {}
        for place, array in self.held.items():
            key = tuple(value for index, value in enumerate(place) if index not in partial)
            sums[key] = sums.get(key, 0) + array
        for place in self.held:
            at = dict(zip(axes, place, strict=True))
            key = tuple(value for index, value in enumerate(place) if index not in partial)
            expected = full[tuple(self.run(self.state, dim, at, full.shape[dim]) for dim in range(full.ndim))]
            np.testing.assert_allclose(sums[key], expected, atol=1e-9)


def walk(path, source: State, full: np.ndarray) -> Ranks:
    ranks = Ranks.of(full, source)
    for step in path.steps:
        after = next(
            state for found, state in steps(ranks.state, full.shape, 4) if found == step and fits(step, state, path)
        )
        ranks = ranks.take(step, after)
    return ranks


def fits(step, state, path) -> bool:
    """Sends of one dimension differ only in the order they lead to; each path has at most one that is tried here."""
    return step.collective != "send" or state.cuts == path.target.cuts


class Known:
    def __init__(self, path, target):
        self.steps, self.target = path.steps, target


@st.composite
def layouts(draw):
    mesh = draw(st.sampled_from([{"a": 2}, {"a": 6}, {"a": 2, "b": 3}, {"a": 2, "b": 2, "c": 3}, {"a": 4, "b": 3}]))
    found = []
    for _ in range(2):
        places = {axis: draw(st.sampled_from([R, V, 0, 1])) for axis in mesh}
        found.append(placed(mesh, places, 2))
    return found


@given(layouts())
@settings(max_examples=120, deadline=None)
def test_paths_turn_one_layout_into_the_other(pair):
    source, target = pair
    full = np.random.default_rng(1).standard_normal(SHAPE)
    path = cheapest(source, target, SHAPE, 4, ring)
    if any(step.collective == "send" for step in path.steps):
        return  # checked below
    ranks = walk(Known(path, target), source, full)
    assert ranks.state == target
    ranks.check(full)
    assert path.seconds == pytest.approx(
        sum(ring(step.collective, step.nbytes, step.group) for step in path.steps if step.collective not in FREE)
    )


def test_another_order_of_the_same_cut_is_one_send():
    mesh = (("a", 2), ("b", 3))
    source, target = (State(mesh, (order, ())) for order in (("a", "b"), ("b", "a")))
    path = cheapest(source, target, SHAPE, 4, ring)
    assert path.collectives == ("send",)
    full = np.random.default_rng(1).standard_normal(SHAPE)
    walk(Known(path, target), source, full).check(full)


ONE = {"tp": 4}


@pytest.mark.parametrize(
    ("source", "target", "collectives", "nbytes"),
    [
        (0, R, ("all_gather",), 1152), (0, 1, ("all_to_all",), 288), (V, R, ("all_reduce",), 1152),
        (V, 0, ("reduce_scatter",), 1152), (R, 0, (), 0), (R, V, (), 0), (0, V, ("all_gather",), 1152), (R, R, (), 0),
    ],
)  # fmt: skip
def test_one_axis(source, target, collectives, nbytes):
    path = cheapest(placed(ONE, {"tp": source}, 2), placed(ONE, {"tp": target}, 2), SHAPE, 4, ring)
    assert path.collectives == collectives
    assert sum(step.nbytes for step in path.steps) == nbytes


def test_all_reduce_is_taken_apart_where_that_is_faster():
    """Dijkstra over time, not over steps: with a slow all-reduce a scatter and a gather win."""

    def slow(collective, nbytes, group):
        return (10 if collective == "all_reduce" else 1) * ring(collective, nbytes, group)

    source, target = placed(ONE, {"tp": V}, 2), placed(ONE, {}, 2)
    assert cheapest(source, target, SHAPE, 4, ring).collectives == ("all_reduce",)
    assert cheapest(source, target, SHAPE, 4, slow).collectives == ("reduce_scatter", "all_gather")


def test_slow_links_get_little_to_do():
    """Two nodes of four: what crosses nodes is scattered inside first."""
    mesh = {"node": 2, "device": 4}

    def uneven(collective, nbytes, group):
        bandwidth = 5e9 if "node" in group.axes else 4e11
        passes = {"all_reduce": 2}.get(collective, 1)
        return 1e-6 + passes * (group.ranks - 1) / group.ranks * nbytes / bandwidth

    source, target = placed(mesh, {"node": V, "device": V}, 2), placed(mesh, {}, 2)
    path = cheapest(source, target, (4096, 4096), 2, uneven)
    assert [(step.collective, step.group.axes) for step in path.steps] == [
        ("reduce_scatter", ("device",)), ("all_reduce", ("node",)), ("all_gather", ("device",)),
    ]  # fmt: skip


def test_dijkstra_equals_trying_every_path():
    mesh = {"a": 2, "b": 2}
    states = {placed(mesh, {"a": x, "b": y}, 2) for x, y in product([R, V, 0, 1], repeat=2)}
    edges = {state: list(steps(state, SHAPE, 4)) for state in states}
    times = {(s, t): 0.0 if s == t else float("inf") for s, t in product(states, states)}
    reached = set(states) | {after for found in edges.values() for _, after in found}
    for state in reached - states:
        edges[state] = list(steps(state, SHAPE, 4))
    times |= {(s, t): 0.0 if s == t else times.get((s, t), float("inf")) for s, t in product(reached, reached)}
    for _ in range(len(reached)):  # Bellman-Ford
        for state in reached:
            for step, after in edges[state]:
                price = 0.0 if step.collective in FREE else ring(step.collective, step.nbytes, step.group)
                for start in states:
                    through = times[start, state] + price
                    if (start, after) in times and through < times[start, after]:
                        times[start, after] = through
    for source, target in product(states, states):
        assert cheapest(source, target, SHAPE, 4, ring).seconds == pytest.approx(times[source, target])


def test_any_factor_of_an_axis():
    assert refined({"tp": 12, "dp": 5, "pp": 1}) == {"tp.0": 2, "tp.1": 2, "tp.2": 3, "dp": 5, "pp": 1}
    mesh = refined({"tp": 12})
    source = placed(mesh, dict.fromkeys(mesh, V), 2)
    target = placed(mesh, {"tp.0": 0, "tp.1": 0, "tp.2": 1}, 2)
    assert source.rvd() == (1, 12, 1, 1) and target.rvd() == (1, 1, 4, 3)
    full = np.random.default_rng(1).standard_normal(SHAPE)
    path = cheapest(source, target, SHAPE, 4, ring)
    walk(Known(path, target), source, full).check(full)


def test_what_does_not_divide_is_refused():
    with pytest.raises(TersorError, match="does not divide"):
        cheapest(placed({"a": 5}, {}, 2), placed({"a": 5}, {"a": 0}, 2), SHAPE, 4, ring)
    with pytest.raises(TersorError, match="has two places"):
        State((("a", 2),), (("a",), ("a",)))
    with pytest.raises(TersorError, match="different meshes"):
        cheapest(placed({"a": 2}, {}, 2), placed({"b": 2}, {}, 2), SHAPE, 4, ring)

"""Branch and bound finds what pricing every layout finds, and prices few."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from plan_brute import brute_force, kind_of
from plan_stub import GB, StubCosts
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.search.bound import BranchAndBound, Front, Known
from tersor.ops.plan_parallel.search.explain import no_plan
from tersor.ops.plan_parallel.search.price import RUN_AT_MOST, Candidate, Pricer
from tersor.ops.plan_parallel.search.space import Legality, Space
from tersor.ops.plan_parallel.search.train import fewer_devices, run_schedules, search_space

EVERY = {degree: "" for degree in range(2, 65)}
DENSE = Space(
    layers=12,
    experts=0,
    devices_per_node=4,
    global_batch=64,
    seq_len=4096,
    legal=Legality({degree: "" if 32 % degree == 0 else f"32 heads, {degree}" for degree in range(2, 65)}, {}, {}),
)
MIXTURE = replace(DENSE, experts=8, legal=DENSE.legal._replace(ep=EVERY, etp=EVERY))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.sampled_from([0.0, 0.05, 0.5]),
    tightness=st.sampled_from([0.3, 0.8, 1.0]),
    devices=st.sampled_from([1, 4, 6, 8]),
    states=st.sampled_from([50.0, 300.0, 900.0, 5000.0]),
    space=st.sampled_from([DENSE, MIXTURE, replace(DENSE, tiers=("gpu", "nvme", "cpu"))]),
    top=st.sampled_from([1, 3, 50]),
)
def test_equals_brute_force(seed, noise, tightness, devices, states, space, top):
    costs = StubCosts(state_gigabytes=states, noise=noise, tightness=tightness, seed=seed)
    best, front, nearest, considered = brute_force(Pricer(costs, costs.limit), space, devices, top)
    costs.asked.clear()
    found = search_space(Pricer(costs, 80 * GB), space, devices, top)
    assert found.best == best
    assert found.pareto == front
    assert found.nearest == nearest
    counted = found.counted
    assert counted.considered == considered
    if best:
        assert counted.estimated == len(costs.asked) == len(set(costs.asked))
        assert counted.estimated + counted.pruned == considered


def test_prices_few_layouts():
    costs = StubCosts(tightness=0.95)
    found = search_space(Pricer(costs, 80 * GB), MIXTURE, 32, 5)
    assert len(found.best) == 5
    assert found.counted.considered > 10_000
    assert found.counted.estimated < 0.05 * found.counted.considered


def test_without_bounds_nothing_is_pruned_but_what_cannot_fit():
    costs = StubCosts(state_gigabytes=300.0)
    costs.lower_bound = lambda layout: (0.0, 0.0)
    found = search_space(Pricer(costs, 80 * GB), DENSE, 8, 3)
    assert found.counted.pruned == 0
    assert found.best == brute_force(Pricer(costs, costs.limit), DENSE, 8, 3)[0]


def test_cutoff_leaves_out_what_is_slower():
    costs = StubCosts(state_gigabytes=300.0)
    best = search_space(Pricer(costs, 80 * GB), DENSE, 8).best[0].estimate.step_seconds
    walk = BranchAndBound(Pricer(costs, costs.limit), DENSE)
    assert not walk.fastest(8, Known(1, 0.99 * best, with_front=False)).best()
    assert walk.fastest(8, Known(1, best, with_front=False)).best()


def test_list_holds_one_plan_of_each_kind():
    found = search_space(Pricer(StubCosts(state_gigabytes=300.0), 80 * GB), DENSE, 8, 10)
    divided = [kind_of(plan.layout) for plan in found.best]
    assert len(set(divided)) == len(divided) > 3
    ranks = [plan.rank for plan in found.best]
    assert ranks == sorted(ranks)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), max_size=20))
def test_front_is_what_no_other_beats(plans):
    front = Front()
    candidates = [
        Candidate(number, SimpleNamespace(step_seconds=seconds, peak_bytes=nbytes)) for seconds, nbytes, number in plans
    ]
    for candidate in candidates:
        front.add(candidate)
    expected: list = []
    for candidate in sorted(candidates, key=lambda plan: plan.rank):
        if not expected or candidate.estimate.peak_bytes < expected[-1].estimate.peak_bytes:
            expected.append(candidate)
    assert [plan.rank for plan in front.found] == [plan.rank for plan in expected]
    for candidate in candidates:
        estimate = candidate.estimate
        beaten = any(
            other.estimate.step_seconds <= estimate.step_seconds
            and other.estimate.peak_bytes <= estimate.peak_bytes
            and (other.estimate.step_seconds, other.estimate.peak_bytes) != (estimate.step_seconds, estimate.peak_bytes)
            for other in candidates
        )
        assert front.beats(estimate.step_seconds, estimate.peak_bytes) == beaten


class Simulated(StubCosts):
    """Interleaved schedules turn out slower than their closed forms say, and zbv larger."""

    def estimate(self, layout, exact=False):
        estimate = super().estimate(layout)
        if exact and layout.schedule == "interleaved":
            return replace(estimate, step_seconds=1.2 * estimate.step_seconds)
        if exact and layout.schedule == "zbv":
            return replace(estimate, fits=False)
        return estimate


def test_schedules_that_are_run_decide():
    """Over the order of the list, and over what fits; the next plan of the same division takes the place of one that does not."""
    costs = Simulated(state_gigabytes=300.0, noise=0.0)
    pricer = Pricer(costs, costs.limit)
    pool = search_space(pricer, DENSE, 8, 60).best
    assert {"interleaved", "zbv"} <= {plan.layout.schedule for plan in pool[:10]}
    found = run_schedules(pricer, pool, 4)
    assert len(found) == 4 and all(plan.layout.schedule != "zbv" for plan in found)
    assert len({kind_of(plan.layout)[:6] for plan in found}) == 4
    for plan in found:
        assert plan.estimate == costs.estimate(plan.layout, exact=plan.layout.pp > 1)
    times = [plan.estimate.step_seconds for plan in found]
    assert times == sorted(times)


def test_long_schedules_are_not_run():
    costs = Simulated(global_batch=64)
    layout = Layout(pp=4, schedule="interleaved", chunks=2)
    short = Candidate(layout, costs.estimate(layout))
    long = Candidate(layout, replace(short.estimate, micro_batches=RUN_AT_MOST))
    pricer = Pricer(costs, costs.limit)
    assert pricer.exact(short).estimate.step_seconds > short.estimate.step_seconds
    assert pricer.exact(long) is long


class OneMicroBatch(StubCosts):
    """A step takes as long as the pipelines that have work: more devices than sequences are idle."""

    def estimate(self, layout, exact=False):
        estimate = super().estimate(layout)
        return replace(estimate, step_seconds=1.0 + 1e-3 * layout.tp + 1e-3 * layout.pp, parts={"compute": 0.01})


def test_a_small_model_is_as_fast_on_fewer_devices():
    costs = OneMicroBatch(state_gigabytes=50.0, tightness=1.0)
    costs.lower_bound = lambda layout: (1.0, 0.0)
    result = search_space(Pricer(costs, 80 * GB), DENSE, 32)
    fewer = fewer_devices(result.pricer, result)
    assert fewer.layout.world == 1


def test_a_large_model_needs_all_devices():
    costs = StubCosts(noise=0.0, tightness=1.0)
    result = search_space(Pricer(costs, 80 * GB), DENSE, 32)
    assert fewer_devices(result.pricer, result) is None


def test_where_all_devices_have_no_layout_the_most_that_have_one_are_used():
    space = replace(DENSE, layers=8, devices_per_node=8)  # 3 divides neither 64 sequences, nor 8 blocks, nor 32 heads
    costs = StubCosts(state_gigabytes=50.0)
    result = search_space(Pricer(costs, 80 * GB), replace(space, pins={"pp": (1, 2)}), 24)
    assert not result.best and result.nearest is None
    result.fewer = fewer_devices(result.pricer, result)
    assert result.fewer.layout.world == 16
    assert "16 have one" in no_plan(result).hint

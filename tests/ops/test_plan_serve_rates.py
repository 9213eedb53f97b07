"""How many requests an instance carries within limits: against a simulated queue and a simulated engine."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.queueing import highest_rate, mean_wait, wait
from tersor.ops.plan_parallel.serve.rates import Limits, both, decode, prefill
from tersor.ops.plan_parallel.serve.steps import PARTS, Step

ONE = Instance(Layout())


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_waiting_agrees_with_a_simulated_queue(load):
    generator, clock, free, waits = random.Random(1), 0.0, 0.0, []
    for _ in range(200_000):
        clock += generator.expovariate(load)
        waits.append(max(0.0, free - clock))
        free = max(free, clock) + 1.0
    assert sum(waits) / len(waits) == pytest.approx(mean_wait(load, 1.0), rel=0.05)
    under = sum(one <= wait(load, 1.0, 0.9) for one in waits) / len(waits)
    assert under == pytest.approx(0.9, abs=0.02)


@given(st.floats(1e-3, 10), st.floats(0, 100))
@settings(max_examples=50, deadline=None)
def test_the_highest_rate_waits_just_as_long(service, patience):
    rate = highest_rate(service, patience)
    assert 0 < rate < 1 / service
    assert wait(rate, service) <= patience * (1 + 1e-9) + 1e-12
    assert rate > 0.99 / service or wait(rate * 1.01, service) > patience * 0.99
    assert highest_rate(service, -1) == 0 and math.isinf(wait(2 / service, service))


class Engine:
    """Costs of an engine that is easy to think of: a prompt takes `reading`, a step of b sequences `fixed + b * each`."""

    prompt, generate = 5000, 50

    def __init__(self, reading=0.05, fixed=0.01, each=1e-4, most=100):
        self.reading, self.fixed, self.each, self.most = reading, fixed, each, most

    def read(self, instance, prompts):
        seconds = prompts * self.reading
        return Step(seconds, seconds, (seconds,) + (0.0,) * (len(PARTS) - 1))

    def token_seconds(self, instance, batch):
        return self.fixed + batch * self.each

    def room(self, instance):
        return self.most, 0.0


def test_both_roles_on_one_device_agree_with_a_simulated_engine():
    engine = Engine(most=40)
    found = both(engine, ONE, Limits())
    assert (found.batch, found.held_by) == (40, "memory")
    clock, left, done, between = 0.0, [], 0, []
    while done < 3000:  # prompts first: whoever is free is filled, then all answers get a token
        while len(left) < 40:
            clock += engine.reading
            left.append((engine.generate - 1, clock))
        clock += engine.token_seconds(None, len(left))
        left = [(tokens - 1, start) for tokens, start in left]
        between += [(clock - start) / (engine.generate - 1) for tokens, start in left if not tokens]
        done += sum(not tokens for tokens, _ in left)
        left = [entry for entry in left if entry[0]]
        if done < 40 and len(left) == 40:  # spread the first ones out, as they are when requests come at any time
            left = [(1 + index * (engine.generate - 2) // 40, start) for index, (_, start) in enumerate(left)]
            done = 40
            clock, between = 0.0, []
            left = [(tokens, 0.0) for tokens, _ in left]
    assert (done - 40) / clock == pytest.approx(found.requests_per_second, rel=0.05)
    late = between[len(between) // 2 :]
    assert sum(late) / len(late) == pytest.approx(found.tpot_seconds, rel=0.05)


def test_roles_keep_to_their_limits():
    engine = Engine()
    assert decode(engine, ONE, Limits(tpot=0.015)).batch == 50
    assert decode(engine, ONE, Limits(tpot=0.015)).held_by == "tpot"
    assert decode(engine, ONE, Limits()).held_by == "memory"
    assert decode(engine, ONE, Limits(tpot=0.005)) is None
    assert decode(engine, ONE, Limits(tpot=0.015), extra=49 * 0.001).batch == 40  # a millisecond a token
    reading = prefill(engine, ONE, Limits(ttft=0.2))
    assert 0.5 / 0.05 < reading.requests_per_second < 1 / 0.05 and reading.held_by == "ttft"
    assert prefill(engine, ONE, Limits()).requests_per_second == pytest.approx(20)
    assert prefill(engine, ONE, Limits(ttft=0.04)) is None
    slack, tight = (both(engine, ONE, Limits(ttft, 0.02)) for ttft in (10.0, 0.1))
    assert tight.requests_per_second < slack.requests_per_second
    assert tight.ttft_seconds <= 0.1 and slack.tpot_seconds <= 0.02


def test_a_rate_that_is_asked_for_is_carried_with_the_smallest_batch():
    engine = Engine()
    most = both(engine, ONE, Limits()).requests_per_second
    half = both(engine, ONE, Limits(), most / 2)
    assert half.held_by == "load" and half.requests_per_second == most / 2

    def carried(batch):
        return batch / (engine.token_seconds(None, batch) * 49 + batch * engine.reading)

    assert carried(half.batch) >= most / 2 > carried(half.batch - 1)
    assert both(engine, ONE, Limits(), most * 1.01) is None
    assert prefill(engine, ONE, Limits(), 21.0) is None
    assert prefill(engine, ONE, Limits(), 10.0).ttft_seconds == pytest.approx(0.05 + wait(10.0, 0.05))

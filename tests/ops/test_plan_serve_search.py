"""The search for serving plans: against trying everything, within limits, and words where there is no plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import header_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import load_cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.search.space import Legality
from tersor.ops.plan_parallel.serve.disaggregated import Apart, packs
from tersor.ops.plan_parallel.serve.instance import Instance, devices_of, first_devices, instances
from tersor.ops.plan_parallel.serve.plan import APART, TOGETHER, rank
from tersor.ops.plan_parallel.serve.rates import Limits, both, decode, prefill
from tersor.ops.plan_parallel.serve.search import no_plan, search, why_not
from tersor.ops.plan_parallel.transform.legality import legal_ep, legal_etp, legal_tp

MINE = {
    "8b": (models.LLAMA_8B, models.llama_shapes, "BF16"),
    "405b": (models.LLAMA_405B, models.llama_shapes, "BF16"),
    "deepseek": (models.DEEPSEEK_V3 | {"num_hidden_layers": 5}, models.deepseek_shapes, "F8_E4M3"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made: dict[str, PlanModel] = {}

    def get(name: str) -> PlanModel:
        if name not in made:
            config, shapes, dtype = MINE[name]
            folder = models.write_model(tmp_path_factory.mktemp("model") / name, config, shapes(config), dtype)
            made[name] = PlanModel(Checkpoint(folder))
        return made[name]

    return get


def legality(model: PlanModel) -> Legality:
    return Legality(legal_tp(model), legal_ep(model), legal_etp(model))


def plans(model, name, where=None, pins=None, top=5, **workload):
    where = where or load_cluster("8xh100")
    found = model(name)
    return search(found, where, Links(where), Workload(mode="serve", **workload), pins, top, legality(found))


@pytest.mark.parametrize(
    "workload",
    [
        {},
        {"objective": "latency"},
        {"ttft_seconds": 0.2, "tpot_seconds": 0.02},
        {"rate": 15.0, "tpot_seconds": 0.03},
        {"rate": 15.0, "objective": "latency"},
    ],
    ids=str,
)
def test_the_search_finds_what_trying_everything_finds(model, workload):
    where, found = load_cluster("4xh100"), model("8b")
    asked = Workload(mode="serve", **workload)
    result = plans(model, "8b", where, **workload)
    costs, limits = result.costs, Limits.of(asked)
    every = [one for one in instances(found, where, result.legal) if costs.room(one)[0]]
    best = min([*result.best, *result.others], key=lambda plan: rank(plan, asked))
    assert best == result.best[0]
    scores = []
    for one in every:
        most = 4 // one.devices
        for count in range(1, most + 1):
            if asked.rate is None and asked.objective == "latency":
                read, write = costs.read(one, 1).seconds, costs.token_seconds(one, 1)
                scores.append(read + 255 * write)
            elif (at := both(costs, one, limits, asked.rate and asked.rate / count)) is not None:
                answer = at.ttft_seconds + 255 * at.tpot_seconds
                scores.append(
                    answer
                    if asked.objective == "latency"
                    else -count * at.requests_per_second
                    if asked.rate is None
                    else (count * one.devices, answer)
                )
    for first, second in product(every, every):
        extra = Apart(costs, where, asked, 4).transfer(first, second)
        for count, others in product(range(1, 5), range(1, 5)):
            if not packs(where, 4, [(first.devices, count), (second.devices, others)]):
                continue
            if asked.rate is None and asked.objective == "latency":
                scores.append(costs.read(first, 1).seconds + 255 * costs.token_seconds(second, 1) + extra)
                continue
            reads = prefill(costs, first, limits, asked.rate and asked.rate / count)
            writes = decode(costs, second, limits, asked.rate and asked.rate / others, extra)
            if reads is None or writes is None:
                continue
            answer = reads.ttft_seconds + 255 * writes.tpot_seconds
            rate = min(count * reads.requests_per_second, others * writes.requests_per_second)
            devices = count * first.devices + others * second.devices
            scores.append(
                answer if asked.objective == "latency" else -rate if asked.rate is None else (devices, answer)
            )
    expected = min(scores)
    if asked.objective == "latency":
        assert best.answer_seconds == pytest.approx(expected, rel=0.02)
    elif asked.rate is None:
        assert best.requests_per_second == pytest.approx(-expected)
    else:
        assert best.devices == expected[0]


def test_prompts_and_answers_go_apart_where_it_pays(model):
    free = plans(model, "8b")
    assert free.best[0].kind == TOGETHER and free.best[0].devices == 8
    strict = plans(model, "8b", ttft_seconds=0.2, tpot_seconds=0.02)
    best = strict.best[0]
    assert best.kind == APART and [group.operating.role for group in best.groups] == ["prefill", "decode"]
    assert best.transfer_seconds == pytest.approx(
        strict.costs.prompt_bytes / (min(group.instance.devices for group in best.groups) * 450e9)
    )
    together = max(plan.requests_per_second for plan in (*strict.best, *strict.others) if plan.kind == TOGETHER)
    assert best.requests_per_second > 1.05 * together
    assert any("pays" in line and "together" in line for line in strict.explain())
    assert any("runner-up" in line for line in strict.explain())
    assert any("runner-up" in line for line in free.explain())


@given(
    st.floats(0.03, 3),
    st.floats(0.004, 0.2),
    st.sampled_from([None, 1.0, 30.0]),
    st.sampled_from(["latency", "throughput"]),
)
@settings(max_examples=15, deadline=None)
def test_every_plan_keeps_to_the_limits(model, ttft, tpot, rate, objective):
    result = plans(model, "8b", ttft_seconds=ttft, tpot_seconds=tpot, rate=rate, objective=objective, top=1000)
    for plan in result.best:
        assert plan.ttft_seconds <= ttft * (1 + 1e-9) and plan.tpot_seconds <= tpot * (1 + 1e-9)
        assert plan.devices <= 8 and plan.requests_per_second > 0
        assert rate is None or plan.requests_per_second == pytest.approx(rate)
        assert plan.numbers()["tokens_per_second"] == pytest.approx(plan.requests_per_second * 256)
    if not result.best:
        assert result.nearest is not None and isinstance(no_plan(result), TersorError)


def test_a_rate_takes_the_fewest_devices(model):
    found = plans(model, "8b", rate=20.0, ttft_seconds=0.5, tpot_seconds=0.03)
    assert found.best[0].devices == 2 and found.best[0].requests_per_second == pytest.approx(20)
    assert plans(model, "8b", rate=1e6).best == []


def test_the_front_of_speed_and_throughput(model):
    front = plans(model, "8b").pareto
    assert len(front) > 5
    for one, other in pairwise(front):
        assert one.tpot_seconds < other.tpot_seconds
        assert one.tokens_per_second_per_device < other.tokens_per_second_per_device


def test_a_model_that_fits_nowhere(model):
    result = plans(model, "405b")
    assert not result.best and result.fitting == 0
    most = sum(weight.nbytes for weight in model("405b").stored.values())
    assert result.nearest.short_bytes > most / 8 - 0.94 * 80e9
    error = no_plan(result)
    assert "tp=8" in str(error) and "lacks" in str(error) and "quantize" in error.hint
    hurried = plans(model, "405b", load_cluster("2x8xh100"), tpot_seconds=0.001)
    assert not hurried.best and "keeps to the limits" in str(no_plan(hurried))
    assert plans(model, "405b", load_cluster("2x8xh100")).best[0].groups[0].instance.layout.pp == 2


def test_why_not(model):
    result = plans(model, "8b", ttft_seconds=0.2, tpot_seconds=0.02)
    assert "does not divide" in why_not("tp=3", result) and "heads" in why_not("tp=3", result)
    assert "here" in why_not("tp=8", result)
    assert "does not fit" in why_not("tp=4,pp=1", plans(model, "405b"))
    free = plans(model, "8b")
    assert "is the plan" in why_not("tp=1,pp=1", free)
    with pytest.raises(TersorError, match="zero is pinned"):
        why_not("zero=3", result)


def test_pins_hold(model):
    result = plans(model, "8b", pins={"tp": (2,), "dp": (3,)})
    assert result.best and all(plan.kind == TOGETHER for plan in result.best)
    for group in (plan.groups[0] for plan in result.best):
        assert (group.layout.tp, group.layout.dp, group.devices) == (2, 3, 6)
    assert plans(model, "8b", pins={"devices": (4,)}).best[0].devices == 4
    with pytest.raises(TersorError, match="16 devices are pinned"):
        plans(model, "8b", pins={"devices": (16,)})
    empty = plans(model, "8b", pins={"tp": (5,)})
    assert empty.nearest is None and "laid out" in str(no_plan(empty))


def test_what_no_degree_allows_is_named(model):
    assert "heads" in str(no_plan(plans(model, "8b", pins={"tp": (3,)}, where=load_cluster("6xh100"))))
    assert "32" in str(no_plan(plans(model, "8b", pins={"pp": (40,)}, where=load_cluster("8x8xh100"))))
    assert "dp=9" in str(no_plan(plans(model, "8b", pins={"dp": (9,)})))


def test_only_what_the_runtime_takes(model):
    found, where = model("8b"), load_cluster("8xh100")
    given = (found, where, Links(where), Workload(mode="serve"), None, 5, legality(found))
    best = search(*given, accepts=lambda layout: layout.tp == 4 and layout.dp == 1).best
    assert best and all(group.layout.tp == 4 and group.replicas == 1 for plan in best for group in plan.groups)
    none = search(*given, accepts=lambda layout: False)
    assert not none.best and "runtime" in str(no_plan(none))


def test_instances_lie_on_devices_of_one_node():
    where = load_cluster("2x8xh100")
    small, large = first_devices(where, [(2, 3), (8, 1)])
    assert (small, large) == ([8, 10, 12], [0])
    assert devices_of(Instance(Layout(tp=1, pp=2)), small) == [8, 10, 12, 9, 11, 13]


def test_experts_are_shared_by_many_ranks_of_latent_attention(model):
    found = model("deepseek")
    where = load_cluster("2x8xh100")
    degrees = {degree: "" for degree in (1, 2, 4, 8, 16)}
    result = search(found, where, Links(where), Workload(mode="serve"), None, 5, Legality(degrees, degrees, degrees))
    best = max(result.best[0].groups, key=lambda group: group.devices).instance.layout
    assert best.dp >= 4 and best.ep == best.dp * best.tp // best.etp


def test_a_slower_network_holds_up_a_cache_on_its_way(model):
    fast = load_cluster("2x8xh100")
    asked = {"prompt": 8192, "generate": 64, "ttft_seconds": 2.0, "tpot_seconds": 0.015}
    slow = replace(fast, network_gbps=0.05)
    best = [plans(model, "8b", where, **asked).best[0] for where in (fast, slow)]
    assert best[0].kind == APART and best[1].kind == TOGETHER

"""Serving plans: steps and memory against sums by hand, rates against a simulated engine, the search against all plans."""

from __future__ import annotations

import header_models as models
import pytest
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import Cluster, load_cluster
from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.model.operators import Pass, operators
from tersor.ops.model.roofline import seconds_of
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.search.space import Legality
from tersor.ops.plan_parallel.serve import kv
from tersor.ops.plan_parallel.serve.costs import ServeCosts
from tersor.ops.plan_parallel.serve.disaggregated import packs
from tersor.ops.plan_parallel.serve.instance import Instance, fit_on, instances
from tersor.ops.plan_parallel.serve.steps import EXPERTS, PIPELINE, TENSOR_PARALLEL
from tersor.ops.plan_parallel.transform.legality import legal_ep, legal_etp, legal_tp

ROUND = Hardware("round numbers", {"bf16": 100e12}, 80e9, 1000, 1.0, 1.0, 1.0, 0.0, link_gbps=100)
MINE = {
    "8b": (models.LLAMA_8B, models.llama_shapes, "BF16"),
    "405b": (models.LLAMA_405B, models.llama_shapes, "BF16"),
    "mixtral": (models.MIXTRAL, models.llama_shapes, "BF16"),
    "deepseek": (models.DEEPSEEK_V3 | {"num_hidden_layers": 5}, models.deepseek_shapes, "F8_E4M3"),
    "gemma": (models.GEMMA3_27B, models.gemma3_shapes, "BF16"),
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


class NoLinks(Links):
    """Exchanges take no time."""

    def seconds(self, *_):
        return 0.0


def cluster(nodes: int = 1, each: int = 8, **changes) -> Cluster:
    return Cluster("round", nodes, each, ROUND, network_gbps=50.0, **changes)


def costs_of(model: PlanModel, where: Cluster | None = None, links=Links, **workload) -> ServeCosts:
    where = where or cluster()
    return ServeCosts(model, where, links(where), Workload(mode="serve", **workload))


def instance(dcp: int = 1, **degrees) -> Instance:
    return Instance(Layout(**degrees), dcp)


def legality(model: PlanModel) -> Legality:
    return Legality(legal_tp(model), legal_ep(model), legal_etp(model))


@pytest.mark.parametrize("name", ["8b", "gemma", "mixtral"])
@pytest.mark.parametrize("run", [Pass(3, 100), Pass(7, 1, 900)])
def test_one_device_takes_the_roofline_of_all_operators(model, name, run):
    costs = costs_of(model(name))
    facts, found = model(name).facts, operators(model(name).facts, model(name).stored)
    expected = sum(one.count * seconds_of(one, run, ROUND)[0] for one in found)
    step = costs.steps.step(instance(), run)
    assert step.seconds == pytest.approx(expected, rel=1e-9)
    assert step.slowest == pytest.approx(step.seconds)
    assert sum(step.parts) == pytest.approx(step.seconds)
    assert facts.layers == sum(costs.steps.stages(instance()))


def test_tensor_parallel_ranks_share_the_work_but_not_the_norms(model):
    costs = costs_of(model("8b"), links=NoLinks)
    one, two = costs.read(instance(), 1), costs.read(instance(tp=2), 1)
    norms = 65 * 2 * 1024 * 4096 * 2 / 1e12
    assert two.seconds - norms == pytest.approx((one.seconds - norms) / 2, rel=1e-9)


def test_collectives_of_a_block(model):
    costs = costs_of(model("8b"))
    links, hidden = costs.links, 4096 * 2
    part = costs.write(instance(tp=4), 5).parts[TENSOR_PARALLEL]
    expected = 65 * links.seconds("all_reduce", 5 * hidden, 4, 1) + links.seconds("all_gather", 5 * 128256 * 2, 4, 1)
    assert part == pytest.approx(expected)
    assert costs.write(instance(), 5).parts[TENSOR_PARALLEL] == 0


def test_experts_are_sent_only_where_ranks_have_requests_of_their_own(model):
    costs = costs_of(model("mixtral"))
    inside = costs.write(instance(tp=8, ep=8), 16)
    assert inside.parts[EXPERTS] == 0
    apart = costs.write(instance(dp=8, ep=8), 16)
    devices = 8 * (1 - (7 / 8) ** 2)  # two experts of eight, each on a device of its own
    once = costs.links.seconds("all_to_all", 16 * devices * 4096 * 2, 8, 1)
    assert apart.parts[EXPERTS] == pytest.approx(32 * 2 * once)
    assert apart.parts[TENSOR_PARALLEL] == 0


def test_an_uneven_load_of_the_experts_costs_arithmetic(model):
    where = cluster()
    even, uneven = (ServeCosts(model("mixtral"), where, NoLinks(where), Workload(), load) for load in (1.0, 1.5))
    place = instance(dp=8, ep=8)
    assert uneven.read(place, 8).seconds > 1.2 * even.read(place, 8).seconds


def test_stages_add_up_and_a_pipeline_hands_on_its_states(model):
    costs = costs_of(model("8b"))
    one, four = costs.write(instance(), 8), costs.write(instance(pp=4), 8)
    send = costs.links.seconds("send", 8 * 4096 * 2, 2, 1)
    assert four.seconds == pytest.approx(one.seconds + 3 * send)
    assert four.parts[PIPELINE] == pytest.approx(3 * send)
    assert one.seconds / 4 < four.slowest < one.seconds / 3
    assert sum(costs.steps.stages(instance(pp=4))) == 32
    pinned = instance(pp=2, stages=(20, 12))
    assert [len(stage.blocks) for stage in costs.steps.placed(pinned)] == [20, 12]


def test_stages_in_other_nodes_are_reached_over_the_network(model):
    place, hidden = instance(tp=4, pp=2), 1024 * 8192  # bytes of a prompt's states
    for size, span in (((1, 8), (2, 1)), ((2, 4), (1, 2))):
        costs = costs_of(model("8b"), cluster(*size))
        links = costs.links
        expected = links.seconds("send", hidden / 4, *span) + links.seconds("all_gather", hidden, 4, 1)
        assert costs.read(place, 1).parts[PIPELINE] == pytest.approx(expected)
    costs = costs_of(model("8b"), cluster(2, 4))
    leaves = [stage.leaves for stage in costs.steps.placed(instance(tp=2, pp=4))]
    assert leaves == [False, True, False, None]


def test_a_pipeline_works_on_several_batches_at_once(model):
    costs = costs_of(model("8b"))
    place = instance(pp=4)
    step = costs.write(place, 16)
    assert costs.token_seconds(place, 64) == pytest.approx(max(step.seconds, 4 * step.slowest))
    assert costs.token_seconds(place, 1) == pytest.approx(costs.write(place, 1).seconds)


def test_memory_of_llama_by_hand(model):
    costs = costs_of(model("8b"), prompt=1000, generate=24)
    (memory,) = costs.memory(instance(tp=2))
    total = sum(weight.nbytes for weight in model("8b").stored.values())
    norms = 65 * 4096 * 2
    assert memory.weights == (total - norms) / 2 + norms
    assert memory.sequence == 1024 * 2 * 32 * 8 * 128 * 2 / 2
    most, short = costs.room(instance(tp=2))
    limit = costs.cluster.memory_bytes
    assert short == 0 and memory.holding(most) <= limit < memory.holding(most + 1)
    first, last = costs.memory(instance(pp=2))
    assert first.weights + last.weights == total and last.logits > 0 == first.logits


def test_experts_are_held_once_by_all_ranks_of_a_stage(model):
    costs = costs_of(model("mixtral"))
    stored, kinds = model("mixtral").stored, model("mixtral").kinds
    experts = sum(weight.nbytes for name, weight in stored.items() if kinds[name] == "experts")
    rest = sum(weight.nbytes for weight in stored.values()) - experts
    assert costs.memory(instance(dp=4, ep=4))[0].weights == pytest.approx(rest + experts / 4)
    assert costs.memory(instance(tp=4, etp=4))[0].weights == pytest.approx(
        costs.memory(instance(tp=4, ep=4))[0].weights
    )


def test_what_is_kept_of_a_sequence(model):
    llama, latent = (model(name).facts.attention[0] for name in ("8b", "deepseek"))
    assert kv.sequence_bytes(llama, 100, 2) == 100 * 2 * 8 * 128 * 2
    assert kv.sequence_bytes(latent, 100, 2) == 100 * 576 * 2
    assert kv.cache_share(llama, 4) == 1 / 4
    assert kv.cache_share(llama, 16) == 1 / 8  # copies: there are eight heads of keys
    assert kv.cache_share(llama, 16, 2) == 1 / 16
    assert kv.cache_share(latent, 8) == 1 and kv.cache_share(latent, 8, 8) == 1 / 8
    windows = [kv.sequence_bytes(one, 5000, 2) / one.cached_numbers / 2 for one in model("gemma").facts.attention]
    assert sorted(set(windows)) == [1024, 5000]
    assert kv.sequence_bytes(None, 5000, 2) == 0
    assert kv.transfer_seconds(1e9, 4, 2, 50) == pytest.approx(0.01)


def test_the_cache_of_latent_attention_can_be_cut_by_tokens(model):
    costs = costs_of(model("deepseek"), prompt=8000)
    whole, cut = instance(tp=8, ep=8), instance(tp=8, ep=8, dcp=8)
    assert costs.memory(cut)[0].sequence == pytest.approx(costs.memory(whole)[0].sequence / 8)
    quiet = costs_of(model("deepseek"), links=NoLinks, prompt=8000)
    assert quiet.write(cut, 64).seconds < quiet.write(whole, 64).seconds
    assert costs.write(cut, 64).parts[TENSOR_PARALLEL] > costs.write(whole, 64).parts[TENSOR_PARALLEL]


def test_where_instances_find_room():
    where = cluster(4, 8)
    assert [fit_on(where, 32, size) for size in (1, 2, 8, 16, 12, 32, 64)] == [32, 16, 4, 2, 0, 1, 0]
    assert fit_on(where, 13, 4) == 3  # five devices of the second node are left
    assert packs(where, 32, [(16, 1), (8, 1), (2, 4)])
    assert not packs(where, 32, [(16, 2), (1, 1)]) and not packs(where, 12, [(8, 1), (3, 2)])
    assert packs(cluster(1, 6), 6, [(3, 1), (2, 1)]) and not packs(cluster(2, 3), 6, [(2, 3)])


def test_instances_are_legal_and_lie_on_nodes_evenly(model):
    found = list(instances(model("mixtral"), cluster(2, 8), legality(model("mixtral"))))
    assert len(set(found)) == len(found)
    for one in found:
        layout = one.layout
        assert layout.ep * layout.etp == layout.tp * layout.dp and 8 % layout.ep == 0 and layout.edp == 1
        assert 8 % one.devices == 0 or one.devices == 16
    degrees = {(one.layout.tp, one.layout.pp, one.layout.dp) for one in found}
    assert {(8, 1, 1), (1, 1, 8), (2, 2, 2), (8, 2, 1), (2, 1, 4)} <= degrees
    pinned = list(instances(model("mixtral"), cluster(), legality(model("mixtral")), {"tp": (2,), "ep": (4,)}))
    assert pinned and all((one.layout.tp, one.layout.ep) == (2, 4) for one in pinned)


def test_an_estimate_of_one_layout(model):
    costs = costs_of(model("8b"), load_cluster("8xh100"))
    found = costs.serve(Layout(tp=2), "both", 64)
    assert found.fits and found.batch == 64 <= found.max_batch
    assert sum(found.parts.values()) == pytest.approx(costs.write(instance(tp=2), 64).seconds)
    assert found.tokens_per_second == pytest.approx(256 * found.requests_per_second)
    assert found.requests_per_second == pytest.approx(64 / (255 * found.tpot_seconds), rel=1e-9)
    full = costs.serve(Layout(tp=2), "decode")
    assert full.batch == full.max_batch and full.ttft_seconds == 0
    over = costs.serve(Layout(), "decode", 100_000)
    assert not over.fits and over.short_bytes > 1e12
    assert costs.serve(Layout(tp=2, dp=3), "prefill").requests_per_second == pytest.approx(
        3 * costs.serve(Layout(tp=2), "prefill").requests_per_second
    )
    with pytest.raises(ValueError, match="role"):
        costs.serve(Layout(), "train")


def test_what_writes_no_text_is_refused(model, tmp_path):
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}  # fmt: skip
    shapes = {
        "embeddings.word_embeddings.weight": (100, 64),
        "encoder.layer.0.attention.self.query.weight": (64, 64),
        "encoder.layer.0.attention.self.key.weight": (64, 64),
    }
    encoder = PlanModel(Checkpoint(models.write_model(tmp_path / "bert", config, shapes)))
    with pytest.raises(TersorError, match="no text"):
        costs_of(encoder)
    with pytest.raises(TersorError, match="prompt is 0"):
        costs_of(model("8b"), prompt=0)
    with pytest.raises(TersorError, match="rate is -1"):
        costs_of(model("8b"), rate=-1)

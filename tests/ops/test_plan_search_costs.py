"""The search with the real model of cost: equal to pricing every layout, stages cut, large models planned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from header_models import (
    DEEPSEEK_V3,
    LLAMA_405B,
    MIXTRAL,
    TINY_LLAMA,
    deepseek_shapes,
    llama_shapes,
    write_model,
)
from plan_brute import brute_force
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import Cluster, load_cluster
from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.cost.constants import RUNTIMES
from tersor.ops.plan_parallel.cost.step import Costs
from tersor.ops.plan_parallel.layout import RECOMPUTE, Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.search.price import Pricer, StageCutter
from tersor.ops.plan_parallel.search.train import search, search_space, space_of

SMALL_LLAMA = TINY_LLAMA | {
    "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 7, "num_attention_heads": 12,
    "num_key_value_heads": 6, "vocab_size": 32000,
}  # fmt: skip
SMALL_MIXTRAL = MIXTRAL | {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_local_experts": 6,
}  # fmt: skip
SMALL_DEEPSEEK = DEEPSEEK_V3 | {
    "hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 256, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 2, "vocab_size": 32000, "q_lora_rank": 128, "kv_lora_rank": 64,
}  # fmt: skip
MODELS = {
    "llama": (SMALL_LLAMA, llama_shapes),
    "tied": (SMALL_LLAMA | {"tie_word_embeddings": True}, llama_shapes),
    "mixtral": (SMALL_MIXTRAL, llama_shapes),
    "deepseek": (SMALL_DEEPSEEK, deepseek_shapes),
    "405b": (LLAMA_405B, llama_shapes),
}
RUNTIME = replace(RUNTIMES["megatron"], fixed_bytes=1e7)  # workspaces as small as the models


@pytest.fixture(scope="session")
def plan_model(tmp_path_factory):
    built: dict[str, PlanModel] = {}

    def get(name: str) -> PlanModel:
        if name not in built:
            config, shapes = MODELS[name]
            folder = write_model(tmp_path_factory.mktemp("headers") / name, config, shapes(config))
            built[name] = PlanModel(Checkpoint(folder))
        return built[name]

    return get


def cluster_of(nodes: int, each: int, gigabytes: float) -> Cluster:
    """Of small devices, so that small models are as tight in them as large ones are in real devices."""
    hardware = Hardware("small", {"bf16": 20e12}, gigabytes * 1e9, 400, link_gbps=40, pcie_gbps=20)
    return Cluster(f"{nodes}x{each}", nodes, each, hardware, network_gbps=5, host_memory_bytes=64e9, host_gbps=10)


def pricer_of(model: PlanModel, cluster: Cluster, workload: Workload) -> Pricer:
    costs = Costs(model, cluster, Links(cluster), workload, runtime=RUNTIME)
    return Pricer(costs, cluster.memory_bytes, StageCutter(model, costs))


@pytest.mark.parametrize(
    ("name", "nodes", "each", "gigabytes", "batch", "seq_len", "tiers"),
    [
        ("llama", 2, 3, 1.2, 12, 1024, ("gpu",)),
        ("llama", 1, 6, 0.4, 6, 8192, ("gpu", "cpu")),
        ("tied", 2, 2, 0.9, 8, 1024, ("gpu",)),
        ("mixtral", 2, 2, 0.7, 8, 512, ("gpu",)),
        ("deepseek", 2, 2, 1.5, 8, 512, ("gpu",)),
        ("llama", 1, 2, 0.2, 4, 1024, ("gpu",)),  # fits nowhere
    ],
)
def test_equals_brute_force(plan_model, name, nodes, each, gigabytes, batch, seq_len, tiers):
    model, cluster = plan_model(name), cluster_of(nodes, each, gigabytes)
    workload = Workload(global_batch=batch, seq_len=seq_len)
    space = space_of(model, cluster, workload, tiers=tiers)
    best, front, nearest, considered = brute_force(pricer_of(model, cluster, workload), space, cluster.devices, 4)
    found = search_space(pricer_of(model, cluster, workload), space, cluster.devices, 4)
    assert [plan.layout for plan in found.best] == [plan.layout for plan in best]
    assert [plan.estimate.step_seconds for plan in found.best] == [plan.estimate.step_seconds for plan in best]
    assert [plan.layout for plan in found.pareto] == [plan.layout for plan in front]
    assert (found.nearest and found.nearest.layout) == (nearest and nearest.layout)
    assert found.counted.considered == considered
    if best:
        assert found.counted.estimated < considered
        assert all(plan.estimate.fits for plan in (*found.best, *found.pareto))
    else:
        assert found.nearest.estimate.short_bytes > 0


@pytest.mark.parametrize("name", ["llama", "tied", "mixtral", "deepseek"])
def test_what_the_search_takes_for_granted(plan_model, name):
    """Bounds are never above prices, and recomputing only ever gives time for memory."""
    model, cluster = plan_model(name), cluster_of(2, 2, 0.8)
    workload = Workload(global_batch=8, seq_len=8192)
    pricer = pricer_of(model, cluster, workload)
    space = space_of(model, cluster, workload, tiers=("gpu", "cpu"))
    for number, group in enumerate(space.groups(4)):
        if number % 5:
            continue
        bounds = []
        for recompute in group.recompute:
            layout = group.layout(recompute)
            price = pricer.price(layout).estimate
            seconds, nbytes = pricer.lower_bound(layout)
            assert seconds <= price.step_seconds and nbytes <= price.peak_bytes
            bounds.append((seconds, nbytes))
        assert [seconds for seconds, _ in bounds] == sorted(seconds for seconds, _ in bounds)
        assert group.recompute == RECOMPUTE and min(nbytes for _, nbytes in bounds) == bounds[-1][1]


def test_stages_are_cut_by_time(plan_model):
    """The last stage has the head besides its blocks, so it has fewer of them than an even cut gives it."""
    model, cluster = plan_model("llama"), cluster_of(1, 6, 80)
    pricer = pricer_of(model, cluster, Workload(global_batch=12, seq_len=1024))
    for pp, chunks, schedule in ((2, 1, "1f1b"), (3, 1, "zb-h1"), (2, 2, "zbv"), (6, 1, "1f1b")):
        layout = Layout(pp=pp, schedule=schedule, chunks=chunks)
        plan = pricer.price(layout)
        cut = tuple(stage.blocks for stage in plan.estimate.stages)
        assert sum(cut) == 7 and len(cut) == pp * chunks
        even = pricer.costs.estimate(layout)
        assert plan.estimate.step_seconds <= even.step_seconds * 1.001


def test_stages_are_cut_by_memory_where_time_does_not_fit(plan_model):
    """1F1B's first rank holds the most micro-batches: with less memory it gets fewer blocks."""
    model = plan_model("llama")
    layout = Layout(pp=3, micro_batch=2)
    workload = Workload(global_batch=24, seq_len=2048)
    roomy = pricer_of(model, cluster_of(1, 3, 80), workload).price(layout)
    gigabytes = roomy.estimate.peak_bytes / 1e9 / 0.94
    tight = pricer_of(model, cluster_of(1, 3, 0.999 * gigabytes), workload).price(layout)
    assert tight.estimate.fits
    assert tight.layout.stages != roomy.layout.stages and sum(tight.layout.stages) == 7
    assert tight.estimate.peak_bytes < roomy.estimate.peak_bytes
    assert tight.estimate.step_seconds >= roomy.estimate.step_seconds


def test_pinned_stages_are_kept(plan_model):
    model, cluster = plan_model("llama"), cluster_of(1, 2, 8)
    workload = Workload(global_batch=8, seq_len=1024)
    costs = Costs(model, cluster, Links(cluster), workload, runtime=RUNTIME)
    found = search(model, costs, cluster, workload, {"stages": [5, 2]})
    assert {plan.layout.stages for plan in found.best} == {(5, 2)}


def test_pinned_devices(plan_model):
    model, cluster = plan_model("llama"), cluster_of(2, 4, 8)
    workload = Workload(global_batch=8, seq_len=1024)
    costs = Costs(model, cluster, Links(cluster), workload, runtime=RUNTIME)
    found = search(model, costs, cluster, workload, {"devices": 2})
    assert {plan.layout.world for plan in found.best} == {2} and found.fewer is None
    with pytest.raises(TersorError, match="16 devices are pinned"):
        search(model, costs, cluster, workload, {"devices": [2, 16]})


def test_listed_plans_have_their_schedules_run(plan_model):
    model, cluster = plan_model("llama"), cluster_of(2, 4, 1.0)
    workload = Workload(global_batch=32, seq_len=1024)
    pricer = pricer_of(model, cluster, workload)
    found = search(model, pricer.costs, cluster, workload, {"pp": [2, 4]}, top=4)
    assert len(found.best) == 4
    for plan in found.best:
        assert plan.estimate == pricer.costs.estimate(plan.layout, exact=True) and plan.estimate.fits
    divided = [(plan.layout.tp, plan.layout.pp, plan.layout.dp) for plan in found.best]
    assert len(set(divided)) == len(divided)


def test_405b_on_1024_devices(plan_model):
    """The bounds leave few of the layouts to be priced."""
    model, cluster = plan_model("405b"), load_cluster("128x8xh100")
    workload = Workload(global_batch=1024, seq_len=8192)
    found = search(model, Costs(model, cluster, Links(cluster), workload), cluster, workload)
    best = found.best[0]
    assert best.layout.world == 1024 and best.estimate.fits and found.fewer is None
    assert best.layout.tp > 1 and best.layout.pp > 1
    assert 0.3 < best.estimate.mfu < 0.7
    assert found.counted.considered > 10_000
    assert found.counted.estimated < 0.1 * found.counted.considered

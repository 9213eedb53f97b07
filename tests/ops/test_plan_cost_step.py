"""Estimates of whole layouts: published pipelines, bounds, memory of ranks, and that the parts add up."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from header_models import LLAMA_8B, LLAMA_405B, MIXTRAL, llama_shapes, write_model
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import load_cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.cost.memory import even_stages, in_flight
from tersor.ops.plan_parallel.cost.pipeline import least_seconds, step_seconds
from tersor.ops.plan_parallel.cost.step import Costs
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.schedule.pipeline import build, simulate

CONFIGS = {"8b": LLAMA_8B, "405b": LLAMA_405B, "mixtral": MIXTRAL}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """costs(name, cluster, **workload and convention) -> Costs"""
    models: dict[str, PlanModel] = {}

    def make(
        name: str, cluster: str = "8x8xh100", convention: str = "megatron", tied: bool = False, **workload
    ) -> Costs:
        key = f"{name}{tied}"
        if key not in models:
            config = CONFIGS[name] | {"tie_word_embeddings": tied}
            models[key] = PlanModel(Checkpoint(write_model(tmp_path_factory.mktemp(key), config, llama_shapes(config))))
        machine = load_cluster(cluster)
        settings = {"global_batch": 512, "seq_len": 4096} | workload
        return Costs(models[key], machine, Links(machine), Workload(**settings), convention)

    return make


@pytest.mark.parametrize(("pp", "micro_batches", "chunks"), [(4, 8, 1), (8, 64, 1), (4, 16, 2), (8, 32, 4)])
def test_published_bubbles(pp, micro_batches, chunks):
    thirds = [1.0] * pp
    bubble = {"1f1b": (pp - 1) / micro_batches, "gpipe": (pp - 1) / micro_batches}
    bubble["interleaved"] = (pp - 1) / (chunks * micro_batches)
    bubble["zb-h1"] = (pp - 1) / (3 * micro_batches)  # a third of 1F1B's
    bubble["zbv"] = 0.0
    for schedule, share in bubble.items():
        seconds, _ = step_seconds(schedule, chunks, micro_batches, thirds, thirds, thirds)
        assert seconds / (3 * micro_batches) - 1 == pytest.approx(share)
        assert least_seconds(schedule, pp, chunks, micro_batches, 3.0 * pp) <= seconds * (1 + 1e-12)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_closed_forms_are_what_the_schedule_takes(schedule, chunks):
    pp, micro_batches = 4, 16
    timeline = simulate(build(schedule, pp, micro_batches, chunks), 1.0 / chunks, 1.0 / chunks, 1.0 / chunks)
    seconds, _ = step_seconds(schedule, chunks, micro_batches, [1.0] * pp, [1.0] * pp, [1.0] * pp)
    assert timeline.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("pp", "chunks", "blocks"),
    [(8, 3, (1,) * 16 + (2,) * 8), (8, 3, (1,) * 8 + (2,) * 8 + (1,) * 8), (4, 5, (1, 2) * 10), (8, 4, (2,) * 32)],
)
def test_uneven_chunks_slow_an_interleaved_schedule(pp, chunks, blocks):
    forward, backward = [1.0 * count for count in blocks], [2.0 * count for count in blocks]
    runs = [
        simulate(build("interleaved", pp, rounds * pp, chunks), forward, backward, 0.0).seconds for rounds in (3, 4)
    ]
    ranks = [sum(forward[rank::pp]) for rank in range(pp)]
    micro_batches = 10**6
    seconds, _ = step_seconds(
        "interleaved", chunks, micro_batches, ranks, [2 * one for one in ranks], [0.0] * pp, (forward, backward)
    )
    assert seconds / micro_batches == pytest.approx((runs[1] - runs[0]) / pp, rel=0.06)


@pytest.mark.parametrize("micro_batches", [8, 32])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zbv", 2)],
)
def test_micro_batches_in_flight_are_those_of_the_schedule(schedule, chunks, micro_batches):
    found = in_flight(schedule, 4, chunks, micro_batches)
    exact = build(schedule, 4, micro_batches, chunks).in_flight
    assert max(found) == pytest.approx(max(exact))
    assert all(most >= other - 1e-9 for most, other in zip(found, exact, strict=True))


def test_even_stages_give_the_ends_less():
    assert even_stages(126, 16) == (7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7)
    assert even_stages(5, 4) == (1, 2, 1, 1)
    assert sum(even_stages(61, 16)) == 61


def some_layouts(seed: int, experts: bool) -> list[Layout]:
    found, chance = [], random.Random(seed)
    while len(found) < 60:
        schedule = chance.choice(["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"])
        pp = chance.choice([1, 2, 4]) if schedule in ("gpipe", "1f1b") else chance.choice([2, 4])
        chunks = {"interleaved": chance.choice([2, 4]), "zbv": 2}.get(schedule, 1)
        tp = chance.choice([1, 2, 4, 8])
        cp = chance.choice([1, 1, 2])
        dp = chance.choice([1, 2, 4])
        offload = chance.choice(["none", "none", "optimizer", "states"])
        choices = {
            "zero": chance.choice([0, 1, 2, 3]), "micro_batch": chance.choice([1, 2]), "schedule": schedule, "chunks": chunks,
            "recompute": chance.choice(["none", "attention", "full"]), "offload": offload,
            "tier": chance.choice(["cpu", "nvme"]), "replicate": chance.choice([1, dp]),
        }  # fmt: skip
        if experts:
            inside = dp * cp * tp
            choices["ep"] = chance.choice([degree for degree in (1, 2, 4, 8) if inside % degree == 0])
        found.append(Layout(tp=tp, pp=pp, dp=dp, cp=cp, **choices))
    return found


@pytest.mark.parametrize("convention", ["megatron", "torchtitan", "deepspeed"])
@pytest.mark.parametrize("name", ["8b", "mixtral"])
def test_bounds_are_never_above_estimates(costs, name, convention):
    found = costs(name, convention=convention, tied=name == "8b")
    for layout in some_layouts(0, name == "mixtral"):
        seconds, nbytes = found.lower_bound(layout)
        estimate = found.estimate(layout)
        assert seconds <= estimate.step_seconds, layout.describe()
        assert nbytes <= estimate.peak_bytes, layout.describe()
        assert sum(estimate.parts.values()) == pytest.approx(estimate.step_seconds)
        assert all(value >= 0 for value in estimate.parts.values())
        assert estimate.peak_bytes == max(stage.memory.total for stage in estimate.stages)
        assert estimate.short_bytes == pytest.approx(max(0.0, estimate.peak_bytes - found.limit))


def test_bounds_hold_for_every_cut_of_the_stages(costs):
    found, chance = costs("8b"), random.Random(1)
    for layout in some_layouts(2, False):
        stages = layout.pp * layout.chunks
        edges = sorted(chance.sample(range(1, 32), stages - 1))
        cut = tuple(stop - start for start, stop in zip([0, *edges], [*edges, 32], strict=True))
        seconds, nbytes = found.lower_bound(layout)
        estimate = found.estimate(replace(layout, stages=cut))
        assert seconds <= estimate.step_seconds, layout.describe()
        assert nbytes <= estimate.peak_bytes, layout.describe()


def test_the_schedule_run_block_by_block_agrees_with_closed_forms(costs):
    found = costs("8b")
    for schedule, chunks in (("1f1b", 1), ("interleaved", 4), ("zb-h1", 1), ("zbv", 2)):
        layout = Layout(tp=2, pp=4, dp=8, zero=1, schedule=schedule, chunks=chunks)
        closed, exact = found.estimate(layout), found.estimate(layout, exact=True)
        assert exact.step_seconds == pytest.approx(closed.step_seconds, rel=0.12)
        assert exact.peak_bytes == pytest.approx(closed.peak_bytes, rel=0.1)


def test_recomputing_and_offloading_only_give_time_for_memory(costs):
    found = costs("8b")
    for layout in some_layouts(3, False):
        plain = replace(layout, recompute="none", offload="none")
        full = found.lower_bound(replace(plain, recompute="full"))
        away = found.estimate(replace(plain, offload="optimizer"))
        here, bound = found.estimate(plain), found.lower_bound(plain)
        assert full[0] >= bound[0] and full[1] <= bound[1]
        assert away.step_seconds >= here.step_seconds - here.parts["optimizer"]
        assert away.peak_bytes <= here.peak_bytes


def test_more_zero_takes_less_memory(costs):
    for convention in ("megatron", "paper", "deepspeed", "torchtitan"):
        found = costs("8b", convention=convention)
        states = [
            found.estimate(Layout(dp=64, zero=zero)).stages[0].memory.states for zero in range(4)
        ]  # fmt: skip
        assert states == sorted(states, reverse=True)


def test_the_first_rank_of_1f1b_holds_most_activations_and_the_last_the_logits(costs):
    estimate = costs("8b").estimate(Layout(tp=2, pp=4, dp=8, zero=1))
    memories = [stage.memory for stage in estimate.stages]
    assert [memory.activations for memory in memories] == sorted(
        (memory.activations for memory in memories), reverse=True
    )
    assert [memory.logits > 0 for memory in memories] == [False, False, False, True]
    assert estimate.stages[0].blocks == 8 and estimate.micro_batches == 64


def test_chunks_of_one_rank_share_its_memory(costs):
    estimate = costs("8b").estimate(Layout(tp=2, pp=2, dp=4, zero=1, schedule="zbv", chunks=2))
    assert [stage.rank for stage in estimate.stages] == [0, 1, 1, 0]
    assert estimate.stages[0].memory == estimate.stages[3].memory


def test_a_tied_head_is_held_by_the_last_stage_too(costs):
    apart, tied = (
        costs("8b", tied=tied).estimate(Layout(pp=2, zero=0)).stages[-1].memory.weights for tied in (False, True)
    )
    assert tied == apart
    one = costs("8b", tied=True).estimate(Layout(pp=1)).stages[0].memory.weights
    assert one == pytest.approx(2 * (8_030_261_248 - 128256 * 4096))


def test_fp8_and_more_devices_are_faster_and_the_work_is_the_same(costs):
    layout = Layout(tp=2, dp=8, zero=1)
    half, eight = costs("8b").estimate(layout), costs("8b", precision="fp8").estimate(layout)
    assert eight.step_seconds < half.step_seconds
    assert costs("8b").estimate(Layout(tp=2, dp=32, zero=1)).step_seconds < half.step_seconds
    # 6 FLOPs a weight and token (the embedding is looked up), and causal attention
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    flops = 512 * 4096 * 6 * weights + 3 * 512 * 32 * 2 * 2 * 4096 * (4096 * 4097 // 2)
    assert costs("8b").step_flops(layout) == pytest.approx(flops, rel=1e-6)
    assert half.mfu == pytest.approx(flops / (half.step_seconds * 16 * 989.4e12))


def test_tensor_parallelism_over_nodes_costs_more_than_within(costs):
    inside = costs("405b", "2x8xh100").estimate(Layout(tp=8, pp=2, zero=0))
    across = costs("405b", "8x2xh100").estimate(Layout(tp=8, pp=2, zero=0))
    assert across.parts["tp"] > 2 * inside.parts["tp"]
    assert any("crosses nodes" in line for line in across.explain)


def test_405b_on_1024_has_the_layout_that_is_used_for_it(costs):
    """Megatron-Bridge's recipe for 1,024 H100 (TP 8, PP 8, CP 2, bf16 gradients), at a plausible share of the peak."""
    estimate = costs("405b", "128x8xh100", global_batch=512, seq_len=8192, gradient_bytes=2).estimate(
        Layout(tp=8, pp=8, cp=2, dp=8, zero=1)
    )
    assert estimate.fits and 0.35 < estimate.mfu < 0.6


def test_refusals_name_the_numbers(costs):
    found = costs("8b")
    with pytest.raises(TersorError, match="512 is not a multiple of dp=3"):
        found.estimate(Layout(dp=3))
    with pytest.raises(TersorError, match="32 blocks are too few for 64 stages"):
        found.estimate(Layout(pp=64))
    with pytest.raises(TersorError, match="the stages have 31 blocks, the model has 32"):
        found.estimate(Layout(pp=2, stages=(16, 15)))


def test_a_stage_may_be_the_embedding_alone(costs):
    estimate = costs("8b").estimate(Layout(pp=4, stages=(0, 16, 16, 0)))
    assert [stage.blocks for stage in estimate.stages] == [0, 16, 16, 0]
    assert estimate.stages[0].memory.weights == 2 * 128256 * 4096

"""Roofline, cache, formats, advice and the cost of answers: against sums done by hand or one by one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import header_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import Hardware, load_hardware
from tersor.ops.model.facts import Attention, facts
from tersor.ops.model.operators import Attend, Linear, Pass, operators
from tersor.ops.model.roofline import seconds_of, total_seconds
from tersor.ops.model.stored import stored_weights
from tersor.ops.profile.headers import test_time as answer_model
from tersor.ops.profile.headers.alternatives import FORMATS, in_format, slower_from_batch, weight_bytes
from tersor.ops.profile.headers.kv_cache import USABLE, cache_bytes, devices_needed, longest_context
from tersor.ops.profile.headers.roofline import middle_step, predict, serve
from tersor.ops.profile.headers.run import profile_headers
from tersor.ops.profile.request import Workload

ROUND = Hardware(
    "round numbers", {"bf16": 100e12, "int8": 200e12}, 80e9, 1000, 1.0, 1.0, 0.8, 0.0, 2.0, 3.6, link_gbps=100
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(config, shapes) -> (facts, operators, checkpoint)"""
    made = {}

    def get(name: str, config: dict, shapes: dict):
        if name not in made:
            checkpoint = Checkpoint(models.write_model(tmp_path_factory.mktemp("model") / name, config, shapes))
            weights = stored_weights(checkpoint)
            found = facts(checkpoint, weights)
            made[name] = found, operators(found, weights), checkpoint
        return made[name]

    return get


@pytest.fixture(scope="module")
def llama(model):
    return model("llama", models.LLAMA_8B, models.llama_shapes(models.LLAMA_8B))


@pytest.fixture(scope="module")
def mixtral(model):
    return model("mixtral", models.MIXTRAL, models.llama_shapes(models.MIXTRAL))


@pytest.fixture(scope="module")
def gemma(model):
    return model("gemma", models.GEMMA3_27B, models.gemma3_shapes(models.GEMMA3_27B))


def linear(**changes) -> Linear:
    whole = {
        "name": "up", "kind": "mlp", "count": 1, "shape": (2000, 1000), "macs": 2_000_000, "params": 2_000_000,
        "weight_bytes": 4_000_000, "label": "bf16", "precision": "bf16",
    }  # fmt: skip
    return Linear(**whole | changes)


def test_an_operator_takes_the_longer_of_work_and_bytes():
    few, many = Pass(1, 1), Pass(1, 10_000)
    assert seconds_of(linear(), few, ROUND) == (pytest.approx((4e6 + 2 * 3000) / 1e12), "memory")
    assert seconds_of(linear(), many, ROUND) == (pytest.approx(2 * 2e6 * 1e4 / 100e12), "compute")
    assert seconds_of(linear(precision="int8"), many, ROUND)[0] == pytest.approx(2 * 2e6 * 1e4 / 200e12)
    assert seconds_of(linear(unpacks=True), many, ROUND)[0] == pytest.approx(2 * 2e6 * 1e4 / 80e12)
    assert seconds_of(linear(speedup=2.0), many, ROUND)[0] == pytest.approx(2 * 2e6 * 1e4 / 200e12)
    assert seconds_of(linear(speedup=2.0), many, replace(ROUND, sparse_speedup=1))[0] == pytest.approx(4e10 / 100e12)
    # no 8-bit floats: unpacked to bf16
    assert seconds_of(linear(precision="fp8"), many, ROUND)[0] == pytest.approx(4e10 / 80e12)
    slow_start = replace(ROUND, kernel_floor_seconds=1e-3)
    assert seconds_of(linear(), few, slow_start) == (pytest.approx(1e-3 + 4.006e-6), "launch")
    assert seconds_of(linear(), many, ROUND, devices=4)[0] == pytest.approx(4e10 / 100e12 / 4)


def test_experts_touched_by_a_batch():
    """Against drawing them: each token picks 2 of 8 different ones."""
    operator = linear(experts=8, active=2)
    assert operator.touched(1) == pytest.approx(2)
    assert operator.touched(10_000) == pytest.approx(8)
    generator = random.Random(0)
    for tokens in (2, 5, 9):
        draws = [len({e for _ in range(tokens) for e in generator.sample(range(8), 2)}) for _ in range(4000)]
        assert operator.touched(tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)
    assert operator.flops(Pass(1, 7)) == 7 * 2 * linear().flops(Pass(1, 1))


def test_totals_are_those_of_the_rows(llama):
    found, work, _ = llama
    data = predict(found, work, Pass(4, 100), load_hardware("h100"), devices=2)
    for key in ("flops", "moved_bytes", "seconds"):
        assert data[key] == pytest.approx(sum(row[key] for row in data["operators"]))
    assert data["seconds"] == pytest.approx(sum(data["bound_seconds"].values()))
    assert data["seconds"] == pytest.approx(total_seconds(found, work, Pass(4, 100), load_hardware("h100"), 2))
    assert [row["name"] for row in data["operators"]].count("all-reduce") == 1


def test_decoding_a_large_model_reads_its_weights(llama):
    """The bound that everyone knows: weights over bandwidth."""
    found, work, checkpoint = llama
    perfect = replace(load_hardware("h100"), memory_efficiency=1.0, kernel_floor_seconds=0.0)
    seconds = predict(found, work, Pass(1, 1, 10), perfect)["seconds"]
    read = checkpoint.nbytes - 2 * 128256 * 4096  # all but the table of embeddings
    assert seconds == pytest.approx(read / 3.35e12, rel=0.01)


def test_serving_adds_up(llama):
    found, work, _ = llama
    load = Workload(batch=8, prompt=1000, generate=100)
    data = serve(found, work, ROUND, load, 1)
    assert data["total_seconds"] == pytest.approx(data["first_token_seconds"] + 99 * data["token_seconds"])
    assert data["tokens_per_second"] == pytest.approx(800 / data["total_seconds"])
    # 3.60 dollars an hour are a tenth of a cent a second
    assert data["dollars_per_million_generated_tokens"] == pytest.approx(1e-3 * data["token_seconds"] / 8 * 1e6)
    assert data["decode"]["past_tokens"] == 1050
    assert serve(found, work, ROUND, replace(load, generate=0), 1)["decode"] is None
    assert serve(found, work, replace(ROUND, dollars_per_hour=None), load, 1)["dollars_per_million_tokens"] is None


specs = st.builds(
    Attention,
    heads=st.just(4), kv_heads=st.just(2), key_dim=st.just(8), value_dim=st.just(8),
    window=st.none() | st.integers(1, 20), latent=st.none(), chunked=st.booleans(),
).map(lambda spec: spec if spec.window else replace(spec, chunked=False))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(spec=specs, new=st.integers(1, 40), past=st.integers(0, 40))
def test_pairs_of_a_sequence_one_by_one(spec, new, past):
    def sees(query: int, key: int) -> bool:
        if key > query or spec.window is None:
            return key <= query
        return query // spec.window == key // spec.window if spec.chunked else query - key < spec.window

    brute = sum(sees(query, key) for query in range(past, past + new) for key in range(past + new))
    assert spec.pairs(new, past) == brute
    assert spec.pairs(new, past) == sum(spec.seen(query) for query in range(past, past + new))


def test_latent_attention_in_a_step_reads_the_latents():
    spec = Attention(128, 128, 192, 128, latent=(512, 64))
    operator = Attend(spec, 61, causal=True)
    step = Pass(2, 1, 999)
    assert operator.flops(step) == 2 * 2 * 128 * (512 + 64 + 512) * 1000
    assert operator.bytes(step) == 2 * (1000 * 576 * 2 + 128 * 320 * 2)
    assert operator.flops(Pass(2, 10)) == 2 * 2 * 128 * (192 + 128) * 55


def test_layers_with_a_state_keep_no_cache():
    operator = Attend(Attention(4, 2, 8, 8, recurrent=True), 1, causal=True)
    assert operator.flops(Pass(1, 10)) == 0 and operator.attention.cached_numbers == 0


@pytest.mark.parametrize("context", [1, 500, 1024, 1025, 40_000])
def test_windows_stop_growing(gemma, context):
    found, _, _ = gemma
    per_layer = 2 * 16 * 128 * 2
    assert cache_bytes(found, context) == per_layer * (10 * context + 52 * min(context, 1024))


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("llama", 37), ("gemma", 1), ("gemma", 5)])
def test_the_longest_context_fits_and_one_more_token_does_not(request, name, batch):
    found, _, checkpoint = request.getfixturevalue(name)
    device = load_hardware("h100")
    longest = longest_context(found, checkpoint.nbytes, device, batch, 1)
    room = USABLE * device.memory_bytes - checkpoint.nbytes
    assert batch * cache_bytes(found, longest) <= room < batch * cache_bytes(found, longest + 1)


def test_weights_that_do_not_fit_leave_no_context(llama):
    found, _, checkpoint = llama
    small = replace(ROUND, memory_bytes=10e9)
    assert longest_context(found, checkpoint.nbytes, small, 1, 1) == 0
    assert devices_needed(found, checkpoint.nbytes, small, 1, 1000) == 2
    assert devices_needed(found, checkpoint.nbytes, load_hardware("h100"), 1, 1000) == 1
    # 64 sequences of 8000 tokens: 67 GB of cache beside 16 GB of weights
    assert devices_needed(found, checkpoint.nbytes, load_hardware("h100"), 64, 8000) == 2


def test_formats_change_the_blocks_alone(mixtral):
    _, work, checkpoint = mixtral
    whole = weight_bytes(work)
    assert whole == sum(
        info.nbytes for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and "embed" not in name
    )
    changed = sum(
        info.params for name, info in checkpoint.tensors.items() if "self_attn" in name or ".experts." in name
    )
    assert whole - weight_bytes(in_format(work, "w4a16")) == pytest.approx(changed * (2 - 0.5 - 2 / 128))
    assert whole - weight_bytes(in_format(work, "2:4")) == pytest.approx(changed * (2 - 9 / 8))
    assert in_format(work, "bf16") == in_format(work, "50 % unstructured") == work
    assert set(FORMATS) == {"bf16", "fp8", "w8a8", "w4a16", "2:4", "50 % unstructured"}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_batch_from_which_int4_is_slower(request, name):
    found, work, _ = request.getfixturevalue(name)
    device, load = load_hardware("h100"), Workload(prompt=512, generate=128)
    int4 = in_format(work, "w4a16")
    batch = slower_from_batch(found, int4, work, device, load, 1)

    def slower(size: int) -> bool:
        run = middle_step(load, size)
        return total_seconds(found, int4, run, device) > total_seconds(found, work, run, device)

    assert batch > 32 and slower(batch) and not slower(batch - 1) and not slower(1)
    assert slower_from_batch(found, in_format(work, "w8a8"), work, device, load, 1) is None
    assert slower_from_batch(found, work, work, device, load, 1) is None


def codes(checkpoint: Checkpoint, hardware: str | Hardware, **workload) -> dict[str, str]:
    device = load_hardware(hardware) if isinstance(hardware, str) else hardware
    data = profile_headers(checkpoint, device, Workload(**workload))
    return {warning["code"]: warning["message"] for warning in data["warnings"]}


def test_advice_on_int4_names_the_batch(llama):
    _, _, checkpoint = llama
    small, large = codes(checkpoint, "h100", batch=1), codes(checkpoint, "h100", batch=512)
    assert "from batch 278 on" in small["weight-only"] and "weight-only-slower" not in small
    assert "weight-only-slower" in large and "weight-only" not in large


def test_advice_on_what_does_not_fit(llama):
    _, _, checkpoint = llama
    assert "those of 2," in codes(checkpoint, replace(ROUND, memory_bytes=12e9))["does-not-fit"]
    assert "does-not-fit" not in codes(checkpoint, "h100")
    assert "131,072" in codes(checkpoint, "h100", prompt=140_000)["beyond-context"]


def test_advice_on_the_cache(llama):
    _, _, checkpoint = llama
    found = codes(checkpoint, "h100", batch=64, prompt=8000, generate=2000)
    assert "cache-dominates" in found and "long-answers" not in found
    assert "long-answers" in codes(checkpoint, "h100") and "cache-dominates" not in codes(checkpoint, "h100")


def test_advice_on_experts_and_small_models(mixtral, tmp_path):
    _, _, checkpoint = mixtral
    assert "experts-touched" in codes(checkpoint, "h200", batch=4)
    assert "experts-touched" not in codes(checkpoint, "h200", batch=1)
    tiny = models.LLAMA_8B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                              "num_key_value_heads": 4, "vocab_size": 1000}  # fmt: skip
    assert "launch-bound" in codes(
        Checkpoint(models.write_model(tmp_path / "m", tiny, models.llama_shapes(tiny))), "h100"
    )


# --- the cost of answers -------------------------------------------------------------------------------------------


def test_budget_of_top_k_has_a_minus():
    """algorithms.md A14: C=300, G=500, B=600. A loop over the tokens is the judge between minus and plus."""
    loop = sum(min(300 + t, 600) for t in range(500))
    assert loop == answer_model.attended(300, 500, 600) == 254_850
    minus, plus = 600 * 500 - 300**2 / 2, 600 * 500 + 300**2 / 2
    assert abs(minus - loop) / loop < 1e-3 < 0.3 < abs(plus - loop) / loop
    assert answer_model.attended(300, 500) == sum(300 + t for t in range(500)) == 274_750


@settings(max_examples=200, deadline=None)
@given(context=st.integers(0, 60), generate=st.integers(0, 60), budget=st.none() | st.integers(1, 90))
def test_attended_tokens_one_by_one(context, generate, budget):
    loop = sum(min(context + t, budget or 10**9) for t in range(generate))
    assert answer_model.attended(context, generate, budget) == loop


@settings(max_examples=100, deadline=None)
@given(
    context=st.integers(1, 40), generate=st.integers(1, 40), trials=st.integers(1, 5), window=st.none() | st.integers(1, 50),
    sparse=st.none() | st.builds(answer_model.Sparse, budget=st.integers(1, 60), block=st.none() | st.sampled_from([2, 8])),
)  # fmt: skip
def test_cost_of_answers_token_by_token(context, generate, trials, window, sparse):
    """A loop over layers, answers and steps that keeps the prompt's cache apart from each answer's own."""
    kinds = [Attention(4, 2, 8, 8), Attention(4, 2, 8, 8, window=window), Attention(4, 4, 12, 8, latent=(16, 4))]
    params, bytes_per_number = 1000, 2
    flops = cache = search = 0.0
    for spec in kinds:
        width = 2 * 16 + 4 if spec.latent else 16
        for step in range(generate):
            in_sight = min(context + step, spec.window or 10**9)
            read = min(in_sight, sparse.budget) if sparse else in_sight
            flops += trials * 2 * 4 * width * read
            if sparse and sparse.block:
                search += trials * 2 * 4 * spec.key_dim * in_sight / sparse.block
            own = min(step, read)
            cache += spec.cached_numbers * bytes_per_number * (trials * read if sparse else (read - own) + trials * own)
    cost = answer_model.answers(Counter(kinds), params, context, generate, trials, sparse, bytes_per_number, 5000, 4)
    assert cost.attention_flops == pytest.approx(flops + search)
    assert cost.cache_bytes == pytest.approx(cache)
    assert cost.linear_flops == trials * 2 * params * generate
    assert cost.weight_bytes == generate * 5000 / 4


def test_published_closed_forms():
    """A14 and B15, dense: n(2PG + 2(2C+G)G H d) FLOPs and 2(2C + nG) G Hkv d bytes, but for the G/2 of the integral."""
    heads, kv_heads, width, layers = 32, 8, 128, 32
    params, context, generate, trials = 8e9, 4000, 16_000, 8
    cost = answer_model.answers({Attention(heads, kv_heads, width, width): layers}, params, context, generate, trials)
    d = width * layers
    assert cost.linear_flops + cost.attention_flops == pytest.approx(
        trials * (2 * params * generate + 2 * (2 * context + generate) * generate * heads * d), rel=1e-4
    )
    assert cost.cache_bytes == pytest.approx(2 * (2 * context + trials * generate) * generate * kv_heads * d, rel=1e-4)
    intensity = 562.5
    assert cost.equivalent_flops(intensity) == cost.linear_flops + cost.attention_flops + intensity * cost.cache_bytes
    block = answer_model.answers(
        {Attention(heads, kv_heads, width, width): layers}, params, context, generate, 1, answer_model.Sparse(6000, 64)
    )
    kappa = 6000 * generate - (6000 - context) ** 2 / 2
    search = (2 * context + generate) / 64 * generate * heads * d
    assert block.attention_flops == pytest.approx(4 * kappa * heads * d + search, rel=1e-4)
    assert block.cache_bytes == pytest.approx(4 * kappa * kv_heads * d, rel=1e-4)


def test_where_the_cache_overtakes_the_weights(llama, gemma):
    for found, _, checkpoint in (llama, gemma):
        weights = checkpoint.nbytes
        for batch in (1, 8):
            tokens = answer_model.crossover_tokens(found, weights, batch)
            assert batch * cache_bytes(found, tokens) >= weights > batch * cache_bytes(found, tokens - 1)


def test_weights_matter_less_the_longer_the_answer(llama):
    _, _, checkpoint = llama
    data = profile_headers(checkpoint, load_hardware("h100"), Workload(batch=8, prompt=512, generate=512, trials=4))
    rows = [row for row in data["test_time"]["rows"] if row["trials"] == 4]
    left = [row["share_left_with_quarter_weights"] for row in rows]
    assert left == sorted(left) and left[-1] > 0.6 > left[0]
    assert [row["attention_share"] for row in rows] == sorted(row["attention_share"] for row in rows)
    assert data["test_time"]["flops_per_byte"] == pytest.approx(989.4e12 / 3.35e12)

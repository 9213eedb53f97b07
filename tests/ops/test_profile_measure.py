"""Measured profiles: that the fit is right and the parts belong together. No test asks for a speed."""

from __future__ import annotations

import json

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import host_path, load_hardware
from tersor.formats.page_text import render
from tersor.ops.model.bare import BareModel, run_block
from tersor.ops.profile.measure import host, operators, run, runtime
from tersor.ops.profile.measure.page import sections
from tersor.ops.profile.measure.runtime import Fit, Fits, Steps, fit_steps, prompt_sizes
from tersor.ops.profile.measure.stand import Stand, choose_blocks
from tersor.ops.profile.measure.whole import generate, held_out_pairs
from tersor.ops.profile.request import Workload

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Few and short runs, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(host, "SIZES", {"cpu": (32,)})
    monkeypatch.setattr(host, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(host, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(runtime, "MIN_ROUNDS", 4)
    monkeypatch.setattr(runtime, "MAX_ROUNDS", 4)
    monkeypatch.setattr(operators, "RUNS", 3)


def filled(path, dtype=torch.float32) -> BareModel:
    bare = BareModel(Checkpoint(path), CPU, dtype)
    bare.fill_shell()
    for index in range(len(bare.blocks)):
        bare.fill(index)
    return bare


def test_prompt_time_is_piecewise_linear():
    fit = Fit((10, 20, 40), (1.0, 2.0, 6.0), ())
    assert [fit.prompt(tokens) for tokens in (5, 10, 15, 20, 30, 40, 50)] == [0.5, 1, 1.5, 2, 4, 6, 8]
    assert fit.total(20, 100) == 2  # does not generate


def test_total_is_the_sum_of_its_steps():
    fit = Fit((10, 20), (1.0, 2.0), (Steps(3, 0.1, 0.01), Steps(1, 0.5, 0.0)))
    assert fit.total(10, 1) == 1.0
    expected = 1.0 + sum(3 * (0.1 + 0.01 * context) + 0.5 for context in (10, 11, 12))
    assert fit.total(10, 4) == pytest.approx(expected)
    assert fit.step(10) == pytest.approx(3 * 0.2 + 0.5)


def test_steps_are_fitted():
    steps = fit_steps(2, [10, 20, 30], [1.1, 1.2, 1.3], None)
    assert (steps.base, steps.slope) == (pytest.approx(1.0), pytest.approx(0.01))
    assert fit_steps(2, [10, 20, 30], [1.3, 1.2, 1.1], None) == Steps(2, pytest.approx(1.2), 0.0)
    windowed = fit_steps(1, [10, 20, 30], [1.1, 1.2, 1.2], 20)
    assert windowed.slope == pytest.approx(0.01)
    assert Fit((1,), (0.0,), (windowed,)).step(1000) == pytest.approx(1.2)
    assert fit_steps(1, [10], [2.0], None) == Steps(1, 2.0, 0.0)


def test_interval_holds_what_the_rounds_hold():
    fits = Fits([Fit((10, 20), (value, 2 * value), ()) for value in (0.9, 0.95, 1.0, 1.05, 1.1)])
    middle, low, high = fits.total(10, 0)
    assert middle == 1.0
    assert (low < 0.9, high > 1.1) == (True, True)
    same = Fits([Fit((10, 20), (1.0, 2.0), ())] * 3)
    assert same.total(15, 0) == (1.5, 1.5, 1.5)


def test_sizes_fit_into_the_context(family):
    bare = BareModel(Checkpoint(family("gpt2")), CPU, torch.float32)
    assert max(prompt_sizes(bare, 10_000)) == 126  # of 128, with room for a step
    assert prompt_sizes(bare, 1) == [2]
    sizes = prompt_sizes(bare, 100)
    assert len(sizes) == 6
    *pairs, workload = held_out_pairs(bare, sizes, 60, 40)
    assert workload == (60, 40)
    assert len(pairs) == 3
    for prompt, generated in pairs:
        assert prompt not in sizes
        assert prompt + generated <= 128


def test_long_answers_stay_within_the_context(family):
    bare = BareModel(Checkpoint(family("gpt2")), CPU, torch.float32)
    pairs = held_out_pairs(bare, prompt_sizes(bare, 1016), 16, 1000)
    assert len(pairs) == 3
    assert all(prompt + generated <= 126 for prompt, generated in pairs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "bert"])
def test_blocks_run_as_in_the_model(name, family):
    bare = filled(family(name))
    inputs = bare.inputs(2, 12)
    seen = []
    with torch.no_grad():
        handle = bare.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        last = []
        end = bare.blocks[-1].register_forward_hook(
            lambda _, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        bare.model(**inputs)
        handle.remove()
        end.remove()
        calls, shape = bare.calls(inputs)
        hidden = seen[0]
        assert hidden.shape == shape
        for block, call in zip(bare.blocks, calls, strict=True):
            hidden = run_block(block, hidden, call)
    assert torch.allclose(hidden, last[0], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_stands_leave_the_cache_as_it_was(name, family):
    bare = filled(family(name))
    kinds = bare.kinds()
    stand = Stand(bare, choose_blocks(bare, kinds), 2, 12)
    for _ in range(2):
        for kind in kinds:
            assert stand.step(kind.name) > 0
            assert stand.prompt(kind.name) > 0
        assert stand.step_shell() > 0
        assert stand.prompt_shell() > 0
    stand._restore(stand.full)
    assert stand.cache.get_seq_length() == 12
    stand._restore(stand.empty)
    assert stand.cache.get_seq_length() == 0


def test_the_whole_model_generates_with_its_cache(family):
    bare = filled(family("llama"))
    lengths = []
    handle = bare.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0].shape[1], kwargs["past_key_values"].get_seq_length())),
        with_kwargs=True,
    )
    generate(bare, bare.inputs(1, 7)["input_ids"], 4)
    handle.remove()
    assert lengths == [(7, 0), (1, 7), (1, 8), (1, 9)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "mixtral", "bert-mlm", "vit"])
def test_measure(name, family, quick):
    stages = []
    checkpoint = Checkpoint(family(name))
    data = run.measure(checkpoint, Workload(2, 40, 20), CPU, lambda stage, done, total: stages.append(stage))
    assert json.loads(json.dumps(data)) == data
    assert list(dict.fromkeys(stages)) == list(run.STAGES)
    layers = checkpoint.config.get("num_hidden_layers") or checkpoint.config["n_layer"]
    assert sum(block["layers"] for block in data["blocks"]) == layers
    causal = name not in ("bert-mlm", "vit")
    assert (data["operators"]["step"] is not None) == causal
    assert (data["runtime"]["token"] is not None) == causal
    assert len(data["held_out"]["rows"]) == (0 if name == "vit" else 4 if causal else 3)
    assert data["device"]["threads"] == torch.get_num_threads()
    rows = {row["name"]: row for row in data["operators"]["prompt"]["rows"]}
    for row in rows.values():
        assert row["low_seconds"] <= row["seconds"] <= row["high_seconds"]
    # Every operator but what has no roofline is predicted.
    assert {key for key, row in rows.items() if row["predicted_seconds"] is None} <= {
        operators.REST, operators.EMBEDDING, "cls.predictions.transform.dense", "vit.embeddings.patch_embeddings.projection",
    }  # fmt: skip
    text = render(sections(data), 120)
    assert "Where the time goes" in text
    assert "What training keeps" in text


def test_operators_are_found_with_their_blocks(family, quick):
    data = run.measure(Checkpoint(family("llama")), Workload(1, 16, 8), CPU)
    for phase in ("prompt", "step"):
        counts = {row["name"]: row["count"] for row in data["operators"][phase]["rows"]}
        linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
        assert counts == {name: 2 for name in [*linears, "mlp.up_proj", "mlp.down_proj", operators.ATTENTION]} | {
            operators.NORMS: 3, operators.REST: 3, operators.EMBEDDING: 1, "lm_head": 1,
        }  # fmt: skip


def test_host_is_measured_once(quick, monkeypatch):
    first, fresh = host.host(CPU)
    assert fresh
    assert load_hardware("host") == first
    assert (first.compute_efficiency, first.memory_efficiency) == (1.0, 1.0)
    assert {"fp32", "bf16"} <= first.peak_flops.keys()
    assert host.host(CPU) == (first, False)
    monkeypatch.setattr(host, "device_label", lambda device: "another machine")
    assert host.host(CPU)[1]
    host_path().write_text("damaged")
    assert host.host(CPU)[1]


def test_a_block_that_does_not_fit_is_named(family, monkeypatch):
    from tersor.ops.profile.measure import stand

    bare = BareModel(Checkpoint(family("llama")), CPU, torch.float32)
    monkeypatch.setattr(stand, "free_bytes", lambda device: 1000)
    with pytest.raises(TersorError, match=r"LlamaDecoderLayer takes \d+ bytes, 0 are free"):
        choose_blocks(bare, bare.kinds())


def test_a_model_that_cannot_be_taken_apart_is_named(family, monkeypatch):
    bare = BareModel(Checkpoint(family("llama")), CPU, torch.float32)
    monkeypatch.setattr(type(bare.model.base_model), "forward", lambda self, **inputs: None)
    with pytest.raises(TersorError, match="LlamaForCausalLM: its blocks cannot be run one by one"):
        bare.calls(bare.inputs(1, 4))


def test_the_check_is_left_out_without_memory(family, quick, monkeypatch):
    from tersor.ops.profile.measure import whole

    monkeypatch.setattr(whole, "free_bytes", lambda device: 1000)
    data = run.measure(Checkpoint(family("llama")), Workload(1, 16, 8), CPU)
    assert data["held_out"]["rows"] == []
    assert "are free" in data["held_out"]["left_out_because"]
    assert "Not checked against the whole model" in render(sections(data), 100)


def test_enough_copies_to_leave_the_cache(family, monkeypatch):
    from tersor.ops.profile.measure import stand

    bare = BareModel(Checkpoint(family("gemma3")), CPU, torch.float32)
    kinds = bare.kinds()
    monkeypatch.setattr(stand, "cache_bytes", lambda device: kinds[0].parameter_bytes)
    assert choose_blocks(bare, kinds) == {kinds[0].name: [0, 1, 2], kinds[1].name: [5]}


def test_the_page_says_what_matters(family, quick):
    data = run.measure(Checkpoint(family("gemma3")), Workload(1, 16, 8), CPU)
    speed, time_goes, memory = sections(data)
    assert [section.title for section in (speed, time_goes, memory)] == [
        "Measured speed", "Where the time goes", "What training keeps in memory",
    ]  # fmt: skip
    assert "off by at most" in speed.lead
    assert "is the largest part of a prompt" in time_goes.lead
    assert [row[:3] for row in time_goes.items[0].rows] == [
        ["Gemma3DecoderLayer (sliding attention)", "6", "24"],
        ["Gemma3DecoderLayer (full attention)", "1", "24"],
    ]
    kept, warning, chains = memory.items
    assert [row[:3] for row in kept.rows[:2]] == [
        ["Gemma3DecoderLayer (sliding attention)", "sdpa", "6"],
        ["Gemma3DecoderLayer (full attention)", "sdpa", "1"],
    ]
    assert warning.warn
    assert "sliding attention" in warning.lines[0]  # its mask is kept, of every block
    assert {row[0] for row in chains.rows} == {"RMSNorm", "gelu → ×"}
    norms = next(row for row in chains.rows if row[0] == "RMSNorm")
    assert norms[5] == "–"  # cannot be nested


def test_the_page_does_without_roofline(family, quick, monkeypatch):
    def unknown(*arguments):
        raise TersorError("no such key in config.json", "")

    monkeypatch.setattr(run, "roofline", unknown)
    data = run.measure(Checkpoint(family("llama")), Workload(1, 16, 0), CPU)
    assert data["operators"]["roofline_missing_because"] == "no such key in config.json"
    assert "No roofline: no such key in config.json." in render(sections(data), 120)

"""Activation sparsity: thresholds and their allocation, and what evaluate makes of them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.cli.main import app
from tersor.formats.activation_thresholds import FILE_NAME, Threshold, description
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.evaluate.run import Request, cut_targets, evaluate
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.input_thresholds import InputCounts, applied
from tersor.ops.model.selection import select
from tersor.ops.model.skeleton import Skeleton, is_linear
from tersor.ops.sparsify.activations.allocate import allocate, average
from tersor.ops.sparsify.activations.run import calibrate
from tersor.ops.sparsify.activations.thresholds import MagnitudeHistogram
from torch import nn
from typer.testing import CliRunner

CPU = torch.device("cpu")
SEQ_LEN = 48
SAMPLES = 24

# ---------------------------------------------------------------- thresholds


def histogram(x: torch.Tensor) -> MagnitudeHistogram:
    found = MagnitudeHistogram()
    found.add(x)
    return found


def share_below(x: torch.Tensor, threshold: float) -> float:
    return int((x.abs() <= threshold).sum()) / x.numel()


@settings(max_examples=50, deadline=None)
@given(
    share=st.floats(0, 1),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    tails=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_threshold_zeroes_the_share(share, scale, tails, seed):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(seed))
    x = scale * (x**3 if tails else x)
    found = share_below(x, histogram(x).threshold(share))
    assert share - 1e-6 <= found <= share + 2e-3


def test_zeros_that_are_there_need_no_threshold():
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).relu()
    found = histogram(x)
    assert found.zeros == share_below(x, 0.0) > 0.45
    assert found.threshold(found.zeros) == 0.0
    assert share_below(x, found.threshold(0.7)) == pytest.approx(0.7, abs=2e-3)


def test_batches_add_up():
    x = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    whole, parts = histogram(x), MagnitudeHistogram()
    for part in x.split(7):
        parts.add(part)
        parts.threshold(0.5)  # asking in between changes nothing
    assert [whole.threshold(share / 10) for share in range(11)] == [parts.threshold(share / 10) for share in range(11)]


def test_applied_is_where_the_magnitude_is_larger():
    layer = nn.Linear(5, 2, bias=False)
    x = torch.tensor([[0.5, -0.5, 0.50001, -3.0, 0.0], [float("nan"), 1.0, 0.1, -0.1, 2.0]])
    seen, counts = [], {}
    with applied({"a": layer}, {"a": 0.5}, counts):
        handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        layer(x)
        handle.remove()
    assert seen[0][0].tolist() == [0, 0, x[0, 2], -3, 0]
    assert torch.isnan(seen[0][1, 0])
    assert seen[0][1, 1:].tolist() == [1, 0, 0, 2]
    assert counts == {"a": InputCounts(2, 10, 5)}
    assert torch.equal(layer(x[:1]), nn.functional.linear(x[:1], layer.weight))  # hooks are gone


# ---------------------------------------------------------------- allocation


def cubic(costs: dict[str, float]):
    return lambda levels: sum(costs[name] * level**3 for name, level in levels.items())


def best_on_grid(sizes: dict[str, float], target: float, error, step: float) -> float:
    grid = [round(step * index, 10) for index in range(int(0.95 / step) + 1)]
    candidates = (dict(zip(sizes, levels, strict=True)) for levels in itertools.product(grid, repeat=len(sizes)))
    return min(error(levels) for levels in candidates if average(levels, sizes) >= target - 1e-9)


def test_equal_sizes_are_spread_as_well_as_can_be():
    """Of separate convex errors greedy steps of one size are the best there is."""
    sizes, error = dict.fromkeys("abcd", 8.0), cubic({"a": 1, "b": 2, "c": 5, "d": 10})
    found = allocate(sizes, dict.fromkeys(sizes, 0.0), 0.5, error)
    assert average(found.levels, sizes) == pytest.approx(0.5)
    assert found.error == pytest.approx(best_on_grid(sizes, 0.5, error, 0.1))
    assert found.error < 0.7 * found.uniform_error


@pytest.mark.parametrize("target", [0.25, 0.4, 0.6])
def test_sizes_count(target):
    """A large layer whose raise costs more is still the better one for each byte."""
    sizes, error = {"small": 1.0, "large": 8.0, "middle": 3.0}, cubic({"small": 1.0, "large": 4.0, "middle": 2.0})
    found = allocate(sizes, dict.fromkeys(sizes, 0.0), target, error)
    assert average(found.levels, sizes) == pytest.approx(target)
    assert found.error <= 1.05 * best_on_grid(sizes, target, error, 0.05)
    assert found.levels["large"] > found.levels["small"]


@settings(max_examples=60, deadline=None)
@given(
    target=st.floats(0.01, 0.99),
    sizes=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
)
def test_target_is_reached_and_uniform_not_missed(target, sizes, seed):
    """Whatever the error is, also where layers hang together."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(len(sizes), len(sizes), generator=generator, dtype=torch.float64)
    names = [str(index) for index in range(len(sizes))]
    start = dict(zip(names, (torch.rand(len(sizes), generator=generator) ** 3).tolist(), strict=True))
    sizes = dict(zip(names, sizes, strict=True))

    def error(levels) -> float:
        vector = torch.tensor(list(levels.values()), dtype=torch.float64)
        return float(vector @ matrix @ vector)

    found = allocate(sizes, start, target, error)
    assert average(found.levels, sizes) >= min(target, average(start, sizes)) - 1e-6
    assert average(found.levels, sizes) >= target - 1e-6
    assert all(start[name] <= level <= 1 for name, level in found.levels.items())
    assert found.error == pytest.approx(error(found.levels))
    assert (
        found.error
        <= found.uniform_error
        == pytest.approx(error({name: max(level, target) for name, level in start.items()}))
    )


def test_enough_zeros_from_the_start():
    start = {"a": 0.9, "b": 0.2}
    found = allocate({"a": 10.0, "b": 1.0}, start, 0.5, cubic({"a": 1, "b": 1}))
    assert found.levels == start


def test_few_runs_of_the_block():
    """Raising is what costs: a step measures about two layers, not all seven."""
    calls, sizes = [], dict.fromkeys("abcdefg", 1.0)
    error = cubic({name: 1 + index for index, name in enumerate(sizes)})
    allocate(sizes, dict.fromkeys(sizes, 0.0), 0.5, lambda levels: calls.append(1) or error(levels))
    assert len(calls) <= 2 + 7 + 2 * 36


# ---------------------------------------------------------------- calibrate


@pytest.fixture(scope="module")
def windows(family, text) -> torch.Tensor:
    return load_windows(family("llama"), str(text), SAMPLES, SEQ_LEN)


def run(folder: Path, windows: torch.Tensor, target: float = 0.5, names=None, max_memory_bytes=None):
    checkpoint = Checkpoint(folder)
    names = list(select(checkpoint).linears) if names is None else names
    return calibrate(DenseView(checkpoint), target, windows, CPU, max_memory_bytes, names)


@pytest.fixture(scope="module")
def llama(family, windows):
    return run(family("llama"), windows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen3-moe", "falcon"])
def test_calibrate_reaches_the_target(name, family, windows):
    folder = family(name)
    found = run(folder, windows, 0.4)
    assert set(found.tensors) | set(found.skipped) == set(select(Checkpoint(folder)).linears)
    assert found.traffic["layer_bytes_not_read"] == pytest.approx(0.4, abs=0.03)
    assert found.traffic["weight_bytes_not_read"] < found.traffic["layer_bytes_not_read"]
    for block in found.blocks:
        assert 0 < block["output_error"] <= block["uniform_output_error"]
    assert found.description()["tensors"].keys() == found.tensors.keys()
    json.dumps(found.report(), allow_nan=False)


def test_experts_of_a_role_share_a_threshold(family, windows):
    found = run(family("mixtral"), windows, 0.4)
    roles: dict[str, set[float]] = {}
    for name, entry in found.tensors.items():
        if ".experts." in name:
            roles.setdefault(".".join([*name.split(".")[:4], name.split(".")[-2]]), set()).add(entry.threshold)
    assert len(roles) == 2 * 3
    assert all(len(thresholds) == 1 for thresholds in roles.values())


def test_calibrate_is_deterministic_and_fits_a_cap(llama, family, windows):
    again = run(family("llama"), windows, max_memory_bytes=16 << 30)
    assert again.description() == llama.description()
    assert again.report() == llama.report()


def test_zeros_of_relu_cost_nothing(family, windows):
    """OPT's second layer reads what a ReLU left: below its share of zeros the threshold stays 0."""
    found = run(family("opt"), windows, 0.05)
    for name, entry in found.tensors.items():
        if name.endswith("fc2.weight"):
            assert entry.threshold == 0
            assert entry.sparsity > 0.2


def with_thresholds(folder: Path, tmp_path: Path, thresholds: dict[str, float]) -> Path:
    model = shutil.copytree(folder, tmp_path / "thresholded")
    content = description(0.5, {name: Threshold(value, 0.5) for name, value in thresholds.items()})
    (model / FILE_NAME).write_text(json.dumps(content))
    return model


def test_calibrate_starts_anew(llama, family, windows, tmp_path):
    """Also where the old thresholds speak of layers that are gone."""
    old = with_thresholds(family("llama"), tmp_path, {"model.layers.7.mlp.up_proj.weight": 100.0})
    assert run(old, windows).description() == llama.description()


def test_layers_outside_the_blocks_are_skipped(family, windows):
    name = "model.layers.1.mlp.up_proj.weight"
    found = run(family("llama"), windows, names=[name, "lm_head.weight"])
    assert list(found.tensors) == [name]
    assert list(found.skipped) == ["lm_head.weight"]
    assert len(found.blocks) == 1
    with pytest.raises(TersorError, match="none of 1 layers"):
        run(family("llama"), windows, names=["lm_head.weight"])


@pytest.mark.parametrize("target", [0, 1, -0.5, 1.5, math.nan])
def test_targets_refused(target, family, windows):
    with pytest.raises(TersorError, match="activation sparsity of"):
        run(family("llama"), windows, target)


def test_no_tokens(family, windows):
    with pytest.raises(TersorError, match="no calibration tokens"):
        run(family("llama"), windows[:0])


def test_encoder_refused(family, windows):
    with pytest.raises(TersorError, match="BertModel"):
        run(family("bert"), windows)


# ---------------------------------------------------------------- what applies them


def threshold_some(folder: Path) -> dict[str, float]:
    """Another threshold for each linear layer of a block, of the size of its inputs."""
    names = sorted(select(Checkpoint(folder)).linears)
    return {name: 0.05 + 0.4 * index / len(names) for index, name in enumerate(names)}


def experts_by_hand(thresholds: dict[str, float], prefix: str, leaves: tuple[str, str, str], counts: list[int]):
    """The forward pass of a fused experts module whose matrices see thresholded inputs. Written anew here."""

    def shrink(x: torch.Tensor, name: str) -> torch.Tensor:
        y = torch.where(x.abs() <= thresholds[name], torch.zeros_like(x), x)
        counts[0] += x.numel()
        counts[1] += int((y == 0).sum())
        return y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden_states)
        for token, (chosen, shares) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            x = hidden_states[token]
            for expert, share in zip(chosen, shares, strict=True):
                gate, up = self.gate_up_proj[expert].chunk(2)
                names = [f"{prefix}.{expert}.{leaf}.weight" for leaf in leaves]
                hidden = self.act_fn(gate @ shrink(x, names[0])) * (up @ shrink(x, names[1]))
                result[token] += share * (self.down_proj[expert] @ shrink(hidden, names[2]))
        return result

    return forward


@torch.no_grad()
def by_hand(folder: Path, thresholds: dict[str, float], windows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of transformers' model with inputs zeroed by hooks, and the share of inputs that were zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    counts, used = [0, 0], set()

    def hook(name):
        def shrink(_, inputs):
            x = inputs[0]
            y = torch.where(x.abs() <= thresholds[name], torch.zeros_like(x), x)
            counts[0] += x.numel()
            counts[1] += int((y == 0).sum())
            return (y,)

        return shrink

    base = model.base_model_prefix + "."
    for path, module in model.named_modules():
        name = next(
            (name for name in (f"{path}.weight", f"{path}.weight".removeprefix(base)) if name in thresholds), None
        )
        if is_linear(module) and name is not None:
            module.register_forward_pre_hook(hook(name))
            used.add(name)
        elif path.endswith(".experts"):
            prefix = (
                path
                if any(name.startswith(path) for name in thresholds)
                else path.replace(".mlp.", ".block_sparse_moe.")
            )
            leaves = (
                ("w1", "w3", "w2") if f"{prefix}.0.w1.weight" in thresholds else ("gate_proj", "up_proj", "down_proj")
            )
            module.forward = experts_by_hand(thresholds, prefix, leaves, counts).__get__(module)
            used |= {name for name in thresholds if name.startswith(f"{prefix}.")}
    assert used == set(thresholds)
    return model(windows).logits, counts[1] / counts[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen3-moe"])
def test_evaluate_is_the_model_with_hooks(name, family, text, tmp_path):
    thresholds = threshold_some(family(name))
    folder = with_thresholds(family(name), tmp_path, thresholds)
    request = Request(str(folder), str(text), SEQ_LEN, max_windows=4)
    quality = evaluate(request).quality
    ids = cut_targets(folder, request)[0]
    logits, zeroed = by_hand(folder, thresholds, ids)
    labels = ids[:, 1:, None]
    expected = math.exp(-float(logits.double().log_softmax(-1)[:, :-1].gather(-1, labels).mean()))
    dense = evaluate(Request(str(family(name)), str(text), SEQ_LEN, max_windows=4)).quality
    assert quality["perplexity"] == pytest.approx(expected, rel=5e-6)
    assert abs(dense["perplexity"] / expected - 1) > 1e-3  # or the test would show nothing
    assert quality["activation_sparsity"]["inputs_zeroed"] == pytest.approx(zeroed, abs=1e-4)
    assert 0.05 < zeroed < 0.95
    assert "activation_sparsity" not in dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_a_threshold_of_zero_changes_nothing(name, family, text, tmp_path):
    folder = with_thresholds(family(name), tmp_path, dict.fromkeys(select(Checkpoint(family(name))).linears, 0.0))
    quality = evaluate(Request(str(folder), str(text), SEQ_LEN, max_windows=4, compare=str(family(name)))).quality
    assert quality["perplexity"] == quality["compared_perplexity"]
    assert quality["kl_divergence"] == 0
    found = quality["activation_sparsity"]["inputs_zeroed"]
    assert 0.1 < found < 0.4 if name == "opt" else found == 0  # OPT has a ReLU


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_bytes_not_read(name, family, text, tmp_path):
    """One layer with all of its inputs zero: its share of all bytes but the embedding table, which is looked up in."""
    layer = "model.layers.0.mlp.down_proj.weight"
    folder = with_thresholds(family(name), tmp_path, {layer: 1e9})
    found = evaluate(Request(str(folder), str(text), SEQ_LEN, max_windows=2)).quality["activation_sparsity"]
    tensors = Checkpoint(folder).tensors
    read = sum(info.nbytes for part, info in tensors.items() if part != "model.embed_tokens.weight" or name != "llama")
    assert found == {
        "inputs_zeroed": 1.0,
        "layer_bytes_not_read": 1.0,
        "weight_bytes_not_read": pytest.approx(tensors[layer].nbytes / read),
    }


def test_experts_count_by_what_is_routed_to_them(family, text, tmp_path):
    """Two of four experts run for a token, so half of their bytes are read without thresholds."""
    names = [name for name in select(Checkpoint(family("mixtral"))).linears if ".experts." in name]
    folder = with_thresholds(family("mixtral"), tmp_path, dict.fromkeys(names, 1e9))
    found = evaluate(Request(str(folder), str(text), SEQ_LEN, max_windows=2)).quality["activation_sparsity"]
    tensors = Checkpoint(folder).tensors
    experts = sum(tensors[name].nbytes for name in names) / 2
    others = sum(info.nbytes for name, info in tensors.items() if name not in names and "embed" not in name)
    assert found["weight_bytes_not_read"] == pytest.approx(experts / (experts + others))


def test_calibration_of_others_sees_the_zeroed_inputs(family, windows, tmp_path):
    """Statistics for quantizing or pruning are those of the inputs that the layer will get."""
    name = "model.layers.0.mlp.down_proj.weight"
    folder = with_thresholds(family("llama"), tmp_path, {name: 1e9})
    seen = {}
    skeleton = Skeleton(DenseView(Checkpoint(folder)), CPU)
    passing = BlockPass(skeleton, windows[:2])
    with skeleton.filled(0) as block:
        layers = skeleton.linears(0)
        passing.run_staged(
            0, block, layers, {"column_norms"}, lambda name, found: seen.update({name: found.column_norms})
        )
    assert float(seen[name].abs().max()) == 0
    assert all(float(norms.max()) > 0 for other, norms in seen.items() if other != name)


def test_stale_thresholds_are_found(family, text, tmp_path):
    folder = with_thresholds(family("llama"), tmp_path, {"model.layers.2.mlp.up_proj.weight": 0.1})
    with pytest.raises(TersorError, match=r"model\.layers\.2\.mlp\.up_proj\.weight") as caught:
        evaluate(Request(str(folder), str(text), SEQ_LEN, max_windows=1))
    assert "--activations" in caught.value.hint


def test_summary_shows_it_and_record_keeps_both(family, text, tmp_path):
    from tersor.formats.report import Report

    folder = with_thresholds(family("llama"), tmp_path, threshold_some(family("llama")))
    report = Report.start("sparsify", {}, 0, "cpu", Checkpoint(folder), [])
    report.quality["activation_sparsity"] = {"target": 0.5, "inputs_zeroed": 2.0}
    report.finish(Checkpoint(folder))
    report.write(folder)
    arguments = ["evaluate", folder, "--text", text, "--seq-len", SEQ_LEN, "--max-windows", 1, "--record"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert "weights not read" in result.stderr
    recorded = json.loads((folder / "report.json").read_text())["quality"]["activation_sparsity"]
    assert recorded["target"] == 0.5
    assert recorded["inputs_zeroed"] < 1

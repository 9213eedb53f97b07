"""`prune --remove weights`: each method against its published definition, and whole runs over families."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.report import Report
from tersor.ops.model.patterns import Pattern, parse_pattern
from tersor.ops.model.selection import select
from tersor.ops.model.soundness import check_folder
from tersor.ops.model.statistics import InputStatistics, output_error
from tersor.ops.prune.request import Request
from tersor.ops.prune.rounds import prune, schedule
from tersor.ops.prune.weights.magnitude import Magnitude
from tersor.ops.prune.weights.random import Random
from tersor.ops.prune.weights.repair import Repaired, refit
from tersor.ops.prune.weights.ria import RIA
from tersor.ops.prune.weights.sparsegpt import SparseGPT
from tersor.ops.prune.weights.wanda import Wanda


def problem(out=24, columns=64, tokens=300, seed=0):
    """Weights, and inputs that are correlated and of different loudness."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    loudness = torch.randn(columns, generator=generator).exp()
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * loudness
    return torch.randn(out, columns, generator=generator), inputs


def statistics_of(inputs) -> InputStatistics:
    statistics = InputStatistics({"hessian", "column_norms"})
    statistics.add(inputs)
    return statistics


# ---- methods


def test_magnitude_by_definition():
    weight, _ = problem()
    found = Magnitude().prune(weight, None, Pattern(), 0.5, "w")
    threshold = weight.abs().flatten().sort().values[weight.numel() // 2]
    assert torch.equal(found != 0, weight.abs() >= threshold)
    assert torch.equal(found[found != 0], weight[found != 0])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_wanda_by_definition(pattern):
    """The published code, line by line: sort |W| ||X|| of each row (of each M), zero the first."""
    weight, inputs = problem()
    metric = weight.abs() * inputs.square().sum(0).sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if pattern == "unstructured":
        order = torch.sort(metric, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(64 * 0.6)], True)
        share = 0.6
    else:
        n, m = map(int, pattern.split(":"))
        for start in range(0, 64, m):
            part = metric[:, start : start + m]
            mask.scatter_(1, start + torch.topk(part, m - n, dim=1, largest=False)[1], True)
        share = 1 - n / m
    found = Wanda().prune(weight, statistics_of(inputs), parse_pattern(pattern), share, "w")
    assert torch.equal(found, weight.masked_fill(mask, 0))


def test_ria_by_definition():
    weight, inputs = problem()
    magnitude = weight.abs()
    score = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1).reshape(-1, 1)
    score *= inputs.square().sum(0).sqrt().reshape(1, -1) ** 0.5
    drop = score.flatten().sort(stable=True).indices[: weight.numel() * 7 // 10]
    expected = weight.flatten().clone()
    expected[drop] = 0
    found = RIA().prune(weight, statistics_of(inputs), Pattern(), 0.7, "w")
    assert torch.equal(found, expected.view(weight.shape))


def sparsegpt_by_definition(weight, inputs, pattern: Pattern, sparsity, damping=0.01, block=128):
    """Algorithm 1 of the paper in float64, the inverse Hessian downdated column by column."""
    columns = weight.shape[1]
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian.diagonal()[hessian.diagonal() == 0] = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * (inputs.double().square().sum(0) / len(inputs)).mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w, keep = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(len(w), stop - start, dtype=torch.float64)
        if pattern.kind == "unstructured":
            score = w[:, start:stop] ** 2 / upper.diagonal()[start:stop] ** 2
            drop = score.flatten().sort(stable=True).indices[: int(score.numel() * sparsity)]
            part = keep[:, start:stop].flatten()
            part[drop] = False
            keep[:, start:stop] = part.view(score.shape)
        for j in range(start, stop):
            if pattern.kind == "n:m" and j % pattern.m == 0:
                part = slice(j, j + pattern.m)
                score = w[:, part] ** 2 / upper.diagonal()[part] ** 2
                keep[:, part] = torch.ones_like(score, dtype=torch.bool).scatter(
                    1, torch.topk(score, pattern.m - pattern.n, dim=1, largest=False)[1], False
                )
            error = torch.where(keep[:, j], 0, w[:, j]) / upper[j, j]
            w[:, j] = torch.where(keep[:, j], w[:, j], 0)
            w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, keep


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("columns", [64, 320])
def test_sparsegpt_by_definition(pattern, columns):
    weight, inputs = problem(columns=columns, tokens=4 * columns)
    pattern = parse_pattern(pattern)
    expected, keep = sparsegpt_by_definition(weight, inputs, pattern, 0.5)
    found = SparseGPT().prune(weight, statistics_of(inputs), pattern, 0.5, "w")
    assert torch.equal(found != 0, keep)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    repaired = Repaired(SparseGPT(), 0.01).prune(weight, statistics_of(inputs), pattern, 0.5, "w")
    assert torch.equal(repaired != 0, keep)


def test_repaired_weights_come_near_least_squares():
    """Row by row the exact solution on the kept columns; no row is worse than before."""
    weight, inputs = problem()
    statistics = statistics_of(inputs)
    before = SparseGPT().prune(weight, statistics, Pattern(), 0.5, "w")
    damped = statistics.hessian.double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(before != 0):
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight[row].double())

    def loss(found):
        difference = weight.double() - found.double()
        return (difference @ damped * difference).sum(1)

    after = refit(weight, before, statistics.hessian, 0.01)
    assert (loss(after) <= loss(before) * (1 + 1e-6)).all()
    assert (loss(after) - loss(best)).sum() < 0.05 * (loss(before) - loss(best)).sum()
    torch.testing.assert_close(
        refit(weight, before, statistics.hessian, 0.01, 200).double(), best, rtol=1e-2, atol=1e-2
    )
    assert torch.equal(refit(weight, before, torch.zeros(64, 64), 0.01), before)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "vector:8x1", "block:4x4"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern):
    weight, inputs = problem(columns=128)
    statistics = statistics_of(inputs)
    errors = [
        output_error(weight, method.prune(weight, statistics, parse_pattern(pattern), 0.5, "w"), statistics.hessian)
        for method in (SparseGPT(), Wanda(), Magnitude())
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("method", [SparseGPT(), Wanda(), Magnitude(), RIA(), Random()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "vector:8x1", "block:4x8"])
@pytest.mark.parametrize("statistics", [True, False])
def test_share_and_pattern_hold_and_masks_only_grow(method, pattern, statistics):
    weight, inputs = problem(columns=192)
    known, rule = statistics_of(inputs) if statistics else None, parse_pattern(pattern)
    once = method.prune(weight, known, rule, 0.5, "w")
    assert (once == 0).float().mean() == 0.5
    if rule.kind == "n:m":
        assert ((once != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    if rule.kind == "tile":
        tiles = (once != 0).unflatten(1, (-1, rule.columns)).unflatten(0, (-1, rule.rows))
        assert torch.equal(tiles.amax((1, 3)), tiles.amin((1, 3)))
    if rule.kind != "n:m":
        twice = method.prune(once, known, rule, 0.75, "w")
        assert (twice == 0).float().mean() == 0.75 and (twice[once == 0] == 0).all()
    less = method.prune(once, known, rule, 0.25 if rule.kind != "n:m" else 0.5, "w")
    assert torch.equal(less == 0, once == 0)


def test_random_depends_on_seed_and_name_alone():
    weight, _ = problem()
    masks = [
        Random(seed).prune(weight, None, Pattern(), 0.5, name) != 0
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3])


# ---- whole runs


def request(model, out, text, **options) -> Request:
    settings = {"calib": str(text), "samples": 4, "seq_len": 64, "device": "cpu"}
    return Request(str(model), out, **settings | options)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "ria", "random"])
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-bias", "gpt2", "mixtral", "qwen3-moe", "bert", "opt", "phi3", "gemma"]
)
def test_run(method, name, family, text, tmp_path):
    """Half of every selected layer is zero, all else is untouched, and the output is a sound plain checkpoint."""
    source = Checkpoint(family(name))
    report = prune(request(family(name), tmp_path / "out", text, method=method))
    assert check_folder(tmp_path / "out") == []
    result, selected = Checkpoint(tmp_path / "out"), select(source).linears
    assert result.config == source.config and result.tensors.keys() == source.tensors.keys()
    for tensor in source.tensors:
        old, new = source.read(tensor), result.read(tensor)
        assert old.dtype == new.dtype and old.shape == new.shape
        if tensor in selected:
            assert int((new == 0).sum()) == pytest.approx(new.numel() / 2, abs=max(new.shape))
        else:
            assert torch.equal(old, new)
    entries = {entry.name: entry for entry in report.tensors}
    assert all((entries[tensor].action == "mask") == (tensor in selected) for tensor in source.tensors)
    assert report.totals()["sparsity"] == pytest.approx(0.5, abs=0.02)
    if method == "sparsegpt":
        assert all(entries[tensor].error["output_relative_mse"] > 0 for tensor in selected if ".experts." not in tensor)


def test_streamed_and_loaded_masks_agree(family, text, tmp_path):
    """transformers loads the masked model and its zeros are where the report says."""
    import transformers

    report = prune(request(family("llama"), tmp_path / "out", text, pattern="2:4", method="wanda"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for entry in report.tensors:
        if entry.action == "mask":
            weight = model.get_parameter(entry.name)
            assert entry.sparsity == 0.5 and ((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


def test_bare_file_needs_no_config(family, tmp_path):
    bare = tmp_path / "bare.safetensors"
    shutil.copy(family("llama") / "model.safetensors", bare)
    report = prune(Request(str(bare), tmp_path / "out", method="magnitude", sparsity=0.3))
    assert report.totals()["sparsity"] == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(TersorError, match=r"config\.json"):
        prune(Request(str(bare), tmp_path / "other", method="wanda"))
    assert not (tmp_path / "other").exists()


def test_pruned_input_only_loses_more(family, text, tmp_path):
    prune(request(family("llama"), tmp_path / "a", text, method="magnitude", sparsity=0.4))
    for method in ("sparsegpt", "wanda"):
        prune(request(tmp_path / "a", tmp_path / method, text, method=method, sparsity=0.6))
        before, after = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / method)
        for name in select(before).linears:
            old, new = before.read(name), after.read(name)
            assert (new[old == 0] == 0).all() and (new == 0).float().mean() == pytest.approx(0.6, abs=0.02)
        assert [step["command"] for step in Report.load(tmp_path / method).history] == ["prune"]


def test_rounds(family, text, tmp_path):
    """Each round's zeros are among the next one's; nothing is left of them on the disk."""
    assert schedule(0.8, 4) == pytest.approx([0.8 * 0.578125, 0.7, 0.8 * 0.984375, 0.8])
    report = prune(request(family("llama"), tmp_path / "out", text, sparsity=0.6, rounds=3))
    assert report.totals()["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shares = [step["totals"]["sparsity"] for step in report.history]
    assert shares == pytest.approx(schedule(0.6, 3)[:2], abs=0.01)


def test_interrupted_round_is_resumed(family, text, tmp_path):
    class Stop(Exception):
        pass

    whole = request(family("llama"), tmp_path / "whole", text, sparsity=0.6, rounds=2)
    prune(whole)

    def stop(stage, done, total):
        if stage == "round 2: blocks" and done == 1:
            raise Stop

    broken = request(family("llama"), tmp_path / "out", text, sparsity=0.6, rounds=2)
    with pytest.raises(Stop):
        prune(broken, stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TersorError, match="did not finish"):
        prune(broken)
    broken.resume = True
    prune(broken)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("kind", ["erk", "owl", "rd"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_allocations_meet_the_total(kind, name, family, text, tmp_path):
    report = prune(request(family(name), tmp_path / "out", text, method="wanda", allocate=kind, sparsity=0.5))
    shares = [entry.sparsity for entry in report.tensors if entry.action == "mask"]
    assert max(shares) > min(shares)
    assert report.totals()["sparsity"] == pytest.approx(0.5, abs=0.02)
    said = report.quality["allocation"]
    assert said["kind"] == kind and len(said["sparsity"]) == len(shares)
    if kind == "rd":
        assert said["predicted_distortion"] > 0 and 0.5 < said["measured_distortion"] / said["predicted_distortion"] < 2


def test_policy(family, text, tmp_path):
    policy = tmp_path / "policy.json"
    tensors = {r".*q_proj\.weight": {"keep": True}, r".*down_proj\.weight": {"sparsity": 0.75}}
    policy.write_text(json.dumps({"schema": "tersor.policy/1", "tensors": tensors}))
    report = prune(request(family("llama"), tmp_path / "out", text, method="wanda", policy=policy, allocate="erk"))
    for entry in report.tensors:
        if "q_proj" in entry.name:
            assert entry.action == "keep" and "policy" in entry.reason
        if "down_proj" in entry.name:
            assert entry.sparsity == 0.75


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"not in \[0, 1\)"),
        ({"sparsity": -0.1}, r"not in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"not in \[0, 1\)"),
        ({"pattern": "2:5"}, "inputs are not divisible by 5"),
        ({"pattern": "block:48x16"}, "tiles of 48x16"),
        ({"pattern": "2:4", "sparsity": 0.7}, "asks for 70.0%"),
        ({"pattern": "2:4", "allocate": "erk"}, "fixes the share"),
        ({"pattern": "what"}, "is not known"),
        ({"method": "cosine"}, "has no method"),
        ({"remove": "everything"}, "is not known"),
        ({"allocate": "fair"}, "is not known"),
        ({"include": ["nothing"]}, "matches no tensor"),
        ({"include": ["norm"]}, "no tensor is left"),
        ({"samples": 10_000}, "windows"),
    ],
    ids=str,
)
def test_bad_requests(options, message, family, text, tmp_path):
    with pytest.raises(TersorError, match=message):
        prune(request(family("llama"), tmp_path / "out", text, **options))
    assert list(tmp_path.iterdir()) == []


def test_quantized_input_is_refused(family, tmp_path):
    from tersor.ops.quantize.run import Request as Quantize
    from tersor.ops.quantize.run import quantize

    quantize(Quantize(str(family("llama")), tmp_path / "codes", group_size=32))
    with pytest.raises(TersorError, match="quantized") as refused:
        prune(Request(str(tmp_path / "codes"), tmp_path / "out", method="magnitude"))
    assert "convert" in refused.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_nan_is_named(method, family, text, tmp_path):
    model = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TersorError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        prune(request(model, tmp_path / "out", text, method=method))
    assert not (tmp_path / "out").exists()

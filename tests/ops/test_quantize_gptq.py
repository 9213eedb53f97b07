"""GPTQ against its definition in float64, and what it promises of a whole run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.encodings import dequantize
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.ops.model.grid import find_grid, round_to_nearest
from tersor.ops.model.inverse_hessian import inverse_factor
from tersor.ops.model.schemes import SCHEMES, scheme_from_name
from tersor.ops.model.statistics import FEWEST_TOKENS, InputStatistics
from tersor.ops.quantize.gptq import GPTQ
from tersor.ops.quantize.run import Request, quantize


def problem(out: int = 24, columns: int = 64, tokens: int = 512, seed: int = 0, spread: float = 1.0):
    """A weight and strongly correlated inputs `[tokens, columns]` of unequal energies."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) * 0.05
    mix = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(tokens, columns // 4, generator=generator) @ mix
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    return weight, inputs * torch.logspace(-spread / 2, spread / 2, columns)[
        torch.randperm(columns, generator=generator)
    ]


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics({"hessian"})
    for batch in inputs.split(100):
        statistics.add(batch)
    return statistics


def output_error(weight, found, scheme, inputs) -> float:
    return float(((dequantize(found, scheme) - weight) @ inputs.T).square().sum() / (weight @ inputs.T).square().sum())


def by_definition(weight, inputs, scheme, scale, zero_point, damping=0.01, activation_order=True, keep_zeros=True):
    """Codes `[out, in]`, one column at a time, from the whole inverse Hessian of the columns not yet fixed.

    Optimal brain surgeon for a fixed column: w -= (w_j - q_j) / [H^-1]_jj * [H^-1]_j, then strike j from H^-1.
    """
    weight, inputs = weight.double(), inputs.double()
    columns, size = weight.shape[1], scheme.group_size or weight.shape[1]
    hessian = inputs.T @ inputs
    energies = hessian.diagonal().clone()
    dead = energies == 0
    hessian[dead, dead] = energies.mean()
    hessian += damping * energies.mean() * torch.eye(columns)
    inverse = torch.linalg.inv(hessian)
    order = torch.argsort(energies, descending=True, stable=True).tolist() if activation_order else range(columns)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    rest, codes = weight.clone(), torch.zeros(weight.shape)
    for j in order:
        s = scale[:, j // size].double()
        z = 0 if zero_point is None else zero_point[:, j // size].double()
        code = (rest[:, j] / s + z).round().clamp(low, high)
        if keep_zeros:
            code = torch.where(weight[:, j] == 0, z, code)
        codes[:, j] = code
        error = (rest[:, j] - (code - z) * s) / inverse[j, j]
        rest -= error[:, None] * inverse[j]
        inverse -= inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return codes


SETTINGS = [
    ({}, Scheme(4, group_size=16)),
    ({}, Scheme(4, group_size=64)),
    ({}, Scheme(3, group_size=32, symmetric=False)),
    ({}, Scheme(2, strategy="channel")),
    ({"activation_order": False}, Scheme(4, group_size=16)),
    ({"activation_order": False}, Scheme(4, strategy="channel", symmetric=False)),
    ({"damping": 0.2}, Scheme(3, group_size=16)),
    ({"clip": False}, Scheme(4, group_size=16, symmetric=False)),
    ({"keep_zeros": False}, Scheme(4, group_size=16)),
]


@pytest.mark.parametrize(("options", "scheme"), SETTINGS, ids=str)
@pytest.mark.parametrize("columns", [64, 320])  # 320: blocks of 128 columns, the last one not full
@pytest.mark.parametrize("zeros", [False, True])
def test_definition(options, scheme, columns, zeros):
    """The same codes as column by column in float64, but for a row where float32 fell to the other side of a tie."""
    weight, inputs = problem(columns=columns, tokens=4 * columns)
    if zeros:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(9)) < 0.5] = 0
    inputs[:, 5] = 0  # an input that is never active
    statistics = statistics_of(inputs)
    found = GPTQ(**options, refit=False).quantize(weight, statistics, scheme, torch.float32)
    energy = statistics.hessian.diagonal()
    scale, zero_point = find_grid(weight, scheme, torch.float32, energy, options.get("clip", True))
    assert torch.equal(found.scale, scale)
    rules = {key: value for key, value in options.items() if key != "clip"}
    expected = by_definition(weight, inputs, scheme, scale, zero_point, **rules)
    assert (found.codes == expected).all(dim=1).float().mean() > 0.8
    assert found.group_index is None
    same = found._replace(codes=expected.to(torch.int8))
    error = output_error(weight, found, scheme, inputs)
    assert error == pytest.approx(output_error(weight, same, scheme, inputs), rel=0.02)


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.75), (3, 0.6), (4, 0.5), (8, 0.5)])
def test_beats_rounding_to_nearest(bits, at_most, symmetric, activation_order):
    weight, inputs = problem(out=64, columns=128)
    scheme, statistics = Scheme(bits, symmetric=symmetric, group_size=32), statistics_of(inputs)
    found = GPTQ(activation_order=activation_order).quantize(weight, statistics, scheme, torch.bfloat16)
    nearest = round_to_nearest(weight, scheme, torch.bfloat16, statistics.column_norms.square())
    assert output_error(weight, found, scheme, inputs) < at_most * output_error(weight, nearest, scheme, inputs)


def test_activation_order_helps_where_energies_differ():
    errors = {}
    for activation_order in (True, False):
        total = 0.0
        for seed in range(4):
            weight, inputs = problem(out=64, columns=128, seed=seed, spread=3.0)
            scheme = Scheme(3, group_size=32)
            found = GPTQ(activation_order=activation_order).quantize(
                weight, statistics_of(inputs), scheme, torch.float32
            )
            total += output_error(weight, found, scheme, inputs)
        errors[activation_order] = total
    assert errors[True] < errors[False]


def test_dead_inputs_are_rounded_and_change_nothing():
    """Columns that are never active: nearest codes on their grid, and the others as if these were not there."""
    weight, inputs = problem()
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 4, 40]] = True
    inputs[:, dead] = 0
    weight[:, dead] *= 0.1  # not the largest of their groups, so that the grid does not depend on them
    scheme = Scheme(4, group_size=16)
    found = GPTQ(clip=False).quantize(weight, statistics_of(inputs), scheme, torch.float32)
    spread = found.scale.repeat_interleave(16, 1)
    assert torch.equal(found.codes[:, dead].float(), (weight / spread).round().clamp(-8, 7)[:, dead])
    other = weight.clone()
    other[:, dead] *= -1
    again = GPTQ(clip=False).quantize(other, statistics_of(inputs), scheme, torch.float32)
    assert torch.equal(again.codes[:, ~dead], found.codes[:, ~dead])


def test_all_inputs_dead():
    weight, scheme = problem()[0], Scheme(4, group_size=16)
    found = GPTQ().quantize(weight, statistics_of(torch.zeros(50, 64)), scheme, torch.float32)
    assert torch.isfinite(found.scale).all()
    assert (dequantize(found, scheme) - weight).abs().max() <= found.scale.max() * 1.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_order", [True, False])
def test_zeros_are_kept(symmetric, activation_order):
    weight, inputs = problem()
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight[pruned] = 0
    scheme, statistics = Scheme(4, symmetric=symmetric, group_size=16), statistics_of(inputs)
    kept = GPTQ(activation_order=activation_order).quantize(weight, statistics, scheme, torch.float32)
    assert (dequantize(kept, scheme)[pruned] == 0).all()
    free = GPTQ(activation_order=activation_order, keep_zeros=False).quantize(weight, statistics, scheme, torch.float32)
    assert (dequantize(free, scheme)[pruned] != 0).float().mean() > 0.1
    assert output_error(weight, free, scheme, inputs) < output_error(weight, kept, scheme, inputs)


def test_static_groups_do_not_follow_the_order():
    """Scales are those of runs of columns, and equal columns in another order of energies give other codes only."""
    weight, inputs = problem()
    scheme = Scheme(4, group_size=16)
    found = {
        order: GPTQ(activation_order=order, clip=False, refit=False).quantize(
            weight, statistics_of(inputs), scheme, torch.float32
        )
        for order in (True, False)
    }
    assert torch.equal(found[True].scale, found[False].scale)
    assert not torch.equal(found[True].codes, found[False].codes)
    assert found[True].group_index is None


# ---- damping


def test_inverse_factor_is_one():
    hessian = statistics_of(problem()[1]).hessian
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, factor.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64), rtol=0, atol=1e-3)


def test_fewer_tokens_than_inputs():
    weight, inputs = problem(tokens=20)
    scheme = Scheme(4, group_size=16)
    found = GPTQ(damping=1e-9).quantize(weight, statistics_of(inputs), scheme, torch.float32)
    nearest = round_to_nearest(weight, scheme, torch.float32)
    assert output_error(weight, found, scheme, inputs) < output_error(weight, nearest, scheme, inputs)


def test_more_damping_is_nearer_to_rounding():
    """With the Hessian drowned in its diagonal, no column can make up for another."""
    weight, inputs = problem()
    scheme, statistics = Scheme(4, group_size=16), statistics_of(inputs)
    scale, _ = find_grid(weight, scheme, torch.float32, statistics.hessian.diagonal())
    nearest = (weight / scale.repeat_interleave(16, 1)).round().clamp(-8, 7)
    shares = []
    for damping in (0.01, 0.1, 1.0, 10.0):
        found = GPTQ(damping=damping).quantize(weight, statistics_of(inputs), scheme, torch.float32)
        shares.append(float((found.codes == nearest).float().mean()))
    assert shares == sorted(shares) and shares[0] < 0.8 < 0.9 < shares[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_an_error(value):
    weight, inputs = problem()
    inputs[7, 7] = value
    with pytest.raises(TersorError, match="Hessian"):
        GPTQ().quantize(weight, statistics_of(inputs), Scheme(4, group_size=16), torch.float32)


# ---- repeatable


def test_deterministic_and_shared_statistics():
    """The same bytes again, whether the inputs' factor is made anew or shared with the layer before."""
    weight, inputs = problem(columns=320)
    scheme, shared = Scheme(4, group_size=32), statistics_of(inputs)
    first = GPTQ().quantize(weight, shared, scheme, torch.bfloat16)
    for statistics in (shared, statistics_of(inputs)):
        again = GPTQ().quantize(weight.clone(), statistics, scheme, torch.bfloat16)
        assert torch.equal(first.codes, again.codes) and torch.equal(first.scale, again.scale)


def test_weight_is_left_alone():
    weight, inputs = problem()
    before = weight.clone()
    GPTQ().quantize(weight, statistics_of(inputs), Scheme(4, group_size=16), torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
def test_floats_are_rounded_to_nearest(name):
    weight, inputs = problem(columns=128)
    found = GPTQ().quantize(weight, statistics_of(inputs), SCHEMES[name], torch.bfloat16)
    expected = round_to_nearest(weight, SCHEMES[name], torch.bfloat16)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))


# ---- the whole run


def request(model, out, text, **options) -> Request:
    settings = {"method": "gptq", "group_size": 32, "calib": str(text), "samples": 6, "seq_len": 64, "device": "cpu"}
    return Request(str(model), out, **settings | options)


def logits(folder, ids):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_run_is_nearer_than_rounding(name, family, text, tmp_path):
    """On the calibration text itself, a GPTQ model's logits are nearer to the dense ones than a rounded model's."""
    from tersor.ops.convert.run import Request as Convert
    from tersor.ops.convert.run import convert
    from tersor.ops.model.calibration import load_windows

    ids = load_windows(family(name), str(text), 6, 64, 0)
    expected = logits(family(name), ids)
    errors = {}
    for method in ("gptq", "rtn"):
        quantize(request(family(name), tmp_path / method, text, method=method, scheme="w3a16"))
        convert(Convert(str(tmp_path / method), tmp_path / f"{method}-dense", "dense", "float32"))
        errors[method] = float((logits(tmp_path / f"{method}-dense", ids) - expected).square().mean())
    assert errors["gptq"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w3a16", "w2a16", "w8a8", "fp8", "fp8-block"])
def test_run_of_every_scheme(scheme, family, text, tmp_path):
    size = 32 if SCHEMES[scheme].strategy == "group" else None
    report = quantize(request(family("llama"), tmp_path / "out", text, scheme=scheme, group_size=size))
    entries = [entry for entry in report.tensors if entry.action == "quantize"]
    assert len(entries) == 14
    assert all(
        0 < entry.error["output_relative_mse"] < {2: 0.6, 3: 0.1}.get(SCHEMES[scheme].bits, 0.03) for entry in entries
    )
    view = DenseView(Checkpoint(tmp_path / "out"))
    for entry in entries:
        assert torch.isfinite(view.read(entry.name)).all()


def test_run_keeps_pruned_zeros(family, text, tmp_path):
    import shutil

    model = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for keep in (True, False):
        report = quantize(request(model, tmp_path / f"out{keep}", text, keep_zeros=keep))
        view = DenseView(Checkpoint(tmp_path / f"out{keep}"))
        lost = sum(
            int((view.read(name)[tensor == 0] != 0).sum()) for name, tensor in tensors.items() if "_proj" in name
        )
        assert (lost == 0) == keep
        sparsities = [entry.sparsity for entry in report.tensors if entry.action == "quantize"]
        assert all(abs(sparsity - 0.5) < 0.05 for sparsity in sparsities)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_without_tokens(method, family, text, tmp_path):
    """Experts that saw too few tokens are rounded to nearest, exactly as without data, and the report says which."""
    model = family("qwen3-moe", num_experts=32, num_experts_per_tok=1)
    report = quantize(request(model, tmp_path / "out", text, method=method, samples=2, seq_len=32))
    quantize(request(model, tmp_path / "rtn", text, method="rtn"))
    found, nearest = DenseView(Checkpoint(tmp_path / "out")), DenseView(Checkpoint(tmp_path / "rtn"))
    starved = [entry for entry in report.tensors if "too few calibration tokens" in (entry.reason or "")]
    assert starved and all(".experts." in entry.name for entry in starved)
    assert any(f"{len(starved)} layers saw fewer than {FEWEST_TOKENS}" in warning for warning in report.warnings)
    calibrated = 0
    for entry in report.tensors:
        if entry.action != "quantize" or ".experts." not in entry.name:
            continue
        same = torch.equal(found.read(entry.name), nearest.read(entry.name))
        if entry in starved:
            assert same and "output_relative_mse" not in entry.error
        else:
            calibrated += not same
            assert entry.error["output_relative_mse"] > 0
    assert calibrated or method == "awq"


def test_layers_outside_the_blocks(family, text, tmp_path):
    """The output head, asked for, is rounded to nearest: no statistics are collected there."""
    report = quantize(request(family("llama"), tmp_path / "out", text, include=["layers", "lm_head"]))
    entry = next(entry for entry in report.tensors if entry.name == "lm_head.weight")
    assert entry.action == "quantize" and "outside the blocks, rounded to nearest" in entry.reason
    original = DenseView(Checkpoint(family("llama"))).read("lm_head.weight")
    expected = round_to_nearest(original, scheme_from_name("w4a16", 32), torch.bfloat16)
    assert torch.equal(DenseView(Checkpoint(tmp_path / "out")).codes("lm_head").codes, expected.codes)


def test_damping_that_starts_at_nothing_or_beyond_the_most():
    singular = torch.ones(16, 16)
    for damping in (0.0, 20.0):
        assert torch.isfinite(inverse_factor(singular, damping)).all()
    with pytest.raises(TersorError, match="not positive definite"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.0)

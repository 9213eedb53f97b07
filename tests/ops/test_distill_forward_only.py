"""Training without gradients: steps are exact, and a log of scalars makes them again."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.kernels.perturb import normal, perturb_
from tersor.ops.distill.forward_only.build import METHODS, build_forward_only
from tersor.ops.distill.forward_only.log import LogWriter, read_log
from tersor.ops.distill.forward_only.mezo import Mezo
from tersor.ops.distill.forward_only.qzo import Qzo
from tersor.ops.distill.forward_only.replay import replay
from tersor.ops.distill.forward_only.sparse_mezo import SparseMezo
from torch import nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

DTYPES = [torch.float32, torch.bfloat16]
RATES = {"mezo": 1e-4, "sparse-mezo": 1e-4, "qzo": 1e-5}


def parameters_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (37, 24), "down.weight": (10, 37), "down.bias": (10,), "gain": (24,)}
    made = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["up.weight"][:, ::3] = 0
    made["gain"] = made["gain"].abs() + 0.5
    return {name: nn.Parameter(value.to(dtype)) for name, value in made.items()}


def loss_of(parameters):
    """The squared error of a small network on made-up data."""
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(64, 24, generator=generator), torch.randn(64, 10, generator=generator)

    def loss_fn():
        wide = {name: parameter.float() for name, parameter in parameters.items()}
        hidden = (x * wide["gain"]) @ wide["up.weight"].t()
        return (hidden.tanh() @ wide["down.weight"].t() + wide["down.bias"] - y).square().mean()

    return loss_fn


def scales_of(dtype=torch.float32):
    """A quantized network: codes and the scales of groups of 8."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (10, 24), generator=generator, dtype=torch.int8)
    return codes, {"scale": nn.Parameter((0.02 * torch.rand(10, 3, generator=generator)).to(dtype))}


def scale_loss(codes, parameters):
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(9))
    wanted = x @ (codes * 0.011).t()
    return lambda: (
        (x @ (codes.view(10, 3, 8) * parameters["scale"].float()[..., None]).view(10, 24).t() - wanted).square().mean()
    )


def problem(name, dtype=torch.float32):
    """A method, its parameters and their loss."""
    if name == "qzo":
        codes, parameters = scales_of(dtype)
        return build_forward_only(name, parameters, seed=4), parameters, scale_loss(codes, parameters)
    parameters = parameters_of(dtype)
    return build_forward_only(name, parameters, seed=4, keep_zeros=["up.weight"]), parameters, loss_of(parameters)


def bytes_of(parameters):
    return {name: parameter.detach().reshape(-1).view(torch.uint8).clone() for name, parameter in parameters.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(METHODS))
def test_both_losses_are_seen_and_the_bytes_come_back(name, dtype):
    """A9: after +eps, -2 eps and +eps the weights are those before, here by a copy."""
    method, parameters, loss_fn = problem(name, dtype)
    seen = []

    def watching():
        seen.append({key: parameter.detach().clone() for key, parameter in parameters.items()})
        return loss_fn()

    with torch.no_grad():
        for key in parameters:
            parameters[key].view(-1)[:1] = -0.0  # adding a zero would lose its sign
    before, start = bytes_of(parameters), {key: value.detach().clone() for key, value in parameters.items()}
    numbers = method.step(watching, 0.0, 3)
    assert same(bytes_of(parameters), before)
    offset = 0
    for key in sorted(parameters):
        z = normal(numbers["seed"], offset, start[key].numel()).view(start[key].shape)
        offset += start[key].numel()
        low, high = method.bounds(key)
        size = start[key].float().abs()
        moves = (size > (-1 if low is None else low)) & (size <= (torch.inf if high is None else high))
        for sign, found in zip((1, -1), seen, strict=True):
            expected = torch.where(moves, start[key].float() + sign * torch.tensor(1e-3) * z, start[key].float()).to(
                dtype
            )
            assert torch.equal(found[key], expected)


def test_taking_the_perturbation_off_again_would_not_give_the_bytes_back():
    """Why there is a copy: half of bfloat16 weights, and some of float32, come back rounded."""
    for dtype, least in ((torch.bfloat16, 0.2), (torch.float32, 0.05)):
        weight = (0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))).to(dtype)
        start = weight.clone()
        for scale in (1e-3, -2e-3, 1e-3):
            perturb_(weight, 5, 0, scale)
        assert (weight != start).float().mean() > least


def test_a_step_is_the_directional_derivative_times_the_direction():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    parameters = {"w": nn.Parameter(weight.clone())}
    numbers = Mezo(parameters).step(lambda: (parameters["w"].double() * slope).sum(), 1e-3, 1)
    z = normal(numbers["seed"], 0, 1200).view(40, 30)
    assert numbers["scalar"] == pytest.approx(float((slope.double() * z).sum()), rel=1e-3)
    assert numbers["loss"] == pytest.approx(float((weight.double() * slope).sum()), rel=1e-4)
    torch.testing.assert_close(parameters["w"].detach(), weight - 1e-3 * numbers["scalar"] * z)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_lowers_the_loss(name):
    method, _, loss_fn = problem(name)
    before = float(loss_fn().detach())
    rate = {"mezo": 1e-3, "sparse-mezo": 3e-3, "qzo": 2e-5}[name]
    for step in range(1, 301):
        method.step(loss_fn, rate, step)
    assert float(loss_fn().detach()) < 0.85 * before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_step(value):
    method, parameters, loss_fn = problem("mezo")
    before, calls = bytes_of(parameters), []

    def breaking():
        calls.append(1)
        return value if len(calls) == 4 else loss_fn()

    method.step(breaking, 1e-3, 1)
    after_one = bytes_of(parameters)
    assert not same(before, after_one)
    with pytest.raises(TersorError, match="step 2: the losses are"):
        method.step(breaking, 1e-3, 2)
    assert same(bytes_of(parameters), after_one)


def test_weights_come_back_when_the_loss_raises():
    method, parameters, _ = problem("mezo")
    before = bytes_of(parameters)
    with pytest.raises(KeyboardInterrupt):
        method.step(lambda: (_ for _ in ()).throw(KeyboardInterrupt), 1e-3, 1)
    assert same(bytes_of(parameters), before)


def test_zeros_of_pruned_layers_stay():
    method, parameters, loss_fn = problem("mezo")
    zeros = parameters["up.weight"].detach() == 0
    for step in range(1, 6):
        method.step(loss_fn, 1e-3, step)
    assert torch.equal(parameters["up.weight"].detach() == 0, zeros)


# ---------------------------------------------------------------- sparse


def test_sparse_mezo_moves_the_small_weights_of_each_matrix():
    parameters = parameters_of()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    method = SparseMezo(parameters, share=0.25)
    method.step(loss_of(parameters), 1e-3, 1)
    assert set(method.thresholds) == {"up.weight", "down.weight"}
    for name in method.thresholds:
        moved, size = parameters[name].detach() != start[name], start[name].abs()
        there = size > 0
        assert moved.sum() == round(0.25 * int(there.sum()))
        assert size[moved].max() <= size[~moved & there].min()
        assert not moved[~there].any()
    assert (parameters["down.bias"].detach() != start["down.bias"]).all()


def test_sparse_mezo_asks_again_at_every_step_who_is_small():
    parameters = {"w": nn.Parameter(torch.linspace(0.1, 1, 400).view(20, 20))}
    method = SparseMezo(parameters, share=0.5)
    start = parameters["w"].detach().clone()
    method.apply(3, 1.0, 0.3)
    grown = (start <= method.thresholds["w"]) & (parameters["w"].detach().abs() > method.thresholds["w"])
    assert grown.any()
    after = parameters["w"].detach().clone()
    method.apply(4, 1.0, 0.3)
    assert torch.equal(parameters["w"].detach() != after, after.abs() <= method.thresholds["w"])


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_sparse_mezo_refuses_shares_that_are_none(share):
    with pytest.raises(TersorError, match="share"):
        SparseMezo(parameters_of(), share=share)


# ---------------------------------------------------------------- scales


def test_qzo_leaves_codes_and_with_lr_0_everything():
    """A7."""
    codes, parameters = scales_of()
    kept, before = codes.clone(), bytes_of(parameters)
    method, loss_fn = Qzo(parameters), scale_loss(codes, parameters)
    for step in range(1, 4):
        method.step(loss_fn, 0.0, step)
    assert same(bytes_of(parameters), before)
    for step in range(4, 10):
        method.step(loss_fn, 1e-5, step)
    assert torch.equal(codes, kept) and not same(bytes_of(parameters), before)


def test_qzo_clips_the_derivative_and_keeps_scales_above_1e_7():
    parameters = {"scale": nn.Parameter(torch.full((50,), 1e-3))}
    method = Qzo(parameters)
    numbers = method.step(lambda: 1e6 * parameters["scale"].double().sum(), 1e-4, 1)
    assert abs(numbers["scalar"]) == 100
    assert parameters["scale"].min() == torch.tensor(1e-7)
    assert parameters["scale"].max() > 1e-3


# ---------------------------------------------------------------- log and replay


def run(name, dtype, path, steps=6):
    """Parameters after `steps` steps, with their log."""
    method, parameters, loss_fn = problem(name, dtype)
    writer = LogWriter(path, "base", name, method.settings())
    for step in range(1, steps + 1):
        writer.write(method.step(loss_fn, RATES[name] / step, step))
    writer.close()
    return parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(METHODS))
def test_replay_gives_the_bytes_of_the_run(name, dtype, tmp_path):
    path = tmp_path / "log.jsonl"
    trained = run(name, dtype, path)
    _, fresh, _ = problem(name, dtype)
    start = bytes_of(fresh)
    assert replay(fresh, read_log(path, "base")) == 6
    assert same(bytes_of(fresh), bytes_of(trained)) and not same(bytes_of(fresh), start)
    _, early, _ = problem(name, dtype)
    replay(early, read_log(path), steps=2)
    assert same(bytes_of(early), bytes_of(run(name, dtype, tmp_path / "two.jsonl", steps=2)))


@pytest.mark.parametrize("name", list(METHODS))
def test_resumed_is_uninterrupted_with_its_log(name, tmp_path):
    whole = run(name, torch.float32, tmp_path / "whole.jsonl")
    path = tmp_path / "log.jsonl"
    saved = {key: value.detach().clone() for key, value in run(name, torch.float32, path, steps=3).items()}
    run(name, torch.float32, tmp_path / "further.jsonl", steps=5)
    path.write_bytes((tmp_path / "further.jsonl").read_bytes() + b'{"step": 6, "se')  # killed after the save
    resumed = _resume(name, path, saved)
    assert same(bytes_of(resumed), bytes_of(whole))
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _resume(name, path, saved):
    """What a resumed run does: settings of the log's first line, weights of the save, steps 4 to 6."""
    _, parameters, loss_fn = problem(name)
    for key, value in saved.items():
        parameters[key].data.copy_(value)
    header = json.loads(path.read_text().splitlines()[0])
    method = METHODS[header["method"]].from_settings(parameters, header["settings"])
    writer = LogWriter(path, "base", name, method.settings(), keep=3)
    for step in range(4, 7):
        writer.write(method.step(loss_fn, RATES[name] / step, step))
    writer.close()
    return parameters


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_steps_do_not_depend_on_how_parameters_are_cut(sizes, seed, dtype):
    """Numbers belong to places in the order of names: one vector, or several in any order, move alike."""
    whole = torch.linspace(-1, 1, sum(sizes)).to(dtype)
    parts = {f"{index}": nn.Parameter(part.clone()) for index, part in enumerate(whole.split(sizes))}
    one = {"w": nn.Parameter(whole.clone())}
    Mezo(one).apply(seed, 0.7, 1e-2)
    Mezo(dict(reversed(parts.items()))).apply(seed, 0.7, 1e-2)
    assert torch.equal(torch.cat([parts[key].detach() for key in sorted(parts)]), one["w"].detach())


def test_a_log_for_another_checkpoint_or_other_parameters_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    run("mezo", torch.float32, path)
    with pytest.raises(TersorError, match="written for the checkpoint base, this one is other"):
        read_log(path, "other")
    parameters = parameters_of()
    del parameters["gain"]
    with pytest.raises(TersorError, match="gain: not trained here"):
        replay(parameters, read_log(path))
    wider = parameters_of() | {"gain": nn.Parameter(torch.ones(25))}
    with pytest.raises(TersorError, match=r"gain: \[25\] here, \[24\] in the log"):
        replay(wider, read_log(path))
    with pytest.raises(TersorError, match="6 steps, not 7"):
        replay(parameters_of(), read_log(path), 7)


def _line(**changes):
    entry = {"step": 3, "seed": 1, "scalar": 0.5, "lr": 1e-4} | changes
    return json.dumps({key: value for key, value in entry.items() if value is not None})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (_line(step=4), "line 4 is step 4, not 3"),
        (_line(step=2), "line 4 is step 2, not 3"),
        (_line(scalar=float("nan")), "not finite"),
        (_line(lr=float("inf")), "not finite"),
        (_line(lr=None), "not finite"),
        (_line(scalar="1"), "not finite"),
        (_line(seed=-1), "seed -1"),
        (_line(seed=2**63), "seed 9223372036854775808"),
        ('{"step": 3, "se', "line 4 is cut"),
        ("[3]", "line 4 is cut or no JSON object"),
    ],
)
def test_damaged_logs_are_refused_by_line(line, says, tmp_path):
    path = tmp_path / "log.jsonl"
    run("mezo", torch.float32, path, steps=2)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TersorError, match=says):
        read_log(path)


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"schema": "other"}\n', b"\xff\xfe\n", b"[1]\n"])
def test_what_is_no_log_is_refused(content, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(TersorError, match=r"log\.jsonl"):
        read_log(path)
    with pytest.raises(TersorError, match=r"absent\.jsonl"):
        read_log(tmp_path / "absent.jsonl")


def test_a_last_line_without_its_end_is_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    run("mezo", torch.float32, path, steps=2)
    path.write_text(path.read_text().rstrip("\n"))
    with pytest.raises(TersorError, match="line 3 is cut"):
        read_log(path)


def test_the_writer_goes_on_with_its_own_log_only(tmp_path):
    path = tmp_path / "log.jsonl"
    run("mezo", torch.float32, path, steps=2)
    method, _, _ = problem("mezo")
    with pytest.raises(TersorError, match="2 steps, the run has 3"):
        LogWriter(path, "base", "mezo", method.settings(), keep=3)
    with pytest.raises(TersorError, match="another run"):
        LogWriter(path, "other", "mezo", method.settings(), keep=1)
    with pytest.raises(TersorError, match="another run"):
        LogWriter(path, "base", "mezo", Mezo(parameters_of(), seed=5).settings(), keep=1)
    writer = LogWriter(path, "base", "mezo", method.settings(), keep=1)
    with pytest.raises(ValueError, match="step 3 after step 1"):
        writer.write({"step": 3, "seed": 1, "scalar": 1.0, "lr": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write({"step": 2, "seed": 1, "scalar": float("nan"), "lr": 1.0})
    writer.close()
    assert len(read_log(path).steps) == 1


@pytest.mark.parametrize("settings", [{}, {"colour": 1, "parameters": {"w": [2]}}])
def test_damaged_settings_are_refused(settings):
    with pytest.raises(TersorError):
        Mezo.from_settings({"w": nn.Parameter(torch.zeros(2))}, settings)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_perturbed_is_refused_by_name():
    with pytest.raises(TersorError, match=r"codes: .* cannot perturb torch\.int8"):
        Mezo({"codes": torch.zeros(3, dtype=torch.int8)})
    with pytest.raises(TersorError, match=r"wide: .* cannot perturb torch\.float64"):
        Mezo({"wide": nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    with pytest.raises(TersorError, match="'spsa' is unknown"):
        build_forward_only("spsa", parameters_of())
    with pytest.raises(TersorError, match="nothing to train"):
        build_forward_only("qzo", {})


def test_shards_are_refused_by_name(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.zeros(4, 4), DeviceMesh("cpu", [0]), [Shard(0)])
        with pytest.raises(TersorError, match="proj: forward-only training does not shard"):
            Mezo({"proj": nn.Parameter(sharded)})
    finally:
        dist.destroy_process_group()

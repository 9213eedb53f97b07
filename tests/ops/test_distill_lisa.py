"""LISA: which blocks train, what they keep, and that what is drawn really moves."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tersor.formats.errors import TersorError
from tersor.ops.distill.optimizers.build import build_optimizer
from tersor.ops.distill.optimizers.lisa import Lisa
from tersor.ops.distill.optimizers.memory import state_bytes
from tersor.ops.distill.optimizers.state import pack_state, unpack_state
from tiny_models import BASE
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor

LAYERS = 6


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**BASE | {"num_hidden_layers": LAYERS, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 0})
    )


def blocks_of(model):
    return [
        [f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()]
        for index, layer in enumerate(model.model.layers)
    ]


class Run:
    """A model, an optimizer and a sampler that train on made-up text."""

    def __init__(self, name="adamw", count=2, every=3, seed=0, **settings):
        self.model = llama()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(name, self.parameters, lr=1e-3, weight_decay=0.1)
        self.lisa = Lisa(self.optimizer, self.parameters, blocks_of(self.model), count, every, seed, **settings)

    def steps(self, first, last):
        for step in range(first, last + 1):
            self.lisa.before_step(step)
            ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(step))
            self.model(ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bytes(self):
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def block_of(name):
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "apollo", "lion"])
def test_changed_layers_are_the_logged_ones(name):
    """A11: between draws frozen layers keep their bytes, weight decay or not."""
    run = Run(name)
    for period in range(4):
        before = run.bytes()
        run.steps(3 * period + 1, 3 * period + 3)
        changed = {key for key, value in run.bytes().items() if not torch.equal(value, before[key])}
        assert run.lisa.log[-1] == {"step": 3 * period + 1, "blocks": list(run.lisa.blocks)}
        assert changed == {key for key in before if block_of(key) in (None, *run.lisa.blocks)}
    assert [entry["step"] for entry in run.lisa.log] == [1, 4, 7, 10]


def test_a_frozen_block_keeps_no_state_and_no_gradient():
    run = Run()
    run.steps(1, 3)
    two = state_bytes(run.optimizer)
    for period in range(1, 6):
        run.steps(3 * period + 1, 3 * period + 3)
        trained = {key for key in run.parameters if block_of(key) in (None, *run.lisa.blocks)}
        assert {key for key in run.parameters if run.parameters[key] in run.optimizer.state} == trained
        assert {key for key in run.parameters if run.parameters[key].requires_grad} == trained
        assert state_bytes(run.optimizer) == two
    run.lisa.before_step(19)
    assert all(run.parameters[key].grad is None for key in run.parameters if not run.parameters[key].requires_grad)


def test_state_starts_anew_after_a_pause_and_goes_on_without_one():
    run = Run(count=3)
    taken = {index: 0 for index in range(LAYERS)}  # steps since the block was last frozen
    seen = set()
    for period in range(8):
        run.steps(3 * period + 1, 3 * period + 3)
        for index in range(LAYERS):
            taken[index] = taken[index] + 3 if index in run.lisa.blocks else 0
            weight = run.parameters[f"model.layers.{index}.mlp.up_proj.weight"]
            if taken[index]:
                assert int(run.optimizer.state[weight]["step"]) == taken[index]
            seen.add(taken[index])
    assert {0, 3, 6} <= seen


def test_an_optimizer_over_what_trains_now_is_refused():
    """The known bug: built while layers are frozen, an optimizer never moves those that are drawn later."""
    model = llama()
    parameters = dict(model.named_parameters())
    now = {name: parameter for name, parameter in parameters.items() if block_of(name) in (None, 0)}
    with pytest.raises(ValueError, match=r"model\.layers\.1\..*would never train"):
        Lisa(build_optimizer("adamw", now), parameters, blocks_of(model), 1)


def test_layers_drawn_later_move_when_all_was_frozen_at_first():
    model = llama().requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer("adamw", parameters, lr=1e-3)
    lisa = Lisa(optimizer, parameters, blocks_of(model), 2, 1)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(1, 16):
        lisa.before_step(step)
        ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = {index for entry in lisa.log for index in entry["blocks"]}
    assert drawn == set(range(LAYERS))
    assert all(not torch.equal(parameter.detach(), start[name]) for name, parameter in parameters.items())
    lisa.release()
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("stop", [3, 5], ids=["between periods", "within one"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "apollo-mini"])
def test_resumed_is_uninterrupted_bit_for_bit(name, stop):
    whole = Run(name)
    whole.steps(1, 10)
    first, second = Run(name), Run(name)
    first.steps(1, stop)
    for key, parameter in first.parameters.items():
        second.parameters[key].data.copy_(parameter.data)
    unpack_state(second.optimizer, *pack_state(first.optimizer))
    second.steps(stop + 1, 10)
    assert all(torch.equal(value, second.bytes()[key]) for key, value in whole.bytes().items())
    assert second.lisa.log[-1] == whole.lisa.log[-1]


# ---------------------------------------------------------------- shards


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.blocks = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.last(x)


def _train_chain(model, rank, world):
    """The sets that changed in each of 5 periods, and the sampler's log."""
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer("adamw", parameters, lr=1e-2)
    blocks = [[f"blocks.{index}.{kind}" for kind in ("weight", "bias")] for index in range(4)]
    lisa, changed = Lisa(optimizer, parameters, blocks, 2, 2), []
    full = _full(model)
    for step in range(1, 11):
        lisa.before_step(step)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::world]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            before, full = full, _full(model)
            changed.append({name for name in full if not torch.equal(full[name], before[name])})
    return full, changed, lisa.log


def _full(model):
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors.items()}


def _worker(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, mesh = Chain(), DeviceMesh("cpu", [0, 1])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    found = _train_chain(fully_shard(model, mesh=mesh), rank, 2)
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def test_two_processes_train_the_same_blocks_as_one(tmp_path):
    """FSDP2, each block a group of its own, frozen and thawed while it runs."""
    multiprocessing.spawn(_worker, (tmp_path / "store", tmp_path / "found.pt"), nprocs=2)
    weights, changed, log = torch.load(tmp_path / "found.pt")
    one, changed_by_one, log_of_one = _train_chain(Chain(), 0, 1)
    assert log == log_of_one and changed == changed_by_one
    assert [{int(name.split(".")[1]) for name in names if "blocks" in name} for names in changed] == [
        set(entry["blocks"]) for entry in log
    ]
    for name, value in one.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the draw


def sampler(count=1, blocks=4, seed=0, weights=None, every=1):
    parameters = {str(index): nn.Parameter(torch.zeros(1)) for index in range(blocks)}
    optimizer = build_optimizer("adamw", parameters)
    return Lisa(optimizer, parameters, [[name] for name in parameters], count, every, seed, weights)


def test_draws_depend_on_seed_and_period_alone():
    draws = [sampler(2, every=5).draw(step) for step in range(1, 41)]
    random.seed(1)
    torch.manual_seed(1)
    assert draws == [sampler(2, every=5).draw(step) for step in range(1, 41)]
    assert all(len(set(draws[start : start + 5])) == 1 for start in range(0, 40, 5))
    assert draws != [sampler(2, every=5, seed=1).draw(step) for step in range(1, 41)]
    assert all(len(set(draw)) == 2 and draw == tuple(sorted(draw)) for draw in draws)


def test_draws_are_uniform_or_follow_the_weights():
    for weights in (None, [1, 2, 0, 5]):
        lisa = sampler(weights=weights)
        found = [sum(lisa.draw(step) == (block,) for step in range(1, 4001)) for block in range(4)]
        expected = [4000 * weight / sum(weights or [1] * 4) for weight in weights or [1] * 4]
        # four standard deviations of a binomial
        assert all(abs(a - b) <= 4 * (b * (1 - b / 4000)) ** 0.5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "0 of 4 blocks"),
        ({"count": 5}, "5 of 4 blocks"),
        ({"count": 2, "weights": [0, 0, 0, 1]}, "2 of 1 blocks"),
        ({"weights": [1, 1]}, "2 sampling weights for 4"),
        ({"weights": [1, 1, 1, -1]}, "none below 0|sampling weights"),
        ({"weights": [1, 1, 1, float("nan")]}, "sampling weights"),
        ({"every": 0}, "every 0 steps"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(TersorError, match=says):
        sampler(**settings)

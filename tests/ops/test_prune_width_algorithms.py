"""Probing, scores, gradients and repair, each against its definition."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model import unit_scores as scores
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.coupling import BlockProbe, find
from tersor.ops.model.gradients import backward
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.statistics import InputStatistics, output_error
from tersor.ops.model.units import find_units
from tersor.ops.prune.width import cut
from tersor.ops.prune.width.channels import rms_offset
from tersor.ops.prune.width.repair import held_out_damping, refit
from torch import nn
from torch.nn import functional


class FakePass:
    """What a probe needs of a block pass: one batch of hidden states and a way to call the block."""

    class skeleton:
        dtype = torch.float32

    class hidden:
        @staticmethod
        def take(batch):
            return torch.zeros(2, 24, 16)

        put = staticmethod(lambda batch, value: None)

    @staticmethod
    def _call(index, block, batch, hidden):
        return block(hidden)


class FFN(nn.Module):
    """A gated FFN; `twist` may do something to what goes into the down projection, `leak` adds a part to the output."""

    def __init__(self, twist=lambda x: x, leak=None, fused=None, inner=12):
        super().__init__()
        self.twist, self.leak, self.fused = twist, leak, fused
        self.up = nn.Linear(16, 2 * inner if fused else inner)
        if not fused:
            self.gate = nn.Linear(16, inner)
        self.down = nn.Linear(inner, 16)

    def forward(self, x):
        if self.fused == "halves":
            gate, up = self.up(x).chunk(2, -1)
        elif self.fused == "interleaved":
            both = self.up(x)
            gate, up = both[..., ::2], both[..., 1::2]
        else:
            gate, up = self.gate(x), self.up(x)
        y = x + self.down(self.twist(functional.relu(gate) * up))
        return y if self.leak is None else y + self.leak(up)


def couplings(block: nn.Module, kind: str = "neurons"):
    return find(BlockProbe(FakePass, 0, block.requires_grad_(False), "block"), kind)


def test_known_groups_are_found():
    found = couplings(FFN())
    assert [(c.reader, c.count, c.width) for c in found] == [("down", 12, 1)]
    assert {name: rows.flatten().tolist() for name, rows in found[0].rows.items()} == {
        "gate": list(range(12)), "up": list(range(12)),
    }  # fmt: skip


@pytest.mark.parametrize("inner", [2, 3, 12, 17])
def test_fused_layouts_are_read_from_the_code(inner):
    halves = couplings(FFN(fused="halves", inner=inner))[0].rows["up"]
    assert torch.equal(halves, torch.stack([torch.arange(inner), torch.arange(inner) + inner], 1))
    interleaved = couplings(FFN(fused="interleaved", inner=inner))[0].rows["up"]
    assert torch.equal(interleaved, torch.arange(2 * inner).reshape(inner, 2))


def test_a_permutation_is_followed():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    rows = couplings(FFN(twist=lambda x: x[..., order]))[0].rows
    assert torch.equal(rows["up"].flatten(), order) and torch.equal(rows["gate"].flatten(), order)


def test_dead_neurons_are_found():
    block = FFN()
    for layer in (block.up, block.gate):
        nn.init.zeros_(layer.weight)
    assert couplings(block)[0].count == 12


def test_entangled_modules_are_refused():
    mixed = FFN(twist=lambda x: x / x.square().mean(-1, keepdim=True).sqrt())
    probe = BlockProbe(FakePass, 0, mixed.requires_grad_(False), "block")
    assert find(probe, "neurons") == []  # a norm in between: no unit is independent of the others
    assert probe.tied == ["block.down"]

    def late(x):  # only the last two are tied, which column 0 does not know of
        return torch.cat([x[..., :-2], x[..., -2:] + x[..., -2:].flip(-1)], -1)

    with pytest.raises(TersorError, match=r"block.(up|gate): row 10 reaches several units of block.down"):
        couplings(FFN(twist=late))
    with pytest.raises(TersorError, match=r"block.(up|gate): reaches the block's output on a way of its own"):
        couplings(FFN(leak=lambda up: up.sum(-1, keepdim=True)))

    class Shared(FFN):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(12, 16)

        def forward(self, x):
            hidden = self.gate(x).sigmoid() * self.up(x)
            return x + self.down(hidden) + self.second(hidden.cos())

    with pytest.raises(TersorError, match=r"block.second: reads the neurons of gate, up as well"):
        couplings(Shared())


def test_hidden_from_gradients_seen_by_the_proof():
    """A dependency that autograd does not know of: the proof changes the rows and looks."""

    def secret(x):
        return torch.cat([x[..., :-1], x[..., -1:] + x[..., -2:-1].detach() * 0.1], -1)

    with pytest.raises(TersorError, match=r"block.down: its neurons are not independent"):
        couplings(FFN(twist=secret))


def test_two_factors_of_one_matrix_are_no_neurons():
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16)

        def forward(self, x):
            return x + self.b(self.a(x))

    assert couplings(Factors()) == []


@pytest.mark.parametrize(
    ("name", "kind", "count", "sizes"),
    [
        ("llama", "heads", 2, {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}),
        ("qwen3", "heads", 2, {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}),
        ("phi3", "heads", 2, {"qkv_proj": 64, "o_proj": 32}),
        ("gpt2", "heads", 4, {"c_attn": 48, "c_proj": 16}),
        ("phi3", "neurons", 96, {"gate_up_proj": 2, "down_proj": 1}),
        ("mixtral", "neurons", 96, {"w1": 1, "w3": 1, "w2": 1}),
    ],
)
def test_units_of_real_blocks(family, name, kind, count, sizes):
    checkpoint = Checkpoint(family(name))
    units = find_units(checkpoint, Skeleton(DenseView(checkpoint), torch.device("cpu")), kind)
    assert len(units) == (8 if name == "mixtral" else 2)
    for group in units:
        assert group.count == count
        assert {
            slot.name.split(".")[-2]: slot.index.shape[1] for slot in group.slots if slot.name.endswith("weight")
        } == sizes
    if name == "phi3" and kind == "heads":  # query heads 0 and 1, then key head 0, then value head 0
        rows = next(slot for slot in units[0].slots if "qkv" in slot.name).index[0]
        assert rows.tolist() == [*range(32), *range(64, 80), *range(96, 112)]


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_kept_count(count, sparsity, multiple_of):
    kept = cut.kept_count(count, sparsity, multiple_of)
    assert 1 <= kept <= count and kept >= count * (1 - sparsity) - 1e-4
    assert kept == count or (kept % multiple_of == 0 and kept - multiple_of < count * (1 - sparsity))


@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 1), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_take_put_and_pack(count, per_unit, axis, random):
    index = torch.arange(count * per_unit).reshape(per_unit, count).T
    slot = cut.Slot("w", axis, index)
    kept = torch.tensor(sorted(random.sample(range(count), random.randint(1, count))))
    tensor = torch.rand((count * per_unit, 3) if axis == 0 else (3, count * per_unit)) + 1
    small = cut.take(tensor, slot, kept)
    assert small.shape == slot.shape(tuple(tensor.shape), len(kept))
    masked = cut.put(small, slot, kept, count * per_unit)
    assert torch.equal(masked, cut.mask(tensor, slot, kept))
    assert torch.equal((slot.of_units(masked) != 0).all(1).nonzero()[:, 0], kept)
    assert torch.equal(cut.unpack(cut.pack(kept, count)), kept)


def test_scores_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = (torch.randn(7, 20, generator=generator) for _ in range(2))
    moments = scores.Moments(7)
    moments.add(weights[:, :8], gradients[:, :8])
    moments.add(weights[:, 8:], gradients[:, 8:])
    product = (weights * gradients).sum(1)
    cosine = functional.cosine_similarity(weights, gradients)
    expected = torch.stack([weights.norm(dim=1), weights.norm(dim=1) / 20, cosine + 1, product.abs(), product**2 / 2])
    five = scores.five_scores(moments)
    torch.testing.assert_close(five, expected)
    torch.testing.assert_close(scores.magnitude(moments), expected[0])
    torch.testing.assert_close(scores.taylor(moments), expected[3])
    first, second = scores.saliency([five, 2 * five])
    norms = (5 * five.square().sum(1)).sqrt()  # over all groups, of both layers
    torch.testing.assert_close(first, 0.2 * (five / norms[:, None]).sum(0))
    torch.testing.assert_close(second, 2 * first)
    assert scores.strongest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    x, column = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    found = scores.activation(x.square().mean(0).reshape(3, 2), column.square().sum(0).reshape(3, 2))
    by_column = x.square().mean(0).sqrt() * column.norm(dim=0)
    torch.testing.assert_close(found, by_column.reshape(3, 2).norm(dim=1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_gradients_are_those_of_the_whole_model(family, text, name):
    """Block by block, backwards, in two batches: as torch's own for the next-token loss."""
    folder = family(name, "float32")
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(DenseView(checkpoint), torch.device("cpu"))
    windows = load_windows(folder, str(text), 70, 48)
    run = BlockPass(skeleton, windows)
    assert len(run.batches) == 2
    wanted = [name for index in range(len(run)) for name in skeleton.checkpoint_names(index)]
    found = {}
    loss = backward(
        run,
        wanted,
        lambda index, tensors: found.update({n: g.clone() for n, (_, g) in tensors.items()}),
        lambda *_: None,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    expected = model(input_ids=windows, labels=windows).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    compared = 0
    for tensor, gradient in found.items():
        if skeleton.sources[tensor].expert is None:
            reference = model.get_parameter(skeleton.sources[tensor].parameter).grad
            assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-7
            compared += 1
    if name == "mixtral":
        stacked = model.model.layers[0].mlp.experts.down_proj.grad[1]
        torch.testing.assert_close(
            found["model.layers.0.block_sparse_moe.experts.1.w2.weight"], stacked, rtol=1e-3, atol=1e-7
        )
    assert compared >= 10 and found.keys() == set(wanted)


def test_refit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 24, generator=generator)
    x = x + 0.2 * torch.randn(400, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    places = torch.tensor([0, 1, 4, 5, 6, 9, 11, 14, 15, 16, 18, 20, 21, 22])
    hessian = x.T @ x / len(x)
    expected = torch.linalg.lstsq(x[:, places].double(), (x @ weight.T).double()).solution.T.float()
    torch.testing.assert_close(refit(weight, hessian, places, 1e-9), expected, rtol=1e-3, atol=1e-3)
    damping = 0.05
    ridge = damping * hessian.diagonal().mean() * torch.eye(len(places))
    other = torch.ones(24, dtype=torch.bool).index_fill(0, places, False)
    cross = weight[:, other] @ hessian[other][:, places]
    torch.testing.assert_close(
        refit(weight, hessian, places, damping),
        weight[:, places] + cross @ torch.linalg.inv(hessian[places][:, places] + ridge), rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    full = torch.zeros_like(weight)
    errors = [
        output_error(weight, full.index_copy(1, places, new), hessian)
        for new in (weight[:, places], refit(weight, hessian, places, 0.01))
    ]
    assert errors[1] < 0.3 * errors[0]
    direct = ((x @ (weight - full.index_copy(1, places, weight[:, places])).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert errors[0] == pytest.approx(float(direct), rel=1e-4)


def test_damping_is_judged_on_tokens_that_are_not_fitted():
    generator = torch.Generator().manual_seed(0)
    weight, places = torch.randn(10, 40, generator=generator), torch.arange(30)

    def damping_for(x):
        statistics = InputStatistics({"hessian", "samples"})
        for batch in x.split(16):
            statistics.add(batch)
        return held_out_damping(weight, statistics, places, 1e-4)

    mix = torch.randn(8, 40, generator=generator)  # few causes: the kept inputs tell what the others are
    plenty = torch.randn(2000, 8, generator=generator) @ mix + 0.1 * torch.randn(2000, 40, generator=generator)
    assert damping_for(plenty) == 1e-4
    assert damping_for(plenty[:48]) > 1e-4
    assert damping_for(torch.randn(48, 40, generator=generator)) in (None, 1.0)  # nothing to be known from the others


def test_refit_of_inputs_that_never_arrive():
    """Nothing is known: nothing changes. Fewer tokens than inputs: damping as little as it takes."""
    weight = torch.randn(5, 8)
    places = torch.tensor([0, 2, 3, 7])
    assert torch.equal(refit(weight, torch.zeros(8, 8), places, 0.01), weight[:, places])
    x = torch.randn(2, 8)
    assert torch.isfinite(refit(weight, x.T @ x, places, 0.0)).all()


def test_rms_norms_are_told_by_what_they_compute():
    norm = nn.RMSNorm(16)
    nn.init.normal_(norm.weight)
    assert rms_offset(norm, 16) == 0.0
    gemma = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(16)
    nn.init.normal_(gemma.weight)
    assert rms_offset(gemma, 16) == 1.0
    assert rms_offset(nn.LayerNorm(16), 16) is None

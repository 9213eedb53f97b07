import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import random_projection as module
from tersor.kernels.random_projection import random_projection, reference_random_projection
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASES = {
    "rows": st.sampled_from([1, 17, 130]),
    "columns": st.sampled_from([1, 33, 96]),
    "rank": st.sampled_from([1, 4, 32]),
    "side": st.sampled_from(["left", "right"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 2**63 - 1),
}


def gradient(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def close(found, expected):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(**CASES, panel=st.sampled_from([1, 64, 1 << 20]))
def test_agrees_with_the_reference(rows, columns, rank, side, dtype, seed, panel):
    g = gradient(rows, columns, dtype)
    before, module.PANEL = module.PANEL, panel
    try:
        close(random_projection(g, rank, seed, side), reference_random_projection(g, rank, seed, side))
    finally:
        module.PANEL = before


def test_seeds_and_repetition():
    g = gradient(40, 30)
    assert torch.equal(random_projection(g, 8, 5), random_projection(g, 8, 5))
    assert not torch.equal(random_projection(g, 8, 5), random_projection(g, 8, 6))
    out = torch.ones(8, 30)
    assert random_projection(g, 8, 5, out=out) is out
    assert torch.equal(out, random_projection(g, 8, 5))
    close(random_projection(g, 8, 5), random_projection(g.t(), 8, 5, "right").t())


def test_norms_are_kept_on_average():
    """||P g||^2 / ||g||^2 has mean 1 and variance 2 / rank."""
    rank, seeds = 64, 200
    column = gradient(50, 1)
    ratios = torch.stack([random_projection(column, rank, seed).square().sum() for seed in range(seeds)])
    ratio = ratios.mean() / column.square().sum()
    assert abs(ratio - 1) < 4 * math.sqrt(2 / rank / seeds)


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def test_the_projection_is_never_whole(monkeypatch):
    monkeypatch.setattr(module, "PANEL", 2048)
    g = gradient(4096, 3)
    with Largest() as largest:
        found = random_projection(g, 64, 1)
    assert largest.numbers <= g.numel() < 64 * 4096 / 16
    close(found, reference_random_projection(g, 64, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient": torch.zeros(4)}, "matrix"),
        ({"side": "top"}, "left or right"),
        ({"rank": 0}, "rank"),
        ({"out": torch.zeros(2, 4)}, "out must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_projection(**({"gradient": torch.zeros(4, 5), "rank": 2, "seed": 0} | arguments))


@pytest.mark.triton
def test_triton_agrees_with_the_reference(on_triton):
    g = gradient(70, 20)
    for side in ("left", "right"):
        close(on_triton(random_projection, g, 4, 77, side), reference_random_projection(g, 4, 77, side))

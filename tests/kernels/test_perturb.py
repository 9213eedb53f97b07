import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import perturb as module
from tersor.kernels.perturb import normal, perturb_, reference_normal, reference_perturb, reference_philox

SEEDS = st.integers(0, 2**63 - 1)
OFFSETS = st.sampled_from([0, 1, 3, 1000, 4 * 2**32 - 2, 2**50 + 5])  # a counter that needs its second word
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BOUNDS = st.sampled_from([(None, None), (0.0, None), (None, 0.5), (0.0, 0.5)])


def bits(values):
    return np.asarray(values).view(np.int32).tolist()


def weights(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator)
    weight[torch.rand(count, generator=generator) < 0.3] = 0
    return weight.to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, the authors' library
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in reference_philox(counter, key)) == expected


def test_box_muller_of_the_reference_is_accurate():
    """Against float64: 1e-6, where the largest numbers are above 5."""
    words = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    other = (words.astype(np.uint64) * 2654435761 & 0xFFFFFFFF).astype(np.uint32)
    found = module._reference_pair(words, other)
    radius = np.sqrt(-2 * np.log(((words >> 8) + 1.0) / 2**24))
    angle = other / 2.0**32 * 2 * np.pi
    assert np.abs(found[0] - radius * np.cos(angle)).max() < 1e-6
    assert np.abs(found[1] - radius * np.sin(angle)).max() < 1e-6


def test_numbers_are_normal():
    z = normal(3, 0, 1 << 20).double()
    error = (1 << 20) ** -0.5
    assert abs(z.mean()) < 4 * error
    assert abs(z.square().mean() - 1) < 4 * 2**0.5 * error
    assert abs(z.pow(3).mean()) < 4 * 15**0.5 * error
    assert abs(z.pow(4).mean() - 3) < 4 * 96**0.5 * error
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 * error
    assert abs((z * normal(4, 0, 1 << 20)).mean()) < 4 * error


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, offset=OFFSETS, count=st.integers(0, 700))
def test_cpu_gives_the_reference_bit_for_bit(seed, offset, count):
    assert bits(normal(seed, offset, count)) == bits(reference_normal(seed, offset, count))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, offset=OFFSETS, cut=st.integers(0, 3000), threads=st.sampled_from([1, 2, 3]))
def test_neither_cuts_nor_threads_change_a_number(seed, offset, cut, threads):
    whole = normal(seed, offset, 3000)
    assert torch.equal(torch.cat([normal(seed, offset, cut), normal(seed, offset + cut, 3000 - cut)]), whole)
    before, panel = torch.get_num_threads(), module.PANEL
    torch.set_num_threads(threads)
    module.PANEL = 512
    try:
        assert torch.equal(normal(seed, offset, 3000), whole)
    finally:
        module.PANEL = panel
        torch.set_num_threads(before)


def test_another_process_gives_the_same_numbers():
    code = "import sys; from tersor.kernels.perturb import normal; sys.stdout.buffer.write(normal(11, 5, 4000).numpy().tobytes())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert hashlib.sha256(out).digest() == hashlib.sha256(normal(11, 5, 4000).numpy().tobytes()).digest()


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    offset=OFFSETS,
    count=st.integers(0, 500),
    dtype=DTYPES,
    bounds=BOUNDS,
    scale=st.floats(-1, 1, width=32),
)
def test_perturb_is_the_reference_bit_for_bit(seed, offset, count, dtype, bounds, scale):
    weight = weights(count, dtype)
    expected = reference_perturb(weight, seed, offset, scale, *bounds)
    scratch = torch.full_like(weight, 7)
    assert torch.equal(perturb_(scratch, seed, offset, scale, *bounds, source=weight), expected)
    assert perturb_(weight, seed, offset, scale, *bounds) is weight
    assert torch.equal(weight, expected)


def test_bounds_choose_what_moves():
    weight = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.6, -9.0])
    moved = perturb_(weight.clone(), 1, 0, 1e-3, low=0.0, high=0.5) != weight
    assert moved.tolist() == [False, True, True, True, True, False, False]
    assert (perturb_(weight.clone(), 1, 0, 1e-3) != weight)[:6].all()


def test_there_and_back():
    """+e, -2e, +e leaves rounding only in float32: at most one per step."""
    weight = weights(4000, torch.float32)
    moved = weight.clone()
    for scale in (1e-3, -2e-3, 1e-3):
        perturb_(moved, 9, 0, scale)
    assert (moved - weight).abs().max() <= 3 * 2**-24 * weight.abs().max()
    assert not torch.equal(perturb_(moved.clone(), 9, 0, 1e-3), moved)


def test_a_tensor_cut_in_two_moves_as_one():
    weight = weights(3001, torch.bfloat16)
    whole = perturb_(weight.clone(), 5, 17, 0.1)
    perturb_(weight[:1234], 5, 17, 0.1)
    perturb_(weight[1234:], 5, 17 + 1234, 0.1)
    assert torch.equal(weight, whole)


def test_parameters_are_moved_in_place():
    parameter = torch.nn.Parameter(torch.zeros(4, 5))
    perturb_(parameter, 2, 3, 1.0)
    assert torch.equal(parameter.detach().view(-1), normal(2, 3, 20))


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.zeros(4, 4).t()[:3], {}, "contiguous"),
        (torch.zeros(4, dtype=torch.int8), {}, "cannot perturb"),
        (torch.zeros(4), {"seed": -1}, "seed"),
        (torch.zeros(4), {"offset": 2**62}, "offset"),
        (torch.zeros(4), {"source": torch.zeros(5)}, "differ"),
    ],
)
def test_wrong_arguments_are_refused(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        perturb_(weight, **({"seed": 0, "offset": 0, "scale": 1.0} | arguments))


@pytest.mark.triton
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, offset=OFFSETS, count=st.sampled_from([0, 1, 1500]))
def test_triton_gives_the_reference_bit_for_bit(on_triton, seed, offset, count):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert bits(on_triton(normal, seed, offset, count, device)) == bits(reference_normal(seed, offset, count))


@pytest.mark.triton
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, offset=OFFSETS, dtype=DTYPES, bounds=BOUNDS)
def test_triton_perturbs_as_the_reference(on_triton, seed, offset, dtype, bounds):
    weight = weights(1100, dtype)
    expected = reference_perturb(weight, seed, offset, 0.01, *bounds)
    found = on_triton(perturb_, weight.clone(), seed, offset, 0.01, *bounds)
    # The interpreter truncates bfloat16.
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 0, "atol": 0}
    torch.testing.assert_close(found, expected, **tolerance)

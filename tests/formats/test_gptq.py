"""GPTQ v1 and v2 against golden words, and against an independent reading of the format."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import gptq
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from transformers import GPTQConfig

BITS = (2, 3, 4, 8)
# What GPTQModel adds to whole words when it loads v1
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def word(value: int) -> int:
    return value & 0xFFFFFFFF


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """`[rows, columns]` as a little-endian stream of `bits` each: uint32 words of each row, an integer at a time."""
    rows = []
    for row in values.tolist():
        whole = sum(value << (bits * place) for place, value in enumerate(row))
        rows.append([(whole >> (32 * place)) & 0xFFFFFFFF for place in range(len(row) * bits // 32)])
    return np.array(rows, dtype=np.uint32)


def unstream(words: np.ndarray, bits: int) -> np.ndarray:
    rows = []
    for row in words.view(np.uint32).tolist():
        whole = sum(value << (32 * place) for place, value in enumerate(row))
        rows.append([(whole >> (bits * place)) & (2**bits - 1) for place in range(len(row) * 32 // bits)])
    return np.array(rows, dtype=np.int64)


def three_bits_by_the_book(values: list[int]) -> list[int]:
    """The layout of AutoGPTQ's 3-bit kernels, written out: 10 values, a split one, 10, a split one, 10."""
    v = values
    first = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30
    second = v[10] >> 2 | sum(v[11 + i] << (3 * i + 1) for i in range(10)) | (v[21] & 1) << 31
    third = v[21] >> 1 | sum(v[22 + i] << (3 * i + 2) for i in range(10))
    return [word(first), word(second), word(third)]


def reader(tensors: dict, bits: int, v2: bool = False) -> np.ndarray:
    """What a runtime makes of the file: scale * (code - zero) by g_idx, one added to a zero of v1 without any mask."""
    codes = unstream(tensors["m.qweight"].numpy().T.copy(), bits).T  # [in, out]
    zeros = unstream(tensors["m.qzeros"].numpy(), bits) + (0 if v2 else 1)
    index = tensors["m.g_idx"].numpy()
    return (tensors["m.scales"].float().numpy()[index] * (codes - zeros[index]).astype(np.float32)).T


def scheme_of(bits: int, symmetric=True, size: int | None = 32, v2=False) -> Scheme:
    return Scheme(bits, "int", symmetric, "channel" if size is None else "group", size, gptq_v2=v2)


def random_weight(bits, out=64, columns=96, size: int | None = 32, symmetric=True, lowest=1, seed=0) -> QuantizedWeight:
    """`lowest`: the least zero point, unsigned. 1 is the least that v1 can hold for any codes."""
    generator = torch.Generator().manual_seed(seed)
    half, groups = 2 ** (bits - 1), columns // (size or columns)
    codes = torch.randint(-half, half, (out, columns), dtype=torch.int8, generator=generator)
    scale = (torch.rand(out, groups, generator=generator) * 0.1 + 1e-3).half()
    if symmetric:
        return QuantizedWeight(codes, scale)
    zeros = torch.randint(lowest - half, half, (out, groups), dtype=torch.int8, generator=generator)
    return QuantizedWeight(codes, scale, zeros)


def decode(tensors: dict, scheme: Scheme) -> QuantizedWeight:
    return gptq.decode("m", tensors.__getitem__, tensors, scheme)


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def test_golden_words():
    codes = ((torch.arange(32) % 8) - 8).to(torch.int8).expand(32, 32).contiguous()  # u = 0 … 7 down each column
    tensors = gptq.encode("m", QuantizedWeight(codes, torch.ones(32, 1)), scheme_of(4))
    assert {word(value) for value in tensors["m.qweight"].flatten().tolist()} == {0x76543210}
    assert {word(value) for value in tensors["m.qzeros"].flatten().tolist()} == {0x77777777}
    assert tensors["m.g_idx"].tolist() == [0] * 32
    assert tensors["m.scales"].dtype == torch.float16
    zero_point = (torch.arange(32) % 8 - 7).to(torch.int8).reshape(32, 1)  # u = 1 … 8, stored as 0 … 7
    tensors = gptq.encode("m", QuantizedWeight(codes, torch.ones(32, 1), zero_point), scheme_of(4, False))
    assert {word(value) for value in tensors["m.qzeros"].flatten().tolist()} == {0x76543210}


@pytest.mark.parametrize(("bits", "v1", "v2"), [
    (2, [0x55555555], [0xAAAAAAAA]), (4, [0x77777777], [0x88888888]), (8, [0x7F7F7F7F], [0x80808080]),
    (3, three_bits_by_the_book([3] * 32), three_bits_by_the_book([4] * 32)),
])  # fmt: skip
def test_symmetric_zero_points(bits, v1, v2):
    """v1 holds the middle less one; v2 the middle. Both read back to no zero point at all."""
    weight = random_weight(bits, 32, 32)
    tensors = gptq.encode("m", weight, scheme_of(bits))
    assert [word(value) for value in tensors["m.qzeros"][0].tolist()] == v1 * (32 * bits // 32 // len(v1))
    assert_same(decode(tensors, scheme_of(bits)), weight)
    stored = np.array(v2 * (32 * bits // 32 // len(v2)), dtype=np.uint32).view(np.int32)[None]
    tensors["m.qzeros"] = torch.from_numpy(stored)
    assert_same(decode(tensors, scheme_of(bits, v2=True)), weight)


def test_three_bits_are_the_layout_of_the_kernels():
    rng = np.random.default_rng(0)
    unsigned = rng.integers(0, 8, (64, 32))
    weight = QuantizedWeight(torch.from_numpy(unsigned - 4).to(torch.int8), torch.ones(64, 1))
    qweight = gptq.encode("m", weight, scheme_of(3))["m.qweight"]
    for row in range(64):
        assert [word(value) for value in qweight[:, row].tolist()] == three_bits_by_the_book(unsigned[row].tolist())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS), st.booleans(), st.sampled_from([None, 8, 32, 96]), st.integers(1, 3), st.integers(0, 2**31)
)
def test_round_trip_and_what_a_runtime_reads(bits, symmetric, size, out, seed):
    weight = random_weight(bits, 32 * out, 96, size, symmetric, seed=seed)
    scheme = scheme_of(bits, symmetric, size)
    gptq.check("model.layers.0.m", (32 * out, 96), scheme)
    tensors = gptq.encode("m", weight, scheme)
    names = {"torch.int32": "I32", "torch.float16": "F16"}
    assert gptq.layout("m", (32 * out, 96), scheme, "BF16") == {
        name: (names[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert set(gptq.tensor_names("m", tensors)) == set(tensors)
    assert gptq.modules(tensors) == ["m"]
    assert_same(decode(tensors, scheme), weight)
    expected = dequantize(weight, scheme).numpy()
    assert np.array_equal(reader(tensors, bits), expected)
    unsigned = weight.codes.numpy().astype(np.int64) + 2 ** (bits - 1)
    assert np.array_equal(tensors["m.qweight"].numpy().view(np.uint32), stream(unsigned, bits).T)
    if bits in ONES:  # and what GPTQModel reads, which adds the ones to whole words
        loaded = tensors | {"m.qzeros": tensors["m.qzeros"] + ONES[bits]}
        assert np.array_equal(reader(loaded, bits, v2=True), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 2**31))
def test_v2_is_read(bits, seed):
    """v2 holds zero points as they are, 0 among them."""
    weight = random_weight(bits, symmetric=False, lowest=0, seed=seed)
    zeros = weight.zero_point.numpy().astype(np.int64).T + 2 ** (bits - 1)
    tensors = gptq.encode("m", weight._replace(zero_point=torch.zeros_like(weight.zero_point)), scheme_of(bits, False))
    tensors["m.qzeros"] = torch.from_numpy(stream(zeros, bits).view(np.int32))
    assert_same(decode(tensors, scheme_of(bits, False, v2=True)), weight)
    assert np.array_equal(reader(tensors, bits, v2=True), dequantize(weight, scheme_of(bits, False)).numpy())


# Zero points of 0, for which v1 has no place


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_of_0_is_refused_where_codes_cannot_move(bits):
    """Runtimes add 1 to what is stored, some to whole words: -1 would be read as 2^bits, or spoil its neighbour."""
    weight = random_weight(bits, symmetric=False)
    half = 2 ** (bits - 1)
    weight.zero_point[3, 1] = -half
    weight.codes[3, 40] = half - 1
    with pytest.raises(TersorError, match="zero point 0") as caught:
        gptq.encode("m", weight, scheme_of(bits, False))
    assert "--format compressed-tensors" in caught.value.hint


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_of_0_moves_up_where_that_changes_no_weight(bits):
    """An empty group, all zeros, has scale eps and zero point 0: its codes have room above them."""
    weight = random_weight(bits, symmetric=False, lowest=0, seed=1)
    half = 2 ** (bits - 1)
    weight.codes.clamp_(max=half - 2)
    weight.zero_point[5, 2] = -half
    weight.codes[5, 64:] = -half
    before = [tensor.clone() for tensor in (weight.codes, weight.zero_point)]
    scheme = scheme_of(bits, False)
    tensors = gptq.encode("m", weight, scheme)
    expected = dequantize(weight, scheme)
    assert bool((expected[5, 64:] == 0).all())
    assert np.array_equal(reader(tensors, bits), expected.numpy())
    assert torch.equal(dequantize(decode(tensors, scheme), scheme), expected)
    assert torch.equal(weight.codes, before[0])
    assert torch.equal(weight.zero_point, before[1])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 2**31))
def test_v1_files_with_zero_points_of_0_are_read_as_their_writers_mean_them(bits, seed):
    """GPTQModel and AutoRound subtract the ones from whole words, with borrow; at 3 bits from each field."""
    weight = random_weight(bits, symmetric=False, lowest=0, seed=seed)
    zeros = weight.zero_point.numpy().astype(np.int64).T + 2 ** (bits - 1)
    tensors = gptq.encode("m", weight._replace(zero_point=torch.zeros_like(weight.zero_point)), scheme_of(bits, False))
    if bits == 3:
        stored = stream((zeros - 1) % 8, 3).view(np.int32)
    else:
        stored = (stream(zeros, bits) - np.uint32(ONES[bits])).view(np.int32)
    tensors["m.qzeros"] = torch.from_numpy(stored)
    assert_same(decode(tensors, scheme_of(bits, False)), weight)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_v2_that_calls_itself_v1(bits):
    weight = random_weight(bits)
    tensors = gptq.encode("m", weight, scheme_of(bits))
    middle = np.full((3, 64), 2 ** (bits - 1))
    tensors["m.qzeros"] = torch.from_numpy(stream(middle, bits).view(np.int32))
    assert_same(decode(tensors, scheme_of(bits)), weight)


# Groups that are not runs of columns


@pytest.mark.parametrize("bits", BITS)
def test_g_idx_of_desc_act(bits):
    weight = random_weight(bits, symmetric=False)
    tensors = gptq.encode("m", weight, scheme_of(bits, False))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    tensors["m.g_idx"] = (torch.arange(96) // 32)[order].to(torch.int32)
    found = decode(tensors, scheme_of(bits, False))
    assert torch.equal(found.group_index, tensors["m.g_idx"])
    assert np.array_equal(dequantize(found, scheme_of(bits, False)).numpy(), reader(tensors, bits))
    with pytest.raises(TersorError, match="desc_act"):
        gptq.encode("m", found, scheme_of(bits, False))
    for bad in (tensors["m.g_idx"] + 1, tensors["m.g_idx"] - 1, tensors["m.g_idx"][:-1], tensors["m.g_idx"][None]):
        with pytest.raises(TersorError, match="does not name groups"):
            decode(tensors | {"m.g_idx": bad}, scheme_of(bits, False))


def test_trivial_or_absent_g_idx():
    weight = random_weight(4)
    tensors = gptq.encode("m", weight, scheme_of(4))
    assert tensors["m.g_idx"].tolist() == [column // 32 for column in range(96)]
    assert_same(decode(tensors, scheme_of(4)), weight)
    del tensors["m.g_idx"]
    assert_same(decode(tensors, scheme_of(4)), weight)


# What cannot be written, and files that are damaged


def test_scales_beyond_fp16():
    weight = random_weight(4)._replace(scale=torch.full((64, 3), 70000.0, dtype=torch.bfloat16))
    with pytest.raises(TersorError, match="too large for fp16"):
        gptq.encode("m", weight, scheme_of(4))


@pytest.mark.parametrize(
    ("module", "shape", "scheme", "word"),
    [
        ("l.0.m", (64, 64), Scheme(8, "float", strategy="channel"), "integer"),
        ("l.0.m", (64, 64), Scheme(8, "int", strategy="channel", activations="int8"), "weights only"),
        ("l.0.m", (64, 64), Scheme(5, group_size=32), "2, 3, 4 or 8"),
        ("l.0.m", (64, 48), Scheme(4, group_size=16), "multiples of 32"),
        ("l.0.m", (48, 64), Scheme(4, group_size=32), "multiples of 32"),
        ("l.0.m", (64, 64), Scheme(4, strategy="tensor"), "whole rows"),
        ("l.0.m", (64, 64), Scheme(4, group_size=48), "not divisible by 48"),
        ("pooler.dense", (64, 64), Scheme(4, group_size=32), "numbered blocks"),
    ],
)
def test_check(module, shape, scheme, word):
    with pytest.raises(TersorError, match=word) as caught:
        gptq.check(module, shape, scheme)
    assert caught.value.hint
    gptq.check("lm_head", (64, 64), Scheme(4, group_size=32))
    gptq.check("language_model.lm_head", (64, 64), Scheme(4, strategy="channel"))


@pytest.mark.parametrize("bits", BITS)
def test_damaged_tensors_are_refused(bits):
    scheme = scheme_of(bits, False)
    good = gptq.encode("m", random_weight(bits, symmetric=False), scheme)
    for name in good.keys() - {"m.g_idx"}:
        with pytest.raises(TersorError, match="missing"):
            decode({key: value for key, value in good.items() if key != name}, scheme)
        tensor = good[name]
        damaged = [
            tensor[:-1],
            tensor[:, :-1],
            tensor[None],
            tensor.flatten(),
            tensor[:0],
            tensor[:, :0],
            tensor[0, 0],
            tensor.T,
        ]
        if name != "m.scales":
            damaged += [tensor.to(torch.int64), tensor.to(torch.uint8), tensor.to(torch.float32)]
        for value in damaged:
            with pytest.raises(TersorError):
                decode(good | {name: value}, scheme)


# The config


LINEARS = [
    f"model.layers.{layer}.{leaf}"
    for layer in range(3)
    for leaf in ("q_proj", "o_proj", "mlp.experts.0", "mlp.experts.1")
]
SCHEMES = [scheme_of(bits, symmetric, size) for bits in BITS for symmetric in (True, False) for size in (None, 32, 128)]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*LINEARS, "lm_head"]), st.none() | st.sampled_from(SCHEMES), min_size=1))
def test_config_gives_every_module_its_scheme(chosen):
    schemes = {module: scheme for module, scheme in chosen.items() if scheme is not None}
    if not schemes:
        return
    config = gptq.quantization_config(schemes, [module for module in chosen if module not in schemes])
    assert json.loads(json.dumps(config)) == config
    found = gptq.scheme_map({"quantization_config": config})
    assert {module: found(module) for module in chosen} == chosen
    theirs = GPTQConfig.from_dict(dict(config))
    common = found("model.layers.99.other")
    assert (theirs.bits, theirs.group_size, theirs.sym) == (common.bits, common.group_size or -1, common.symmetric)
    assert theirs.desc_act is False
    assert theirs.format == "gptq"


def test_config_as_transformers_writes_it_back():
    """`save_pretrained` of a loaded model adds keys of its own."""
    config = gptq.quantization_config({"model.layers.0.q": scheme_of(4, size=128)}, ["lm_head"])
    again = json.loads(json.dumps(GPTQConfig.from_dict(dict(config)).to_dict(), default=str))
    assert gptq.scheme_map({"quantization_config": again})("model.layers.0.q") == scheme_of(4, size=128)
    again = json.loads(json.dumps(GPTQConfig(bits=4, checkpoint_format="gptq_v2").to_dict(), default=str))
    assert gptq.scheme_map({"quantization_config": again})("model.layers.0.q").gptq_v2


def test_versions():
    for form, v2 in [({}, False), ({"checkpoint_format": "gptq"}, False), ({"checkpoint_format": "gptq_v2"}, True),
                     ({"format": "gptq_v2"}, True), ({"checkpoint_format": "", "format": "gptq"}, False)]:  # fmt: skip
        scheme = gptq.scheme_map({"quantization_config": {"bits": 4, "group_size": 128} | form})("a.0.b")
        assert scheme == Scheme(4, group_size=128, gptq_v2=v2)
    for form in ("marlin", "bitblas", ["gptq"], 7):
        with pytest.raises(TersorError, match="checkpoint_format"):
            gptq.scheme_map({"quantization_config": {"bits": 4, "checkpoint_format": form}})


def test_dynamic_rules_in_their_order():
    """As GPTQModel applies them: the first that matches from the start of the name counts; -: leaves dense."""
    rules = {
        r"-:.*\.0\.q": {},
        r"+:.*\.q": {"bits": 8},
        r".*\.o$": {"group_size": 32, "sym": False},
        "+:.*": {"bits": 2},
    }
    scheme = gptq.scheme_map({"quantization_config": {"bits": 4, "group_size": 128, "dynamic": rules}})
    assert scheme("l.0.q") is None
    assert scheme("l.1.q") == Scheme(8, group_size=128)
    assert scheme("l.1.o") == Scheme(4, "int", False, "group", 32)
    assert scheme("l.1.o2") == Scheme(2, group_size=128)
    assert scheme("lm_head") is None


@pytest.mark.parametrize(
    "config",
    [
        {}, {"bits": 5}, {"bits": "4"}, {"bits": 4.0}, {"bits": [4]}, {"bits": True}, {"bits": 4, "group_size": 0},
        {"bits": 4, "group_size": None}, {"bits": 4, "group_size": "128"}, {"bits": 4, "group_size": -2},
        {"bits": 4, "dynamic": ["-:x"]}, {"bits": 4, "dynamic": {"+:x": None}},
        {"bits": 4, "dynamic": {"+:(": {}}}, {"bits": 4, "dynamic": {"+:x": {"bits": 7}}},
        {"bits": 4, "dynamic": {"+:x": {"group_size": "all"}}},
    ],
)  # fmt: skip
def test_config_that_cannot_be_read(config):
    with pytest.raises(TersorError):
        gptq.scheme_map({"quantization_config": config})


def test_dense_shape():
    from tersor.formats.header import TensorInfo

    def info(dtype, *shape):
        return TensorInfo("", dtype, shape, None, 0, 0)

    for bits in BITS:
        infos = {"m.qweight": info("I32", 96 * bits // 32, 64), "m.scales": info("F16", 3, 64)}
        assert gptq.dense_shape("m", infos, scheme_of(bits), None) == ((64, 96), "F16")
    for broken in ({}, infos | {"m.scales": info("F16", 64)}, {"m.qweight": info("I32", 12, 64)}):
        with pytest.raises(TersorError, match="missing or not 2-D"):
            gptq.dense_shape("m", broken, scheme_of(4), None)

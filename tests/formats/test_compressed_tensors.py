"""The same bytes and the same weights as the compressed-tensors library, both ways."""

import copy
import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import compressed_tensors
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.errors import TersorError
from tersor.formats.header import SAFETENSORS_DTYPES
from tersor.formats.scheme import Scheme

INT_SCHEMES = [
    Scheme(bits, "int", symmetric, strategy, 32 if strategy == "group" else None)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel")
]
WITH_ACTIVATIONS = [
    Scheme(8, "int", True, "channel", activations="int8"),
    Scheme(8, "int", False, "channel", activations="int8"),
    Scheme(8, "int", True, "group", 32, activations="int8"),
    Scheme(8, "int", True, "tensor", activations="int8"),
    Scheme(8, "int", False, "tensor", activations="int8"),
]
FLOAT_SCHEMES = [
    Scheme(8, "float", strategy="channel", activations="fp8"),
    Scheme(8, "float", strategy="tensor", activations="fp8"),
    Scheme(8, "float", strategy="tensor"),
    Scheme(8, "float", strategy="block", block=(128, 128), activations="fp8-group"),
]
ALL = INT_SCHEMES + WITH_ACTIVATIONS + FLOAT_SCHEMES


def label(scheme: Scheme) -> str:
    sign = "sym" if scheme.symmetric else "asym"
    return f"{scheme.kind}{scheme.bits}-{sign}-{scheme.strategy}-{scheme.activations or 'weights'}"


def random_weight(scheme: Scheme, shape: tuple[int, int], dtype=torch.bfloat16, seed=0) -> QuantizedWeight:
    """Codes over their whole range, a scale of each size, zero points over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)
    if scheme.kind == "float":
        raw = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        codes = torch.where(raw & 127 == 127, 0, raw).view(torch.float8_e4m3fn)  # 127 and 255 are NaN
    else:
        codes = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    grid = compressed_tensors._scale_shape(shape, scheme)
    scale = (torch.rand(grid, generator=generator) * 0.1 + 1e-3).to(dtype)
    zero_point = None if scheme.symmetric else torch.randint(low, high, grid, dtype=torch.int8, generator=generator)
    return QuantizedWeight(codes, scale, zero_point)


def reference(scheme: Scheme):
    """Their scheme and compressor, out of the config that is written here."""
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"m": scheme}, ["lm_head"]))
    theirs = config.config_groups["group_0"]
    assert theirs.format is not None
    return theirs, BaseCompressor.get_value_from_registry(theirs.format)


def local(tensors: dict) -> dict:
    assert all(name.startswith("m.") for name in tensors)
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def assert_same_weight(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert same(found.codes, expected.codes)
    assert same(found.scale, expected.scale)
    assert (found.zero_point is None) == (expected.zero_point is None)
    assert found.zero_point is None or same(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("shape", [(40, 64), (33, 96), (256, 160)], ids=str)
@pytest.mark.parametrize("scheme", ALL, ids=label)
def test_they_decode_what_is_encoded_here(scheme, shape):
    weight = random_weight(scheme, shape, torch.float32)
    scheme_there, compressor = reference(scheme)
    found = compressor.decompress(local(compressed_tensors.encode("m", weight, scheme)), scheme_there)["weight"]
    assert torch.equal(found, dequantize(weight, scheme))


@pytest.mark.parametrize("shape", [(40, 64), (33, 96), (256, 160)], ids=str)
@pytest.mark.parametrize("scheme", ALL, ids=label)
def test_what_they_encode_is_the_same_bytes_and_is_decoded_here(scheme, shape):
    weight = random_weight(scheme, shape, torch.float32, seed=1)
    scheme_there, compressor = reference(scheme)
    state = {"weight": dequantize(weight, scheme), "weight_scale": weight.scale}
    if weight.zero_point is not None:
        state["weight_zero_point"] = weight.zero_point
    theirs = {f"m.{name}": tensor for name, tensor in compressor.compress(state, scheme_there).items()}
    ours = compressed_tensors.encode("m", weight, scheme)
    if scheme.strategy == "tensor" and not scheme.symmetric:
        assert theirs["m.weight_zero_point"].shape == ours["m.weight_zero_point"].shape == (1,)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert same(ours[name], tensor), name
    assert_same_weight(compressed_tensors.decode("m", theirs.__getitem__, theirs, scheme), weight)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 70), st.integers(1, 4), st.sampled_from(["bfloat16", "float16", "float32"]),
       st.integers(0, 2**31))  # fmt: skip
def test_round_trip_fills_its_layout(scheme, out, groups, dtype, seed):
    shape = (out, groups * 32 if scheme.strategy == "group" else groups * 32 - seed % 31)
    compressed_tensors.check("m", shape, scheme)
    weight = random_weight(scheme, shape, getattr(torch, dtype), seed)
    tensors = compressed_tensors.encode("m", weight, scheme)
    layout = compressed_tensors.layout("m", shape, scheme, SAFETENSORS_DTYPES[dtype])
    assert layout == {
        name: (SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert set(compressed_tensors.tensor_names("m", tensors)) == set(tensors)
    assert compressed_tensors.modules(tensors) == ["m"]
    assert_same_weight(compressed_tensors.decode("m", tensors.__getitem__, tensors, scheme), weight)


def test_golden_words():
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    scheme = Scheme(4, "int", False, "group", 8)
    zero_point = torch.arange(-8, -6, dtype=torch.int8).reshape(2, 1)
    found = compressed_tensors.encode("m", QuantizedWeight(codes, torch.ones(2, 1), zero_point), scheme)
    assert [word & 0xFFFFFFFF for word in found["m.weight_packed"].flatten().tolist()] == [0x76543210, 0xFEDCBA98]
    assert found["m.weight_zero_point"].tolist() == [[0x10]]
    assert found["m.weight_shape"].tolist() == [2, 8]
    rows = torch.arange(-8, 0, dtype=torch.int8).reshape(8, 1)
    weight = QuantizedWeight(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8, 1), rows)
    assert compressed_tensors.encode("m", weight, scheme)["m.weight_zero_point"].tolist() == [[0x76543210]]


# Codes that cannot be written as they are


def test_encode_refuses_what_the_format_cannot_say():
    scheme = Scheme(4, group_size=32)
    weight = random_weight(scheme, (4, 64))
    index = torch.arange(64, dtype=torch.int32) % 2
    with pytest.raises(TersorError, match="desc_act"):
        compressed_tensors.encode("m", weight._replace(group_index=index), scheme)
    with pytest.raises(TersorError, match="zero points"):
        compressed_tensors.encode("m", weight._replace(zero_point=torch.ones(4, 2, dtype=torch.int8)), scheme)
    with pytest.raises(TersorError, match="zero points"):
        compressed_tensors.encode("m", weight, Scheme(4, "int", False, "group", 32))


def test_check():
    for bits in (1, 5, 6, 7):
        with pytest.raises(TersorError, match=f"{bits} bits"):
            compressed_tensors.check("m", (4, 64), Scheme(bits, group_size=32))
    with pytest.raises(TersorError, match="65 columns are not divisible by 32"):
        compressed_tensors.check("m", (4, 65), Scheme(4, group_size=32))
    compressed_tensors.check("m", (4, 65), Scheme(4, strategy="channel"))


# Files that are damaged


def read_damaged(tensors: dict, scheme: Scheme) -> QuantizedWeight:
    return compressed_tensors.decode("m", tensors.__getitem__, tensors, scheme)


@pytest.mark.parametrize("scheme", ALL, ids=label)
def test_every_tensor_is_needed_and_its_shape_and_dtype_checked(scheme):
    """Any tensor missing, cut, transposed, flattened or of another dtype is refused, or read to the same weight."""
    good = compressed_tensors.encode("m", random_weight(scheme, (40, 64)), scheme)
    expected = dequantize(read_damaged(good, scheme), scheme)
    for name in good:
        with pytest.raises(TersorError, match="missing"):
            read_damaged({key: value for key, value in good.items() if key != name}, scheme)
        tensor = good[name]
        damaged = [
            tensor[:-1],
            tensor[None],
            tensor.flatten()[:-1],
            tensor[:0],
            tensor.mT if tensor.dim() > 1 else tensor[:0],
        ]
        if tensor.dim() > 1:
            damaged += [tensor[:, :-1], tensor.flatten()]
        if name == "m.weight":  # nothing else says how large it is, so another size may be a smaller weight
            damaged = [tensor[None], tensor.flatten(), tensor[0, 0]]
        if name.endswith(("packed", "weight")):
            damaged += [tensor.to(torch.int64), tensor.to(torch.bfloat16)]
        for value in damaged:
            try:
                found = dequantize(read_damaged(good | {name: value}, scheme), scheme)
            except TersorError as error:
                assert error.hint
            else:
                assert torch.equal(found, expected), (name, value.shape)


@pytest.mark.parametrize(
    "shape", [[40], [40, 64, 1], [0, 64], [-40, 64], [64, 40], [40, 2**62], [2**40, 64], [40.0, 64.0], []]
)
def test_weight_shape_that_lies(shape):
    scheme = Scheme(4, group_size=32)
    good = compressed_tensors.encode("m", random_weight(scheme, (40, 64)), scheme)
    with pytest.raises(TersorError, match=r"m\.weight_"):
        read_damaged(good | {"m.weight_shape": torch.tensor(shape)}, scheme)


def test_group_index_of_older_files():
    """Files with actorder hold the group of every column; -1 marks one that was never set."""
    scheme = Scheme(4, group_size=32)
    weight = random_weight(scheme, (40, 64))
    good = compressed_tensors.encode("m", weight, scheme)
    index = torch.arange(64, dtype=torch.int32) % 2
    found = read_damaged(good | {"m.weight_g_idx": index}, scheme)
    expected = weight.codes.float() * weight.scale.float()[:, index.long()]
    assert torch.equal(dequantize(found, scheme), expected)
    assert read_damaged(good | {"m.weight_g_idx": torch.full((64,), -1)}, scheme).group_index is None
    for bad in (index[:-1], index + 1, index[None], index - 5):
        with pytest.raises(TersorError, match="does not name groups"):
            read_damaged(good | {"m.weight_g_idx": bad}, scheme)


# The config


LINEARS = [
    f"model.layers.{layer}.{leaf}"
    for layer in range(3)
    for leaf in ("q_proj", "o_proj", "mlp.experts.0", "mlp.experts.1")
]


def skeleton(names) -> torch.nn.Module:
    root = torch.nn.Module()
    for name in names:
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, torch.nn.Linear(128, 128, device="meta"))
    return root


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from([*LINEARS, "lm_head"]), st.none() | st.sampled_from(ALL), min_size=1))
def test_config_means_the_same_there_and_here(chosen):
    """Each module gets the scheme it was given, from their matching rules as from ours; the rest stays dense."""
    schemes = {module: scheme for module, scheme in chosen.items() if scheme is not None}
    ignore = [module for module, scheme in chosen.items() if scheme is None]
    if not schemes:
        return
    settings_ = compressed_tensors.quantization_config(schemes, ignore)
    assert json.loads(json.dumps(settings_)) == settings_
    scheme_of = compressed_tensors.scheme_map({"quantization_config": settings_})
    assert {module: scheme_of(module) for module in chosen} == chosen
    model = skeleton(chosen)
    apply_quantization_config(model, QuantizationConfig.model_validate(copy.deepcopy(settings_)))
    for module, scheme in chosen.items():
        theirs = getattr(model.get_submodule(module), "quantization_scheme", None)
        assert (theirs is None) == (scheme is None), module
        if scheme is not None:
            assert theirs.weights.num_bits == scheme.bits
            assert theirs.weights.type == scheme.kind
            assert theirs.weights.symmetric == scheme.symmetric
            assert theirs.weights.strategy == scheme.strategy
            assert theirs.weights.group_size == scheme.group_size
            assert theirs.weights.block_structure == (list(scheme.block) if scheme.block else None)
            assert (theirs.input_activations is None) == (scheme.activations is None)
            assert theirs.format == compressed_tensors.format_of(scheme)


def test_formats_in_the_config():
    one = compressed_tensors.quantization_config({"a": Scheme(4, group_size=128)}, [])
    assert one["format"] == one["config_groups"]["group_0"]["format"] == "pack-quantized"
    two = compressed_tensors.quantization_config({"a": Scheme(4, group_size=128), "b": FLOAT_SCHEMES[0]}, [])
    assert two["format"] == "mixed-precision"
    assert [group["format"] for group in two["config_groups"].values()] == ["pack-quantized", "float-quantized"]


# As llm-compressor 0.14.0.1 writes it
WRITTEN_BY_LLM_COMPRESSOR = {
    "config_groups": {
        "W4A16": {
            "format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": None, "observer_kwargs": {}, "scale_dtype": None, "strategy": "group", "symmetric": True,
                "type": "int", "zp_dtype": None,
            },
        }
    },
    "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head", "re:.*embed_tokens"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    "transform_config": {}, "version": "0.19.0",
}  # fmt: skip


def with_weights(**changes) -> dict:
    config = copy.deepcopy(WRITTEN_BY_LLM_COMPRESSOR)
    config["config_groups"]["W4A16"]["weights"] |= changes
    return config


def test_config_of_llm_compressor():
    scheme_of = compressed_tensors.scheme_map({"quantization_config": WRITTEN_BY_LLM_COMPRESSOR})
    assert scheme_of("model.layers.0.mlp.up_proj") == Scheme(4, group_size=128)
    assert scheme_of("lm_head") is None
    assert scheme_of("model.embed_tokens") is None
    scheme_of = compressed_tensors.scheme_map({"quantization_config": with_weights(group_size=-1)})
    assert scheme_of("x") == Scheme(4, strategy="channel")


def test_three_bits_packed_the_old_way_are_refused():
    for version in ("0.17.1", "0.9.0", None, "", "unknown"):
        with pytest.raises(TersorError, match="ten to a word"):
            compressed_tensors.scheme_map({"quantization_config": with_weights(num_bits=3) | {"version": version}})
    for version in ("0.18.0", "0.20.0.a20260601", "1.0"):
        scheme_of = compressed_tensors.scheme_map(
            {"quantization_config": with_weights(num_bits=3) | {"version": version}}
        )
        assert scheme_of("x").bits == 3


@pytest.mark.parametrize(
    "config",
    [
        {}, {"config_groups": None}, {"config_groups": []}, {"config_groups": {"a": 1}},
        WRITTEN_BY_LLM_COMPRESSOR | {"format": "nvfp4-pack-quantized"}, WRITTEN_BY_LLM_COMPRESSOR | {"format": None},
        WRITTEN_BY_LLM_COMPRESSOR | {"format": ["pack-quantized"]}, WRITTEN_BY_LLM_COMPRESSOR | {"ignore": "lm_head"},
        WRITTEN_BY_LLM_COMPRESSOR | {"ignore": [7]}, WRITTEN_BY_LLM_COMPRESSOR | {"ignore": ["re:("]},
        with_weights(num_bits=5), with_weights(num_bits="4"), with_weights(num_bits=4.0), with_weights(num_bits=None),
        with_weights(type="float"), with_weights(type=None), with_weights(strategy=None), with_weights(strategy=["group"]),
        with_weights(strategy="tensor_group"), with_weights(group_size=None), with_weights(group_size=0),
        with_weights(group_size="128"), with_weights(strategy="block"), with_weights(strategy="block", block_structure=[128]),
        with_weights(strategy="block", block_structure=[128, 0]),
    ],
)  # fmt: skip
def test_config_that_cannot_be_read(config):
    with pytest.raises(TersorError) as caught:
        compressed_tensors.scheme_map({"quantization_config": config})
    assert caught.value.hint


@pytest.mark.parametrize(
    "group",
    [{"targets": "Linear"}, {"targets": [None]}, {"targets": ["re:["]}, {"targets": None}, {"weights": None}, {"weights": []},
     {"input_activations": [1]}],
)  # fmt: skip
def test_group_that_cannot_be_read(group):
    config = copy.deepcopy(WRITTEN_BY_LLM_COMPRESSOR)
    config["config_groups"]["W4A16"] |= group
    with pytest.raises(TersorError):
        compressed_tensors.scheme_map({"quantization_config": config})


def test_dense_shape():
    from tersor.formats.header import TensorInfo

    def info(dtype, *shape):
        return TensorInfo("", dtype, shape, None, 0, 0)

    packed = Scheme(4, group_size=32)
    infos = {
        "m.weight_packed": info("I32", 40, 8),
        "m.weight_scale": info("F16", 40, 2),
        "m.weight_shape": info("I64", 2),
    }
    assert compressed_tensors.dense_shape("m", infos, packed, lambda name: torch.tensor([40, 64])) == ((40, 64), "F16")
    infos = {"m.weight": info("F8_E4M3", 40, 64), "m.weight_scale": info("BF16", 1)}
    assert compressed_tensors.dense_shape("m", infos, FLOAT_SCHEMES[1], None) == ((40, 64), "BF16")
    for broken in (
        {},
        {"m.weight_scale": info("BF16", 1)},
        {"m.weight": info("I8", 40, 64)},
        infos | {"m.weight": info("I8", 40)},
    ):
        with pytest.raises(TersorError):
            compressed_tensors.dense_shape("m", broken, FLOAT_SCHEMES[1], None)

"""What the encodings share: telling them apart, dequantizing, and patterns that hit what they should."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import compressed_tensors, encodings, gptq
from tersor.formats.encodings import QuantizedWeight, dequantize, patterns
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

INTERFACE = (
    "layout", "check", "encode", "decode", "dense_shape", "tensor_names", "modules", "quantization_config", "scheme_map",
)  # fmt: skip


def test_every_encoding_has_the_interface():
    for name in encodings.NAMES:
        module = encodings.encoding(name)
        assert all(callable(getattr(module, function)) for function in INTERFACE)
    with pytest.raises(TersorError, match="unknown encoding 'zip'"):
        encodings.encoding("zip")


def test_detect():
    assert encodings.detect(None, ["a.weight"]) is None
    assert encodings.detect({}, ["a.weight"]) is None
    assert encodings.detect({"quantization_config": None}, ["a.weight"]) is None
    assert encodings.detect({"quantization_config": {"quant_method": "gptq"}}, []) is gptq
    assert encodings.detect({"quantization_config": {"quant_method": "compressed-tensors"}}, []) is compressed_tensors
    for names in (["a.weight_packed"], ["a.qweight"]):
        for config in (None, {}, {"quantization_config": {}}):
            with pytest.raises(TersorError, match="no quantization_config"):
                encodings.detect(config, names)
    for method in ("awq", "bitsandbytes", None, 7, ["gptq"]):
        with pytest.raises(TersorError, match="not read here"):
            encodings.detect({"quantization_config": {"quant_method": method}}, [])
    with pytest.raises(TersorError, match="not read here"):
        encodings.detect({"quantization_config": "gptq"}, [])


def test_schemes_of_config_and_names_that_disagree():
    scheme = Scheme(4, group_size=32)
    config = {"quantization_config": compressed_tensors.quantization_config({"l.0.a": scheme}, ["l.0.b"])}
    names = ["l.0.a.weight_packed", "l.0.a.weight_scale", "l.0.b.weight", "norm.weight"]
    assert encodings.schemes(compressed_tensors, config, names) == {"l.0.a": scheme}
    with pytest.raises(TersorError, match=r"'l.0.b'.*leaves it out"):
        encodings.schemes(compressed_tensors, config, [*names, "l.0.b.weight_packed"])


def by_hand(codes, scale, zero, where) -> torch.Tensor:
    """The definition, an element at a time. `where(row, column)` is the index of the scale."""
    result = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            at = where(row, column)
            value = float(codes[row, column]) - (0 if zero is None else int(zero[at]))
            result[row, column] = value * float(scale[at])
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.sampled_from(["group", "channel"]),
       st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_dequantize_by_group(out, groups, size, symmetric, strategy, shuffled, seed):
    torch.manual_seed(seed)
    size, groups = (size, groups) if strategy == "group" else (size * groups, 1)
    codes = torch.randint(-128, 128, (out, groups * size), dtype=torch.int8)
    scale = torch.rand(out, groups).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(-128, 128, (out, groups), dtype=torch.int8)
    index = torch.randint(groups, (groups * size,), dtype=torch.int32) if shuffled else None
    scheme = Scheme(8, "int", symmetric, strategy, size if strategy == "group" else None)
    found = dequantize(QuantizedWeight(codes, scale, zero, index), scheme)
    expected = by_hand(codes, scale, zero, lambda r, c: (r, int(index[c]) if shuffled else c // size))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(),
       st.integers(0, 2**31))  # fmt: skip
def test_dequantize_by_block_and_tensor(out, columns, rows, width, per_tensor, symmetric, seed):
    torch.manual_seed(seed)
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
    shape = (1, 1) if per_tensor else (-(-out // rows), -(-columns // width))
    scale = torch.rand(shape)
    zero = None if symmetric else torch.randint(-128, 128, shape, dtype=torch.int8)
    scheme = Scheme(
        8, "int", symmetric, "tensor" if per_tensor else "block", block=None if per_tensor else (rows, width)
    )
    expected = by_hand(codes, scale, zero, lambda r, c: (0, 0) if per_tensor else (r // rows, c // width))
    assert torch.equal(dequantize(QuantizedWeight(codes, scale, zero), scheme), expected)
    if per_tensor:
        flat = QuantizedWeight(codes, scale.reshape(1), None if zero is None else zero.reshape(1))
        assert torch.equal(dequantize(flat, scheme), expected)


def test_dequantize_does_not_change_its_input():
    for scheme in (
        Scheme(8, strategy="tensor"),
        Scheme(8, strategy="channel"),
        Scheme(8, strategy="block", block=(2, 2)),
    ):
        codes = torch.ones(2, 2, dtype=torch.int8)
        scale = torch.full((2, 1) if scheme.strategy == "channel" else (1, 1), 3.0)
        assert torch.equal(dequantize(QuantizedWeight(codes, scale), scheme), torch.full((2, 2), 3.0))
        assert bool((codes == 1).all())
        assert bool((scale == 3).all())


@pytest.mark.parametrize(
    ("scheme", "scale"),
    [
        (Scheme(4, group_size=4), (3, 2)),
        (Scheme(4, group_size=4), (4, 3)),
        (Scheme(4, strategy="channel"), (1, 1)),
        (Scheme(8, "float", strategy="tensor"), (2,)),
        (Scheme(8, "float", strategy="block", block=(2, 4)), (2, 1)),
        (Scheme(8, "float", strategy="block", block=(2, 4)), (1, 4)),
    ],
)
def test_dequantize_refuses_scales_that_do_not_fit(scheme, scale):
    with pytest.raises(TersorError, match="do not fit a weight"):
        dequantize(QuantizedWeight(torch.zeros(4, 8, dtype=torch.int8), torch.ones(scale)), scheme)


names = st.builds(
    lambda layer, expert, leaf: f"model.layers.{layer}.mlp{'' if expert is None else f'.experts.{expert}'}.{leaf}",
    st.integers(0, 12), st.none() | st.integers(0, 3), st.sampled_from(["up", "up_proj", "down", "a.b"]),
) | st.sampled_from(["lm_head", "h.0", "h.10", "h0.x", "model.layers.1", "a+b.3.(c)", "7.x"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sets(names, max_size=12), st.sets(names, max_size=12))
def test_patterns_hit_all_that_they_should_and_no_other(modules, others):
    others -= modules
    found = patterns(sorted(modules), sorted(others))

    def hit(name: str) -> bool:
        return any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in found)

    assert all(hit(name) for name in modules)
    assert not any(hit(name) for name in others)
    assert len(found) <= len(modules)


def test_patterns_are_short_where_layers_repeat():
    modules = [f"model.layers.{layer}.{leaf}" for layer in range(32) for leaf in ("q_proj", "k_proj")]
    found = patterns(modules, ["lm_head", *(f"model.layers.{layer}.v_proj" for layer in range(32))])
    assert found == [r"re:^model\.layers\.\d+\.q_proj$", r"re:^model\.layers\.\d+\.k_proj$"]
    assert patterns(modules[:2], modules[2:]) == sorted(modules[:2])[::-1]


def test_need_names_the_tensor():
    assert encodings.need(lambda name: name + "!", ["a"], "a") == "a!"
    with pytest.raises(TersorError, match="'b' is missing"):
        encodings.need(lambda name: name, ["a"], "b")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<", "a{99999999999999999999}", "(" * 5000])
def test_patterns_out_of_a_config(pattern):
    with pytest.raises(TersorError, match="not a regular expression"):
        encodings.compiled(pattern)

"""Weights stored as factors: bytes, detection, and the dense view of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tersor.formats import low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.header import SAFETENSORS_DTYPES
from tersor.formats.low_rank import Factors

UP = Factors("model.layers.0.up", "low_rank", 3, (20, 12), "BF16")
DOWN = Factors("model.layers.0.down", "kronecker", 2, (12, 20), "F32", grid=(3, 5))
FUSED = Factors("h.0.attn.c_attn", "low_rank", 2, (24, 8), "F16", transposed=True)
OTHER = {"model.norm.weight": torch.ones(12), "model.layers.0.up.bias": torch.ones(20)}


def tensors_of(factors: Factors, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(shape, generator=generator) for _, shape in factors.layout.values()]
    return low_rank.encode(factors, *pair)


def save(folder: Path, *all_factors: Factors, entries: dict | None = None, config: dict | None = None) -> Checkpoint:
    """A folder with these factors; `entries` replaces the modules of lowrank.json."""
    folder.mkdir(exist_ok=True)
    tensors = dict(OTHER)
    for factors in all_factors:
        tensors |= tensors_of(factors)
    save_file(tensors, folder / "model.safetensors")
    content = low_rank.description(all_factors)
    content["modules"] = content["modules"] if entries is None else entries
    (folder / "lowrank.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def entry(factors: Factors) -> dict:
    return low_rank.description([factors])["modules"][factors.module]


@st.composite
def any_factors(draw) -> Factors:
    size = st.integers(1, 7)
    dtype = draw(st.sampled_from(["F32", "BF16", "F16", "F64"]))
    if draw(st.booleans()):
        shape = draw(size) * draw(size), draw(size) * draw(size)
        return Factors("a.0.b", "low_rank", draw(size), shape, dtype, draw(st.booleans()))
    m1, n1, m2, n2 = (draw(size) for _ in range(4))
    return Factors("a.0.b", "kronecker", draw(size), (m1 * m2, n1 * n2), dtype, draw(st.booleans()), (m1, n1))


@given(any_factors())
@settings(max_examples=60, deadline=None)
def test_what_is_written_decodes_to_the_definition(factors):
    tensors = tensors_of(factors)
    found = {name: (SAFETENSORS_DTYPES[str(t.dtype)[6:]], tuple(t.shape)) for name, t in tensors.items()}
    assert found == factors.layout
    assert factors.params == sum(tensor.numel() for tensor in tensors.values())
    assert factors.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    first, second = (tensor.double() for tensor in tensors.values())
    if factors.grid is None:
        wanted = first @ second
    else:
        wanted = sum(torch.kron(b, c) for b, c in zip(first, second, strict=True))
    decoded = low_rank.decode(factors, tensors.__getitem__)
    assert decoded.dtype == torch.float32
    assert tuple(decoded.shape) == factors.shape
    torch.testing.assert_close(decoded.double(), wanted, rtol=1e-5, atol=1e-5)


def test_detection_gives_back_what_was_described(tmp_path):
    checkpoint = save(tmp_path / "m", UP, DOWN, FUSED)
    assert low_rank.detect(checkpoint) == {factors.module: factors for factors in (UP, DOWN, FUSED)}
    save_file(OTHER, tmp_path / "dense.safetensors")
    assert low_rank.detect(Checkpoint(tmp_path / "dense.safetensors")) == {}


def test_dense_view(tmp_path):
    checkpoint = save(tmp_path / "m", UP, DOWN, FUSED)
    view = DenseView(checkpoint)
    assert view.is_factorised
    assert not view.is_quantized
    assert view.tensors.keys() == OTHER.keys() | {factors.name for factors in (UP, DOWN, FUSED)}
    for factors in (UP, DOWN, FUSED):
        found = view.tensors[factors.name]
        assert (found.dtype, found.shape, found.is_stored) == (factors.dtype, factors.stored_shape, False)
        wanted = low_rank.decode(factors, checkpoint.read)
        wanted = wanted.T if factors.transposed else wanted
        assert torch.equal(view.read(factors.name), wanted)
        assert torch.equal(view.map(factors.name), wanted)
        assert tuple(wanted.shape) == factors.stored_shape
        assert view.stored_names(factors.name) == factors.names
    assert torch.equal(view.read("model.norm.weight"), OTHER["model.norm.weight"])
    assert view.stored_names("model.norm.weight") == ("model.norm.weight",)


def test_description_does_not_travel(tmp_path):
    checkpoint = save(tmp_path / "m", UP)
    (checkpoint.path / "tokenizer.json").write_text("{}")
    assert [path.name for path in checkpoint.side_files()] == ["tokenizer.json"]


def without(key: str) -> dict:
    return {name: value for name, value in entry(UP).items() if name != key}


DAMAGED = {
    "key 'rank' is missing": {UP.module: without("rank")},
    "key 'shape' is missing": {UP.module: without("shape")},
    "key 'dtype' is missing": {UP.module: without("dtype")},
    "key 'transposed' is missing": {UP.module: without("transposed")},
    "kind is not low_rank or kronecker": {UP.module: entry(UP) | {"kind": ["low_rank"]}},
    "expected BF16 [20, 4]": {UP.module: entry(UP) | {"rank": 4}},
    "expected BF16 [12, 3]": {UP.module: entry(UP) | {"shape": [12, 20]}},
    "expected F32 [20, 3]": {UP.module: entry(UP) | {"dtype": "F32"}},
    "rank 0, dtype": {UP.module: entry(UP) | {"rank": 0}},
    "rank True, dtype": {UP.module: entry(UP) | {"rank": True}},
    "rank '3', dtype": {UP.module: entry(UP) | {"rank": "3"}},
    "dtype ['BF16']": {UP.module: entry(UP) | {"dtype": ["BF16"]}},
    "dtype 'I8'": {UP.module: entry(UP) | {"dtype": "I8"}},
    "transposed 'no'": {UP.module: entry(UP) | {"transposed": "no"}},
    "shape [20] is not": {UP.module: entry(UP) | {"shape": [20]}},
    "shape [-20, 12] is not": {UP.module: entry(UP) | {"shape": [-20, 12]}},
    "tensor 'model.layers.0.up.kron_b' is missing": {UP.module: entry(DOWN)},
    "tensor '../../etc/passwd.lr_a' is missing": {UP.module: entry(UP), "../../etc/passwd": entry(UP)},
    "does not list the module of tensor 'model.layers.0.up.lr_a'": {},
    "'modules' is missing": [],
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_description(message, tmp_path):
    checkpoint = save(tmp_path / "m", UP, entries=DAMAGED[message])
    with pytest.raises(TersorError) as error:
        DenseView(checkpoint)
    assert message in str(error.value)
    assert "lowrank.json" in str(error.value)


@pytest.mark.parametrize("shape", [[12, 21], [13, 20], [24, 20]])
def test_damaged_kronecker_shape(shape, tmp_path):
    checkpoint = save(tmp_path / "m", DOWN, entries={DOWN.module: entry(DOWN) | {"shape": shape}})
    with pytest.raises(TersorError, match=r"no multiple of \[3, 5\]|expected F32"):
        DenseView(checkpoint)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"modules": {}}', '{"schema": "tersor.lowrank/2"}', "[" * 100_000, "\udcff"]
)
def test_unreadable_description(content, tmp_path):
    checkpoint = save(tmp_path / "m", UP)
    (checkpoint.path / "lowrank.json").write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(TersorError, match=r"lowrank\.json"):
        low_rank.detect(checkpoint)


def test_factors_need_their_description(tmp_path):
    checkpoint = save(tmp_path / "m", UP)
    with pytest.raises(TersorError, match=r"lr_a.*lowrank.json") as error:
        low_rank.detect(Checkpoint(checkpoint.path / "model.safetensors"))
    assert "whole folder" in error.value.hint
    (checkpoint.path / "lowrank.json").unlink()
    with pytest.raises(TersorError, match="is a factor"):
        DenseView(checkpoint)


def test_description_without_its_factors(tmp_path):
    save(tmp_path / "m", UP)
    save_file(OTHER, tmp_path / "m" / "model.safetensors")
    with pytest.raises(TersorError, match=r"model.layers.0.up.lr_a' is missing"):
        low_rank.detect(Checkpoint(tmp_path / "m"))


def test_a_file_of_that_name_may_be_another_ones(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / "lowrank.json").write_text('{"adapter": 1}')
    assert low_rank.detect(Checkpoint(tmp_path / "m")) == {}


def test_a_weight_is_dense_or_factors_not_both(tmp_path):
    checkpoint = save(tmp_path / "m", UP)
    save_file(OTHER | tensors_of(UP) | {UP.name: torch.ones(20, 12)}, checkpoint.path / "model.safetensors")
    with pytest.raises(TersorError, match="as well, dense"):
        low_rank.detect(Checkpoint(checkpoint.path))


def test_transposed_must_fit_the_model(tmp_path):
    assert low_rank.detect(save(tmp_path / "right", FUSED, config={"model_type": "gpt2"}))
    with pytest.raises(TersorError, match="does not fit the model"):
        low_rank.detect(save(tmp_path / "wrong", FUSED, config={"model_type": "llama"}))


def test_codes_and_factors_do_not_mix(tmp_path):
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}
    with pytest.raises(TersorError, match="both codes and factors"):
        DenseView(save(tmp_path / "m", UP, config=quantized))


def test_refusal_names_the_way_out(tmp_path):
    with pytest.raises(
        TersorError, match=r"2 layers are stored as factors, for example 'model.layers.0.up'; not so"
    ) as error:
        low_rank.refuse(save(tmp_path / "m", UP, DOWN), "not so")
    assert "convert" in error.value.hint

"""sparse.json against the tensors it speaks of: believed only where they confirm it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sparse_cases import entry, pack, random_elements, to_two_of_four
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.sparse.elements import from_elements
from tersor.formats.sparse.packed import (
    FILE_NAME,
    FORMATS,
    MODULES,
    SUFFIXES,
    Packed,
    codec,
    description,
    detect,
    inner_quantization_config,
)

WANTED = [
    entry("sparse-bitmask", "BF16", 16, 20, 13, name="a.weight"),
    entry("sparse-24-bitmask", "I32", 4, 6, 24, name="b.weight_packed"),
    entry("vector", "I8", 8, 20, 13, tile=(8, 1), name="c.weight"),
    entry("block", "F32", 32, 20, 13, tile=(4, 4), transposed=True, name="d.weight"),
    entry("tiled-csl", "F16", 16, 130, 9, name="e.weight"),
    entry("vector", "BF16", 16, 9, 70, tile=(1, 64), name="f.weight"),
]


def packed_tensors() -> tuple[list[Packed], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Entries, the tensors that hold them, and those they stand for."""
    entries, tensors, stored = [], {"norm.weight": torch.ones(3)}, {}
    for number, wanted in enumerate(WANTED):
        elements = random_elements(wanted.rows, wanted.columns, wanted.bits, 0.3, number)
        elements = to_two_of_four(elements) if wanted.format == "sparse-24-bitmask" else elements
        packed, parts = pack(wanted, elements)
        entries.append(packed)
        tensors |= parts
        stored[packed.name] = from_elements(packed, elements)
    return entries, tensors, stored


def write(folder: Path, tensors: dict[str, torch.Tensor], content: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if content is not None:
        (folder / FILE_NAME).write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture(scope="module")
def whole():
    entries, tensors, stored = packed_tensors()
    return entries, tensors, stored, json.dumps(description(entries, {"quant_method": "gptq"}))


def test_every_format_is_found_again(whole, tmp_path):
    entries, tensors, stored, content = whole
    checkpoint = Checkpoint(write(tmp_path / "m", tensors, json.loads(content)))
    found = detect(checkpoint)
    assert found == {packed.name: packed for packed in entries}
    assert inner_quantization_config(checkpoint) == {"quant_method": "gptq"}
    for name, packed in found.items():
        elements = packed.codec.decode(packed, checkpoint.read)
        back = from_elements(packed, elements)
        assert back.dtype == stored[name].dtype
        assert torch.equal(back.contiguous().view(torch.uint8), stored[name].contiguous().view(torch.uint8))
        assert packed.nbytes == sum(checkpoint.tensors[part].nbytes for part in packed.layout)
        assert packed.stored_nbytes == stored[name].nbytes


def test_every_format_has_the_same_functions():
    for form in FORMATS:
        for function in ("misfit", "count", "layout", "encode", "decode"):
            assert callable(getattr(codec(form), function))
    assert set(MODULES) == {packed.format for packed in WANTED}


def test_suffixes_are_those_of_the_layouts(whole):
    found = {f".{name.rpartition('.')[2]}" for packed in whole[0] for name in packed.layout}
    assert found == set(SUFFIXES)


def test_a_checkpoint_without_packed_tensors(tmp_path):
    folder = write(tmp_path / "m", {"a.weight": torch.ones(2, 2)}, None)
    assert detect(Checkpoint(folder)) == {}
    (folder / FILE_NAME).write_text('{"schema": "of something else"}')
    assert detect(Checkpoint(folder)) == {}


def test_parts_without_a_description_are_refused(whole, tmp_path):
    _, tensors, _, content = whole
    with pytest.raises(TersorError, match=f"there is no {FILE_NAME}"):
        detect(Checkpoint(write(tmp_path / "m", tensors, None)))
    for key, value, words in [
        ("schema", "tersor.sparse/9", "schema is 'tersor.sparse/9'"),
        ("tensors", [], "'tensors' is missing or not an object"),
        ("tensors", {}, r"does not list what tensor '\w+\.\w+' belongs to"),
    ]:
        with pytest.raises(TersorError, match=words):
            detect(Checkpoint(write(tmp_path / "m", tensors, {**json.loads(content), key: value})))
    with pytest.raises(TersorError, match="quantization_config is not an object"):
        inner_quantization_config(
            Checkpoint(write(tmp_path / "m", tensors, {**json.loads(content), "quantization_config": 3}))
        )


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("a.weight", "format", "sparse", "format 'sparse'"),
        ("a.weight", "format", ["vector"], "cannot be"),
        ("a.weight", "dtype", "BF17", "dtype 'BF17'"),
        ("a.weight", "dtype", {}, "cannot be"),
        ("a.weight", "dtype", "F64", "do not fit F64"),
        ("a.weight", "shape", [20], r"shape \[20\]"),
        ("a.weight", "shape", [20, 0], r"shape \[20, 0\]"),
        ("a.weight", "shape", [13, 20], r"elements \[20, 13\] of 16 bits do not fit BF16 \[13, 20\]"),
        ("a.weight", "transposed", True, "do not fit"),
        ("a.weight", "transposed", 1, "transposed 1"),
        ("a.weight", "rows", 0, r"elements \[0, 13\]"),
        ("a.weight", "rows", -1, "not all numbers"),
        ("a.weight", "rows", 1 << 70, "not all numbers"),
        ("a.weight", "rows", True, "not all numbers"),
        ("a.weight", "bits", 8, "elements of 8 bits|8-bit elements"),
        ("a.weight", "count", 261, "261 values in"),
        ("a.weight", "count", 7, r"tensor 'a\.compressed' is BF16"),
        ("a.weight", "zero", 8, "zero 8 where BF16 has one of its own"),
        ("a.weight", "zero", "zero_point", "zero 'zero_point' where BF16"),
        ("a.weight", "zero", "zero", "zero 'zero'"),
        ("a.weight", "tile", [8, 1], "tile"),
        ("b.weight_packed", "zero", 16, "zero 16 is no code of 4 bits"),
        ("b.weight_packed", "bits", 5, "5-bit elements"),
        ("b.weight_packed", "bits", 8, "8-bit elements"),
        ("b.weight_packed", "columns", 22, "22 columns are no whole groups of four"),
        ("b.weight_packed", "columns", 20, "72 values in"),
        ("c.weight", "tile", None, "tile None"),
        ("c.weight", "tile", [0, 1], r"tile \[0, 1\]"),
        ("c.weight", "tile", [1 << 20, 1], "more than 65536 elements"),
        ("c.weight", "tile", [9, 1], r"tensor 'c\.tile_values' is"),
        ("c.weight", "count", 40, "40 tiles 8x1"),
        ("e.weight", "count", 6, "6 items"),
        ("e.weight", "dtype", "F32", "do not fit F32"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(whole, tmp_path, name, key, value, words):
    _, tensors, _, content = whole
    content = json.loads(content)
    content["tensors"][name][key] = value
    with pytest.raises(TersorError, match=words) as error:
        detect(Checkpoint(write(tmp_path / "m", tensors, content)))
    assert repr(name) in str(error.value)


def test_elements_beyond_any_memory_are_refused(tmp_path):
    content = description([entry("vector", "BF16", 16, 1 << 31, 1 << 30, tile=(32, 1), name="a.weight")], None)
    with pytest.raises(TersorError, match="more than a tensor can have"):
        detect(Checkpoint(write(tmp_path / "m", {"x": torch.ones(1)}, content)))


@pytest.mark.parametrize(
    "key", ["format", "dtype", "shape", "rows", "columns", "bits", "count", "transposed", "zero", "tile"]
)
def test_keys_that_are_missing_are_named(whole, tmp_path, key):
    _, tensors, _, content = whole
    content = json.loads(content)
    del content["tensors"]["c.weight"][key]
    with pytest.raises(TersorError, match=f"tensor 'c.weight': key '{key}' is missing"):
        detect(Checkpoint(write(tmp_path / "m", tensors, content)))


def test_tensors_that_do_not_confirm_it_are_named(whole, tmp_path):
    _, tensors, stored, content = whole
    content = json.loads(content)
    missing = {name: tensor for name, tensor in tensors.items() if name != "a.row_offsets"}
    with pytest.raises(TersorError, match=r"tensor 'a\.row_offsets' is missing"):
        detect(Checkpoint(write(tmp_path / "m", missing, content)))
    with pytest.raises(TersorError, match=r"'a\.weight': is there as well"):
        detect(Checkpoint(write(tmp_path / "m", {**tensors, "a.weight": stored["a.weight"]}, content)))
    other = {**tensors, "a.bitmask": tensors["a.bitmask"].to(torch.int8)}
    with pytest.raises(TersorError, match=r"tensor 'a\.bitmask' is I8 \[20, 2\], expected U8 \[20, 2\]"):
        detect(Checkpoint(write(tmp_path / "m", other, content)))
    content["tensors"]["a.weight_packed"] = content["tensors"]["a.weight"]
    with pytest.raises(
        TersorError, match=r"tensor 'a\.compressed' would belong to both 'a\.weight' and 'a\.weight_packed'"
    ):
        detect(Checkpoint(write(tmp_path / "m", tensors, content)))


numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 13, 16, 20, 24, 32, 64, 70, -1, 1 << 40, 1 << 61, 1 << 70])
values = st.one_of(
    numbers, st.none(), st.booleans(), st.floats(), st.text(max_size=4), st.lists(numbers, max_size=3),
    st.sampled_from([*FORMATS, "BF16", "F16", "I8", "U8", "I32", "F8_E4M3", "zero_point"]), st.just({}),
)  # fmt: skip
keys = st.sampled_from(
    ["format", "dtype", "shape", "rows", "columns", "bits", "count", "transposed", "zero", "tile", "other"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.integers(0, len(WANTED) - 1), st.dictionaries(keys, values, max_size=4), max_size=2),
    st.dictionaries(st.sampled_from(["g.weight", "", "a", "a.x", "norm.weight"]), values, max_size=1),
    st.dictionaries(st.sampled_from(["schema", "tensors", "quantization_config"]), values, max_size=1),
)
def test_any_description_gives_an_error_or_what_can_be_read(fuzzed, changes, added, top):
    """What passes `detect` has the shapes that decoders count on."""
    entries, checkpoint, content = fuzzed
    described = json.loads(content)
    for number, change in changes.items():
        described["tensors"][entries[number].name] |= change
    described["tensors"] |= added
    described |= top
    (checkpoint.path / FILE_NAME).write_text(json.dumps(described), "utf-8")
    try:
        found = detect(checkpoint)
    except TersorError as error:
        assert error.hint
        return
    for packed in found.values():
        try:
            elements = packed.codec.decode(packed, checkpoint.read)
        except TersorError as error:
            assert repr(packed.name) in str(error)
        else:
            assert tuple(elements.shape) == (packed.rows, packed.columns)


@pytest.fixture(scope="module")
def fuzzed(whole, tmp_path_factory):
    entries, tensors, _, content = whole
    return entries, Checkpoint(write(tmp_path_factory.mktemp("sparse") / "m", tensors, None)), content


@settings(max_examples=100, deadline=None)
@given(st.recursive(values, lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8))
def test_any_json_gives_an_error(fuzzed, content):
    _, checkpoint, _ = fuzzed
    (checkpoint.path / FILE_NAME).write_text(json.dumps(content), "utf-8")
    with pytest.raises(TersorError):
        detect(checkpoint)

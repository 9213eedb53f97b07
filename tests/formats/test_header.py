"""Headers, honest and hostile: a parse agrees with the reference implementation, or TersorError is raised."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import DTYPE_BYTES, TORCH_DTYPES, build_header, read_header, tensor_bytes

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def container(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_agrees_or_refused(file: Path) -> bool:
    """True where the file was read."""
    try:
        tensors, metadata = read_header(file)
        checkpoint = Checkpoint(file)
    except TersorError as error:
        assert error.hint
        assert str(file) in str(error)
        return False
    with safetensors.safe_open(file, "pt") as reference:
        assert set(reference.keys()) == set(tensors)
        assert (reference.metadata() or {}) == metadata
        for name, info in tensors.items():
            theirs = reference.get_tensor(name)
            assert TORCH_DTYPES[info.dtype] == str(theirs.dtype).removeprefix("torch.")
            assert info.shape == tuple(theirs.shape)
            assert info.params == theirs.numel()
            assert torch.equal(raw(checkpoint.read(name)), raw(theirs))
    return True


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


shapes = st.lists(st.integers(0, 5), max_size=4)
layouts = st.dictionaries(st.text(max_size=12), st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=6)


@FUZZ
@given(layouts, st.integers(0, 2**32 - 1))
def test_what_is_built_is_read_here_and_by_the_reference(tmp_path, layout, seed):
    layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items() if _encodable(name)}
    layout.pop("__metadata__", None)
    header, offsets = build_header(layout)
    size = sum(tensor_bytes(*stored) for stored in layout.values())
    data = np.random.default_rng(seed).integers(0, 2, size, dtype=np.uint8).tobytes()  # 0 and 1: BOOL too
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + data)
    assert len(header) % 8 == 0
    assert assert_agrees_or_refused(file)
    tensors, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    assert list(tensors) == sorted(layout, key=lambda name: (offsets[name], tensor_bytes(*layout[name])))
    for name, info in tensors.items():
        assert (info.name, info.dtype, info.shape, info.file) == (name, *layout[name], file)
        assert (info.offset, info.nbytes) == (offsets[name], tensor_bytes(*layout[name]))


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(tmp_path, data, framed):
    file = tmp_path / "x.safetensors"
    file.write_bytes(container(data) if framed else data)
    assert_agrees_or_refused(file)


@FUZZ
@given(st.data())
def test_random_bytes_in_a_valid_header(tmp_path, data):
    good = container({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", (2, 3), (8, 14))}, bytes(14))
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(broken) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            broken[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del broken[place : place + data.draw(st.integers(1, 4))]
        else:
            broken[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        if not broken:
            break
    file = tmp_path / "x.safetensors"
    file.write_bytes(broken)
    assert_agrees_or_refused(file)


numbers = st.one_of(
    st.integers(-4, 20),
    st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, 1.5, True, None, "8", [], {}]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I2", "f32", "", None, 7, ["F32"]])),
            "shape": st.one_of(st.lists(numbers, max_size=3), values),
            "data_offsets": st.one_of(st.lists(numbers, max_size=3), values),
            "extra": values,
        },
    ),
    st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 8), st.integers(0, 8)).map(
        lambda t: entry({1: "U8", 2: "BF16", 4: "F32"}[t[0]], (t[1],), (t[2], t[2] + t[0] * t[1]))
    ),
    values,
)


@FUZZ
@given(st.dictionaries(st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)), entries, max_size=4),
       st.integers(0, 24))  # fmt: skip
def test_structured_nonsense(tmp_path, header, size):
    file = tmp_path / "x.safetensors"
    file.write_bytes(container(json.dumps(header, ensure_ascii=True).encode(), bytes(size)))
    assert_agrees_or_refused(file)


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
REFUSED = {
    "overlap": (container(TWO | {"b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "same bytes": (container(TWO | {"b": entry(offsets=(0, 8))}, bytes(8)), "overlaps"),
    "gap": (container(TWO | {"b": entry(offsets=(12, 20))}, bytes(20)), "gap"),
    "gap at the start": (container({"a": entry(offsets=(4, 12))}, bytes(12)), "gap"),
    "bytes of nobody": (container(TWO, bytes(17)), "no tensor owns"),
    "truncated": (container(TWO, bytes(15)), "truncated"),
    "huge offsets": (container({"a": entry(offsets=(2**62, 2**62 + 8))}, bytes(8)), "gap"),
    "huge shape": (container({"a": entry(shape=(2**62,), offsets=(0, 8))}, bytes(8)), "needs"),
    "shape that overflows to 0": (container({"a": entry("U8", (2**32, 2**32), (0, 0))}), "shape"),
    "overflow hidden by a zero": (container({"a": entry("U8", (0, 2**62, 2**62), (0, 0))}), "shape"),
    "overflow before a zero": (container({"a": entry("U8", (2**62, 2**62, 0), (0, 0))}), "shape"),
    "too many extents": (container({"a": entry("U8", (1,) * 65, (0, 1))}, bytes(1)), "shape"),
    "negative shape": (container({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
    "negative offsets": (container({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets"),
    "reversed offsets": (container({"a": entry(offsets=(8, 0))}, bytes(8)), "needs"),
    "three offsets": (container({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "data_offsets"),
    "fraction": (container({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
    "boolean shape": (container({"a": entry("U8", (True,), (0, 1))}, bytes(1)), "shape"),
    "wrong size": (container({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes, has 8"),
    "unknown dtype": (container({"a": entry(dtype="F7_E9M9")}, bytes(8)), "F7_E9M9"),
    "dtype is a list": (container({"a": entry(dtype=["F32"])}, bytes(8)), "dtype"),
    "no dtype": (container({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)), "lacks dtype"),
    "entry is a number": (container({"a": 7}), "lacks dtype"),
    "duplicate name": (
        container(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "twice",
    ),
    "duplicate key": (container(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "not UTF-8": (container(b'{"\xff":1}'), "JSON"),
    "UTF-8 with a mark": (container(b"\xef\xbb\xbf{}"), "JSON"),
    "half a surrogate": (container(rb'{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "JSON"),
    "half a surrogate in metadata": (container(rb'{"__metadata__":{"a":"\udfff"}}'), "JSON"),
    "NaN": (container(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"b":NaN}}', b"x"), "JSON"),
    "integer of 5000 digits": (container(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "JSON"),
    "deep list": (container(b"[" * 500_000), "JSON"),
    "deep entry": (container(b'{"a":' * 100_000), "JSON"),
    "list": (container([]), "object"),
    "number": (container(b"17"), "object"),
    "two values": (container(b"{}{}"), "JSON"),
    "metadata is a list": (container({"__metadata__": []}), "__metadata__"),
    "metadata holds a number": (container({"__metadata__": {"epoch": 3}}), "__metadata__"),
    "empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "no header": (bytes(8), "too short"),
    "length beyond the file": ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "claims"),
    "not a safetensors file": (b"PK\x03\x04" + bytes(100), "header"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    data, word = REFUSED[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(TersorError, match=word) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("claim", [2**20, 99_999_999, 2**40, 2**63, 2**64 - 1])
def test_a_claimed_length_costs_no_memory(claim, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(claim.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(TersorError):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_longest_header_is_limited_even_when_the_bytes_are_there(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(100_000_009)  # a hole: no disk is used
    with pytest.raises(TersorError, match="claims"):
        read_header(file)


def test_shape_of_many_extents_is_refused_before_it_is_multiplied(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(container({"a": entry("U8", (2**62,) * 100_000, (0, 1))}, b"x"))
    with pytest.raises(TersorError, match="100000 extents"):
        read_header(file)


def test_unreadable(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(TersorError, match=str(path)):
            read_header(path)


def test_order_of_the_header_does_not_matter(tmp_path):
    """Any order of names is legal, and zero-size tensors share their offset with a neighbour."""
    file = tmp_path / "x.safetensors"
    header = {"b": entry(offsets=(8, 16)), "empty": entry(shape=(0, 3), offsets=(8, 8)), "a": entry()}
    file.write_bytes(container(header, np.arange(4, dtype="<f4").tobytes()))
    assert assert_agrees_or_refused(file)
    assert list(read_header(file)[0]) == ["a", "empty", "b"]


def test_metadata_and_padding_of_the_reference_writer(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, file, metadata={"format": "pt", "licence": "ü"})
    assert read_header(file)[1] == {"format": "pt", "licence": "ü"}
    assert assert_agrees_or_refused(file)


def test_no_metadata(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(container({"a": entry()}, bytes(8)))
    assert assert_agrees_or_refused(file)
    assert read_header(file)[1] == {}

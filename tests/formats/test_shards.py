from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tersor.formats.errors import TersorError
from tersor.formats.header import read_header
from tersor.formats.shards import (
    FILE_NAME,
    Piece,
    ShardedTensor,
    ShardIndex,
    create_file,
    dcp_file_name,
    dcp_metadata,
    file_name,
)

HASH = "0123456789abcdef" * 2


def index() -> ShardIndex:
    pieces = [Piece(0, ((0, 2), (0, 4)), (0, 0), HASH), Piece(1, ((2, 4), (0, 4)), (0, 0), HASH)]
    tensors = {
        "w": ShardedTensor("BF16", (4, 4), HASH, 0, pieces),
        "scale": ShardedTensor("F32", (), HASH, None, [Piece(0, (), (), HASH)]),
    }
    source = {"path": "model", "fingerprint": "f"}
    return ShardIndex("rank", {"tp": 2}, source, ["a.safetensors", "b.safetensors"], [10, 20], [[0], [1]], tensors)


def test_saved_and_loaded(tmp_path):
    index().save(tmp_path)
    assert ShardIndex.load(tmp_path) == index()
    assert json.loads((tmp_path / FILE_NAME).read_text())["schema"] == "tersor.shards/1"


CHANGES = {
    "schema": lambda content: content.update(schema="tersor.shards/2"),
    "path": lambda content: content["files"].__setitem__(0, "../a.safetensors"),
    "twice": lambda content: content["files"].__setitem__(0, "b.safetensors"),
    "format": lambda content: content.update(format="pickle"),
    "no layout": lambda content: content.pop("layout"),
    "rank": lambda content: content["ranks"].append([2]),
    "size": lambda content: content["file_bytes"].__setitem__(0, -1),
    "dtype": lambda content: content["tensors"]["w"].update(dtype="BF17"),
    "shape": lambda content: content["tensors"]["w"].update(shape=[4, True]),
    "joined": lambda content: content["tensors"]["w"].update(concatenated=2),
    "hash": lambda content: content["tensors"]["w"].update(hash="xyz"),
    "box": lambda content: content["tensors"]["w"]["pieces"][0].__setitem__(1, [[0, 5], [0, 4]]),
    "dimensions": lambda content: content["tensors"]["w"]["pieces"][0].__setitem__(1, [[0, 4]]),
    "backwards": lambda content: content["tensors"]["w"]["pieces"][0].__setitem__(1, [[2, 0], [0, 4]]),
    "file": lambda content: content["tensors"]["w"]["pieces"][0].__setitem__(0, 7),
    "at": lambda content: content["tensors"]["w"]["pieces"][0].__setitem__(2, [0, -1]),
    "list": lambda content: content.update(tensors=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_believed(tmp_path, change):
    index().save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    CHANGES[change](content)
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(TersorError, match=r"shards\.json"):
        ShardIndex.load(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_anything_else_is_an_error(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("shards")
    content = json.loads(json.dumps({"schema": "tersor.shards/1", "format": "rank", "layout": {}, "source": {}}))
    content |= {"files": value, "file_bytes": value, "ranks": [], "tensors": {"w": value}}
    (folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(TersorError):
        ShardIndex.load(folder)


def test_no_index_is_named(tmp_path):
    with pytest.raises(TersorError, match=r"no shards\.json"):
        ShardIndex.load(tmp_path)


def test_created_files_are_safetensors(tmp_path):
    path = tmp_path / file_name(3)
    layout = {"w": ("BF16", (2, 3)), "empty": ("F32", (0, 3)), "scalar": ("I64", ())}
    offsets, size = create_file(path, layout, dcp_metadata({"w": (4, 0), "empty": (0, 0), "scalar": ()}))
    assert path.name == "rank-00003.safetensors" and path.stat().st_size == size
    found = read_header(path)[0]
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == layout
    assert {name: info.offset for name, info in found.items()} == offsets
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"])["w"] == {"saved_offsets": [4, 0]}
    with pytest.raises(TersorError, match="cannot be written"):
        create_file(path, layout, {})


def test_dcp_names_are_those_of_torch():
    hf_utils = pytest.importorskip("torch.distributed.checkpoint._hf_utils")
    assert dcp_file_name(0, 1, 2) == hf_utils._gen_file_name(2, 2, 1)

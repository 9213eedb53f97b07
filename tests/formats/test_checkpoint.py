"""Reading folders and files: every dtype as the reference reads it, and no trust in an index or a config."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tersor.formats.checkpoint import INDEX_NAME, Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.locate import locate

SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (6, 4),
    "cube": (3, 2, 5),
    "empty": (0,),
    "no-rows": (0, 4),
    "no-columns": (4, 0),
}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits, so that NaN payloads, negative zeros and infinities are among them; BOOL holds 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    top = 2 if dtype == "bool" else 256
    return torch.randint(top, (count,), dtype=torch.uint8, generator=generator).view(kind).reshape(shape)


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory) -> Path:
    tensors = {
        f"{dtype}.{name}": random_tensor(dtype, shape, seed)
        for seed, dtype in enumerate(TORCH_DTYPES.values())
        for name, shape in SHAPES.items()
    }
    path = tmp_path_factory.mktemp("dtypes") / "all.safetensors"
    save_file(tensors, path)
    return path


def test_every_dtype_and_shape_is_read_as_the_reference_reads_it(every_dtype):
    checkpoint = Checkpoint(every_dtype)
    with safe_open(every_dtype, "pt") as reference:
        assert set(checkpoint.tensors) == set(reference.keys())
        assert len(checkpoint.tensors) == len(TORCH_DTYPES) * len(SHAPES)
        for name in checkpoint.tensors:
            expected = reference.get_tensor(name)
            assert same(checkpoint.read(name), expected), name
            assert same(checkpoint.map(name), expected), name
    assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert checkpoint.config is None


def test_row_panels(every_dtype):
    checkpoint = Checkpoint(every_dtype)
    with safe_open(every_dtype, "pt") as reference:
        for name, info in checkpoint.tensors.items():
            for start in range(info.shape[0] if info.shape else 0):
                for stop in range(start, info.shape[0] + 1):
                    assert same(checkpoint.read(name, rows=(start, stop)), reference.get_tensor(name)[start:stop])


def test_read_is_a_copy_and_map_never_writes_to_the_file(every_dtype):
    before = every_dtype.read_bytes()
    checkpoint = Checkpoint(every_dtype)
    checkpoint.read("int32.matrix").zero_()
    checkpoint.map("int32.matrix").zero_()
    assert every_dtype.read_bytes() == before
    assert same(checkpoint.read("int32.matrix"), random_tensor("int32", (6, 4), list(TORCH_DTYPES).index("I32")))


def test_unaligned_data(tmp_path):
    """Nothing obliges a writer to put a float at a multiple of four."""
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]},
    }
    raw_header = json.dumps(header).encode()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw_header).to_bytes(8, "little") + raw_header + b"\7" + values.numpy().tobytes())
    checkpoint = Checkpoint(file)
    assert torch.equal(checkpoint.read("x"), values)
    assert torch.equal(checkpoint.map("x"), values)
    assert torch.equal(checkpoint.read("x", rows=(1, 2)), values[1:])


def test_only_the_bytes_asked_for_are_read(every_dtype, monkeypatch):
    checkpoint = Checkpoint(every_dtype)
    real, seen = os.preadv, []

    def watch(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        seen.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", watch)
    checkpoint.read("float32.matrix", rows=(2, 4))
    assert seen == [(checkpoint.tensors["float32.matrix"].offset + 2 * 16, 2 * 16)]


def test_short_reads_are_continued(every_dtype, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:5]], offset))
    with safe_open(every_dtype, "pt") as reference:
        assert same(Checkpoint(every_dtype).read("float64.cube"), reference.get_tensor("float64.cube"))


def test_file_cut_or_gone_after_opening(every_dtype, tmp_path):
    file = Path(shutil.copy(every_dtype, tmp_path / "x.safetensors"))
    checkpoint = Checkpoint(file)
    last = max(checkpoint.tensors.values(), key=lambda info: (info.offset, info.nbytes))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(TersorError, match="ends at byte"):
        checkpoint.read(last.name)
    file.unlink()
    with pytest.raises(TersorError, match=str(file)):
        checkpoint.read(last.name)


def test_unknown_tensor(every_dtype):
    checkpoint = Checkpoint(every_dtype)
    for read in (checkpoint.read, checkpoint.map):
        with pytest.raises(TersorError, match=r"no tensor 'nothing\.weight'"):
            read("nothing.weight")


# Folders and their index


def shard(folder: Path, weight_map: dict | None = None, **files: dict) -> Path:
    """A folder of shards `a`, `b`, … and an index that says so unless `weight_map` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, tensors in files.items():
        save_file({key: torch.tensor(value) for key, value in tensors.items()}, folder / f"{name}.safetensors")
        found |= dict.fromkeys(tensors, f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": found if weight_map is None else weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def test_shards(tmp_path):
    checkpoint = Checkpoint(shard(tmp_path / "m", a={"x": [1.0]}, b={"y": [2.0], "z": [3]}))
    assert [file.name for file in checkpoint.shards] == ["a.safetensors", "b.safetensors"]
    assert {name: checkpoint.read(name).item() for name in checkpoint.tensors} == {"x": 1.0, "y": 2.0, "z": 3}
    assert checkpoint.nbytes == 4 + 4 + 8


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(TersorError) as caught:
        Checkpoint(folder)
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("missing.safetensors", "not there"),
        ("../outside.safetensors", "outside the folder"),
        ("deeper/../../outside.safetensors", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("", "not there"),
        (".", "not there"),
        ("a.safetensors\0", "not there"),
        ("a" * 300, "not there"),
        ("a/" * 3000 + "a", "not there"),
        ("\udcff.safetensors", "not there"),
    ],
)
def test_index_that_names_no_file_of_the_folder(file, word, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = shard(tmp_path / "m", {"x": file, "y": "a.safetensors"}, a={"y": [2.0]})
    refused(folder, INDEX_NAME, word)


def test_hub_cache_links_are_followed(tmp_path):
    """A Hub snapshot is links into ../../blobs: a link that is there is judged by its own name."""
    blobs = shard(tmp_path / "blobs", a={"x": [1.0]}, b={"y": [2.0]})
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", INDEX_NAME):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert Checkpoint(snapshot).read("y").item() == 2.0
    assert blobs.is_dir()


def test_link_to_nowhere_or_to_itself(tmp_path):
    for target in ("nowhere", "b.safetensors"):
        folder = shard(tmp_path / target, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": [1.0]})
        (folder / "b.safetensors").symlink_to(target)
        refused(folder, "b.safetensors", "not there")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"x": 1}}', '{"weight_map": {}}',
     "\xff", "[" * 100_000, '{"weight_map": null}', '{"weight_map": {"x": ["a.safetensors"]}}'],
)  # fmt: skip
def test_malformed_index(text, tmp_path):
    folder = shard(tmp_path / "m", a={"x": [1.0]})
    (folder / INDEX_NAME).write_text(text, "latin-1")
    refused(folder, INDEX_NAME)


def test_index_and_shards_that_disagree(tmp_path):
    files = {"a": {"x": [1.0]}, "b": {"y": [2.0]}}
    right = {"x": "a.safetensors", "y": "b.safetensors"}
    refused(shard(tmp_path / "1", right | {"z": "a.safetensors"}, **files), "'z'", "no shard has it")
    refused(
        shard(tmp_path / "2", {"x": "b.safetensors", "y": "a.safetensors"}, **files), "'x'", "it is in a.safetensors"
    )
    refused(shard(tmp_path / "3", right, a={"x": [1.0]}, b={"x": [2.0], "y": [3.0]}), "'x'", "also in a.safetensors")
    refused(
        shard(tmp_path / "4", {"x": "a.safetensors", "z": "a.safetensors"}, a={"x": [1.0]}), "'z'", "no shard has it"
    )


def test_shards_of_one_name_in_two_folders(tmp_path):
    folder = tmp_path / "m"
    shard(folder / "one", a={"x": [1.0]})
    shard(folder / "two", a={"y": [2.0]})
    index = {"x": "one/a.safetensors", "y": "two/a.safetensors"}
    assert Checkpoint(shard(folder, index)).read("y").item() == 2.0
    refused(shard(folder, {"x": "two/a.safetensors", "y": "one/a.safetensors"}), "'x'")


def test_which_file_of_a_folder(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    refused(folder, "no safetensors file")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    refused(folder, "pickled")
    save_file({"x": torch.ones(1)}, folder / "only.safetensors")
    assert list(Checkpoint(folder).tensors) == ["x"]
    save_file({"y": torch.ones(1)}, folder / "second.safetensors")
    refused(folder, "2 safetensors files but no")
    save_file({"z": torch.ones(1)}, folder / "model.safetensors")
    assert list(Checkpoint(folder).tensors) == ["z"]  # what transformers prefers too
    (folder / INDEX_NAME).write_text('{"weight_map": {"x": "only.safetensors"}}')
    assert list(Checkpoint(folder).tensors) == ["z"]
    refused(tmp_path / "absent", "no such file or folder")


def test_config(tmp_path):
    folder = shard(tmp_path / "m", a={"x": [1.0]})
    with pytest.raises(TersorError, match=r"no config.json, which this needs"):
        Checkpoint(folder).require_config("which this needs")
    (folder / "config.json").write_text('{"model_type": "ü"}', "utf-8")
    assert Checkpoint(folder).require_config("") == {"model_type": "ü"}
    for text in ("", "[]", "{", '{"a": }', "\xff\xfe", '{"a":' * 50_000):
        (folder / "config.json").write_text(text, "latin-1")
        refused(folder, "config.json")


def test_side_files_are_everything_but_weights_and_what_is_written_anew(tmp_path):
    folder = shard(tmp_path / "m", a={"x": [1.0]})
    keep = {"tokenizer.json", "modeling_own.py", "sub/vocab.txt", "sub/config.json", "1_Pooling/report.json"}
    drop = {"config.json", "report.json", "report.html", "quantize_config.json", "w.bin", "sub/w.gguf", "w.pt", "w.h5",
            ".cache/x", "sub/.hidden", "old.safetensors.index.json"}  # fmt: skip
    for name in keep | drop:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert {path.relative_to(folder).as_posix() for path in Checkpoint(folder).side_files()} == keep
    assert Checkpoint(folder / "a.safetensors").side_files() == []


def test_fingerprint(tmp_path):
    folder = shard(tmp_path / "m", a={"x": [1.0]}, b={"y": [2.0]})
    first = Checkpoint(folder).fingerprint()
    assert first == Checkpoint(folder).fingerprint()
    assert first == Checkpoint(shutil.copytree(folder, tmp_path / "copy")).fingerprint()
    seen = {first}
    shard(folder, a={"x": [1.5]}, b={"y": [2.0]})
    seen.add(Checkpoint(folder).fingerprint())
    shard(folder, a={"x": [1.0]}, b={"z": [2.0]})
    seen.add(Checkpoint(folder).fingerprint())
    shard(folder, a={"x": [1.0]}, b={"y": [2.0]})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    seen.add(Checkpoint(folder).fingerprint())
    assert len(seen) == 4


# From what was typed to a path


def test_locate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == Path("org/name")  # a folder wins over a Hub id
    assert locate(str(tmp_path)) == tmp_path
    for nonsense in (
        "no-such-folder",
        "a/b/c",
        "",
        "../../x y",
        "org/na me",
        "a\0b",
        "a" * 5000,
        "~nobody-of-that-name/x y",
    ):
        with pytest.raises(TersorError, match="no such file or folder"):
            locate(nonsense)


def test_locate_without_the_hub(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(TersorError, match="not to be had from the Hub") as caught:
        locate("org/does-not-exist")
    assert "spelling" in caught.value.hint

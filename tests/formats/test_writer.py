"""Writing: bytes that the reference reads, a name that appears only when all is there, and full disks."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tersor.formats import writer as writer_module
from tersor.formats.checkpoint import INDEX_NAME, Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import SAFETENSORS_DTYPES, TORCH_DTYPES
from tersor.formats.output import partial_path
from tersor.formats.writer import CheckpointWriter, shard_names, writing

KEY = {"run": 1}
TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b.weight": torch.arange(10, dtype=torch.bfloat16).reshape(5, 2),
    "c.scale": torch.tensor(0.5, dtype=torch.float16),
    "d.empty": torch.zeros(0, 3, dtype=torch.int32),
    "e.codes": torch.arange(-8, 8, dtype=torch.int8),
    "f.mask": torch.tensor([True, False, True]),
    "g.fp8": torch.tensor([1.0, -448.0, 0.0]).to(torch.float8_e4m3fn),
    "ü/ \"h\"\n": torch.arange(7, dtype=torch.int64),
}  # fmt: skip


def layout_of(tensors: dict[str, torch.Tensor]) -> dict:
    return {
        name: (SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def write_all(out: Path, tensors=TENSORS, **options) -> Path:
    with writing(CheckpointWriter(out, layout_of(tensors), KEY, **options)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
            writer.finish(name, None)
        writer.commit()
    return out


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(raw(found[name]), raw(tensor)), name


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_reference_reads_what_is_written(tmp_path):
    out = write_all(tmp_path / "out")
    assert os.listdir(out) == ["model.safetensors"]
    assert_same(load_file(out / "model.safetensors"), TENSORS)
    checkpoint = Checkpoint(out)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, TENSORS)
    assert not partial_path(out).exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES.values())), st.lists(st.integers(0, 9), max_size=3)), max_size=9
    ),
    st.integers(1, 400),
    st.randoms(use_true_random=False),
)
def test_any_layout_any_order_any_shard_size(tmp_path_factory, entries, shard_bytes, random):
    tensors = {}
    for number, (dtype, shape) in enumerate(entries):
        kind = getattr(torch, dtype)
        count = torch.Size(shape).numel() * kind.itemsize
        tensors[f"layer.{number}"] = torch.randint(2, (count,), dtype=torch.uint8).view(kind).reshape(shape)
    out = tmp_path_factory.mktemp("writer") / "out"
    order = random.sample(sorted(tensors), len(tensors))
    with writing(CheckpointWriter(out, layout_of(tensors), KEY, max_shard_bytes=shard_bytes)) as writer:
        for name in order:
            writer.write(name, tensors[name])
        writer.commit()
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == shard_names(len(files))
    assert_same({name: tensor for file in files for name, tensor in load_file(file).items()}, tensors)
    assert (out / INDEX_NAME).exists() == (len(files) > 1)
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= shard_bytes or len(held) == 1
    checkpoint = Checkpoint(out)
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)


def test_shards_and_index(tmp_path):
    out = write_all(tmp_path / "out", max_shard_bytes=100)
    index = json.loads((out / INDEX_NAME).read_text("utf-8"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    assert index["weight_map"] == {name: file for file in files for name in load_file(out / file)}
    with pytest.raises(TersorError, match="not there"):
        (out / files[1]).unlink()
        Checkpoint(out)


def test_same_input_same_bytes(tmp_path):
    assert digests(write_all(tmp_path / "a", max_shard_bytes=90)) == digests(
        write_all(tmp_path / "b", max_shard_bytes=90)
    )


def test_views_and_panels(tmp_path):
    """Tensors that are not contiguous, and a tensor that arrives in pieces."""
    weight = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    layout = {"t": ("F32", (4, 6)), "p": ("F32", (6, 4))}
    with writing(CheckpointWriter(tmp_path / "out", layout, KEY)) as writer:
        writer.write("t", weight.T)
        for row in reversed(range(6)):
            writer.write_bytes("p", row * 16, memoryview(weight[row].numpy()).cast("B"))
        assert torch.equal(writer.read("p"), weight)
        writer.commit()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["t"], weight.T)
    assert torch.equal(found["p"], weight)


def test_several_threads(tmp_path):
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(32)}
    with writing(CheckpointWriter(tmp_path / "out", layout_of(tensors), KEY, max_shard_bytes=20_000)) as writer:

        def work(names):
            for name in names:
                writer.write(name, tensors[name])
                writer.finish(name, 1)

        threads = [threading.Thread(target=work, args=(list(tensors)[part::4],)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.journal.done.keys() == tensors.keys()
        writer.commit()
    checkpoint = Checkpoint(tmp_path / "out")
    assert_same({name: checkpoint.read(name) for name in tensors}, tensors)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 6, dtype=torch.float16), torch.zeros(6, 4), torch.zeros(24)])
def test_a_tensor_that_is_not_of_the_layout(tensor, tmp_path):
    wrong = pytest.raises(ValueError, match=r"a\.weight: layout says F32 \[4, 6\]")
    with wrong, writing(CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)) as writer:
        writer.write("a.weight", tensor)
    assert list(tmp_path.iterdir()) == []


# Interrupted, resumed, given up


def interrupt(out: Path, after: int, **options) -> None:
    with pytest.raises(KeyboardInterrupt), writing(CheckpointWriter(out, layout_of(TENSORS), KEY, **options)) as writer:
        for name in list(TENSORS)[:after]:
            writer.write(name, TENSORS[name])
            writer.finish(name, {"error": 0.5})
        raise KeyboardInterrupt


@pytest.mark.parametrize("after", range(len(TENSORS) + 1))
def test_resume_gives_the_same_bytes(after, tmp_path):
    expected = digests(write_all(tmp_path / "expected", max_shard_bytes=90))
    out = tmp_path / "out"
    interrupt(out, after, max_shard_bytes=90)
    assert not out.exists()
    with writing(CheckpointWriter(out, layout_of(TENSORS), KEY, resume=True, max_shard_bytes=90)) as writer:
        assert writer.journal.done == {name: {"error": 0.5} for name in list(TENSORS)[:after]}
        assert_same({name: writer.read(name) for name in writer.journal.done}, dict(list(TENSORS.items())[:after]))
        for name in TENSORS.keys() - writer.journal.done.keys():
            writer.write(name, TENSORS[name])
        writer.commit()
    assert digests(out) == expected


def test_resume_of_another_run_is_refused_and_keeps_the_work(tmp_path):
    interrupt(tmp_path / "out", 3)
    before = digests(partial_path(tmp_path / "out"))
    with pytest.raises(TersorError, match="other run"):
        CheckpointWriter(tmp_path / "out", layout_of(TENSORS), {"run": 2}, resume=True)
    assert digests(partial_path(tmp_path / "out")) == before


def test_resume_with_nothing_to_resume(tmp_path):
    write_all(tmp_path / "out", resume=True)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


def test_starting_over_removes_what_was_left(tmp_path):
    partial = partial_path(tmp_path / "out")
    interrupt(tmp_path / "out", 3, max_shard_bytes=20)
    (partial / "sub").mkdir()
    (partial / "sub" / "stale.json").write_text("{}")
    (partial / "link").symlink_to(tmp_path)
    write_all(tmp_path / "out")
    assert digests(tmp_path / "out").keys() == {"model.safetensors"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="boom"),
        writing(CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)) as writer,
    ):
        writer.write("a.weight", TENSORS["a.weight"])
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_second_process_is_refused_and_harms_nothing(resume, tmp_path):
    """Even with --force (resume=False): the files of a run that is still going are not those of an abandoned one."""
    out = tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; from tersor.formats.writer import CheckpointWriter\n"
        "from tersor.formats.errors import TersorError\n"
        "try: CheckpointWriter(Path(sys.argv[1]), {'x': ('U8', (3,))}, {'run': 1}, resume=sys.argv[2] == 'True')\n"
        "except TersorError as error: print(error); sys.exit(7)\n"
    )
    with writing(CheckpointWriter(out, layout_of(TENSORS), KEY)) as writer:
        writer.write("a.weight", TENSORS["a.weight"])
        writer.finish("a.weight", None)
        writer.flush()
        before = digests(writer.partial)
        second = subprocess.run(
            [sys.executable, "-c", script, out, str(resume)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 7, second.stderr
        assert "another run is writing it" in second.stdout
        assert digests(writer.partial) == before
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.commit()
    assert_same(load_file(out / "model.safetensors"), TENSORS)


KILLED = """
import os, shutil, sys
from pathlib import Path
import torch
from tersor.formats import writer as module

def run(out, step):
    calls = 0
    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*args, **kwargs)
        return wrapper
    for name in ("rename", "fsync", "fdatasync", "unlink", "pwrite"):
        setattr(os, name, dying(getattr(os, name)))
    shutil.rmtree = dying(shutil.rmtree)
    with module.writing(module.CheckpointWriter(out, {"new": ("F32", (5,))}, {"run": 1})) as writer:
        writer.write("new", torch.ones(5))
        writer.finish("new", None)
        writer.add_json("config.json", {})
        writer.commit()

root, step, code = Path(sys.argv[1]), 0, 9
while code == 9:
    step += 1
    shutil.copytree(root / "before", root / str(step))
    pid = os.fork()
    if pid == 0:
        try:
            run(root / str(step) / "out", step)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(step, code)
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_any_step(replaced, tmp_path):
    """OUT is absent or whole. What --force replaces is there, or beside it, until the new output is."""
    (tmp_path / "before").mkdir()
    if replaced:
        write_all(tmp_path / "before" / "out")
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    steps, code = map(int, result.stdout.split())
    assert code == 0, result.stderr
    assert steps > 8
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        found = [path for path in (folder / "out", folder / "out.replaced") if path.exists()]
        assert found or not replaced
        for path in found[:1]:
            checkpoint = Checkpoint(path)
            if "new" in checkpoint.tensors:
                assert path.name == "out"
                assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
                assert torch.equal(checkpoint.read("new"), torch.ones(5))
            else:
                assert replaced
                assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, TENSORS)
    assert os.listdir(tmp_path / str(steps)) == ["out"]
    assert "new" in Checkpoint(tmp_path / str(steps) / "out").tensors


# Disks


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "fsync", "rename"])
def test_disk_full(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(TersorError, match="no space left on the disk") as caught:
        write_all(tmp_path / "out")
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_disk_full_before_anything_is_there(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(TersorError, match="no space left on the disk"):
        CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_disk_full_in_the_middle_and_then_room_again(tmp_path, monkeypatch):
    """The interrupt keeps the partial output even when the disk has no room for the last lines of the journal."""
    writer = CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)
    writer.write("a.weight", TENSORS["a.weight"])
    writer.finish("a.weight", None)
    writer.flush()
    writer.finish("b.weight", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_space)
        with pytest.raises(TersorError, match="no space"):
            writer.abort(keep=True)
    with writing(CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY, resume=True)) as again:
        assert list(again.journal.done) == ["a.weight"]
        for name, tensor in TENSORS.items():
            again.write(name, tensor)
        again.commit()
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


def test_file_system_that_cannot_reserve(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert_same(load_file(write_all(tmp_path / "out") / "model.safetensors"), TENSORS)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:7] if offset else data, offset))
    assert_same(load_file(write_all(tmp_path / "out") / "model.safetensors"), TENSORS)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TersorError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", layout_of(TENSORS), KEY)
    (tmp_path / "out.partial").write_text("in the way")
    with pytest.raises(TersorError, match="cannot be written"):
        CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)


def test_commit_replaces_an_old_output_whole(tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "old.txt").write_text("old")
    out.with_name("out.replaced").mkdir()  # someone else's, or left by a kill between two renames
    write_all(out)
    assert os.listdir(out) == ["model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]


def test_side_files_travel_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    save_file({"x": torch.ones(1)}, source / "model.safetensors")
    files = {"tokenizer.json": b'{"a":\r\n1}', "sub/code.py": b"\x00\xff", "empty": b""}
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "shared.txt").symlink_to("tokenizer.json")
    with writing(CheckpointWriter(tmp_path / "out", {"x": ("F32", (1,))}, KEY)) as writer:
        writer.write("x", torch.ones(1))
        writer.copy_side_files(Checkpoint(source))
        writer.add_json("config.json", {"name": "ü"})
        writer.commit()
    for name, content in (files | {"shared.txt": files["tokenizer.json"]}).items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not (tmp_path / "out" / "shared.txt").is_symlink()
    assert (tmp_path / "out" / "config.json").read_text("utf-8") == '{\n  "name": "ü"\n}\n'


def test_marks_become_durable_by_themselves_and_after_their_data(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(writer_module, "SECONDS_BETWEEN_FLUSHES", -1.0)
    writer = CheckpointWriter(tmp_path / "out", layout_of(TENSORS), KEY)
    real_data, real_journal = os.fdatasync, writer.journal.flush
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("data"), real_data(fd)))
    monkeypatch.setattr(writer.journal, "flush", lambda: (order.append("journal"), real_journal()))
    writer.write("a.weight", TENSORS["a.weight"])
    writer.finish("a.weight", None)
    assert order == ["data", "journal"]
    assert (writer.partial / "journal.jsonl").read_text().splitlines()[1:] == ['["a.weight", null]']
    writer.abort(keep=False)
    assert list(tmp_path.iterdir()) == []

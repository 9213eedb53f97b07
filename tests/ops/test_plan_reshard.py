"""Moving tensors between any boxes: random tensors, random cuts, there and back."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats import linear_hash
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import build_header, read_header
from tersor.formats.output import output_folder
from tersor.formats.shards import ShardIndex
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.shards import intersect, reshard
from tersor.ops.plan_parallel.shards.intersect import common, overlaps, refine, subtract, tiling_problem, volume, whole
from tersor.ops.plan_parallel.shards.layout import Local, chunk, join, rows
from tersor.ops.plan_parallel.shards.source import from_checkpoint, from_shards
from tersor.ops.plan_parallel.shards.verify import verify_shards
from tersor.ops.plan_parallel.shards.write import write_placed

DTYPES = {"U8": np.uint8, "BF16": np.uint16, "F32": np.uint32, "I64": np.uint64}


def save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    header, _ = build_header({name: (dtype, data.shape) for name, (dtype, data) in tensors.items()})
    path.write_bytes(header + b"".join(data.tobytes() for _, data in tensors.values()))
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    found = {}
    for name, info in read_header(path)[0].items():
        data = np.frombuffer(raw, DTYPES[info.dtype], info.params, info.offset)
        found[name] = data.reshape(info.shape)
    return found


class Contents(SimpleNamespace):
    """Stands in for Placement: what each rank holds is given, tensor by tensor."""

    layout = Layout()

    @property
    def mesh(self):
        return SimpleNamespace(all=range(len(self.ranks)))

    @property
    def holders(self):
        return {(rank,): [rank] for rank in range(len(self.ranks))}

    def of_rank(self, rank: int) -> dict[str, Local]:
        return self.ranks[rank]


def write(folder: Path, ranks: list[dict[str, Local]], tensors, format: str = "rank") -> ShardIndex:
    with output_folder(folder) as partial:
        index = write_placed(partial, Contents(ranks=ranks), tensors, format, lambda *_: None)
        index.source = {"path": "", "fingerprint": ""}
        index.save(partial)
    return index


@st.composite
def shapes(draw, most=3):
    return tuple(draw(st.lists(st.integers(1, 7), max_size=most)))


@st.composite
def cuttings(draw, shape, count):
    """Boxes that tile `shape`, dealt out to `count` ranks, some of them to several."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 3))):
        if not shape:
            break
        number, dimension = draw(st.integers(0, len(boxes) - 1)), draw(st.integers(0, len(shape) - 1))
        start, stop = boxes[number][dimension]
        if stop - start > 1:
            cut, box = draw(st.integers(start + 1, stop - 1)), boxes.pop(number)
            for side in ((start, cut), (cut, stop)):
                boxes.append((*box[:dimension], side, *box[dimension + 1 :]))
    held = [[] for _ in range(count)]
    for box in boxes:
        for rank in draw(st.sets(st.integers(0, count - 1), min_size=1)):
            held[rank].append(box)
    return held


@st.composite
def layouts(draw, shapes):
    """What each rank holds: boxes that cannot be joined to one tensor are left to further ranks."""
    count = draw(st.integers(1, 4))
    ranks: list[dict[str, Local]] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        for rank, boxes in enumerate(draw(cuttings(shape, count))):
            boxes = draw(st.permutations(boxes))
            try:
                locals_ = [join(name, boxes)] if boxes else []
            except TersorError:
                locals_ = [join(name, [box]) for box in boxes]
            for number, local in enumerate(locals_):
                if number:
                    ranks.append({name: local})
                else:
                    ranks[rank][name] = local
    return ranks


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_there_and_back(tmp_path_factory, data):
    """Checkpoint -> A -> B -> whole tensors again: the same bytes and hashes, whatever A and B, and whatever the panels."""
    folder = tmp_path_factory.mktemp("reshard")
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = {}
    for number in range(data.draw(st.integers(1, 3))):
        shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(list(DTYPES)))
        bits = generator.integers(0, 256, (*shape, DTYPES[dtype]().itemsize), np.uint8)
        tensors[f"t{number}"] = (dtype, bits.view(DTYPES[dtype]).reshape(shape))
    given_shapes = {name: array.shape for name, (_, array) in tensors.items()}
    source = save(folder / "model.safetensors", tensors)
    before = reshard.PANEL_BYTES
    reshard.PANEL_BYTES = data.draw(st.sampled_from([1, 8, 64, 1 << 20]))
    try:
        first = write(folder / "a", data.draw(layouts(given_shapes)), from_checkpoint(Checkpoint(source)))
        format = data.draw(st.sampled_from(["rank", "dcp"]))
        second = write(folder / "b", data.draw(layouts(given_shapes)), from_shards(folder / "a")[1], format)
        together = [{name: join(name, [whole(shape)]) for name, shape in given_shapes.items()}]
        third = write(folder / "c", together, from_shards(folder / "b")[1])
        assert [verify_shards(folder / name) for name in "abc"] == [[], [], []]
    finally:
        reshard.PANEL_BYTES = before
    back = load(folder / "c" / third.files[0])
    for name, (_, array) in tensors.items():
        assert back[name].tobytes() == array.tobytes()
        value = linear_hash.to_text(linear_hash.of_box(array, whole(array.shape), array.shape))
        assert {index.tensors[name].hash for index in (first, second, third)} == {value}
    for index, name in ((first, "a"), (second, "b")):
        files = [load(folder / name / file) for file in index.files]
        for tensor, entry in index.tensors.items():
            for piece in entry.pieces:
                extents = [stop - start for start, stop in piece.box]
                at = tuple(slice(start, start + extent) for start, extent in zip(piece.at, extents, strict=True))
                expected = tensors[tensor][1][tuple(slice(*side) for side in piece.box)]
                assert np.array_equal(files[piece.file][tensor][at], expected)
    boxes = [(name, piece.box) for name, entry in second.tensors.items() for piece in entry.pieces]
    assert format == "rank" or len(boxes) == len(set(boxes)), "DCP stores nothing twice"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_overlaps_are_those_of_every_pair(data):
    sides = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted).map(tuple)
    dimensions = data.draw(st.integers(0, 3))
    boxes = st.lists(st.tuples(*[sides] * dimensions), max_size=6)
    first, second = data.draw(boxes), data.draw(boxes)
    expected = {
        (i, j, box)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
        if (box := common(one, other)) is not None
    }
    found = list(overlaps(first, second))
    assert len(found) == len(expected) and set(found) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_refined_boxes_are_equal_or_disjoint(data):
    sides = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda side: side[0] < side[1])
    boxes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=5))
    parts = refine(boxes)
    for box in boxes:
        assert tiling_problem(
            [tuple((a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True)) for part in parts[box]],
            [stop - start for start, stop in box],
        ) == ""  # fmt: skip
    flat = [part for box in boxes for part in parts[box]]
    assert all(one == other or common(one, other) is None for one in flat for other in flat)
    left = subtract(boxes[0], boxes[-1])
    assert sum(map(volume, left)) == volume(boxes[0]) - sum(volume(box) for *_, box in overlaps(boxes[:1], boxes[-1:]))


def test_tiling_says_what_is_wrong():
    halves = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
    assert tiling_problem(halves, (4, 4)) == ""
    assert tiling_problem([*halves, halves[0]], (4, 4)) == "", "a replica"
    assert "8 of 16 elements are in no box, for example [2:4, 0:4]" in tiling_problem(halves[:1], (4, 4))
    assert "both hold [1:2, 0:4]" in tiling_problem([*halves, ((1, 2), (0, 4))], (4, 4))
    assert "reaches out" in tiling_problem([((0, 5), (0, 4))], (4, 4))
    assert intersect.show(((0, 2), (1, 3))) == "[0:2, 1:3]"


def test_chunks_are_those_of_torch():
    import torch

    for extent in (1, 5, 7, 8, 64):
        for parts in (1, 2, 3, 4, 8):
            expected = [len(piece) for piece in torch.chunk(torch.arange(extent), parts)]
            sizes = [stop - start for start, stop in (chunk(extent, parts, index) for index in range(parts))]
            assert sizes == expected + [0] * (parts - len(expected))


def test_rows_of_joined_boxes():
    """gate | up: rows of the local tensor, across the seam."""
    local = join("gate_up", [((0, 4), (0, 6)), ((8, 12), (0, 6))])
    assert (local.shape, local.concatenated) == ((8, 6), 0)
    part = rows(local, 2, 6)
    assert part.boxes == (((2, 4), (0, 6)), ((8, 10), (0, 6))) and part.starts == ((0, 0), (2, 0))
    assert rows(local, 8, 8) is None
    with pytest.raises(TersorError, match="2 boxes that differ in 2 dimensions"):
        join("odd", [((0, 2), (0, 2)), ((2, 4), (2, 4))])


@pytest.fixture
def cut(tmp_path):
    """A checkpoint of two tensors, cut in two."""
    data = np.random.default_rng(0).integers(0, 65536, (64, 48), np.uint16)
    source = save(tmp_path / "model.safetensors", {"w": ("BF16", data), "norm": ("F32", data[0].astype(np.uint32))})
    ranks = [
        {"w": join("w", [((0, 64), (0, 24))]), "norm": join("norm", [((0, 48),)])},
        {"w": join("w", [((0, 64), (24, 48))]), "norm": join("norm", [((0, 48),)])},
    ]
    write(tmp_path / "cut", ranks, from_checkpoint(Checkpoint(source)))
    return tmp_path / "cut", source, ranks


def test_every_altered_byte_is_found(cut):
    folder, source, ranks = cut
    file = folder / "rank-00001.safetensors"
    raw = bytearray(file.read_bytes())
    start = read_header(file)[0]["w"].offset
    for place in (start, start + 1000, start + 64 * 24 * 2 - 1):
        altered = bytearray(raw)
        altered[place] ^= 1
        file.write_bytes(altered)
        assert verify_shards(folder) == ["tensor 'w' has been altered in shard rank-00001.safetensors"]
        with pytest.raises(TersorError, match=r"'w' has been altered in .*rank-00001"):
            write(folder.parent / "again", ranks, from_shards(folder)[1])
        assert not (folder.parent / "again").exists()
    file.write_bytes(raw)
    assert verify_shards(folder) == []
    assert verify_shards(folder, SimpleNamespace(fingerprint=lambda: "other", path=source))[0].startswith("the shards")


def test_an_altered_replica_is_found(cut):
    folder, *_ = cut
    file = folder / "rank-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[read_header(file)[0]["norm"].offset] ^= 128
    file.write_bytes(raw)
    assert verify_shards(folder) == ["tensor 'norm' has been altered in shard rank-00001.safetensors"]


def test_missing_and_cut_files_are_named(cut):
    folder, *_ = cut
    file = folder / "rank-00001.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    assert "rank-00001.safetensors has" in verify_shards(folder)[0]
    file.unlink()
    assert verify_shards(folder)[0] == "shard rank-00001.safetensors is missing, which rank 1 needs"
    with pytest.raises(TersorError, match=r"rank-00001.safetensors is missing"):
        from_shards(folder)


def edit(folder: Path, change) -> None:
    index = ShardIndex.load(folder)
    change(index)
    index.save(folder)


def test_boxes_must_tile(cut):
    folder, *_ = cut
    pieces = ShardIndex.load(folder).tensors["w"].pieces
    edit(folder, lambda index: index.tensors["w"].pieces.pop())
    assert "'w': 1536 of 3072 elements are in no box" in verify_shards(folder)[0]
    edit(folder, lambda index: index.tensors["w"].pieces.extend([pieces[1], pieces[1]]))
    assert "its boxes hold 3072" in verify_shards(folder)[0], "a doubled box"
    from dataclasses import replace

    moved = [pieces[0], replace(pieces[1], box=((0, 64), (20, 44)))]
    edit(folder, lambda index: setattr(index.tensors["w"], "pieces", moved))
    assert "both hold [0:64, 20:24]" in verify_shards(folder)[0]
    swapped = [replace(pieces[0], box=pieces[1].box), replace(pieces[1], box=pieces[0].box)]
    edit(folder, lambda index: setattr(index.tensors["w"], "pieces", swapped))
    assert "'w' has been altered in shard rank-00000" in " ".join(verify_shards(folder))


def test_a_hash_of_another_sum_is_found(cut):
    folder, *_ = cut
    edit(folder, lambda index: setattr(index.tensors["w"], "hash", "0" * 32))
    assert "its boxes have hash" in verify_shards(folder)[0]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tersor.ops.plan_parallel.shards import reshard
    sys.path.insert(0, {tests!r})
    from test_plan_reshard import Checkpoint, from_checkpoint, join, write

    moved, written = reshard._write, []
    def killing(file, offset, data):
        moved(file, offset, data)
        written.append(file)
        if len(written) == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    reshard._write = killing
    reshard.PANEL_BYTES = 512
    ranks = [{{"w": join("w", [((0, 64), (0, 48))]), "norm": join("norm", [((0, 48),)])}}]
    write(Path({out!r}), ranks, from_checkpoint(Checkpoint(Path({source!r}))))
"""


@pytest.mark.parametrize("after", [1, 7, 13])
def test_a_kill_leaves_nothing_that_looks_whole(cut, after):
    _, source, _ = cut
    out = source.parent / "killed"
    code = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), after=after, out=str(out), source=str(source)
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    left = out.with_name("killed.partial")
    assert left.exists()
    with pytest.raises(TersorError, match=r"no shards.json"):
        verify_shards(left)
    write(out, [{"w": join("w", [((0, 64), (0, 48))]), "norm": join("norm", [((0, 48),)])}], from_checkpoint(Checkpoint(source)))  # fmt: skip
    assert verify_shards(out) == [] and not left.exists()


def test_a_failure_is_raised_and_leaves_nothing(cut, monkeypatch):
    _, source, ranks = cut

    def full(file, offset, data):
        raise TersorError(f"{file}: no space left on the disk")

    monkeypatch.setattr(reshard, "_write", full)
    with pytest.raises(TersorError, match="no space"):
        write(source.parent / "new", ranks, from_checkpoint(Checkpoint(source)))
    assert not list(source.parent.glob("new*"))


def test_whatever_fails_is_raised_in_the_thread_that_asked(cut):
    _, source, _ = cut

    def moves():
        yield reshard.Move("w", "BF16", (64, 48), from_checkpoint(Checkpoint(source))["w"].parts, ())
        raise TersorError("no more")

    for threads in (1, 4):
        with pytest.raises(TersorError, match="no more"):
            reshard.run(moves(), threads=threads)
    with pytest.raises(ZeroDivisionError):
        reshard.run(list(itertools.islice(moves(), 1)), lambda nbytes: 1 // 0, threads=4)

"""The file of a teacher's top tokens: written whole or not at all, believed only when it fits the run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tersor.formats import teacher_logits
from tersor.formats.errors import TersorError
from tersor.formats.header import read_header
from tersor.formats.teacher_logits import (
    RELATIVE_ERROR,
    LogitsFacts,
    TeacherLogits,
    TeacherLogitsWriter,
    bytes_per_token,
    file_bytes,
    is_teacher_logits,
)

FACTS = LogitsFacts(
    teacher="f" * 32, tokenizer="t" * 32, text="x" * 32, tokens="k" * 32, windows=40, seq_len=6, batch=2, steps=3, seed=0,
    k=4, temperature=2.0, vocabulary=100,
)  # fmt: skip
WINDOWS = [3, 7, 8, 30]
RUN = {
    "tokenizer": "t" * 32, "text": "x" * 32, "tokens": "k" * 32, "windows": 40, "seq_len": 6, "batch": 2, "steps": 3,
    "seed": 0,
}  # fmt: skip


def top(facts: LogitsFacts, seed: int = 0):
    """What a teacher says of one window."""
    logits = 4 * torch.randn(facts.seq_len, facts.vocabulary, generator=torch.Generator().manual_seed(seed))
    logs = logits.log_softmax(1)
    values, indices = logs.topk(facts.k, 1)
    return indices, values, logs.scatter(1, indices, float("-inf")).logsumexp(1)


def write(path: Path, facts: LogitsFacts = FACTS, windows=WINDOWS, **options) -> Path:
    with TeacherLogitsWriter(path, facts, windows, **options) as writer:
        for window in reversed(windows):  # in any order
            writer.write(window, *top(facts, window))
    return path


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 60), st.integers(1, 9), st.sampled_from([100, 65536, 65537, 200_000]),
    st.sets(st.integers(0, 39), min_size=1, max_size=5), st.data(),
)  # fmt: skip
def test_round_trip_within_the_stated_error(k, seq_len, vocabulary, windows, data):
    facts = dataclasses.replace(FACTS, k=k, seq_len=seq_len, vocabulary=vocabulary)
    windows = sorted(windows)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "cache.safetensors", facts, windows)
        assert path.stat().st_size == file_bytes(facts, len(windows))
        header = path.stat().st_size - len(windows) * (8 + seq_len * bytes_per_token(k, vocabulary))
        assert header == read_header(path)[0]["windows"].offset
        wanted = data.draw(st.lists(st.sampled_from(windows), min_size=1, max_size=6))
        cache = TeacherLogits(path)
        indices, logs, rest = cache.read(wanted)
    assert cache.facts == facts
    expected = [torch.stack(parts) for parts in zip(*(top(facts, window) for window in wanted), strict=True)]
    assert indices.dtype == torch.int32 and torch.equal(indices.long(), expected[0])
    for found, exact in ((logs, expected[1]), (rest, expected[2])):
        assert found.dtype == torch.float32
        assert bool(((found - exact).abs() <= RELATIVE_ERROR * exact.abs() + 2.0**-25).all())


def test_bytes_per_token(tmp_path):
    assert bytes_per_token(64, 65536) == 64 * 4 + 2
    assert bytes_per_token(64, 65537) == 64 * 6 + 2
    tensors, metadata = read_header(write(tmp_path / "cache.safetensors"))
    tokens = len(WINDOWS) * FACTS.seq_len
    stored = sum(info.nbytes for name, info in tensors.items() if name != "windows")
    assert stored == tokens * bytes_per_token(FACTS.k, FACTS.vocabulary)
    assert metadata["seed"] == "0" and metadata["temperature"] == "2.0" and metadata["text"] == FACTS.text


def test_other_readers_open_it(tmp_path):
    with safe_open(write(tmp_path / "cache.safetensors"), "pt") as file:
        assert set(file.keys()) == {"windows", "indices", "log_probabilities", "log_rest"}
        assert file.get_tensor("indices").dtype == torch.uint16
        assert file.get_tensor("windows").tolist() == WINDOWS


def test_certain_and_impossible_tokens(tmp_path):
    """Logarithms that rounding put above 0, below what F16 holds, and no rest at all."""
    facts = dataclasses.replace(FACTS, seq_len=1, k=2, vocabulary=2)
    with TeacherLogitsWriter(tmp_path / "cache.safetensors", facts, [0]) as writer:
        writer.write(0, torch.tensor([[1, 0]]), torch.tensor([[1e-8, -1e6]]), torch.tensor([-torch.inf]))
    indices, logs, rest = TeacherLogits(tmp_path / "cache.safetensors").read([0])
    assert indices.tolist() == [[[1, 0]]] and logs.tolist() == [[[0.0, -65504.0]]] and rest.tolist() == [[-torch.inf]]


def test_existing_file_is_kept_unless_forced(tmp_path):
    path = write(tmp_path / "deep" / "cache.safetensors")
    with pytest.raises(TersorError, match="exists") as error:
        write(path)
    assert "--force" in error.value.hint
    write(path, dataclasses.replace(FACTS, seed=5), force=True)
    assert TeacherLogits(path).facts.seed == 5
    with pytest.raises(TersorError, match="is a folder"):
        write(tmp_path / "deep", force=True)


def test_failure_leaves_nothing(tmp_path):
    path = tmp_path / "cache.safetensors"
    with pytest.raises(KeyboardInterrupt), TeacherLogitsWriter(path, FACTS, WINDOWS) as writer:
        writer.write(3, *top(FACTS))
        raise KeyboardInterrupt
    unfinished = pytest.raises(ValueError, match="3 windows were not written, for example 7")
    with unfinished, TeacherLogitsWriter(path, FACTS, WINDOWS) as writer:
        writer.write(3, *top(FACTS))
    with pytest.raises(ValueError, match=r"not .6, 4. entries"), TeacherLogitsWriter(path, FACTS, WINDOWS) as writer:
        writer.write(3, *top(dataclasses.replace(FACTS, k=5)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [1, 2])
def test_a_teacher_that_gives_nan(tmp_path, part):
    numbers = top(FACTS)
    numbers[part][2] = torch.nan
    with (
        pytest.raises(TersorError, match="NaN in window 7"),
        TeacherLogitsWriter(tmp_path / "cache.safetensors", FACTS, WINDOWS) as writer,
    ):
        writer.write(7, *numbers)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(teacher_logits.os, "posix_fallocate", full)
    with pytest.raises(TersorError, match="no space left on the disk"):
        write(tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "cache.safetensors"
    with TeacherLogitsWriter(path, FACTS, [3]) as writer:
        with pytest.raises(TersorError, match="another run is writing it"):
            TeacherLogitsWriter(path, FACTS, [3])
        writer.write(3, *top(FACTS))
    assert TeacherLogits(path).read([3])[0].shape == (1, 6, 4)


def test_a_kill_leaves_the_partial_name_only(tmp_path):
    """SIGKILL between two windows: no file of that name, and the next run starts over on what is left."""
    path = tmp_path / "cache.safetensors"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_teacher_logits import FACTS, WINDOWS, TeacherLogitsWriter, top
with TeacherLogitsWriter({str(path)!r}, FACTS, WINDOWS) as writer:
    for window in WINDOWS[:-1]:
        writer.write(window, *top(FACTS, window))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors.partial"]
    assert not is_teacher_logits(path)
    write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    assert torch.equal(TeacherLogits(path).read(WINDOWS[-1:])[0][0].long(), top(FACTS, WINDOWS[-1])[0])


def test_is_teacher_logits(tmp_path, family):
    assert is_teacher_logits(write(tmp_path / "cache.safetensors"))
    assert not is_teacher_logits(family("llama"))
    assert not is_teacher_logits(family("llama") / "model.safetensors")
    assert not is_teacher_logits(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"tokenizer": "?"}, "another tokenizer", "student it was made with"),
        ({"text": "?"}, "another text than --data", "--data it was made with"),
        ({"seq_len": 7}, "made with --seq-len 6, this run has 7", "--seq-len 6"),
        ({"tokens": "?"}, "split the same text otherwise", "library"),
    ],
)
def test_other_data_is_refused(tmp_path, changed, message, hint):
    cache = TeacherLogits(write(tmp_path / "cache.safetensors"))
    cache.belongs_to(RUN)
    cache.belongs_to(RUN | {"seed": 9, "steps": 1, "batch": 1})  # which windows these take is what `require` looks at
    with pytest.raises(TersorError, match=message) as error:
        cache.belongs_to(RUN | changed)
    assert hint in error.value.hint and "--cache-teacher" in error.value.hint


def test_other_windows_are_refused(tmp_path):
    cache = TeacherLogits(write(tmp_path / "cache.safetensors"))
    cache.require([30, 3], RUN | {"seed": 4})
    with pytest.raises(
        TersorError, match=r"lacks 2 of the 3 windows.*--seed 0 --batch 2 --steps 3, .*--seed 4"
    ) as error:
        cache.require([3, 4, 5], RUN | {"seed": 4})
    assert "--seed 0" in error.value.hint
    with pytest.raises(TersorError, match="lacks 1 of the 2 windows") as error:
        cache.require([3, 4], RUN | {"batch": 3, "steps": 9})
    assert "lower --steps to 2" in error.value.hint


def edited(path: Path, edit) -> Path:
    """The file with another header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    return path


DAMAGED = [
    (lambda h: h["__metadata__"].update(schema="tersor.stats/1"), "holds tersor.stats/1, not tersor.teacher-logits/1"),
    (lambda h: h.pop("__metadata__"), "holds no schema"),
    (lambda h: h["__metadata__"].pop("seed"), "metadata has no 'seed'"),
    (lambda h: h["__metadata__"].update(k="many"), "'k' = 'many'"),
    (lambda h: h["__metadata__"].update(k="0"), "'k' = '0'"),
    (lambda h: h["__metadata__"].update(k="101"), "top 101 of 100"),
    (lambda h: h["__metadata__"].update(temperature="NaN"), "'temperature' = 'NaN'"),
    (lambda h: h["__metadata__"].update(temperature="-1"), "'temperature' = '-1'"),
    (lambda h: h["__metadata__"].update(seq_len="7"), "'indices' is U16 .4, 6, 4., its metadata says U16 .4, 7, 4."),
    (lambda h: h["__metadata__"].update(vocabulary="70000"), "'indices' is U16"),
    (lambda h: h["__metadata__"].update(windows="30"), "'windows' does not ascend within 0 … 29"),
    (lambda h: h.update(other=h.pop("log_rest")), "tensor 'log_rest' is missing"),
    (lambda h: h.update(other=h.pop("windows")), "tensor 'windows' is missing"),
]


@pytest.mark.parametrize(("edit", "message"), DAMAGED, ids=[message[:24] for _, message in DAMAGED])
def test_damaged_headers_are_named(tmp_path, edit, message):
    path = edited(write(tmp_path / "cache.safetensors"), edit)
    with pytest.raises(TersorError, match=message) as error:
        TeacherLogits(path)
    assert str(path) in str(error.value) and "--cache-teacher" in error.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [("indices", b"\xff\xff"), ("log_probabilities", b"\x00\x7e"), ("log_probabilities", b"\x00\x3c"), ("log_rest", b"\x00\x7e")],
    ids=["index", "nan", "positive", "nan rest"],
)  # fmt: skip
def test_damaged_numbers_are_named(tmp_path, name, value):
    path = write(tmp_path / "cache.safetensors")
    info = read_header(path)[0][name]
    with open(path, "r+b") as file:
        file.seek(info.offset + info.nbytes // 4)  # the second of four windows
        file.write(value)
    cache = TeacherLogits(path)
    cache.read([3, 8, 30])
    with pytest.raises(TersorError, match=f"'{name}' holds .* in window 7") as error:
        cache.read([3, 7])
    assert "damaged" in error.value.hint


def test_truncated_and_missing_files(tmp_path):
    path = write(tmp_path / "cache.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TersorError, match="truncated"):
        TeacherLogits(path)
    with pytest.raises(TersorError, match="no such file"):
        TeacherLogits(tmp_path / "nothing")

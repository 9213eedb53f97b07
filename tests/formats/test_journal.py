"""The journal: what a kill leaves behind, and who may write."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.errors import TersorError
from tersor.formats.journal import Journal

KEY = {"version": "1", "input": "abc", "include": ["a", "b"], "samples": 128, "policy": None}


def written(path, units=3):
    journal = Journal(path, KEY, resume=False)
    for number in range(units):
        journal.mark(f"unit {number}", {"error": number / 7, "text": "ü\n"})
    journal.flush()
    journal.close()
    return path


def reopened(path, key=KEY) -> dict:
    journal = Journal(path, key, resume=True)
    journal.close()
    return journal.done


def test_what_is_flushed_comes_back(tmp_path):
    done = reopened(written(tmp_path / "j"))
    assert done == {f"unit {number}": {"error": number / 7, "text": "ü\n"} for number in range(3)}
    assert reopened(tmp_path / "j") == done


def test_a_mark_counts_only_after_flush(tmp_path):
    journal = Journal(tmp_path / "j", KEY, resume=False)
    journal.mark("a", 1)
    journal.flush()
    journal.mark("b", 2)
    assert journal.done == {"a": 1, "b": 2}
    journal.close()
    assert reopened(tmp_path / "j") == {"a": 1}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_anywhere_then_continued(tmp_path_factory, data):
    """Whatever a kill leaves, the whole lines count, and a run that goes on writes a journal that can be read."""
    path = written(tmp_path_factory.mktemp("journal") / "j")
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    lines = max(whole[:cut].count(b"\n") - 1, 0)
    journal = Journal(path, KEY, resume=True)
    assert list(journal.done) == [f"unit {number}" for number in range(lines)]
    journal.mark("after", None)
    journal.flush()
    journal.close()
    assert list(reopened(path)) == [*(f"unit {number}" for number in range(lines)), "after"]


@pytest.mark.parametrize("torn", [b'["half', b'["whole", 1]', b"\x00\x00\x00", b"\xff"])
def test_torn_last_line_is_cut_off(torn, tmp_path):
    path = written(tmp_path / "j")
    before = path.read_bytes()
    path.write_bytes(before + torn)
    assert len(reopened(path)) == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        b"not json\n",
        b"7\n",
        b"[1]\n",
        b"[1, 2, 3]\n",
        b'{"a": 1}\n',
        b"[[], 2]\n",
        b"null\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_line_is_refused(damage, tmp_path):
    path = written(tmp_path / "j")
    path.write_bytes(path.read_bytes() + damage)
    before = path.read_bytes()
    with pytest.raises(TersorError, match="not readable") as caught:
        reopened(path)
    assert "--force" in caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize("first", [b"7\n", b"[]\n", b"null\n", b'"text"\n', b"{\n"])
def test_first_line_that_is_no_key(first, tmp_path):
    (tmp_path / "j").write_bytes(first)
    with pytest.raises(TersorError, match="not readable"):
        reopened(tmp_path / "j")


def test_another_run_is_named_by_what_differs(tmp_path):
    path = written(tmp_path / "j")
    with pytest.raises(TersorError, match=r"other input, samples$") as caught:
        reopened(path, KEY | {"input": "def", "samples": 2})
    assert "--force" in caught.value.hint
    with pytest.raises(TersorError, match="other samples, seed"):
        reopened(path, {key: value for key, value in KEY.items() if key != "samples"} | {"seed": 0})
    assert len(reopened(path)) == 3  # nothing was lost by being refused


def test_without_resume_it_starts_over(tmp_path):
    Journal(written(tmp_path / "j"), KEY, resume=False).close()
    assert (tmp_path / "j").read_bytes() == json.dumps(KEY).encode() + b"\n"
    assert reopened(tmp_path / "j") == {}


@pytest.mark.parametrize("resume", [True, False])
def test_second_writer_is_refused_and_harms_nothing(resume, tmp_path):
    journal = Journal(tmp_path / "j", KEY, resume=False)
    journal.mark("a", 1)
    journal.flush()
    before = (tmp_path / "j").read_bytes()
    script = (
        "import sys, json; from pathlib import Path; from tersor.formats.journal import Journal\n"
        "from tersor.formats.errors import TersorError\n"
        "try: Journal(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == 'True')\n"
        "except TersorError as error: print(error); sys.exit(7)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "j"), json.dumps(KEY), str(resume)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 7, second.stderr
    assert "another run is writing it" in second.stdout
    assert (tmp_path / "j").read_bytes() == before
    journal.close()
    assert subprocess.run(command, timeout=60).returncode == 0  # the lock goes with the run


def test_many_marks_are_appended_in_order(tmp_path):
    journal = Journal(tmp_path / "j", KEY, resume=False)
    for number in range(500):
        journal.mark(f"unit {number}", number)
        if number % 50 == 0:
            journal.flush()
    journal.flush()
    journal.close()
    assert list(reopened(tmp_path / "j").values()) == list(range(500))

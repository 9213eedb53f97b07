"""Where output may go, and what --force replaces."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_line import assert_refused, run


@pytest.mark.parametrize("command", ["convert", "quantize"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_output_is_the_input(command, force, lines, quantized):
    given = [str(part) for part in lines[command]]
    model = Path(given[1])
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for spelling in (model, model / ".." / model.name, os.path.relpath(model)):
        given[given.index("-o") + 1] = str(spelling)
        assert_refused(run(*given, *force), "is the input")
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_output_is_a_link_to_the_input(lines, tmp_path, quantized):
    (tmp_path / "link").symlink_to(quantized)
    assert_refused(run("convert", quantized, "-o", tmp_path / "link", "--to", "gptq", "--force"), "is the input")


def test_output_exists(lines, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(*lines["quantize"]).exit_code == 0  # empty: taken
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert_refused(run(*lines["quantize"]), "not empty", "--force")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_output_is_a_file(lines, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_refused(run(*lines["quantize"], "--force"), "not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_force_replaces_the_whole_folder(lines, tmp_path):
    """Nothing of the earlier checkpoint is left among the new one's files."""
    assert run(*lines["quantize"], "--format", "gptq").exit_code == 0
    assert (tmp_path / "out" / "quantize_config.json").exists()
    assert run(*lines["quantize"], "--force").exit_code == 0
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run("verify", tmp_path / "out").exit_code == 0


def test_force_keeps_the_old_output_until_the_new_one_is_whole(lines, tmp_path, quantized):
    assert run(*lines["quantize"]).exit_code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    broken = shutil.copytree(quantized, tmp_path / "broken")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64] + b"\xff" * 64)  # NaN in the last tensor
    result = run("convert", broken, "-o", tmp_path / "out", "--to", "dense", "--force", "-q")
    assert_refused(result)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_partial_output_of_an_earlier_run(lines, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("")
    assert_refused(run(*lines["quantize"]), "did not finish", "--resume", "--force")
    assert run(*lines["quantize"], "--force").exit_code == 0
    assert not partial.exists()


def test_output_in_a_folder_that_is_not_there_yet(lines, tmp_path):
    given = [str(part) for part in lines["quantize"]]
    given[given.index("-o") + 1] = str(tmp_path / "a" / "b")
    assert run(*given).stdout == f"{tmp_path / 'a' / 'b'}\n"


def test_force_replaces_checkpoints_only(lines, tmp_path):
    """A slip of the hand must not cost a home folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert_refused(run(*lines["quantize"], "--force"), "holds no checkpoint")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


def test_force_leaves_other_folders_alone(lines, tmp_path):
    """The old output is set aside while the new one takes its name; what had that name already stays."""
    assert run(*lines["quantize"]).exit_code == 0
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "mine").write_text("x")
    assert run(*lines["quantize"], "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]
    assert (tmp_path / "out.replaced" / "mine").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_output_around_or_inside_the_input(force, family, tmp_path):
    """Replacing a folder that holds the input would delete it; one inside it would be copied into itself."""
    model = shutil.copytree(family("llama"), tmp_path / "runs" / "model")
    (tmp_path / "runs" / "config.json").write_text("{}")
    for out, word in ((tmp_path / "runs", "holds the input"), (model / "out", "inside the input")):
        assert_refused(run("quantize", model, "-o", out, "--group-size", 32, *force), word)
    bare = model / "model.safetensors"
    assert_refused(run("quantize", bare, "-o", model, "--group-size", 32, *force), "holds the input")
    assert run("verify", model).exit_code == 0

"""The report: what it holds, what it adds up to, and how it survives disk, NaN and other people's edits."""

from __future__ import annotations

import json
import math

import pytest
from tersor import __version__
from tersor.formats import report as reports
from tersor.formats.errors import TersorError
from tersor.formats.report import KEYS, SCHEMA, Report, TensorEntry, finite, validate


def tensor(name: str = "model.layers.0.mlp.up_proj.weight", **changes) -> TensorEntry:
    values = {
        "action": "quantize", "reason": None, "before": {"dtype": "BF16", "shape": [4, 8], "bytes": 64},
        "after": {"dtype": "INT4 g8 symmetric", "shape": [4, 8], "bytes": 24}, "error": {"relative_mse": 0.01},
        "sparsity": 0.25, "bits": 6.0, "seconds": 0.1,
    }  # fmt: skip
    return TensorEntry(name, **values | changes)


def a_report(**changes) -> Report:
    described = {"path": "model", "fingerprint": "ab", "bytes": 96, "params": 48}
    values = {
        "command": "quantize", "args": {"scheme": "w4a16"}, "seed": 3, "device": "cpu", "input": described,
        "output": described | {"path": "small", "bytes": 56}, "seconds": 1.5, "peak_rss_bytes": 1000, "tensors": [tensor()],
    }  # fmt: skip
    return Report(**values | changes)


class Checkpoint:
    """What Report needs of a formats.checkpoint.Checkpoint."""

    path, nbytes, tensors = "model", 96, {}

    def fingerprint(self) -> str:
        return "ab"


def test_content_has_the_keys_of_the_schema_in_order():
    content = a_report().to_dict()
    assert tuple(content) == KEYS
    assert content["schema"] == SCHEMA
    assert content["version"] == __version__
    assert validate(content) == []


def test_write_and_load_round_trip(tmp_path):
    report = a_report(warnings=["größer"], quality={"perplexity": 12.5}, history=[{"command": "prune"}])
    report.write(tmp_path)
    assert Report.load(tmp_path) == report
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert "größer" in (tmp_path / "report.json").read_text("utf-8")


def test_start_and_finish_describe_input_and_output():
    report = Report.start("quantize", {"a": 1}, 7, "cpu", Checkpoint(), [])
    report.finish(Checkpoint(), name="small")
    assert report.input == {"path": "model", "fingerprint": "ab", "bytes": 96, "params": 0}
    assert report.output == report.input | {"path": "small"}
    assert report.seconds >= 0
    assert report.peak_rss_bytes > 1_000_000
    assert reports.resident_bytes() > 1_000_000


def test_totals_add_up():
    kept = TensorEntry(
        "norm", "keep", "norm", *[{"dtype": "BF16", "shape": [16], "bytes": 32}] * 2, None, None, None, None
    )
    sparser = tensor("b", sparsity=0.75, after={"dtype": "INT4", "shape": [2, 8], "bytes": 8}, bits=4.0)
    totals = a_report(tensors=[tensor(), kept, sparser]).totals()
    assert totals["bytes_before"] == 64 + 32 + 64
    assert totals["bytes_after"] == 24 + 32 + 8
    assert (totals["params_before"], totals["params_after"]) == (80, 64)
    assert totals["bits_per_weight"] == 8 * 64 / 64
    assert totals["sparsity"] == pytest.approx((0.25 * 32 + 0.75 * 16) / 48)  # the kept tensor was not measured


def test_totals_of_nothing():
    totals = a_report(tensors=[]).totals()
    assert totals["bits_per_weight"] is None
    assert totals["sparsity"] is None
    assert totals["bytes_after"] == 0


def test_a_scalar_counts_as_one_parameter():
    side = {"dtype": "F32", "shape": [], "bytes": 4}
    totals = a_report(tensors=[TensorEntry("scale", "keep", None, side, side)]).totals()
    assert (totals["params_after"], totals["bits_per_weight"]) == (1, 32)


def test_what_json_cannot_hold_becomes_null(tmp_path):
    report = a_report(quality={"perplexity": math.inf, "list": [1.0, math.nan]}, tensors=[tensor(bits=-math.inf)])
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text("utf-8")
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the file"))
    assert content["quality"] == {"perplexity": None, "list": [1.0, None]}
    assert content["tensors"][0]["bits"] is None
    assert finite((1, 2.5, "x", None, True)) == [1, 2.5, "x", None, True]


def test_history_grows_by_a_step_for_each_command(tmp_path):
    assert Report.history_of(tmp_path) == []
    folders = [tmp_path / str(step) for step in range(3)]
    for index, folder in enumerate(folders):
        folder.mkdir()
        past = Report.history_of(folders[index - 1]) if index else []
        a_report(command=("prune", "quantize", "convert")[index], history=past, warnings=[str(index)]).write(folder)
    assert [step["command"] for step in Report.load(folders[2]).history] == ["prune", "quantize"]
    history = Report.history_of(folders[2])
    assert [step["command"] for step in history] == ["prune", "quantize", "convert"]
    assert [step["warnings"] for step in history] == [["0"], ["1"], ["2"]]
    for step in history:  # the numbers stay, the thousands of tensor entries and older steps do not
        assert step["totals"]["bytes_after"] == 24
        assert step["output"]["path"] == "small"
        assert not {"tensors", "history"} & step.keys()


def damage(key, value):
    return lambda content: content | {key: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: [content], "is not a tersor.report/1"),
        (damage("schema", "tersor.report/2"), "is not a tersor.report/1"),
        (lambda content: {key: value for key, value in content.items() if key != "totals"}, "'totals' is missing"),
        (damage("extra", 1), "'extra' is not known"),
        (damage("tensors", {}), "'tensors' is not a list"),
        (damage("history", None), "'history' is not a list"),
        (damage("tensors", ["x"]), "does not have the keys"),
        (damage("tensors", [{"name": "x"}]), "does not have the keys"),
        (lambda content: content | {"tensors": [content["tensors"][0] | {"after": {"bytes": 1}}]}, "'after' is not"),
    ],
)  # fmt: skip
def test_damage_is_named(change, words, tmp_path):
    changed = change(a_report().to_dict())
    assert words in validate(changed)[0]
    (tmp_path / "report.json").write_text(json.dumps(changed))
    with pytest.raises(TersorError, match=r"report\.json") as caught:
        Report.load(tmp_path)
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100, '"\\ud800"'])
def test_an_unreadable_report_is_an_error_with_a_hint(text, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(TersorError) as caught:
        Report.load(tmp_path)
    assert caught.value.hint

"""`profile` as a whole: which parts are called, what is written, several checkpoints side by side."""

from __future__ import annotations

import json

import pytest
from tersor.formats.errors import TersorError
from tersor.formats.output import partial_path
from tersor.formats.page import Plot, Table
from tersor.formats.report import Report
from tersor.ops.evaluate.run import Request as EvaluateRequest
from tersor.ops.evaluate.run import evaluate, record
from tersor.ops.profile.request import Request, Workload
from tersor.ops.profile.run import profile
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize


def test_headers_alone(family):
    report, sections = profile(Request([str(family("llama"))]))
    (model,) = report.quality["models"]
    assert set(model) == {"name", "path", "bytes", "quality", "headers"}
    assert model["headers"]["model"]["layers"] == 2
    assert sections[0].title == "Model and speed"


def test_what_is_written(family, tmp_path):
    out = tmp_path / "out"
    profile(Request([str(family("llama"))], out, memory_trace="synthetic", workload=Workload(2, 64, 8)))
    assert sorted(path.name for path in out.iterdir()) == ["memory_plan.json", "report.html", "report.json"]
    report = Report.load(out)
    assert report.command == "profile" and report.args["prompt"] == 64
    page = (out / "report.html").read_text()
    assert "Peak memory" in page and "fingerprint" in page
    with pytest.raises(TersorError, match="not empty"):
        profile(Request([str(family("llama"))], out))
    profile(Request([str(family("llama"))], out, force=True))
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]


def test_side_by_side(family, text, tmp_path):
    dense, small = family("llama"), tmp_path / "small"
    quantize(QuantizeRequest(str(dense), small, group_size=32))
    record(evaluate(EvaluateRequest(str(small), str(text), 32, max_windows=2)), small)
    report, sections = profile(Request([str(dense), str(small)], tmp_path / "out"))
    first, second = report.quality["models"]
    assert second["bytes"] < first["bytes"]
    assert second["quality"]["perplexity"] > 1 and first["quality"] == {}
    assert sections[0].title == "Side by side"
    table = next(item for item in sections[0].items if isinstance(item, Table))
    assert [row[0] for row in table.rows] == [dense.name, "small"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert any(section.title.startswith("small: ") for section in sections)


def test_quality_against_size_is_drawn_where_it_is_known(family, text, tmp_path):
    for bits in (4, 8):
        out = tmp_path / f"w{bits}"
        quantize(QuantizeRequest(str(family("llama")), out, f"w{bits}a16", group_size=32))
        record(evaluate(EvaluateRequest(str(out), str(text), 32, max_windows=2)), out)
    _, sections = profile(Request([str(tmp_path / "w4"), str(tmp_path / "w8")]))
    (plot,) = (item for item in sections[0].items if isinstance(item, Plot))
    assert [dot[2] for dot in plot.points[""]] == ["w4", "w8"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hardware": "abacus"}, "abacus.*"),
        ({"suggest": "lots"}, "lots"),
        ({"collect": ["nonsense"]}, "nonsense"),
        ({"method": "awq"}, "awq"),
        ({"memory_trace": "no-such-trace"}, "no-such-trace"),
        ({"calib": "no-such-text.txt", "sensitivity": True}, "no-such-text"),
    ],
)
def test_bad_input_leaves_nothing(changes, words, family, tmp_path):
    with pytest.raises(TersorError, match=words):
        profile(Request([str(family("llama"))], tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


def test_some_parts_are_for_one_model(family):
    models = [str(family("llama")), str(family("qwen2"))]
    with pytest.raises(TersorError, match="--suggest is for one model, 2 were given"):
        profile(Request(models, suggest="4bits"))


def test_suggestion_is_a_policy_that_quantize_executes(family, text, tmp_path):
    model = str(family("llama"))
    request = Request(
        [model], tmp_path / "p", sensitivity=True, suggest="5bits", calib=str(text), samples=4, seq_len=32
    )
    report, _ = profile(request)
    policy = json.loads((tmp_path / "p" / "policy.json").read_text())
    assert policy["schema"] == "tersor.policy/1"
    quantize(QuantizeRequest(model, tmp_path / "q", policy=tmp_path / "p" / "policy.json"))
    bits = [entry.bits for entry in Report.load(tmp_path / "q").tensors if entry.action == "quantize"]
    assert bits and report.quality["models"][0]["sensitivity"]["suggestion"]["target"] == "5bits"

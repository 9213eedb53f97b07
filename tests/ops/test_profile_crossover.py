"""`profile --sparse-crossover`: the sparsity above which a format is faster. Times are made up: no test asks for a speed."""

from __future__ import annotations

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.page import Table
from tersor.formats.page_text import render
from tersor.formats.report import Report
from tersor.ops.model import tile_costs
from tersor.ops.model.tile_costs import KINDS, SPARSITIES
from tersor.ops.profile.crossover.page import sections
from tersor.ops.profile.crossover.run import crossing, linear_shapes, sparse_crossover, token_counts
from tersor.ops.profile.request import Request, Workload
from tersor.ops.profile.run import profile

CPU = torch.device("cpu")
FASTER = {"sparse-bitmask": 1.0, "vector": 0.5, "block": 3.0, "sparse-24-bitmask": 0.5}


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Dense takes 0.4 s, a format what FASTER says times the share that it stores, a block 0.4 s more; a cache of its
    own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def time_calls(calls, device):
        expected = [0.4]
        for format, _ in KINDS:
            of = (0.5,) if format == "sparse-24-bitmask" else SPARSITIES
            expected += [FASTER[format] * (1 - sparsity) + (0.4 if format == "block" else 0) for sparsity in of]
        if len(calls) < len(expected):  # a shape that 2:4 does not admit
            del expected[1]
        assert len(calls) == len(expected)
        return expected

    monkeypatch.setattr(tile_costs, "time_calls", time_calls)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([5.0, 3.0, 1.0], 0.85),
        ([4.0, 1.0, 1.0], 0.7),
        ([1.0, 1.0, 1.0], 0.5),
        ([1.0, 3.0, 1.0], 0.85),
    ],
)
def test_crossing(seconds, expected):
    assert crossing([0.5, 0.8, 0.9], seconds, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize("seconds", [[3.0, 3.0, 3.0], [5.0, 1.0, 3.0], [1.0, 1.0, 2.0]])
def test_no_crossing(seconds):
    """Faster is faster at all sparsities above."""
    assert crossing([0.5, 0.8, 0.9], seconds, 2.0) is None


def test_tokens_are_those_of_the_workload():
    assert token_counts(Workload()) == [1, 16, 512]
    assert token_counts(Workload(batch=4, prompt=100)) == [4, 16, 400]
    assert token_counts(Workload(batch=16, prompt=1)) == [16]


def test_shapes_are_those_of_linear_layers(family):
    assert linear_shapes(Checkpoint(family("llama"))) == {(64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2}
    assert linear_shapes(Checkpoint(family("gpt2"))) == {(192, 64): 2, (64, 64): 2, (256, 64): 2, (64, 256): 2}
    experts = linear_shapes(Checkpoint(family("mixtral")))
    assert experts[96, 64] == 2 * 4 * 2 and (4, 64) not in experts


def test_a_model_without_linear_layers(tmp_path):
    from safetensors.torch import save_file

    save_file({"table.weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(TersorError, match="no linear layer"):
        linear_shapes(Checkpoint(tmp_path))


def test_rows_are_by_shape_and_tokens(made_up, family):
    stages = []
    data = sparse_crossover(
        Checkpoint(family("llama")), Workload(), CPU, lambda stage, done, total: stages.append((stage, done, total))
    )
    assert [stage[1:] for stage in stages] == [(done, 4) for done in range(5)]
    assert len(data["rows"]) == 4 * 3 and data["tokens"] == [1, 16, 512] and data["dtype"] == "float32"
    row = data["rows"][0]
    found = {(one["format"], one["tile"]): one["faster_from"] for one in row["formats"]}
    assert found["sparse-bitmask", None] == pytest.approx(0.6, abs=0.02)
    assert found["vector", (32, 1)] == found["sparse-24-bitmask", None] == 0.5
    assert found["block", (32, 32)] is None


def test_given_shapes_in_place_of_the_models(made_up, family):
    data = sparse_crossover(Checkpoint(family("llama")), Workload(prompt=1), CPU, shapes=[(32, 70)])
    assert [row["shape"] for row in data["rows"]] == [[32, 70]] * 2
    assert all(one["format"] != "sparse-24-bitmask" for one in data["rows"][0]["formats"])


def test_page(made_up, family):
    data = sparse_crossover(Checkpoint(family("llama")), Workload(), CPU)
    (section,) = sections(data)
    tables = [item for item in section.items if isinstance(item, Table)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    first = min(range(len(data["rows"])), key=lambda at: data["rows"][at]["shape"] != [64, 64])
    cells = dict(zip(tables[0].columns, tables[0].rows[first], strict=True))
    assert cells["weight"] == "64×64" and cells["dense"] == "400 ms" and cells["layers"] == "4"
    assert (
        cells["sparse-bitmask"] in ("59 %", "60 %", "61 %")
        and cells["vector 32x1"] == "≤ 50 %"
        and cells["block 16x16"] == "never"
    )
    assert cells["sparse-24-bitmask"] == "1.6×"
    assert "vector 32x1 is faster than dense above 50 % at every shape" in section.lead
    times = dict(zip(tables[1].columns, tables[1].rows[1], strict=True))
    assert [times[share] for share in ("50 %", "80 %", "90 %", "95 %")] == ["500 ms", "200 ms", "100 ms", "50 ms"]
    assert "never" in render(sections(data), 100)


def test_page_where_dense_always_wins(made_up, family, monkeypatch):
    monkeypatch.setattr(tile_costs, "time_calls", lambda calls, device: [1.0] + [2.0] * (len(calls) - 1))
    (section,) = sections(sparse_crossover(Checkpoint(family("llama")), Workload(), CPU))
    assert "dense is always faster" in section.lead
    assert set(section.items[0].rows[0][4:]) == {"never"}


def test_it_is_in_the_report(made_up, family, tmp_path):
    out = tmp_path / "out"
    profile(Request([str(family("llama"))], out, sparse_crossover=True, device="cpu"))
    report = Report.load(out)
    assert report.quality["models"][0]["crossover"]["rows"][0]["dense_seconds"] == 0.4
    assert report.args["sparse_crossover"] is True
    page = (out / "report.html").read_text()
    assert "Where sparse products pay" in page and "--sparse-crossover" in page


def test_without_it_nothing_is_timed(family):
    report, _ = profile(Request([str(family("llama"))]))
    assert "crossover" not in report.quality["models"][0]

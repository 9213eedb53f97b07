"""The cost model against published runs: torchtitan's of an 8B model, mbridge's memory of a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from header_models import LLAMA_8B, llama_shapes, write_model
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.plan_parallel.model import PlanModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import plan_fit

        yield plan_fit


@pytest.fixture(scope="module")
def rows(script, tmp_path_factory):
    model = PlanModel(Checkpoint(write_model(tmp_path_factory.mktemp("llama"), LLAMA_8B, llama_shapes(LLAMA_8B))))
    return script.table_of(model, script.runtimes({}, {}))


def test_torchtitan_rows_by_the_constants_as_committed(rows):
    """One set of constants, fitted on half of the rows; throughput within 15 %, memory within 10 %, on both halves."""
    assert [row["fitted"] for row in rows].count(False) == 5
    for row in rows:
        assert abs(row["throughput_error"]) < 0.15, row
        assert abs(row["memory_error"]) < 0.10, row


def test_mbridge_rows_with_nothing_fitted(script, tmp_path):
    found = script.mixtral_rows(tmp_path)
    assert len(found) == 4
    for row in found:
        assert abs(row["error"]) < 0.03, row


def test_committed_results_are_those_of_the_constants(rows):
    committed = json.loads((BENCHMARKS / "results" / "plan_fit.json").read_text("utf-8"))
    for row, known in zip(rows, committed["torchtitan"], strict=True):
        assert row["row"] == known["row"]
        assert row["predicted_tokens_per_second"] == pytest.approx(known["predicted_tokens_per_second"], rel=1e-3)
        assert row["predicted_peak_gib"] == pytest.approx(known["predicted_peak_gib"], rel=1e-3)

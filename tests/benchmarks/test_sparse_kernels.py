"""The benchmark of sparse kernels runs on any machine. No test asks for a speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """script(*arguments) runs the benchmark; every product once, for a millisecond."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_speed
    import sparse_kernels

    monkeypatch.setattr(kernel_speed, "seconds_of", lambda run, device: (run(), 1e-3)[1])

    def main(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sparse_kernels.py", *map(str, arguments)])
        sparse_kernels.main()

    return main


def test_table_of_a_cpu(script, tmp_path):
    script("--device", "cpu", "--size", 64, "--output", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse_kernels.cpu.json", "sparse_kernels.cpu.md"]
    content = json.loads((tmp_path / "sparse_kernels.cpu.json").read_text())
    families = {row["family"] for row in content["rows"]}
    assert {"bitmap 80 %", "vector 32x1 90 %", "block 32x32 90 %", "2:4", "active 50 %"} <= families
    ours = [row for row in content["rows"] if row["implementation"] == "tersor"]
    assert len(ours) == 8 + 4 + 1 + 2 + 2 and all(row["seconds"] > 0 and row["bytes"] > 0 for row in ours)
    assert all("skipped" not in row for row in content["rows"])
    page = (tmp_path / "sparse_kernels.cpu.md").read_text()
    assert page.count("\n| ") == len(content["rows"]) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script, tmp_path, capsys):
    script("--device", "cuda", "--output", tmp_path)
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())

"""A quantized checkpoint, and a short line for every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import COMMANDS, run


@pytest.fixture(scope="module")
def quantized(family, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert run("quantize", family("llama"), "-o", out, "--group-size", 32).exit_code == 0
    return out


def each_command(model: Path, quantized: Path, text: Path, out: Path) -> dict[str, list]:
    """A short line for every command, each of which succeeds."""
    return {
        "convert": ["convert", quantized, "-o", out, "--to", "gptq"],
        "distill": [
            "distill", model, "--teacher", model, "-o", out, "--data", text, "--steps", 2, "--batch", 2, "--seq-len", 32,
        ],
        "evaluate": ["evaluate", quantized, "--text", text, "--seq-len", 32, "--max-windows", 2],
        "plan-parallel": [
            "plan-parallel", model, "-o", out, "--cluster", "2xh100", "--global-batch", 4, "--seq-len", 64,
        ],
        "profile": ["profile", quantized, "-o", out],
        "prune": ["prune", model, "-o", out, "--method", "magnitude"],
        "quantize": ["quantize", model, "-o", out, "--group-size", 32],
        "sparsify": ["sparsify", model, "-o", out, "--pattern", "2:4"],
        "verify": ["verify", quantized],
    }  # fmt: skip


@pytest.fixture
def lines(family, quantized, text, tmp_path):
    found = each_command(family("llama"), quantized, text, tmp_path / "out")
    assert sorted(found) == COMMANDS
    return found

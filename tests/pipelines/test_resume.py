"""kill -9 at any moment leaves no output that looks whole, and --resume then gives the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TERSOR = [sys.executable, "-m", "tersor.cli.main"]
# Journal at every unit, and stop for a moment after each, so that a kill finds the run at a chosen point.
SLOW_WRITER = """
import os, sys, time
from tersor.formats import writer
writer.SECONDS_BETWEEN_FLUSHES = -1.0
finish = writer.CheckpointWriter.finish
def slow(self, unit, data):
    finish(self, unit, data)
    time.sleep(0.15)
writer.CheckpointWriter.finish = slow
from tersor.cli.main import main
sys.argv[0] = "tersor"
main()
"""


def digests(folder: Path) -> dict[str, str]:
    """Every file but the report, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith("report.")
    }


def command(model, out, method, text) -> list[str]:
    """`method` is one of quantize, or of prune with what is removed before a colon."""
    calibration = ["--calib", text, "--samples", 4, "--seq-len", 32] if method != "rtn" else []
    if ":" in method:
        target, method = method.split(":")
        start = ["prune", model, "-o", out, "--remove", target, "--sparsity", 0.25]
    elif method == "sparsify":
        return [str(part) for part in ["sparsify", model, "-o", out, "--pattern", "2:4"]]
    else:
        start = ["quantize", model, "-o", out, "--group-size", 32]
    return [str(part) for part in [*start, "--method", method, *calibration]]


PRUNE = ["weights:sparsegpt", "neurons:activation", "layers:cosine"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "sparsify", *PRUNE])
def test_sigkill_then_resume(method, family, text, tmp_path):
    model = family("gemma3")  # seven blocks
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*TERSOR, *command(model, whole, method, text)], check=True, capture_output=True)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    for kills, units in enumerate((1, 5)):
        resume = ["--resume"] if kills else []
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_WRITER, *command(model, out, method, text), *resume],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > units:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        assert journal.exists()
    done = journal.read_bytes().count(b"\n")
    assert done > 5
    result = subprocess.run([*TERSOR, *command(model, out, method, text), "--resume"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert digests(out) == digests(whole)
    assert not journal.exists()


def test_interrupt_keeps_the_work(family, text, tmp_path):
    """Ctrl-C: exit 130, a line that says how to go on, a partial folder, no output."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, *command(family("gemma3"), out, "gptq", text)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    assert journal.exists()
    again = subprocess.run([*TERSOR, *command(family("gemma3"), out, "gptq", text)], capture_output=True, text=True)
    assert again.returncode == 1
    assert "--resume" in again.stderr


def test_resume_refuses_another_run(family, text, tmp_path):
    model, out = family("gemma3"), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, *command(model, out, "rtn", text)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    other = [*command(model, out, "rtn", text), "--asymmetric", "--resume"]
    result = subprocess.run([*TERSOR, *other], capture_output=True, text=True)
    assert result.returncode == 1
    assert "symmetric" in result.stderr
    assert journal.exists()


def test_same_input_same_bytes(family, text, tmp_path):
    for name in ("a", "b"):
        subprocess.run(
            [*TERSOR, *command(family("mixtral"), tmp_path / name, "gptq", text)], check=True, capture_output=True
        )
    assert digests(tmp_path / "a") == digests(tmp_path / "b")

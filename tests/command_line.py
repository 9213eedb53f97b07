"""Running commands in this process."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from tersor.cli.main import app
from typer.testing import CliRunner

COMMANDS = sorted(typer.main.get_command(app).commands)


def run(*arguments, **options):
    """In this process: what a command prints and how it exits."""
    return CliRunner().invoke(app, [str(part) for part in arguments], **options)


def ok(*arguments) -> Path:
    """A command that has to succeed: the path that it prints."""
    result = run(*arguments, "-q")
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def assert_refused(result, *words: str) -> None:
    """Exit 1, one line of error, one of hint, nothing else that matters."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.stderr
    assert all(line.split(": ", 1)[1].strip() for line in lines)
    for word in words:
        assert word in result.stderr

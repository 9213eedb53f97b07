"""The command contract: what goes to stdout, exit codes, error lines, help, dry runs, pipes, interruption."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from command_line import COMMANDS, assert_refused, run
from tersor.cli import common
from tersor.cli.main import app
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError

TERSOR = [sys.executable, "-m", "tersor.cli.main"]


# --- stdout and stderr ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_is_one_path(command, lines, tmp_path, quantized):
    result = run(*lines[command])
    assert result.exit_code == 0, result.stderr
    expected = tmp_path / "out" if "-o" in lines[command] else quantized
    assert result.stdout == f"{expected}\n"
    assert result.stderr  # a summary


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet(command, lines):
    result = run(*lines[command], "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_json(command, lines):
    result = run(*lines[command], "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    if command == "verify":
        assert found["schema"] == "tersor.verify/1"
    else:
        assert (found["schema"], found["command"]) == ("tersor.report/1", command)


@pytest.mark.parametrize("command", ["convert", "distill", "plan-parallel", "profile", "prune", "quantize", "sparsify"])
def test_json_is_the_report_on_disk(command, lines, tmp_path):
    found = json.loads(run(*lines[command], "--json", "-q").stdout)
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())


def test_the_page_of_a_profile_without_output_is_on_stdout(family):
    """Nothing else is produced, as with --dry-run."""
    result = run("profile", family("llama"))
    assert result.exit_code == 0
    assert result.stdout.startswith("Model and speed\n====")
    assert result.stderr == ""


def test_no_colour_codes_when_not_a_terminal(lines):
    result = run(*lines["quantize"])
    assert "\x1b" not in result.stderr + result.stdout


# --- input from a pipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_dash_is_the_last_line_of_stdin(command, lines):
    given = [str(part) for part in lines[command]]
    model = given[1]
    given[1] = "-"
    result = run(*given, "-q", input=f"something else\n\n  {model}  \n\n")
    assert result.exit_code == 0, result.stderr
    if command in ("evaluate", "verify"):
        assert result.stdout == f"{model}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_dash_without_input(command, lines):
    given = [str(part) for part in lines[command]]
    given[1] = "-"
    result = run(*given, input="\n \n")
    assert_refused(result, "stdin")


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess:
    prefix = f'tersor() {{ {shlex.join(TERSOR)} "$@"; }}\nset -o pipefail\n'
    return subprocess.run(["bash", "-c", prefix + line], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_whole_pipe(family, text, tmp_path):
    """As a user types it: four commands, each reads the path that the one before it printed."""
    line = (
        f"tersor quantize {family('llama')} -o small --group-size 32 | tersor verify - | tersor convert - -o g --to gptq -q"
        f" | tersor evaluate - --text {text} --seq-len 32 --max-windows 2 --record"
    )
    result = shell(line, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "g\n"
    report = json.loads((tmp_path / "g" / "report.json").read_text())
    assert report["quality"]["perplexity"] > 1
    assert [step["command"] for step in report["history"]] == ["quantize"]


def test_a_pipe_breaks_where_it_fails(family, tmp_path):
    """The commands behind a failure say that nothing came, and do nothing."""
    line = f"tersor quantize {family('llama')} -o small --scheme w5a16 | tersor convert - -o g --to gptq"
    result = shell(line, tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert [text.split(":")[0] for text in result.stderr.splitlines()].count("error") == 2
    assert "w5a16" in result.stderr
    assert "stdin, which is empty" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_stdout(lines, tmp_path):
    """A reader that is gone (`| head -c0`) costs the line, not the work, and shows no traceback."""
    process = subprocess.Popen(
        [*TERSOR, *map(str, lines["quantize"]), "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.wait(timeout=120)
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert process.returncode != 0
    assert Checkpoint(tmp_path / "out").tensors


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_named_failure(command, lines, tmp_path):
    given = [str(part) for part in lines[command]]
    given[1] = str(tmp_path / "no such model")
    assert_refused(run(*given), "no such model")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_message_of_several_lines_is_one_line(command, lines, tmp_path):
    given = [str(part) for part in lines[command]]
    given[1] = str(tmp_path / "two\nlines")
    assert_refused(run(*given), "two lines")


@pytest.mark.parametrize("command", COMMANDS)
def test_debug_shows_the_traceback(command, lines, tmp_path):
    given = [str(part) for part in lines[command]]
    given[1] = str(tmp_path / "nothing")
    result = run(*given, "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, TersorError)


def test_debug_from_the_shell(tmp_path):
    result = subprocess.run([*TERSOR, "verify", "nothing", "--debug"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "TersorError: nothing" in result.stderr
    assert result.stdout == ""


WRONG_USAGE = [
    ["no-such-command"],
    ["quantize"],
    ["quantize", "model", "--no-such-option"],
    ["quantize", "model", "-o"],
    ["quantize", "model", "-o", "out", "--samples", "many"],
    ["quantize", "model", "-o", "out", "--seq-len", "1"],
    ["convert", "model", "--to", "dense"],
    ["convert", "model", "-o", "out"],
    ["evaluate"],
    ["evaluate", "model", "--stride", "0"],
    ["verify", "model", "extra"],
    ["profile"],
    ["profile", "model", "--collect", "norms"],  # no output
    ["profile", "model", "--suggest", "4bits"],
]
WITHOUT_TORCH = """
import sys
from tersor.cli.main import main
status = 0
try:
    main()
except SystemExit as leaving:
    status = leaving.code
heavy = {"torch", "transformers", "triton", "numba"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=" ".join)
def test_wrong_usage(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["quantize", "model", "--no-such-option"], 2),
        (["convert", "model", "-o", "out"], 2),
        (["evaluate", "model", "--stride", "0"], 2),
        (["verify"], 2),
        (["quantize", "MODEL"], 2),  # no output
        (["quantize", "MODEL", "--dry-run"], 0),
        (["quantize", "MODEL", "--dry-run", "--method", "gptq"], 0),
        (["quantize", "no-such-model", "-o", "out"], 1),
        (["profile", "MODEL"], 0),
        (["profile", "MODEL", "--hardware", "abacus"], 1),
        (["--help"], 0),
        (["--version"], 0),
        *[([command, "--help"], 0) for command in COMMANDS],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_answers_without_torch(arguments, status, family, tmp_path):
    arguments = [str(family("llama")) if part == "MODEL" else part for part in arguments]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == status, result.stderr
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys, time
from tersor.cli import common
def wait(model):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
common.resolve_input = wait
from tersor.cli.main import main
main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c(command, lines):
    """tests/pipelines/test_resume.py interrupts real work; here it is the exit and the line, of every command."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *map(str, lines[command])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while (line := process.stderr.readline()) and line != "ready\n":
        pass
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.startswith("interrupted")
    assert ("--resume" in stderr) == (command in ("convert", "distill", "prune", "quantize", "sparsify"))
    assert "Traceback" not in stderr


def test_out_of_memory_is_named(monkeypatch, lines):
    def greedy(*_):
        raise MemoryError

    monkeypatch.setattr(Checkpoint, "__init__", greedy)
    assert_refused(run(*lines["evaluate"]), "out of memory", "--max-memory")


# --- help -------------------------------------------------------------------------------------------------------------


def examples(command: str) -> list[list[str]]:
    """Every command of every example in a help text, as arguments."""
    help_text = run(*([command] if command else []), "--help").stdout.replace("\\\n", " ")
    lines = re.findall(r"^ +tersor (.*)$", help_text, re.MULTILINE)
    return [shlex.split(part.strip().removeprefix("tersor ")) for line in lines for part in re.split(r"\||&&", line)]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_that_parse(command):
    found = examples(command)
    assert found
    assert command == "" or any(arguments[0] == command for arguments in found)
    group = typer.main.get_command(app)
    for name, *rest in found:
        subcommand = group.commands[name]
        with subcommand.make_context(name, rest) as context:  # raises UsageError for what does not parse
            assert any(context.params.get(key) for key in ("model", "models", "student"))


def test_every_option_says_what_it_is_for():
    for command in typer.main.get_command(app).commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option" and "--help" not in parameter.opts:
                assert parameter.help or parameter.name == "dtype", f"{command.name} {parameter.opts}"


def test_sizes():
    assert common.parse_size(None) is None
    assert common.parse_size("8GiB") == 8 << 30
    assert common.parse_size("1.5kb") == 1500
    assert common.parse_size("500 MB") == 500_000_000
    assert common.parse_size("77") == 77
    for text in ("lots", "8 GiBs", "-1GB", "", "1e9e"):
        with pytest.raises(TersorError):
            common.parse_size(text)


# --- dry run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", ["--group-size", "32"]),
        ("llama", ["--scheme", "w3a16", "--asymmetric"]),
        ("llama", ["--scheme", "fp8-block"]),
        ("llama-tied", ["--exclude", "k_proj", "--include", "lm_head|layers"]),
        ("gpt2", ["--group-size", "32"]),
        ("mixtral", ["--format", "gptq", "--group-size", "-1"]),
    ],
)
def test_dry_run_foretells_the_bytes(name, settings, family, tmp_path):
    model, out = family(name), tmp_path / "out"
    if "--include" in settings:
        settings = [*settings[:2], "--include", "layers"]
    result = run("quantize", model, *settings, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    foretold = json.loads(result.stdout)
    report = json.loads(run("quantize", model, "-o", out, *settings, "--json", "-q").stdout)
    assert foretold["output_bytes"] == Checkpoint(out).nbytes == report["output"]["bytes"]
    assert foretold["input_bytes"] == Checkpoint(model).nbytes
    done = {entry["name"]: (entry["action"], entry["after"]["bytes"]) for entry in report["tensors"]}
    assert {row["name"]: (row["action"], row["after_bytes"]) for row in foretold["tensors"]} == done
    assert foretold["warnings"] == report["warnings"]


def test_dry_run_for_people(family, tmp_path):
    result = run("quantize", family("llama"), "-o", tmp_path / "out", "--dry-run", "--group-size", 32)
    assert result.exit_code == 0
    assert "quantize  model.layers.0.mlp.up_proj.weight" in result.stdout
    assert "outside the repeated blocks" in result.stdout
    assert "peak memory" in result.stdout
    assert list(tmp_path.iterdir()) == []


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_now_and_then(capsys, monkeypatch):
    """Where stderr is no terminal: a line at the start of a stage, then one in ten seconds, and the end."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with common.progress(quiet=False) as progress:
        for done in range(50):
            progress("blocks", done, 50)
            now += 1.0
        progress("blocks", 50, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("blocks 0/50")
    assert lines[-1].startswith("blocks 50/50")
    assert 5 <= len(lines) <= 7
    assert "s left" in lines[1]
    with common.progress(quiet=True) as progress:
        progress("blocks", 1, 2)
    assert capsys.readouterr().err == ""

"""The rules of the house: imports point down, the package list is complete, the shell answers at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "cli": {"cli", "ops", "formats"},
    "ops": {"ops", "kernels", "formats"},
    "kernels": {"kernels"},
    "formats": {"formats"},
}


def modules() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("tersor.")}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        if name == "tersor.__version__":
            continue
        assert name.split(".")[1] in LAYERS[layer], f"{path} imports {name}"


def test_checks_of_verify_are_shared_not_crossed():
    """A subcommand's folder imports no other subcommand's folder."""
    for path in sorted((ROOT / "ops").rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if len(parts) < 3 or parts[1] == "model":
            continue
        for name in imported(path):
            target = name.split(".")
            if target[1] == "ops" and len(target) > 2:
                assert target[2] in (parts[1], "model"), f"{path} imports {name}"


def test_package_list_is_complete():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"tersor"} | {
        "tersor." + ".".join(path.parent.relative_to(ROOT).parts)
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
    }
    assert listed == found


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize", "--help"], ["prune", "--help"], ["prune"], ["nonsense"], ["--version"]]
)
def test_the_shell_does_not_import_torch(arguments):
    code = "import sys\nsys.argv = ['tersor', *sys.argv[1:]]\nfrom tersor.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("command", [["quantize"], ["prune"], ["prune", "--remove", "ranks"]], ids=" ".join)
def test_dry_run_does_not_import_torch(command, family):
    code = "import sys\nsys.argv = ['tersor', *sys.argv[1:]]\nfrom tersor.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run(
        [sys.executable, "-c", code, *command, str(family("llama")), "--dry-run"], check=True, capture_output=True
    )


def test_no_file_is_two_ideas():
    for path in modules():
        assert len(path.read_text("utf-8").splitlines()) <= 400, path


def test_readme_commands_parse():
    """Every tersor line of the README is one that the command line accepts."""
    readme = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"^\s*(?:\| )?(tersor .*)$", readme, re.MULTILINE)
    assert len(found) >= 5
    from tersor.cli.main import app
    from typer.main import get_command

    commands = get_command(app).commands
    for line in found:
        for part in line.split(" | "):
            name, *arguments = part.split("#")[0].split()[1:]
            if name.startswith("-"):
                continue
            commands[name].make_context(name, arguments)

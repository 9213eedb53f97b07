"""The `tersor` command. Each subcommand is a file of this folder; torch is imported only when work begins."""

from __future__ import annotations

from typing import Annotated

import typer
from tersor import __version__
from tersor.cli import convert, distill, evaluate, plan_parallel, profile, prune, quantize, sparsify, verify

app = typer.Typer(
    name="tersor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Make model checkpoints smaller, faster and easier to place on hardware.\n\n"
    "Each command reads a checkpoint, does one thing to it and writes a new checkpoint with a report. It prints the output "
    "path, so that commands chain:\n\n"
    "\b\n"
    "  tersor prune MODEL -o sparse --sparsity 0.5 | tersor quantize - -o small --method gptq \\\n"
    "    | tersor verify - | tersor evaluate - --text book.txt",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tersor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("prune", short_help="Zeros, or a smaller model.")(prune.prune)
app.command("quantize", short_help="Fewer bits per weight.")(quantize.quantize)
app.command("sparsify", short_help="Zeros packed away, without loss.")(sparsify.sparsify)
app.command("distill", short_help="Train a compressed model to do what the original does.")(distill.distill)
app.command("profile", short_help="Where bytes, time and memory go; what compression would do.")(profile.profile)
app.command("plan-parallel", short_help="Place a checkpoint on a cluster; cut it into shards.")(
    plan_parallel.plan_parallel
)
app.command("evaluate", short_help="Perplexity, and how far two models are apart.")(evaluate.evaluate)
app.command("verify", short_help="Is this checkpoint sound?")(verify.verify)
app.command("convert", short_help="Another encoding without loss, or dense again.")(convert.convert)


def main() -> None:
    app(prog_name="tersor")


if __name__ == "__main__":
    main()

"""`tersor verify`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from tersor.cli import common


def verify(
    model: common.Model,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Also measure each tensor's error and compare it with the report."),
    ] = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Check that a checkpoint is sound: headers, index, codes that decode, no NaN, config that fits, report that holds.

    \b
      tersor verify small
      tersor verify small --against MODEL

    Prints MODEL when it is sound. Otherwise prints each problem and exits with 1.
    """
    with common.reported_errors(debug, resumable=False):
        path = common.resolve_input(model)
        from tersor.ops.verify.run import verify as run

        with common.progress(quiet) as progress:
            result = run(path, against, progress)
        found = {
            "schema": "tersor.verify/1", "path": str(result.path), "tensors": result.tensors,
            "quantized_modules": result.quantized_modules, "problems": result.problems,
        }  # fmt: skip
        for problem in result.problems:
            sys.stderr.write(f"error: {common.one_line(problem)}\n")
        if result.problems:
            sys.stderr.write(f"hint: write {common.one_line(path)} again from its source\n")
            if json:
                common.emit(path, found)
            raise typer.Exit(1)
        common.show([("sound", f"{result.tensors} tensors, {result.quantized_modules} quantized layers")], [], quiet)
        common.emit(path, found if json else None)

"""`tersor verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.plan import is_plan


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
    What plan-parallel --shard wrote: are the shards the model, bit for bit?
      tersor verify P

    Prints MODEL when it is sound. Otherwise prints each problem and exits with 1.
    """
    with common.reported_errors(debug, resumable=False):
        path = common.resolve_input(model)
        with common.progress(quiet) as progress:
            if is_plan(Path(path)):
                from tersor.ops.plan_parallel.verify import verify_plan

                result = verify_plan(Path(path), against, progress)
                compared = "the hashes they were written with" if result.against is None else str(result.against)
                sound = f"a plan; {result.files} files of shards hold {result.tensors} tensors, equal to {compared}"
                sound = sound if result.files else "a plan without shards"
                numbers = {
                    "shard_files": result.files,
                    "against": None if result.against is None else str(result.against),
                }
            else:
                from tersor.ops.verify.run import verify as run

                result = run(path, against, progress)
                sound = f"{result.tensors} tensors, {result.quantized_modules} quantized layers"
                numbers = {"quantized_modules": result.quantized_modules}
        found = {
            "schema": "tersor.verify/1", "path": str(result.path), "tensors": result.tensors, **numbers,
            "problems": result.problems,
        }  # fmt: skip
        for problem in result.problems:
            sys.stderr.write(f"error: {common.one_line(problem)}\n")
        if result.problems:
            sys.stderr.write(f"hint: write {common.one_line(path)} again from its source\n")
            if json:
                common.emit(path, found)
            raise typer.Exit(1)
        common.show([("sound", sound)], [], quiet)
        common.emit(path, found if json else None)

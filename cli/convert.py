"""`tersor convert`."""

from __future__ import annotations

from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import size


def convert(
    model: common.Model,
    output: common.Output,
    to: Annotated[str, typer.Option("--to", help="dense, compressed-tensors or gptq.")],
    dtype: Annotated[str | None, typer.Option(help="With --to dense: bfloat16, float16 or float32.")] = None,
    force: common.Force = False,
    resume: common.Resume = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Write a quantized checkpoint in another encoding with the same codes, or as dense weights; unpack a sparse one.

    \b
      tersor convert small -o small-gptq --to gptq
      tersor convert small -o dense --to dense
      tersor convert sparse -o before --to dense

    Between encodings nothing is rounded; what would lose something is refused. --to dense gives back what
    sparsify packed, every tensor bit for bit: if those were codes they are again, and --to dense once more makes them
    weights (or at once, with --dtype).
    """
    with common.reported_errors(debug):
        from tersor.ops.convert.run import Request
        from tersor.ops.convert.run import convert as run

        request = Request(common.resolve_input(model), output, to, dtype, force, resume)
        with common.progress(quiet) as progress:
            report = run(request, progress)
        totals = report.totals()
        rows = [
            ("bytes", f"{size(totals['bytes_before'])} → {size(totals['bytes_after'])}"),
            ("report", str(output / "report.html")),
        ]
        common.show(rows, report.warnings, quiet)
        common.emit(output, report.to_dict() if json else None)

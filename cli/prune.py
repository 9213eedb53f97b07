"""`tersor prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import size


def prune(
    model: common.Model,
    output: common.Output = None,
    remove: Annotated[
        str,
        typer.Option(
            help="weights (zeros, same shapes); neurons heads channels vocab layers attention mlp ranks experts norms (smaller)."
        ),
    ] = "weights",
    method: Annotated[
        str | None, typer.Option(help="How to choose; --dry-run names the default, a wrong one lists all.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of what is removed, 0 to 1. Default 0.5, or what the pattern fixes.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="weights: unstructured, N:M such as 2:4, block:16x16, vector:32x1.")
    ] = "unstructured",
    allocate: Annotated[
        str, typer.Option(help="weights: uniform, erk (by shape), owl (by outliers), rd (by measured damage).")
    ] = "uniform",
    rounds: Annotated[
        int, typer.Option(min=1, help="weights: prune in this many passes, more and more (cubic schedule).")
    ] = 1,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="Round kept widths up to this, for kernels and tensor parallelism.")
    ] = 1,
    repair: Annotated[
        bool,
        typer.Option("--repair/--no-repair", help="Refit what stays, or the layer that reads it, by least squares."),
    ] = True,
    keep_shape: Annotated[
        bool, typer.Option("--keep-shape", help="Write zeros in the old shapes instead of removing.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="ranks: write the product of the factors in the old shape.")
    ] = False,
    extract: Annotated[
        str | None,
        typer.Option(
            help="Slice a sub-network out of an elastic checkpoint: a name in its elastic.json, shares, or a JSON file.",
            metavar="CONFIG",
        ),
    ] = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    policy: common.Policy = None,
    stats: common.Stats = None,
    calib: common.Calib = None,
    samples: common.Samples = 128,
    seq_len: common.SeqLen = 512,
    seed: common.Seed = 0,
    damping: Annotated[
        float, typer.Option(min=0.0, help="Share of the mean diagonal added to a Hessian before it is inverted.")
    ] = 0.01,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    dry_run: common.DryRun = False,
    force: common.Force = False,
    resume: common.Resume = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Remove what the model does not need: single weights, or whole parts of it.

      \b
      Half of the weights become zero, the others make up for them:
        tersor prune MODEL -o sparse --method sparsegpt --sparsity 0.5
      A quarter of the feed-forward neurons is cut out; the result is a smaller model that loads as before:
        tersor prune MODEL -o small --remove neurons --sparsity 0.25
      Then fewer bits, zeros kept:
        tersor prune MODEL -o sparse --pattern 2:4 | tersor quantize - -o small --scheme w4a16 --method gptq
    A part of what distill --elastic trained, by its share of neurons, heads and blocks, or by name:
        tersor prune ELASTIC -o small --extract neurons=0.5,heads=0.5,depth=0.75

      \b
      --remove   methods, the default first
      weights    sparsegpt wanda magnitude ria random
      neurons    activation saliency taylor magnitude random (also heads, channels)
      layers     cosine knapsack even (also attention, mlp)
      ranks      whitened svd kronecker
      experts    frequency merge random
      norms      fold (same function, fewer tensors)
      vocab      frequency
    """
    with common.reported_errors(debug):
        from tersor.ops.prune.request import Request
        from tersor.ops.prune.run import plan

        request = Request(
            common.resolve_input(model), output, remove, method, sparsity, pattern, allocate, rounds, multiple_of, repair,
            keep_shape, merge, include or [], exclude or [], policy, stats, calib, samples, seq_len, seed, damping, device,
            common.parse_size(max_memory), force, resume, extract,
        )  # fmt: skip
        if dry_run:
            from tersor.ops.prune.forecast import forecast

            common.show_forecast(forecast(*plan(request), request), json)
            return
        common.require_output(output, ", or --dry-run")
        from tersor.ops.prune.rounds import prune as run

        with common.progress(quiet) as progress:
            report = run(request, progress)
        common.show(_summary(report, request, output), report.warnings, quiet)
        common.emit(output, report.to_dict() if json else None)


def _summary(report, request, output: Path) -> list[tuple[str, str]]:
    totals = report.totals()
    changed = sum(entry.action != "keep" for entry in report.tensors)
    rows = [
        (request.remove, f"{changed} tensors changed with {request.method}, {len(report.tensors) - changed} kept"),
        ("bytes", f"{size(totals['bytes_before'])} → {size(totals['bytes_after'])}"),
        ("parameters", f"{totals['params_before']:,} → {totals['params_after']:,}"),
    ]
    if totals["sparsity"] is not None:
        rows.append(("zeros", f"{totals['sparsity']:.2%} of the weights that were pruned"))
    for key, label in (("predicted_distortion", "predicted damage"), ("measured_distortion", "measured damage")):
        if key in report.quality.get("allocation", {}):
            rows.append((label, f"{report.quality['allocation'][key]:.4g}"))
    rows.append(("time", f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"))
    rows.append(("report", str(output / "report.html")))
    return rows

"""`tersor sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import size


def sparsify(
    model: common.Model,
    output: common.Output = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Make zeros first: 2:4 or N:M, vector:32x1, block:16x16, unstructured. Default: those there."
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="auto (smallest for each layer), fastest (measured here), sparse-bitmask sparse-24-bitmask vector block tiled-csl."
        ),
    ] = "auto",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros that --pattern makes. Default 0.5, or what N:M fixes.")
    ] = None,
    permute: Annotated[
        bool,
        typer.Option("--permute/--no-permute", help="Reorder channels, same function, so that the pattern keeps more."),
    ] = True,
    positive_zeros: Annotated[
        bool, typer.Option("--positive-zeros", help="Store -0.0 as 0.0, so that it is packed away too.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="fastest: tokens at once for which the kernels are compared.")] = 1,
    activations: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Thresholds that zero this share of the layers' inputs at run time."),
    ] = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    policy: common.Policy = None,
    stats: common.Stats = None,
    calib: common.Calib = None,
    samples: common.Samples = 16,
    seq_len: common.SeqLen = 512,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    dry_run: common.DryRun = False,
    force: common.Force = False,
    resume: common.Resume = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Turn zeros into bytes and speed: pack them away without loss.

    \b
    The zeros that prune made, each layer in the format in which it is smallest:
      tersor prune MODEL -o A --pattern 2:4 | tersor quantize - -o B --scheme w8a16 | tersor sparsify - -o C
    Zeros in vectors of 32, which a GPU can skip, with channels reordered so that less is lost:
      tersor sparsify MODEL -o C --pattern vector:32x1 --sparsity 0.9
    Inputs near zero are skipped when the model runs; no weight changes:
      tersor sparsify MODEL -o C --activations 0.5
    Back, bit for bit:
      tersor convert C --to dense -o B

    \b
    Evaluate, quantize, profile and convert read the output; in Python tersor.ops.model.load(C) does.
    Bytes per bf16 weight with a share s of zeros (dense: 2), and what each format is for:
      sparse-bitmask     2 (1 - s) + 0.125   zeros anywhere
      sparse-24-bitmask  1.125               at most two of four
      vector, block      2 (1 - s)           zeros in whole tiles: fast
      tiled-csl          4 (1 - s)           export for Flash-LLM
    """
    with common.reported_errors(debug):
        from tersor.ops.sparsify.request import Request

        request = Request(
            common.resolve_input(model), output, pattern, format, sparsity, permute, positive_zeros, tokens, include or [],
            exclude or [], policy, stats, activations, calib, samples, seq_len, seed, device, common.parse_size(max_memory),
            force, resume,
        )  # fmt: skip
        if dry_run:
            from tersor.ops.sparsify.forecast import forecast
            from tersor.ops.sparsify.plan import plan

            common.show_forecast(forecast(*plan(request), request), json)
            return
        common.require_output(output, ", or --dry-run")
        from tersor.ops.sparsify.run import sparsify as run

        with common.progress(quiet) as progress:
            report = run(request, progress)
        common.show(_summary(report, output), report.warnings, quiet)
        common.emit(output, report.to_dict() if json else None)


def _summary(report, output: Path) -> list[tuple[str, str]]:
    totals, quality = report.totals(), report.quality
    packed = [entry for entry in report.tensors if entry.action == "pack"]
    rows = [
        ("layers", ", ".join(f"{count} {name}" for name, count in quality["layers_by_format"].items())),
        ("bytes", f"{size(totals['bytes_before'])} → {size(totals['bytes_after'])}"),
    ]
    if packed:
        before, after = (sum(side[key]["bytes"] for side in map(vars, packed)) for key in ("before", "after"))
        rows.append(("packed layers", f"{after / before:.1%} of their bytes"))
    if totals["sparsity"] is not None:
        rows.append(("zeros", f"{totals['sparsity']:.2%} of their weights"))
    if "kept_importance" in quality:
        rows.append(("kept importance", _kept(quality)))
    if "activation_sparsity" in quality:
        skipped = quality["activation_sparsity"]["weight_bytes_not_read"]
        rows.append(("weights not read", f"{skipped:.1%} of the bytes, for each token"))
    rows.append(("time", f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"))
    rows.append(("report", str(output / "report.html")))
    return rows


def _kept(quality: dict) -> str:
    text = f"{quality['kept_importance']:.2%}"
    found = quality.get("permutation", {})
    if found.get("groups"):
        text += f", {found['kept_after'] - found['kept_before']:+.2%} of it by reordering channels"
    return text

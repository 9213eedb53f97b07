"""`tersor quantize`."""

from __future__ import annotations

from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import size


def quantize(
    model: common.Model,
    output: common.Output = None,
    scheme: Annotated[
        str, typer.Option(help="w4a16 w8a16 w3a16 w2a16 (weights only), w8a8 (int8), fp8, fp8-block.")
    ] = "w4a16",
    method: Annotated[
        str, typer.Option(help="rtn: no data, seconds. gptq: best for 4 bits and less. awq: between.")
    ] = "rtn",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; -1 for whole rows. Default 128.")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Asymmetric stores zero points too.")
    ] = True,
    format: Annotated[
        str, typer.Option(help="compressed-tensors or gptq. auto: the first, but gptq for GPT-2's transposed layers.")
    ] = "auto",
    clip: Annotated[
        bool, typer.Option("--clip/--no-clip", help="Search each group's range for the least error.")
    ] = True,
    include: common.Include = None,
    exclude: common.Exclude = None,
    policy: common.Policy = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="An error where a group size does not fit, not a smaller group.")
    ] = False,
    stats: common.Stats = None,
    calib: common.Calib = None,
    samples: common.Samples = 128,
    seq_len: common.SeqLen = 512,
    seed: common.Seed = 0,
    damping: Annotated[
        float, typer.Option(min=0.0, help="gptq: share of the mean diagonal added to the Hessian.")
    ] = 0.01,
    activation_order: Annotated[
        bool, typer.Option("--activation-order/--no-activation-order", help="gptq: columns by falling input energy.")
    ] = True,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros/--no-keep-zeros", help="gptq: weights that are zero stay zero.")
    ] = True,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    dry_run: common.DryRun = False,
    force: common.Force = False,
    resume: common.Resume = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Store the weights of linear layers in fewer bits.

    \b
    In seconds, without data:
      tersor quantize MODEL -o small --scheme w4a16
    With calibration text, one block in memory at a time:
      tersor quantize MODEL -o small --scheme w4a16 --method gptq --group-size 64 --calib book.txt
    What would happen:
      tersor quantize MODEL --scheme w4a16 --dry-run

    Embeddings, routers, norms and the output head stay as they are, unless --include names them; then only what it
    matches is quantized. --exclude leaves layers out. The output loads in transformers and vLLM.
    """
    with common.reported_errors(debug):
        from tersor.ops.quantize.run import Request, plan

        request = Request(
            common.resolve_input(model), output, scheme, method, group_size, symmetric, format, clip, include or [], exclude or [],
            policy, strict, stats, calib, samples, seq_len, seed, damping, activation_order, keep_zeros, device, common.parse_size(max_memory),
            force, resume,
        )  # fmt: skip
        if dry_run:
            from tersor.ops.quantize.forecast import forecast

            common.show_forecast(forecast(*plan(request), request), json)
            return
        common.require_output(output, ", or --dry-run")
        from tersor.ops.quantize.run import quantize as run

        with common.progress(quiet) as progress:
            report = run(request, progress)
        totals = report.totals()
        counts = sum(entry.action == "quantize" for entry in report.tensors)
        common.show(
            [
                ("layers", f"{counts} quantized with {method}, {len(report.tensors) - counts} tensors kept"),
                ("bytes", f"{size(totals['bytes_before'])} → {size(totals['bytes_after'])}"),
                ("bits per weight", f"{totals['bits_per_weight']:.2f}"),
                ("time", f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"),
                ("report", str(output / "report.html")),
            ],
            report.warnings,
            quiet,
        )
        common.emit(output, report.to_dict() if json else None)

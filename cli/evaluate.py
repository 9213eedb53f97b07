"""`tersor evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common


def evaluate(
    model: common.Model,
    text: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Text to score: .txt .jsonl .parquet or Hub dataset. Default: shipped prose."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows. Default: the window, so that none overlap.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Score only the first windows.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Add KL divergence from OTHER and top-1 agreement with it.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Also put the result into MODEL's report.json and report.html.")
    ] = False,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure perplexity on a text, one block of the model in memory at a time.

    \b
      tersor evaluate small --text book.txt --seq-len 512
      tersor evaluate small --text book.txt --compare MODEL

    Quantized checkpoints are decoded by this toolkit's own readers. Prints MODEL, so that commands chain; --json prints
    the report with quality.perplexity.
    """
    with common.reported_errors(debug, resumable=False):
        path = common.resolve_input(model)
        from tersor.ops.evaluate.run import Request, evaluate, require_report
        from tersor.ops.evaluate.run import record as add_to_report

        if record:
            require_report(Path(path))
        request = Request(path, text, seq_len, stride, max_windows, compare, device, common.parse_size(max_memory))
        with common.progress(quiet) as progress:
            report = evaluate(request, progress)
        if record:
            add_to_report(report, Path(path))
        quality = report.quality
        rows = [
            ("perplexity", f"{quality['perplexity']:.3f}"),
            ("text", f"{quality['text']}, {quality['tokens']} tokens in windows of {quality['window_tokens']}"),
        ]
        if compare is not None:
            rows += [
                ("other", f"perplexity {quality['compared_perplexity']:.3f} ({compare})"),
                ("KL divergence", f"{quality['kl_divergence']:.4f} nats per token"),
                ("top-1 agreement", f"{100 * quality['top1_agreement']:.1f} %"),
            ]
        if "activation_sparsity" in quality:
            skipped = quality["activation_sparsity"]
            rows += [
                ("inputs zeroed", f"{100 * skipped['inputs_zeroed']:.1f} % of those of layers with a threshold"),
                ("weights not read", f"{100 * skipped['weight_bytes_not_read']:.1f} % of the bytes, for each token"),
            ]
        common.show([*rows, ("time", f"{report.seconds:.1f} s")], report.warnings, quiet)
        common.emit(path, report.to_dict() if json else None)

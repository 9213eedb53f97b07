"""`tersor profile`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common


def profile(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folder, .safetensors file, Hub id, or - for a path on stdin. Several are compared.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for report.json, report.html and what else is asked for."
        ),
    ] = None,
    hardware: Annotated[
        str, typer.Option(metavar="NAME", help="h100 h200 a100 l40s mi300x, host (after --measure), or a .toml file.")
    ] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens read by each.")] = 512,
    generate: Annotated[int, typer.Option(min=0, help="Tokens written by each.")] = 128,
    trials: Annotated[int, typer.Option(min=1, help="Answers sampled from one prompt (test-time scaling).")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time operators and blocks on this device; count what training saves.")
    ] = False,
    sparse_crossover: Annotated[
        bool,
        typer.Option("--sparse-crossover", help="Time sparse products on this device: from which sparsity they pay."),
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="With calibration text: what every scheme does to every layer.")
    ] = False,
    collect: Annotated[
        str, typer.Option(metavar="KINDS", help="Save norms,hessian,routing to stats.safetensors, for --stats.")
    ] = "",
    suggest: Annotated[
        str | None, typer.Option(metavar="BUDGET", help="Write policy.json for 4.25bits, 2.5GB or 30ms.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Which method of quantize the policy of --suggest is for: rtn, gptq.")
    ] = "rtn",
    memory_trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Plan memory for a trace: JSON, PyTorch's snapshot pickle, or synthetic."),
    ] = None,
    calib: common.Calib = None,
    samples: common.Samples = 32,
    seq_len: common.SeqLen = 512,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    force: common.Force = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Know before you cut: where bytes, time and memory go, and what compression would do.

    \b
    From headers and config.json alone, in a moment:
      tersor profile MODEL --hardware h100 --batch 8 --prompt 2048 --generate 256
    Several checkpoints side by side, with plots:
      tersor profile MODEL small -o compare
    On this machine, predicted against measured:
      tersor profile MODEL --measure
    The sparsity above which each sparse format beats dense, for a step (--batch), a small batch and a prompt:
      tersor profile MODEL --sparse-crossover
    Which layers suffer from which scheme, and the best mix for a budget:
      tersor profile MODEL --sensitivity --suggest 4.25bits -o P && tersor quantize MODEL --policy P/policy.json -o Q

    Prints the page; with -o it prints the folder, which holds report.json, report.html, and policy.json or
    stats.safetensors where they were asked for.
    """
    with common.reported_errors(debug, resumable=False):
        from tersor.formats.page_text import render
        from tersor.ops.profile.request import Request, Workload
        from tersor.ops.profile.run import profile as run

        for option, value in (("--collect", collect), ("--suggest", suggest)):
            if value and output is None:
                raise typer.BadParameter(f"an output folder is needed for {option}", param_hint="'-o' / '--output'")
        request = Request(
            [common.resolve_input(model) for model in models], output, hardware, Workload(batch, prompt, generate, trials),
            measure, sparse_crossover, sensitivity, [kind for kind in collect.split(",") if kind], suggest, method,
            memory_trace, calib, samples, seq_len, seed, device, common.parse_size(max_memory), force,
        )  # fmt: skip
        with common.progress(quiet) as progress:
            report, sections = run(request, progress)
        stream = sys.stdout if output is None and not json else sys.stderr
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        if stream is sys.stdout or not quiet:
            unicode = (stream.encoding or "").lower().startswith("utf")
            stream.write(render(sections, width, ascii_only=not unicode))
        if stream is sys.stdout:
            return
        common.emit(output or "", report.to_dict() if json else None)

"""`tersor distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import size


def distill(
    student: Annotated[
        str | None,
        typer.Argument(metavar="STUDENT", help="Folder, Hub id, or - for a path on stdin. Left out with --config."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint, or logits that --cache-teacher wrote.")
    ] = None,
    output: common.Output = None,
    data: Annotated[
        str | None, typer.Option(metavar="SRC", help="Text: .txt .jsonl .parquet, Hub dataset. Default: shipped prose.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step, over all processes.")] = 4,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time; gradients add up.")] = None,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens per sequence.")] = 256,
    loss: Annotated[
        str,
        typer.Option(
            help="Terms with weights, kl=1,hidden=0.5: kl reverse-kl js top-k-kl mse bd-kd next hidden attention."
        ),
    ] = "kl",
    temperature: Annotated[float, typer.Option(help="Of both softmaxes.")] = 1.0,
    layer_map: Annotated[
        str | None, typer.Option(metavar="MAP", help="Blocks to compare, student:teacher, as in 0:0,1:3.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw adamw8bit apollo apollo-mini lion; without gradients mezo sparse-mezo qzo.")
    ] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: by optimizer.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps up to it. Default a tenth.")] = None,
    schedule: Annotated[str, typer.Option(help="cosine linear constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Decoupled, of matrices.")] = 0.0,
    clip_norm: Annotated[float, typer.Option(min=0.0, help="Largest norm of the gradient; 0 for none.")] = 1.0,
    train: Annotated[str, typer.Option(help="all, norms, or scales of a quantized student.")] = "all",
    quantized: Annotated[
        str, typer.Option(help="Quantized layers: qat (new codes under the same scales) or scales (same codes).")
    ] = "qat",
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros/--no-keep-zeros", help="Weights that are zero stay zero.")
    ] = True,
    lisa: Annotated[int, typer.Option(min=0, help="Train so many blocks at a time, drawn anew; 0 for all.")] = 0,
    lisa_every: Annotated[int, typer.Option(min=1, help="Steps until others are drawn.")] = 20,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="config.json of a smaller model, begun from the teacher's weights."),
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Train nested widths and depths at once, for prune --extract.")
    ] = False,
    teacher_mode: Annotated[
        str, typer.Option(help="auto in-process streamed (a block at a time in memory) cached.")
    ] = "auto",
    cache_teacher: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the teacher's top logits once, then train from them.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Logits of a position in the cache, and of top-k-kl.")] = 64,
    nested: Annotated[
        bool, typer.Option("--nested/--no-nested", help="Keep fewer activations of feed-forward layers.")
    ] = True,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep only each block's input, and run blocks again (slower).")
    ] = False,
    replay: Annotated[
        Path | None, typer.Option(metavar="LOG", help="Make a mezo or qzo run again from its log.jsonl, bit for bit.")
    ] = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    seed: common.Seed = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Keep the state every so many steps, for --resume.")] = 0,
    log_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Scalars for TensorBoard.")] = None,
    device: common.Device = "auto",
    max_memory: common.MaxMemory = None,
    force: common.Force = False,
    resume: common.Resume = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Train a compressed model to do what the original does.

    \b
    A shorter model learns from the whole one:
      tersor prune MODEL -o S --remove layers --sparsity 0.25 | tersor distill - --teacher MODEL -o D --steps 200
    The same with less memory, and with the hidden states compared as well:
      tersor distill S --teacher MODEL -o D --optimizer adamw8bit --recompute --loss kl=1,hidden=0.1
    Only the scales of a quantized model, without a backward pass:
      tersor distill Q --teacher MODEL -o D --optimizer qzo --train scales
    On several GPUs:
      torchrun --nproc-per-node 8 -m tersor.cli distill S --teacher MODEL -o D --batch 64

    Zeros stay zeros, codes stay codes of the same scheme, tied weights stay tied; the output is stored as the student was.
    Ctrl-C and SIGTERM finish the step and keep the state; --resume goes on to the same bytes.
    """
    with common.reported_errors(debug):
        from tersor.ops.distill.request import Request

        given = None if student is None else common.resolve_input(student)
        common.require_output(output)
        if (given is None) == (config is None):
            raise typer.BadParameter("give a student, or --config for a new one", param_hint="STUDENT")
        request = Request(
            given, output, teacher, config, data, steps, batch, micro_batch, seq_len, loss, temperature, layer_map, optimizer,
            lr, warmup, schedule, weight_decay, clip_norm, train, quantized, keep_zeros, lisa, lisa_every, elastic, teacher_mode,
            cache_teacher, top_k, nested, recompute, replay, include or [], exclude or [], seed, save_every, log_dir, device,
            common.parse_size(max_memory), force, resume,
        )  # fmt: skip
        from tersor.ops.distill.run import distill as run

        with common.progress(quiet) as progress:
            report = run(request, progress)
        if report is None:  # another process of torchrun speaks
            return
        common.show(_summary(report, output), report.warnings, quiet)
        common.emit(output, report.to_dict() if json else None)


def _summary(report, output: Path) -> list[tuple[str, str]]:
    training, memory = report.quality["training"], report.quality.get("memory")
    rows = []
    if "last_loss" in training:
        rows += [
            ("loss", f"{training['first_loss']:.4g} → {training['last_loss']:.4g} in {training['steps']} steps"),
            ("speed", f"{training['tokens_per_second']:.0f} tokens/s"),
        ]
    if memory is not None and memory["total_bytes"] is not None:
        plain = memory["adamw"]["total_bytes"]
        rows.append(("memory", size(memory["total_bytes"]) + (f", plain AdamW {size(plain)}" if plain else "")))
    rows.append(("time", f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"))
    rows.append(("report", str(output / "report.html")))
    return rows

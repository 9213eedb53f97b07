"""`tersor plan-parallel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tersor.cli import common
from tersor.formats.units import count, duration, latency, percent, size


def plan_parallel(
    model: common.Model,
    output: common.Output = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="SPEC", help="4x8xh100 (nodes x devices x kind), 8xa100, or a .toml file.")
    ] = None,
    mode: Annotated[str, typer.Option(help="train or serve.")] = "train",
    global_batch: Annotated[int, typer.Option(min=1, help="Sequences a training step.")] = 256,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 4096,
    optimizer: Annotated[str, typer.Option(help="adamw adamw8bit apollo apollo-mini lion sgd.")] = "adamw",
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of the whole training, 15e12: how long?")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of products: bf16 fp16 fp8 fp32.")] = "bf16",
    convention: Annotated[
        str, typer.Option(help="Whose states are counted: megatron torchtitan deepspeed paper.")
    ] = "megatron",
    objective: Annotated[str, typer.Option(help="Of serving: throughput or latency.")] = "throughput",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that a request reads.")] = 1024,
    generate: Annotated[int, typer.Option(min=0, help="Tokens that it writes.")] = 256,
    rate: Annotated[
        float | None, typer.Option(min=0.0, help="Requests a second in all. Default: as many as go.")
    ] = None,
    ttft: Annotated[float | None, typer.Option(metavar="SECONDS", help="Longest time to the first token.")] = None,
    tpot: Annotated[float | None, typer.Option(metavar="SECONDS", help="Longest time between tokens.")] = None,
    fix: Annotated[
        list[str] | None, typer.Option(metavar="CHOICES", help="Fixed choices, tp=8,zero=1; the rest is searched.")
    ] = None,
    pin: Annotated[Path | None, typer.Option(metavar="FILE", help="The same as a YAML file.")] = None,
    why_not: Annotated[
        list[str] | None, typer.Option(metavar="CHOICES", help="Why is it not tp=8,pp=2? Repeatable.")
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="Only plans it can run: megatron torchtitan deepspeed fsdp2 huggingface vllm.",
        ),
    ] = "any",
    top: Annotated[int, typer.Option(min=1, help="Plans to report.")] = 5,
    tiers: Annotated[str, typer.Option(help="Where states may lie: gpu, or gpu,cpu, or gpu,cpu,nvme.")] = "gpu",
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results of nccl-tests, in place of the tables.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="report.json of profile --measure on such a device.")
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Routing trace: which experts should be neighbours.")
    ] = None,
    map_ranks: Annotated[bool, typer.Option("--map", help="Place ranks by the cluster's bandwidth matrix.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Write the shards of every rank.")] = False,
    shard_format: Annotated[str, typer.Option(help="rank, or dcp (torch.distributed.checkpoint).")] = "rank",
    source_plan: Annotated[
        Path | None, typer.Option("--from", metavar="PLAN", help="Take the weights from the shards of another plan.")
    ] = None,
    execute_check: Annotated[
        int,
        typer.Option("--execute-check", metavar="N", min=0, help="Run a shrunken copy on N processes of this machine."),
    ] = 0,
    seed: common.Seed = 0,
    force: common.Force = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Place a checkpoint on a cluster: which parallelism, how fast, how much memory, and the files to start it with.

    \b
    A training plan for 16 GPUs, and every rank's shard of the weights:
      tersor plan-parallel MODEL --cluster 2x8xh100 --global-batch 256 --seq-len 4096 -o P --shard
    Some choices are yours, and why is it not another?
      tersor plan-parallel MODEL --cluster 4x8xh100 --fix tp=4,schedule=1f1b --why-not tp=8,pp=2 -o P
    A plan for serving under latency limits:
      tersor plan-parallel MODEL --cluster 8xh100 --mode serve --ttft 0.5 --tpot 0.03 -o P
    Move shards to another layout; prove that they are the same weights:
      tersor plan-parallel MODEL --cluster 8xh100 --fix tp=8 --from P -o Q --shard && tersor verify Q

    Reads headers and a description of the cluster: no GPU is needed. P holds plan.json, a report, and files for
    Megatron-LM, torchtitan, DeepSpeed, FSDP2, transformers and vLLM.
    """
    with common.reported_errors(debug, resumable=False):
        from tersor.ops.plan_parallel.request import Request, Workload, parse_tokens

        given = common.resolve_input(model)
        common.require_output(output)
        if cluster is None:
            raise typer.BadParameter("say what it is to be placed on, as in 4x8xh100", param_hint="'--cluster'")
        workload = Workload(
            mode, global_batch, seq_len, optimizer, parse_tokens(tokens), precision, prompt=prompt, generate=generate,
            rate=rate, objective=objective, ttft_seconds=ttft, tpot_seconds=tpot,
        )  # fmt: skip
        request = Request(
            given, output, cluster, workload, fix or [], pin, why_not or [], runtime, top, tuple(tiers.split(",")), convention, calibrate,
            measured, experts, map_ranks, shard, shard_format, source_plan, execute_check, seed, force,
        )  # fmt: skip
        from tersor.ops.plan_parallel.run import plan_parallel as run

        with common.progress(quiet) as progress:
            report = run(request, progress)
        common.show(_summary(report), report.warnings, quiet)
        common.emit(output, report.to_dict() if json else None)


def _summary(report) -> list[tuple[str, str]]:
    plan = report.quality["plan"]
    rows = [("plan", plan["layout"])]
    if plan["mode"] == "train":
        rows.append(("speed", f"{latency(plan['step_seconds'])} a step, {count(plan['tokens_per_second'])} tokens/s"))
        rows.append(("use", f"{percent(plan['mfu'])} of the peak; {plan['bound_by']}"))
        if plan.get("training_seconds"):
            rows.append(("training", duration(plan["training_seconds"])))
    else:
        rows.append(("first token", latency(plan["ttft_seconds"])))
        rows.append(
            ("next tokens", f"{latency(plan['tpot_seconds'])} each, {count(plan['tokens_per_second'])} tokens/s")
        )
    rows.append(("memory", f"{size(plan['peak_bytes'])} of {size(plan['device_bytes'])} usable, on the fullest device"))
    if plan.get("shards"):
        rows.append(("shards", plan["shards"]))
    if plan.get("check"):
        rows.append(("check", plan["check"]))
    rows += [("why not", answer) for answer in plan.get("why_not", {}).values()]
    rows.append(("report", str(Path(report.output["path"]) / "report.html")))
    return rows

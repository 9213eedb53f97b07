"""Arguments of Megatron-LM's pretrain_gpt.py as a shell script: parallelism, batch, memory, and the model itself.

Stages that are not even are written in Megatron's layout string, as in `Et*3|(tt|)*29,m|L`: E the embedding, t a block,
L the loss, stages apart by |. Ranks count as in this tool: tensor, context, expert and data parallel, pipeline slowest.
"""

from __future__ import annotations

from itertools import groupby

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.export.megatron_model import model_options
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "Megatron-LM"
OPTIMIZERS = {"adamw": "adam", "sgd": "sgd", "lion": "lion"}
FSDP = {2: "optim_grads", 3: "optim_grads_params"}


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`megatron.sh`. Raises Unsupported."""
    common.require(NAME, _cases(layout, workload))
    parallel, notes = _parallel(model, layout, workload)
    shape, more = model_options(model, workload)
    training = _training(layout, workload)
    lines = ["#!/usr/bin/env bash", *common.headline(model, layout), *(f"# Note: {note}" for note in notes + more)]
    lines += ["# Data, tokenizer and learning rate are yours: give them to this script.", "set -euo pipefail"]
    if layout.zero < 2 and (layout.tp > 1 or layout.cp > 1):
        lines.append(
            "export CUDA_DEVICE_MAX_CONNECTIONS=1  # which Megatron asks for with tensor or context parallelism"
        )
    for name, options in (("MODEL_ARGS", shape), ("PARALLEL_ARGS", parallel), ("TRAINING_ARGS", training)):
        lines += common.shell_array(name, options)
    lines += common.torchrun(layout, cluster, "pretrain_gpt.py \\")
    lines.append('  "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "$@"')
    return Export({"megatron.sh": "\n".join(lines) + "\n"}, notes + more)


def _cases(layout: Layout, workload: Workload) -> Cases:
    micro_batches = layout.micro_batches(workload.global_batch) if workload.mode == "train" else layout.pp
    pipeline, schedule, optimizer = layout.pp > 1, layout.schedule, workload.optimizer
    few = schedule == "interleaved" and micro_batches < layout.pp
    return [
        (workload.mode != "train", "it trains, this plan serves"),
        (pipeline and schedule in ("zb-h1", "zbv"), f"it has no schedule {schedule}"),
        (pipeline and few, f"{micro_batches} micro-batches are fewer than pp={layout.pp}, which interleaving needs"),
        (layout.offload == "states", "it keeps only optimizer states on the host"),
        (layout.offload != "none" and layout.tier != "cpu", "it offloads to host memory, not to a disk"),
        (
            layout.offload == "optimizer" and layout.zero != 1,
            "it offloads the states of its distributed optimizer (zero=1)",
        ),
        (optimizer not in (*OPTIMIZERS, "adamw8bit"), f"it has no optimizer {optimizer}"),
        (optimizer == "adamw8bit" and layout.zero != 1, "its optimizer with 8-bit states needs zero=1"),
        (
            layout.cp > 1 and workload.seq_len % (2 * layout.cp),
            f"sequences of {workload.seq_len} tokens are not a multiple of 2 * cp = {2 * layout.cp}",
        ),
    ]


def _parallel(model: PlanModel, layout: Layout, workload: Workload) -> tuple[dict[str, object], list[str]]:
    notes: list[str] = []
    options: dict[str, object] = {
        "tensor-model-parallel-size": layout.tp,
        "pipeline-model-parallel-size": layout.pp,
        "context-parallel-size": layout.cp,
    }
    if layout.tp > 1:
        options["sequence-parallel"] = True
    if layout.cp > 1:
        options["cp-comm-type"] = "p2p"
    if model.facts.experts:
        options["expert-model-parallel-size"] = layout.ep
        options["expert-tensor-parallel-size"] = layout.etp
    if layout.pp > 1:
        stages = common.stages_of(model, layout)
        if not common.is_even(stages):
            options["pipeline-model-parallel-layout"] = pipeline_layout(stages)
        elif layout.chunks > 1:
            options["num-virtual-stages-per-pipeline-rank"] = layout.chunks
        if layout.schedule == "gpipe":
            notes.append("Megatron-LM runs 1F1B in place of GPipe: the same bubble, never more activations.")
    options |= _sharding(layout, notes)
    if layout.recompute == "full":
        options |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    elif layout.recompute == "attention":
        options |= {"recompute-granularity": "selective", "recompute-modules": ["core_attn"]}
    if layout.offload == "optimizer":
        options |= {"optimizer-cpu-offload": True, "overlap-cpu-optimizer-d2h-h2d": True}
        options["use-precision-aware-optimizer"] = True
    return options, notes


def _sharding(layout: Layout, notes: list[str]) -> dict[str, object]:
    """Gradients are reduced while the backward runs in every case."""
    options: dict[str, object] = {"overlap-grad-reduce": True}
    if layout.zero == 0:
        return options if layout.dp * layout.cp > 1 else {}
    options |= {"use-distributed-optimizer": True, "overlap-param-gather": True}
    if layout.zero == 1:
        options |= {"ckpt-format": "torch_dist", "dist-ckpt-optim-fully-reshardable": True}
    else:
        options |= {
            "use-megatron-fsdp": True,
            "data-parallel-sharding-strategy": FSDP[layout.zero],
            "ckpt-format": "fsdp_dtensor",
        }
        notes.append("Megatron-FSDP wants CUDA_DEVICE_MAX_CONNECTIONS unset, or more than 1.")
    if layout.replicate > 1:
        options["num-distributed-optimizer-instances"] = layout.replicate
    return options


def _training(layout: Layout, workload: Workload) -> dict[str, object]:
    options: dict[str, object] = {
        "micro-batch-size": layout.micro_batch,
        "global-batch-size": workload.global_batch,
        "optimizer": OPTIMIZERS.get(workload.optimizer, "adam"),
    }
    if workload.tokens is not None:
        options["train-samples"] = -(-workload.tokens // workload.seq_len)
    if workload.precision == "fp8":
        options |= {"bf16": True, "fp8-format": "hybrid"}
    elif workload.precision in ("bf16", "fp16"):
        options[workload.precision] = True
    if workload.precision in ("bf16", "fp8") and workload.gradient_bytes == 2:
        options["grad-reduce-in-bf16"] = True
    if workload.optimizer == "adamw8bit":
        options |= {"use-precision-aware-optimizer": True, "exp-avg-dtype": "fp8", "exp-avg-sq-dtype": "fp8"}
    return options


def pipeline_layout(stages: tuple[int, ...]) -> str:
    """The layout string of so many blocks a stage, equal neighbours in the middle written once: `Ett|(ttt|)*6tttL`.

    Commas mean nothing to Megatron-LM, which takes them out first; here they keep a count apart from what follows.
    """
    if len(stages) == 1:
        return f"E{_blocks(stages[0])}L"
    text = f"E{_blocks(stages[0])}|"
    for blocks, run in groupby(stages[1:-1]):
        count = len(list(run))
        # Repetition of a group stops at the first ")", so a block count inside is written out.
        text += f"({'t' * blocks}|)*{count}," if count > 1 else f"{_blocks(blocks)}|"
    return f"{text}{_blocks(stages[-1])}L"


def _blocks(count: int) -> str:
    return "t" * count if count < 4 else f"t*{count},"

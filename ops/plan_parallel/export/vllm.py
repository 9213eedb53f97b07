"""`vllm serve` arguments, with VLLM_PP_LAYER_PARTITION for stages that are not even."""

from __future__ import annotations

import shlex
from dataclasses import replace

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "vLLM"


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`vllm.sh`. Raises Unsupported."""
    plan, layout = layout, _instance(model, layout)
    common.require(NAME, _cases(model, layout, workload))
    nodes, each = common.nodes_of(layout, cluster)
    stages = common.stages_of(model, layout)
    # Without a limit the whole context of the model is served, and its cache set aside.
    longest = workload.prompt + workload.generate
    options: dict[str, object] = {
        "tensor-parallel-size": layout.tp,
        "pipeline-parallel-size": layout.pp,
        "data-parallel-size": layout.dp,
        "max-model-len": min(longest, model.facts.context or longest),
        "gpu-memory-utilization": round(cluster.usable_memory, 2),
    }
    if workload.batch:
        options["max-num-seqs"] = workload.batch
    if layout.cp > 1:
        options["prefill-context-parallel-size"] = layout.cp
    if layout.ep > 1:
        options["enable-expert-parallel"] = True
    if model.facts.cache_bytes_per_number == 1:
        options["kv-cache-dtype"] = "fp8"
    notes = []
    if plan != layout:
        notes.append(
            f"This starts one of {plan.dp // layout.dp} equal servers: start one on the devices of each, with a port of its own, "
            "and spread requests over them."
        )
    if nodes > 1:
        if layout.dp > 1:
            options["data-parallel-size-local"] = max(1, each // (layout.tp * layout.pp * layout.cp))
            options["data-parallel-backend"] = "ray"
        else:
            options["distributed-executor-backend"] = "ray"
        notes.append(f"{nodes} nodes: start a Ray cluster over them first, then this script on its head node.")
    if model.facts.experts and layout.dp > 1 and layout.ep == 1 and layout.etp > 1:
        notes.append("Without expert parallelism vLLM cuts experts over all tensor and data ranks.")
    lines = ["#!/usr/bin/env bash", *common.headline(model, plan), *(f"# Note: {note}" for note in notes)]
    lines.append("set -euo pipefail")
    if layout.pp > 1 and not common.is_even(stages):
        lines.append(f"export VLLM_PP_LAYER_PARTITION={','.join(map(str, stages))}")
    lines.append(f"vllm serve {shlex.quote(str(model.checkpoint.path))} \\")
    lines += [f"  {line} \\" for line in common.option_lines(options)]
    lines.append('  "$@"')
    return Export({"vllm.sh": "\n".join(lines) + "\n"}, notes)


def _instance(model: PlanModel, layout: Layout) -> Layout:
    """One of the instances of a mixture: data-parallel ranks of one vLLM share their experts."""
    if not model.facts.experts or layout.cp > 1 or layout.dp % layout.edp:
        return layout
    return replace(layout, dp=layout.dp // layout.edp)


def _cases(model: PlanModel, layout: Layout, workload: Workload) -> Cases:
    ranks = layout.tp * layout.dp * layout.cp
    heads = min((attention.heads for attention in model.facts.attends), default=layout.tp)
    return [
        (workload.mode != "serve", "it serves, this plan trains"),
        (layout.chunks > 1, f"chunks={layout.chunks}: a rank has one stage"),
        (layout.ep not in (1, ranks), f"ep={layout.ep}: it spreads experts over all tp * dp * cp = {ranks} ranks"),
        (layout.ep > 1 and layout.etp > 1, f"experts are whole with ep, not cut by etp={layout.etp}"),
        (heads % layout.tp, f"tp={layout.tp} does not divide {heads} heads"),
        (layout.offload != "none", "weights stay on the device"),
        (layout.zero == 3 and layout.dp > 1, "it shards nothing over data-parallel ranks (zero=3)"),
    ]

"""A Python file that runs the plan with torch alone: DTensor, FSDP2 and torch.distributed.pipelining on a Hugging Face model.

Its code is `fsdp2_template.py` with the plan written in. `--execute-check` runs the very same file.
"""

from __future__ import annotations

import pprint
from importlib.resources import files

from tersor.formats.cluster import Cluster
from tersor.ops.model.facts import TEXT_CONFIGS
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.export.styles import Styles, styles, why_not
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "FSDP2"
MARK = "PLAN = {}  # the exporter writes the plan here\n"


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`fsdp2_plan.py`. Raises Unsupported."""
    found = styles(model, layout.etp)
    several = any(isinstance(model.checkpoint.config.get(key), dict) for key in TEXT_CONFIGS)
    more: Cases = [
        (workload.mode != "train", "it trains, this plan serves"),
        (several, "the file knows models of text alone"),
    ]
    common.require(NAME, [*more, *cases(model, layout, found)])
    plan = settings(layout, found, model.facts.block_prefix)
    plan |= {
        "stages": list(common.stages_of(model, layout)),
        "micro_batches": layout.micro_batches(workload.global_batch),
        "seq_len": workload.seq_len,
        "precision": workload.precision,
    }
    launch = common.torchrun(layout, cluster, f"fsdp2_plan.py {model.checkpoint.path}")
    head = [*common.headline(model, layout), *(f"# {line.removeprefix('# ')}" for line in launch)]
    return Export({"fsdp2_plan.py": "\n".join(head) + "\n" + code(plan)}, _notes(model, layout, workload, found))


def settings(layout: Layout, found: Styles, blocks: str) -> dict[str, object]:
    """PLAN of the file, without what belongs to a workload."""
    return {
        **{name: getattr(layout, name) for name in ("tp", "pp", "dp", "replicate", "zero", "ep", "chunks", "schedule")},
        **{name: getattr(layout, name) for name in ("micro_batch", "recompute", "offload")},
        "blocks": blocks,
        "tp_plan": dict(found.tensor) if layout.tp > 1 else {},
        "ep_plan": dict(found.expert) if layout.ep > 1 else {},
    }


def code(plan: dict[str, object]) -> str:
    """The file without its first lines."""
    text = files("tersor.ops.plan_parallel.export").joinpath("fsdp2_template.py").read_text("utf-8")
    before, mark, after = text.partition(MARK)
    if not mark:
        raise RuntimeError("fsdp2_template.py has no place for the plan")
    return f"{before}PLAN = {pprint.pformat(plan, width=110, sort_dicts=False)}\n{after}"


def cases(model: PlanModel, layout: Layout, found: Styles) -> Cases:
    """What of a layout the file cannot do."""
    facts, ranks, experts = model.facts, layout.dp * layout.tp, layout.ep > 1
    cut, front = why_not(model, layout.tp, found), model.pieces[0].weights
    return [
        (cut, cut),
        (layout.pp > 1 and len(front) > 1, f"its stages begin with an embedding of tokens alone, not with {front[-1]}"),
        (layout.cp > 1, f"context parallelism (cp={layout.cp}): the model's own attention does not know of it"),
        (
            layout.zero == 1 and layout.dp > 1,
            "FSDP2 shards gradients with the optimizer states (zero=2), or nothing (zero=0)",
        ),
        (common.loses_gradients(layout), common.LOST_GRADIENTS),
        (
            facts.experts and layout.etp > 1 and (experts or layout.etp != layout.tp),
            f"etp={layout.etp}: experts are whole with ep, and cut tp ways without",
        ),
        (
            experts and (layout.ep % layout.tp or ranks % layout.ep),
            f"ep={layout.ep} is not a multiple of tp={layout.tp} that divides dp * tp = {ranks}",
        ),
        (experts and not found.expert, f"transformers has no expert-parallel plan for {facts.family}"),
        (experts and layout.replicate > 1, f"replicas of shards (replicate={layout.replicate}) with ep={layout.ep}"),
        (
            layout.recompute == "attention",
            "recomputing attention alone: fused attention keeps nothing that it would save",
        ),
        (layout.offload == "optimizer", "FSDP2 offloads weights, gradients and optimizer states together"),
        (
            layout.offload == "states" and (layout.zero < 2 or layout.dp == 1),
            "FSDP2 offloads what it shards: zero=2 or 3, dp > 1",
        ),
        (layout.offload != "none" and layout.tier != "cpu", "it offloads to host memory, not to a disk"),
    ]


def _notes(model: PlanModel, layout: Layout, workload: Workload, found: Styles) -> list[str]:
    notes = []
    if layout.tp > 1:
        notes.append(
            "Activations between the blocks are whole on every rank of tp (no sequence parallelism), and logits are gathered: "
            "more memory than the plan counts."
        )
        notes.append(f"What is cut by columns and rows is from {found.source}.")
    if model.facts.experts or "packed_colwise" in found.tensor.values():
        notes.append("Experts are cut with transformers.distributed: transformers 5.21 or newer.")
    if layout.pp > 1 and model.facts.tied:
        notes.append("First and last stage hold the shared table each, and sum its gradients.")
    if layout.dp == 1 and workload.master:
        notes.append(
            "With dp=1 there is no FSDP2, and so no float32 copy of the weights beside those in the plan's precision."
        )
    if workload.optimizer != "adamw":
        notes.append(f"The file trains with AdamW; replace it by {workload.optimizer}.")
    if workload.precision == "fp8":
        notes.append("Products are in bf16; fp8 ones need torchao's conversion of the linear layers.")
    notes.append("Each process loads the whole checkpoint before it cuts it: host memory for all processes of a node.")
    return notes

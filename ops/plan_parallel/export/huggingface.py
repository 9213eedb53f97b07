"""transformers' own DistributedConfig with `tp_plan` and `ep_plan`, and a few lines of Python that load the model with it."""

from __future__ import annotations

import json

from tersor.formats.cluster import Cluster
from tersor.ops.model.facts import TEXT_CONFIGS
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.export.styles import Styles, styles, why_not
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "transformers"
LOAD = '''\
"""Loads the model as planned. Start it with torchrun: see the last lines of this file."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

settings = json.loads(Path(__file__).with_name("tp_plan.json").read_text())
model = AutoModelForCausalLM.from_pretrained({path!r}, distributed_config=DistributedConfig(**settings), dtype="auto")
'''


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`tp_plan.json` and `huggingface_load.py`. Raises Unsupported."""
    found = styles(model, layout.etp)
    common.require(NAME, _cases(model, layout, workload, found))
    replicas = layout.dp if layout.zero == 0 else layout.replicate
    settings: dict[str, object] = {
        "tp_size": layout.tp,
        "pp_size": layout.pp,
        "fsdp_size": layout.dp // replicas,
        "dp_replicate_size": replicas,
        "ep_size": layout.ep,
    }
    several = any(isinstance(model.checkpoint.config.get(key), dict) for key in TEXT_CONFIGS)
    if layout.tp > 1:
        # Rules with these names take the place of the model's own, whose modules have other names beside a tower.
        settings["tp_plan"] = "auto" if several else found.tensor
    if layout.ep > 1 and found.expert and not several:
        settings["ep_plan"] = found.expert
    if layout.offload == "states":
        settings["fsdp_cpu_offload"] = True
    notes = [f"Styles are from {found.source}."]
    if layout.tp > 1:
        notes.append("Activations between the blocks are whole on every rank of tp, and logits are gathered.")
    if layout.pp > 1:
        notes.append("The pipeline of transformers runs one stage at a time.")
    launch = common.torchrun(layout, cluster, "huggingface_load.py")
    code = [LOAD.format(path=str(model.checkpoint.path)), *common.headline(model, layout)]
    code += [f"# {line.removeprefix('# ')}" for line in launch]
    files = {"tp_plan.json": json.dumps(settings, indent=2) + "\n", "huggingface_load.py": "\n".join(code) + "\n"}
    return Export(files, notes)


def _cases(model: PlanModel, layout: Layout, workload: Workload, found: Styles) -> Cases:
    pipeline, experts = layout.pp > 1, layout.ep > 1
    each = model.facts.layers // layout.pp
    uneven = any(blocks != each for blocks in common.stages_of(model, layout)[:-1])
    cut = why_not(model, layout.tp, found)
    return [
        (cut, cut),
        (
            layout.dp > 1 and layout.zero in (1, 2),
            "its FSDP shards weights with all else (zero=3), or nothing (zero=0)",
        ),
        (layout.cp > 1, f"it has no context parallelism (cp={layout.cp})"),
        (
            pipeline and workload.mode == "train",
            "its pipeline runs one stage at a time, which is no schedule to train with",
        ),
        (pipeline and layout.dp > 1, "pipeline and data parallelism do not go together in it"),
        (pipeline and experts, "pipeline and expert parallelism do not go together in it"),
        (layout.chunks > 1, f"chunks={layout.chunks}: a rank has one stage"),
        (layout.chunks == 1 and uneven, "its stages have the same number of blocks, the last one what is left over"),
        (experts and layout.ep % layout.tp, f"ep={layout.ep} is not a multiple of tp={layout.tp}"),
        (
            layout.etp > 1 and (experts or layout.etp != layout.tp),
            f"etp={layout.etp}: experts are whole with ep, and cut tp ways without",
        ),
        (layout.offload == "optimizer", "it offloads weights, gradients and optimizer states together"),
        (layout.offload != "none" and layout.tier != "cpu", "it offloads to host memory, not to a disk"),
    ]

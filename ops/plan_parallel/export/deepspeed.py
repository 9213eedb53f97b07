"""DeepSpeed's JSON configuration: ZeRO, AutoTP, AutoEP, offload and batch for a Hugging Face model."""

from __future__ import annotations

import json

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "DeepSpeed"
OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD"}
EXPERT_PRESETS = {"mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"}


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`ds_config.json`. Raises Unsupported."""
    common.require(NAME, _cases(model, layout, workload))
    common.nodes_of(layout, cluster)
    hidden = model.facts.hidden
    settings: dict[str, object] = {
        "train_batch_size": workload.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches(workload.global_batch),
        "zero_allow_untested_optimizer": True,
    }
    if workload.precision in ("bf16", "fp16", "fp8"):
        settings["fp16" if workload.precision == "fp16" else "bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "bf16" if workload.gradient_bytes == 2 else "fp32"}
    # The sizes that transformers fills in for "auto".
    zero: dict[str, object] = {"stage": layout.zero, "overlap_comm": True, "contiguous_gradients": True}
    zero |= {"reduce_scatter": True, "reduce_bucket_size": hidden * hidden}
    if layout.zero == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 9 * hidden * hidden // 10,
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        if layout.replicate > 1:
            zero["mics_shard_size"] = layout.dp // layout.replicate
    if layout.offload != "none":
        place: dict[str, object] = {"device": layout.tier, "pin_memory": True}
        if layout.tier == "nvme":
            place["nvme_path"] = "/local_nvme"
        zero["offload_optimizer"] = place
        if layout.offload == "states":
            zero["offload_param"] = dict(place)
    settings["zero_optimization"] = zero
    if layout.tp > 1:
        settings["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.ep > 1:
        settings["expert_parallel"] = {"enabled": True, "autoep_size": layout.ep, "preset_model": model.facts.family}
    notes = _notes(layout, workload)
    return Export({"ds_config.json": json.dumps(settings, indent=2) + "\n"}, notes)


def _cases(model: PlanModel, layout: Layout, workload: Workload) -> Cases:
    family, experts, offloads = model.facts.family, layout.ep > 1, layout.offload != "none"
    needed = 1 if layout.offload == "optimizer" else 3
    return [
        (workload.mode != "train", "it trains, this plan serves"),
        (layout.pp > 1, f"it has no pipeline for Hugging Face models (pp={layout.pp})"),
        (layout.cp > 1, f"context parallelism (cp={layout.cp}) needs Ulysses attention in the model's own code"),
        (
            layout.replicate > 1 and layout.zero in (1, 2),
            f"replicas of shards (replicate={layout.replicate}) need zero=3 (MiCS)",
        ),
        (experts and layout.replicate > 1 and layout.zero == 3, "AutoEP and MiCS (replicate) do not go together"),
        (experts and layout.tp > 1, "AutoEP and AutoTP do not go together"),
        (experts and layout.etp > 1, f"AutoEP does not cut experts themselves (etp={layout.etp})"),
        (experts and family not in EXPERT_PRESETS, f"AutoEP has no preset for {family}"),
        (
            model.facts.experts and layout.tp > 1 and not experts and layout.etp != layout.tp,
            f"AutoTP cuts experts like the rest: etp={layout.tp}, not {layout.etp}",
        ),
        (offloads and layout.zero < needed, f"offload of {layout.offload} needs zero={needed} or more"),
        (offloads and layout.tier == "nvme" and layout.zero < 3, "only zero=3 offloads to a disk"),
    ]


def _notes(layout: Layout, workload: Workload) -> list[str]:
    notes = []
    if workload.optimizer in OPTIMIZERS:
        notes.append(
            f"The optimizer ({OPTIMIZERS[workload.optimizer]}) and its learning rate are the training script's."
        )
    else:
        notes.append(f"DeepSpeed has no optimizer {workload.optimizer}: the training script brings it.")
    if layout.recompute != "none":
        notes.append(
            "Recomputation is the model's: model.gradient_checkpointing_enable(), which recomputes whole blocks."
        )
    if layout.tp > 1:
        notes.append("AutoTP keeps activations between the blocks whole on every rank: no sequence parallelism.")
    if layout.zero == 3 and layout.replicate > 1:
        notes.append("mics_shard_size needs the model built under deepspeed.zero.MiCS_Init.")
    if layout.offload != "none" and layout.tier == "nvme":
        notes.append("Set nvme_path to a folder on a local disk.")
    if workload.precision == "fp8":
        notes.append("DeepSpeed has no fp8 products for Hugging Face models: bf16 is set.")
    return notes

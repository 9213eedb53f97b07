"""torchtitan: a Python module with a configuration function, which is how runs are described since 2026, and its flags.

Flags (`--parallelism.…`, `--training.…`) still take precedence over a configuration, but their set is frozen, and the
modules of uneven stages have none. So the module says everything, and the flags are there for who has a configuration.

FSDP2 shards weights, gradients and optimizer states together over dp_shard * cp ranks: `never` resharding after the forward
is ZeRO 2, `always` ZeRO 3. Experts lie on what ep borrows from dp_shard, cp and tp, as in this tool with etp=1.
"""

from __future__ import annotations

from tersor.formats.cluster import Cluster
from tersor.ops.plan_parallel.export import common
from tersor.ops.plan_parallel.export.common import Cases, Export
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

NAME = "torchtitan"
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}
RECOMPUTE = {"none": "none", "full": "full", "attention": "selective"}
POLICIES = {"full": "FullAC", "selective": "SelectiveAC"}
# (family, blocks, hidden size) of models that torchtitan defines itself: its module and configuration.
DEFINED = {
    ("llama", 32, 4096): ("llama3", "llama3_8b"),
    ("llama", 80, 8192): ("llama3", "llama3_70b"),
    ("llama", 126, 16384): ("llama3", "llama3_405b"),
    ("qwen3", 28, 1024): ("qwen3", "qwen3_0_6b"),
    ("qwen3", 28, 2048): ("qwen3", "qwen3_1_7b"),
    ("qwen3", 40, 5120): ("qwen3", "qwen3_14b"),
    ("qwen3", 64, 5120): ("qwen3", "qwen3_32b"),
    ("qwen3_moe", 48, 2048): ("qwen3", "qwen3_30b_a3b"),
    ("deepseek_v3", 61, 7168): ("deepseek_v3", "deepseek_v3_671b"),
}
BACKEND = "transformers_modeling_backend"


def export(model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster) -> Export:
    """`torchtitan_plan.py`, `torchtitan.flags` and `torchtitan.sh`. Raises Unsupported."""
    module, config = _base(model)
    common.require(NAME, _cases(model, layout, workload, module))
    settings, notes = _settings(model, layout, workload, module)
    stages = common.stages_of(model, layout)
    parts = _modules(stages, rotary=module == BACKEND) if layout.pp > 1 else []
    if not common.is_even(stages):
        notes.append("Uneven stages have no flag: run with torchtitan_plan.py.")
    if layout.recompute == "attention":
        notes.append("torchtitan does not recompute attention alone; `selective` is set, which keeps matrix products.")
    policy = RECOMPUTE[layout.recompute]
    # The policy is a subcommand, which comes last on a command line.
    flags = [
        f"--module {module}",
        f"--config {config}",
        *common.option_lines(settings),
        f"activation-checkpoint:{policy}",
    ]
    head = [*common.headline(model, layout), *(f"# Note: {note}" for note in notes)]
    script = [
        "#!/usr/bin/env bash",
        *head,
        "set -euo pipefail",
        'export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}"',
        *common.torchrun(layout, cluster, "-m torchtitan.train \\"),
        '  --module torchtitan_plan --config planned "$@"',
    ]
    files = {
        "torchtitan_plan.py": "\n".join([*head, *_function(module, config, settings, parts, policy)]) + "\n",
        "torchtitan.flags": "\n".join(flags) + "\n",
        "torchtitan.sh": "\n".join(script) + "\n",
    }
    return Export(files, notes)


def _function(module: str, config: str, settings: dict[str, object], parts: list[list[str]], policy: str) -> list[str]:
    """Of Python: a function that takes a configuration of torchtitan and changes what the plan says."""
    place = "experiments" if module == BACKEND else "models"
    lines = [f"from torchtitan.{place}.{module}.config_registry import {config}"]
    if policy != "none":
        lines.insert(0, f"from torchtitan.distributed.activation_checkpoint import {POLICIES[policy]}")
    lines += ["", "", "def planned():", f"    config = {config}()"]
    lines += [f"    config.{name} = {value!r}" for name, value in settings.items()]
    lines.append(f"    config.activation_checkpoint = {POLICIES[policy] + '.Config()' if policy != 'none' else None}")
    if parts:
        lines += [
            "    config.parallelism.module_fqns_per_model_part = [",
            *(f"        {part!r}," for part in parts),
            "    ]",
        ]
    return [*lines, "    return config"]


def _base(model: PlanModel) -> tuple[str, str]:
    facts = model.facts
    vocab_of_llama_3 = facts.family != "llama" or (facts.vocab or 0) in range(128000, 128513)
    known = DEFINED.get((facts.family, facts.layers, facts.hidden))
    if known and vocab_of_llama_3:
        return known
    return BACKEND, f"{BACKEND}_full_moe" if facts.experts else f"{BACKEND}_full"


def _cases(model: PlanModel, layout: Layout, workload: Workload, module: str) -> Cases:
    tokens, pipeline, moe = layout.micro_batch * workload.seq_len, layout.pp > 1, model.facts.experts > 0
    shards = layout.dp * layout.cp > 1
    least = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    return [
        (workload.mode != "train", "it trains, this plan serves"),
        (shards and layout.zero == 1, "FSDP2 shards gradients with the optimizer states (zero=2), or nothing (zero=0)"),
        (pipeline and layout.schedule == "zb-h1", "its zero-bubble schedules have two stages on a rank: zbv"),
        (pipeline and common.loses_gradients(layout), common.LOST_GRADIENTS),
        (
            moe and layout.etp != (layout.tp if layout.ep == 1 else 1),
            f"etp={layout.etp}: experts are whole with ep, and cut tp ways without",
        ),
        (moe and pipeline and module == BACKEND, f"{BACKEND} has no pipeline for models with experts"),
        (layout.offload == "optimizer", "it offloads weights, gradients and optimizer states together"),
        (layout.offload != "none" and layout.tier != "cpu", "it offloads to host memory, not to a disk"),
        (workload.optimizer != "adamw", f"it has no optimizer {workload.optimizer} for a whole model"),
        (workload.precision == "fp16", "it has no fp16"),
        (tokens % least, f"{tokens} tokens of a micro-batch are not a multiple of {least} (tp, and 2 * cp)"),
    ]


def _settings(model: PlanModel, layout: Layout, workload: Workload, module: str) -> tuple[dict[str, object], list[str]]:
    micro_batches, notes = layout.micro_batches(workload.global_batch), []
    shard = 1 if layout.zero == 0 else layout.dp // layout.replicate
    settings: dict[str, object] = {
        "parallelism.data_parallel_replicate_degree": layout.dp // shard,
        "parallelism.data_parallel_shard_degree": shard,
        "parallelism.fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "parallelism.tensor_parallel_degree": layout.tp,
        "parallelism.context_parallel_degree": layout.cp,
        "parallelism.pipeline_parallel_degree": layout.pp,
        "parallelism.expert_parallel_degree": layout.ep,
        "training.num_tokens_per_microbatch_per_dp_rank": layout.micro_batch * workload.seq_len,
        "training.num_tokens_per_train_step": workload.global_batch * workload.seq_len,
        "training.max_context_length": workload.seq_len,
        "training.dtype": "float32" if workload.master else "bfloat16",
        "training.mixed_precision_param": "float32" if workload.precision == "fp32" else "bfloat16",
    }
    if layout.zero == 0 and layout.cp > 1:
        notes.append(f"torchtitan shards weights over the {layout.cp} context ranks whatever the plan says (zero=0).")
    if layout.pp > 1:
        settings |= {
            "parallelism.pipeline_parallel_schedule": SCHEDULES[layout.schedule],
            "parallelism.num_pp_microbatches": micro_batches,
        }
    if layout.pp > 1 or layout.ep > 1:
        settings["training.disable_cuda_graphs"] = True
    if layout.offload == "states":
        settings["training.enable_cpu_offload"] = True
    if workload.tokens is not None:
        settings["training.steps"] = -(-workload.tokens // (workload.global_batch * workload.seq_len))
    if workload.precision == "fp8":
        notes.append(
            "fp8 products come from a converter in the configuration (Float8LinearConverter), which is not set here."
        )
    settings["hf_assets_path"] = str(model.checkpoint.path)
    if module == BACKEND:
        settings["hf_model"] = str(model.checkpoint.path)
        settings["parallelism.spmd_backend"] = "partial_dtensor"
        notes.append(f"torchtitan does not define this model itself; {BACKEND} takes it from transformers.")
    return settings, notes


def _modules(stages: tuple[int, ...], rotary: bool) -> list[list[str]]:
    """The modules of each stage, by the names torchtitan gives them."""
    parts, block = [], 0
    for stage, blocks in enumerate(stages):
        names = ["tok_embeddings"] if stage == 0 else []
        names += [f"layers.{index}" for index in range(block, block + blocks)]
        names += ["norm", "lm_head"] if stage == len(stages) - 1 else []
        parts.append([*names, "rotary_emb"] if rotary else names)
        block += blocks
    return parts

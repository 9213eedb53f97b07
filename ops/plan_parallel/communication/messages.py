"""How much a step sends over each axis of a layout, for the placement of ranks on unequal links."""

from __future__ import annotations

from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

HIDDEN_BYTES = 2  # of a number between blocks


def message_bytes(model: PlanModel, layout: Layout, workload: Workload) -> dict[str, float]:
    """Bytes of one step by axis, as `mapping.map_ranks` takes them: hidden states over a stage boundary (`pp`), gradients of
    a rank (`shard`, `replicate`, and `edp` of experts), tokens to experts (`ep`), keys and values (`cp`)."""
    facts = model.facts
    tokens = workload.global_batch * workload.seq_len / layout.dp / layout.cp  # of a pipeline, in a step
    experts = sum(weight.params for name, weight in model.stored.items() if model.kinds[name] == "experts")
    dense = sum(weight.params for weight in model.stored.values()) - experts
    per_rank = layout.tp * layout.pp
    gradients = dense / per_rank * workload.gradient_bytes
    found = {"shard": gradients, "replicate": gradients / layout.shard_ranks}
    if layout.pp > 1:
        found["pp"] = tokens * facts.hidden * HIDDEN_BYTES / layout.tp
    if layout.cp > 1:
        widths = sum(attention.kv_heads * (attention.key_dim + attention.value_dim) for attention in facts.attends)
        found["cp"] = tokens * layout.cp * widths / per_rank * HIDDEN_BYTES
    if experts:
        found["edp"] = experts / (layout.pp * layout.ep * layout.etp) * workload.gradient_bytes
        if layout.ep > 1:
            sent = 2 * facts.layers / layout.pp * facts.experts_per_token  # there and back in every block
            found["ep"] = tokens / layout.tp * facts.hidden * HIDDEN_BYTES * sent
    return found

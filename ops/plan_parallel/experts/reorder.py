"""`--experts`: a checkpoint whose experts stand where a plan wants them, from a trace of what tokens were sent to."""

from __future__ import annotations

from pathlib import Path

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.routing import read_routing, write_expert_map
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.experts.crossings import judge
from tersor.ops.plan_parallel.experts.permute import Permuted, router_groups
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel

MAP_FILE = "expert_map.json"


def reorder_experts(
    path: Path, model: PlanModel, layout: Layout, links: Links, output: Path, seed: int
) -> tuple[PlanModel, dict]:
    """Writes the checkpoint to `output`, its map beside the weights. Returns it, and numbers for plan.json.

    Raises TersorError where the model or the plan has nothing to place.
    """
    if layout.ep == 1:
        raise TersorError(
            "--experts places experts on the ranks of expert parallelism, the plan has none (ep=1)",
            "leave --experts out, or fix a degree: --fix ep=8",
        )
    routing = read_routing(path, model.facts.experts or None)
    nodes = links.span(layout, "ep")[1]
    placement, numbers = judge(routing, layout.ep, nodes, router_groups(model.checkpoint.config or {}), seed=seed)
    permuted = Permuted(model, placement.orders())
    permuted.write(output)
    orders = {mixture.module: order for mixture, order in zip(permuted.mixtures, placement.orders(), strict=True)}
    write_expert_map(output / MAP_FILE, orders, layout.ep, nodes)
    return PlanModel(Checkpoint(output)), {"map": f"{output.name}/{MAP_FILE}", **numbers}

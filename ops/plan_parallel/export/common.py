"""What exporters share: their result, why a runtime cannot run a plan, and how processes are started."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards.layout import even_stages


class Export(NamedTuple):
    """Text by file name, and what a user should know: where the runtime does something else than the plan says."""

    files: dict[str, str]
    notes: list[str]


class Unsupported(TersorError):
    """The runtime cannot run this plan. `reasons` says what of it, one sentence each."""

    def __init__(self, runtime: str, reasons: list[str]):
        why = "; ".join(reasons)
        super().__init__(f"{runtime} cannot run this plan: {why}", "pin another choice, or use another export")
        self.runtime, self.reasons = runtime, reasons


Cases = list[tuple[object, str]]  # (whether it is so, why a plan cannot be run then)


def reasons(cases: Cases) -> list[str]:
    return [text for holds, text in cases if holds]


def require(runtime: str, cases: Cases) -> None:
    """Raises Unsupported where one of the cases holds."""
    if found := reasons(cases):
        raise Unsupported(runtime, found)


# Found by running it (torch 2.13): such a backward looks for the weights of a stage after FSDP2 has freed them.
LOST_GRADIENTS = (
    "schedules that split the backward lose gradients of weights that FSDP2 frees after the forward: zero=2"
)


def loses_gradients(layout: Layout) -> bool:
    return layout.pp > 1 and layout.dp > 1 and layout.zero == 3 and layout.schedule in ("zb-h1", "zbv")


def stages_of(model: PlanModel, layout: Layout) -> tuple[int, ...]:
    """Blocks of every stage, in model order."""
    return layout.stages or even_stages(model.facts.layers, layout.pp * layout.chunks)


def is_even(stages: tuple[int, ...]) -> bool:
    return len(set(stages)) == 1


def nodes_of(layout: Layout, cluster: Cluster) -> tuple[int, int]:
    """(nodes, processes on each). Raises TersorError where the ranks do not fill the nodes they are on."""
    if layout.world <= cluster.devices_per_node:
        return 1, layout.world
    nodes, over = divmod(layout.world, cluster.devices_per_node)
    if over:
        raise TersorError(
            f"{layout.world} ranks do not fill nodes of {cluster.devices_per_node} devices",
            "launchers start the same number of processes on every node: choose degrees whose product is a multiple",
        )
    return nodes, cluster.devices_per_node


def torchrun(layout: Layout, cluster: Cluster, what: str) -> list[str]:
    """The lines of a launch command up to the script; more than one node take theirs from the environment."""
    nodes, each = nodes_of(layout, cluster)
    if nodes == 1:
        return [f"torchrun --standalone --nproc-per-node {each} {what}"]
    return [
        "# On every node, with NODE_RANK from 0 on and MASTER_ADDR the name of the first node.",
        f"torchrun --nnodes {nodes} --nproc-per-node {each} --node-rank ${{NODE_RANK:?}} \\",
        f"  --rdzv-backend static --master-addr ${{MASTER_ADDR:?}} --master-port ${{MASTER_PORT:-29500}} {what}",
    ]


def option_lines(options: dict[str, object]) -> list[str]:
    """`--name value` for each option; switches have the value True, lists several words."""
    lines = []
    for name, value in options.items():
        words = [] if value is True else value if isinstance(value, list | tuple) else [value]
        lines.append(" ".join([f"--{name}", *(shlex.quote(str(word)) for word in words)]))
    return lines


def shell_array(name: str, options: dict[str, object]) -> list[str]:
    """A bash array of options, one a line."""
    return [f"{name}=(", *(f"  {line}" for line in option_lines(options)), ")"]


def headline(model: PlanModel, layout: Layout, mark: str = "#") -> list[str]:
    return [
        f"{mark} Written by tersor plan-parallel for {model.facts.architecture} ({model.facts.layers} blocks).",
        f"{mark} Layout: {layout.describe()} ({layout.world} devices).",
    ]

"""All exports of a plan: files in `OUT/exports/RUNTIME/`, and for every runtime what it does otherwise, or why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.export import deepspeed, fsdp2, huggingface, megatron, torchtitan, vllm
from tersor.ops.plan_parallel.export.common import Export, Unsupported
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

Exporter = Callable[[PlanModel, Layout, Workload, Cluster], Export]
EXPORTERS: dict[str, Exporter] = {
    "megatron": megatron.export,
    "torchtitan": torchtitan.export,
    "deepspeed": deepspeed.export,
    "fsdp2": fsdp2.export,
    "huggingface": huggingface.export,
    "vllm": vllm.export,
}


def export(
    runtime: str, model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster
) -> Export | Unsupported:
    """The runtime's files for a plan, or why there are none."""
    try:
        return EXPORTERS[runtime](model, layout, workload, cluster)
    except Unsupported as error:
        return error
    except TersorError as error:
        return Unsupported(runtime, [str(error)])


def accepted_by(runtime: str, model: PlanModel, workload: Workload, cluster: Cluster) -> Callable[[Layout], bool]:
    """Whether the runtime can run a layout."""
    return lambda layout: isinstance(export(runtime, model, layout, workload, cluster), Export)


def exports(
    model: PlanModel, layout: Layout, workload: Workload, cluster: Cluster, instead: Mapping[str, Layout] | None = None
) -> dict[str, Export | Unsupported]:
    """For every runtime its files, or why there are none. `instead`: other plans for some of them."""
    layouts = dict.fromkeys(EXPORTERS, layout) | dict(instead or {})
    return {name: export(name, model, layouts[name], workload, cluster) for name in EXPORTERS}


def write_exports(
    folder: Path,
    model: PlanModel,
    layout: Layout,
    workload: Workload,
    cluster: Cluster,
    instead: Mapping[str, Layout] | None = None,
) -> dict[str, Export | Unsupported]:
    """Into `folder/exports`, a folder for each runtime that can run the plan, or the one it has instead."""
    found = exports(model, layout, workload, cluster, instead)
    for name, result in found.items():
        if isinstance(result, Export):
            place = folder / "exports" / name
            place.mkdir(parents=True, exist_ok=True)
            for file, text in result.files.items():
                (place / file).write_text(text, "utf-8")
                if file.endswith(".sh"):
                    (place / file).chmod(0o755)
    return found


def summary(found: dict[str, Export | Unsupported]) -> dict[str, dict[str, object]]:
    """For plan.json: `files` and `notes`, or `unsupported` with the reasons."""
    return {
        name: {"files": sorted(result.files), "notes": result.notes}
        if isinstance(result, Export)
        else {"unsupported": result.reasons}
        for name, result in found.items()
    }

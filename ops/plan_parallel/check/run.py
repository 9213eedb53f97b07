"""Runs a plan on a shrunken copy of its model, over a few processes on the CPU, and compares it with one process.

The file that runs is the one that `export.fsdp2` writes for the shrunken layout, under torchrun with gloo: DTensor tensor
parallelism, FSDP2, torch.distributed.pipelining's schedules, experts over ranks. Everything is float32, so that what
differs is the order of sums alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.ops.model.facts import TEXT_CONFIGS
from tersor.ops.plan_parallel.check.shrink import micro_batches, shrink_config, shrink_layouts
from tersor.ops.plan_parallel.export import common, fsdp2
from tersor.ops.plan_parallel.export.styles import Styles, styles
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel

NO_CHECK = "leave --execute-check out"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
SECONDS = 600


@dataclass(frozen=True)
class Run:
    """One layout that was run. `layouts`: where each parameter lay, as DTensor says it. Differences are relative:
    |loss - expected| / expected, and for the worst parameter |gradient - expected| / (|expected| + 0.001 |all of them|)."""

    layout: Layout
    loss: float
    loss_difference: float
    gradient_difference: float
    worst: str
    layouts: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.loss_difference <= LOSS_TOLERANCE and self.gradient_difference <= GRADIENT_TOLERANCE


@dataclass(frozen=True)
class CheckResult:
    """Differences are the largest of all runs; `layout` and `layouts` are those of the first one."""

    passed: bool
    loss_difference: float
    gradient_difference: float
    layouts: dict[str, str]
    layout: Layout
    notes: list[str]
    runs: tuple[Run, ...]


def execute_check(model: PlanModel, layout: Layout, processes: int = 4, seed: int = 0) -> CheckResult:
    """Raises TersorError for a model that this cannot train, and where a process fails, with its last words."""
    config = model.checkpoint.config
    if not model.facts.causal or model.facts.head is None:
        raise TersorError(f"{model.checkpoint.path}: {model.facts.architecture} predicts no next token", NO_CHECK)
    runnable, notes = _runnable(model, layout)
    layouts, more = shrink_layouts(runnable, processes)
    blocks = max(sum(small.stages) for small in layouts)
    for number, small in enumerate(layouts):  # all runs are of one model
        *before, last = small.stages
        layouts[number] = replace(small, stages=(*before, last + blocks - sum(small.stages)))
    plans = [_plan(model, small) for small in layouts]
    results = run_plans(shrink_config(config, layouts), plans, processes, seed)
    runs = tuple(_run(small, result) for small, result in zip(layouts, results, strict=True))
    tolerance = f"float32; tolerance {LOSS_TOLERANCE:g} of the loss and {GRADIENT_TOLERANCE:g} of each gradient."
    return CheckResult(
        passed=all(run.passed for run in runs),
        loss_difference=max(run.loss_difference for run in runs),
        gradient_difference=max(run.gradient_difference for run in runs),
        layouts=runs[0].layouts,
        layout=runs[0].layout,
        notes=[*notes, *more, tolerance],
        runs=runs,
    )


def _runnable(model: PlanModel, layout: Layout) -> tuple[Layout, list[str]]:
    """The layout without the kinds of parallelism that torch and transformers cannot do to this model, and why."""
    notes = []
    # More ranks than heads of keys and values are no question here: the shrunken model has as many heads as it needs.
    tp = min(layout.tp, *(attention.kv_heads for attention in model.facts.attends))
    kinds = (
        ("tp", Layout(tp=tp), {"tp": 1, "etp": 1, "dp": layout.dp * layout.tp}),
        ("pp", Layout(pp=layout.pp), {"pp": 1, "schedule": "1f1b", "chunks": 1, "stages": ()}),
        ("ep", Layout(dp=layout.ep, ep=layout.ep), {"ep": 1}),
    )
    for kind, alone, without in kinds:
        reasons = common.reasons(fsdp2.cases(model, alone, styles(model)))
        if getattr(layout, kind) > 1 and reasons:
            notes.append(f"{kind} is not run: {'; '.join(reasons)}.")
            layout = replace(layout, **without)
    if layout.offload != "none":
        notes.append("Offload is not run.")
    if layout.ep > 1 and layout.etp > 1:
        notes.append("Experts are whole on their ranks: they are not cut by etp as well.")
        layout = replace(layout, etp=1)
    return layout, notes


def _plan(model: PlanModel, layout: Layout) -> dict[str, object]:
    """PLAN of the file that runs a shrunken layout. The small model is one of text alone, whose blocks are `model.layers`."""
    found, blocks = styles(model, layout.etp), model.facts.block_prefix
    prefix, _, name = blocks.rpartition(".")
    if not prefix or any(isinstance(model.checkpoint.config.get(key), dict) for key in TEXT_CONFIGS):
        start = f"{prefix}." if prefix else ""
        named = [{f"model.{key.removeprefix(start)}": style for key, style in plan.items()} for plan in found[:2]]
        if model.facts.head:
            named[0]["lm_head"] = named[0].pop(f"model.{model.facts.head.removeprefix(start)}", "colwise_gather_output")
        found, blocks = Styles(*named, found.source), f"model.{name}"
    return fsdp2.settings(layout, found, blocks) | {
        "stages": list(layout.stages),
        "micro_batches": micro_batches(layout),
        "seq_len": 0,
        "precision": "fp32",
    }


def run_plans(config: dict, plans: list[dict], processes: int, seed: int) -> list[dict]:
    """What `worker.run` returns for each plan; all are run by the same processes, one after the other."""
    with tempfile.TemporaryDirectory(prefix="tersor-check-") as scratch:
        folder = Path(scratch)
        names = [f"fsdp2_plan_{number}.py" for number in range(len(plans))]
        for name, plan in zip(names, plans, strict=True):
            (folder / name).write_text(fsdp2.code(plan), "utf-8")
        (folder / "job.json").write_text(json.dumps({"config": config, "seed": seed, "files": names}))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [*launch, "-m", "tersor.ops.plan_parallel.check.worker", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TersorError(
                f"the check has not ended in {SECONDS} seconds on {processes} processes",
                NO_CHECK,
            ) from error
        if done.returncode or not (folder / "result.json").is_file():
            raise TersorError(f"the check failed: {_last_words(done.stderr)}", NO_CHECK)
        return json.loads((folder / "result.json").read_text())


def _last_words(output: str) -> str:
    """The message of the first process that failed, out of torchrun's log."""
    lines = [line.strip() for line in output.splitlines()]
    errors = [
        line.partition("]: ")[2] or line for line in lines if "Error: " in line and "ChildFailedError" not in line
    ]
    # The other processes lose their connection then.
    first = [line for line in errors if "gloo" not in line and "onnection" not in line]
    return (first or errors or lines[-1:] or ["no output"])[0]


def _run(layout: Layout, result: dict) -> Run:
    worst = max(result["gradients"], key=lambda name: result["gradients"][name])
    difference = abs(result["loss"] - result["expected_loss"]) / abs(result["expected_loss"])
    return Run(
        layout=layout,
        loss=result["loss"],
        loss_difference=difference if math.isfinite(difference) else math.inf,
        gradient_difference=math.inf if result["unseen"] else result["gradients"][worst],
        worst=result["unseen"][0] if result["unseen"] else worst,
        layouts=result["layouts"],
    )

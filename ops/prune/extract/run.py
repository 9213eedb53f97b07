"""Slices a sub-network out of an elastic checkpoint, with the cutting and the proof of `--remove neurons` and `heads`."""

from __future__ import annotations

import torch
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.width.proof import prove
from tersor.ops.prune.width.run import Run


def decide(job: Job, plan: Plan) -> Plan:
    """Everything has been decided when the model was trained."""
    if plan.details.skeleton.device == job.device:
        job.skeleton = plan.details.skeleton
    return plan


class _Slices(Run):
    """`Run`, with zeros for blocks that go where shapes stay."""

    def cut(self, name: str) -> dict | None:
        if name not in self.details.silent or name in self.written:
            return super().cut(name)
        info = self.checkpoint.tensors[name]
        return self._write(name, torch.zeros(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype])))


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write every tensor that stays. Returns what the report says."""
    run = _Slices(job, plan, writer)
    run.blocks()
    run.remainder()
    job.progress("prove", 0, 1)
    prove(job, plan, writer, run.kept)
    details = plan.details
    return {
        "extracted": {
            "network": job.request.extract,
            "blocks": details.blocks,
            "kept": {group.module: f"{len(run.kept[group.module])} of {group.count}" for group in details.units},
        }
    }

"""The processes of a run: one, or those that torchrun started. torch.distributed does the work."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of them; all get the same answer."""
        return bool(self.sum(torch.tensor([float(flag)]))) if self.count > 1 else flag

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier()


def join(device: torch.device) -> Ranks:
    """The group that torchrun's environment describes, joined; one process alone without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if not torch.distributed.is_initialized():
        # Numbers of the loop travel on the CPU, parameters and gradients on the device they are on.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend)
    return Ranks(torch.distributed.get_rank(), count)


def leave(ranks: Ranks) -> None:
    if ranks.count > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(model: torch.nn.Module, blocks: torch.nn.ModuleList, ranks: Ranks, device: torch.device) -> None:
    """FSDP2 over all processes: every block gathers its weights when it runs, and the rest of the model stays whole for a
    step, because the losses read the head outside of the model's own forward pass."""
    if ranks.count == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.count,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)

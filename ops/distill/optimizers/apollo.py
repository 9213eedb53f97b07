"""APOLLO and APOLLO-Mini: Zhu et al., SGD-like Memory, AdamW-level Performance (arXiv:2412.05270).

AdamW's moments are kept of `R = P G`, a random projection of the gradient along its smaller dimension, and tell by how much
each channel of G (APOLLO) or G as a whole (Mini) has to be scaled. The norm-growth limiter is that of Fira
(arXiv:2410.01623)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from tersor.formats.errors import TersorError
from tersor.kernels.perturb import normal
from tersor.kernels.random_projection import PANEL, random_projection
from tersor.ops.distill.optimizers.base import LocalOptimizer, derived_seed, local, start_adamw, update_adamw
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RANK = 128  # of a matrix whose smaller dimension is at least 4 times that; a quarter of the dimension below
TINY = 1e-30  # keeps a channel without any gradient from dividing by 0


class Apollo(LocalOptimizer):
    """State of a matrix `[m, n]`, m <= n: two float32 `[rank, n]`, instead of two `[m, n]`.

    Groups whose `kind` is `adamw` (embeddings, output layer, everything of one dimension) take steps of AdamW. In the
    others each matrix, the last two dimensions of a parameter, has a P of its own, made again from `seed`, name and step
    whenever it is needed and another one every `gap` steps, when moments stay.

    `per`: "channel" or "tensor" (Mini). `rank` None: 128, at most a quarter of m; Mini: 1. `scale` None: m / rank. A
    projection keeps the norm of G, but an Adam direction of rank numbers has 1 / sqrt(m / rank) the norm of one of m
    numbers; the update carries sqrt(scale), so that with this default it is as long as AdamW's, and AdamW's learning rates
    fit. It is the 32 = 4096 / 128 of the authors' fine-tuning.

    Bias is corrected in the moments, before the limiter compares norms. The authors correct after it, so that what it holds
    back in the first steps is the growth of the correction.

    Sharded parameters (FSDP2, by rows or by matrices): where m is the dimension of columns the projection is local; where
    it is that of rows, each process projects its rows, the parts are added up, and all hold the same moments. Norms that
    need all rows are added up too. Other shardings raise TersorError.
    """

    project = staticmethod(random_projection)

    def __init__(
        self,
        params,
        lr: float,
        betas=(0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        scale: float | None = None,
        per: str = "channel",
        gap: int = 200,
        growth: float = 1.01,
        seed: int = 0,
    ):
        self.seed = seed
        settings = {"rank": rank, "scale": scale, "per": per, "gap": gap, "growth": growth, "kind": "apollo"}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | settings)

    def start(self, parameter: nn.Parameter, group: dict) -> dict:
        if group["kind"] == "adamw":
            return start_adamw(parameter)
        weight, rank = local(parameter.detach()), _rank(parameter, group)
        rows, columns = parameter.shape[-2:] if parameter.ndim > 2 else (len(weight), parameter.shape[1])
        shape = (rank, columns) if _side(parameter) == "left" else (rows, rank)
        count = math.prod(weight.shape[:-2])
        moments = {
            key: torch.zeros(count, *shape, dtype=torch.float32, device=weight.device)
            for key in ("exp_avg", "exp_avg_sq")
        }
        return moments | {"norm": torch.zeros(count, device=weight.device)}

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, state: dict, group: dict) -> None:
        if group["kind"] == "adamw":
            update_adamw(parameter, gradient, state, group)
            return
        step, betas, side = state["step"], group["betas"], _side(parameter)
        first, share = _shard(name, parameter)
        gradient = gradient.float().reshape(len(state["norm"]), *gradient.shape[-2:])
        rank, smaller = _rank(parameter, group), min(parameter.shape[-2:])
        period = (step - 1) // group["gap"]
        by_rows = parameter.ndim == 2  # what a shard cuts: rows of one matrix, else whole matrices
        projected = torch.empty_like(state["exp_avg"])
        for index, (matrix, out) in enumerate(zip(gradient, projected, strict=True)):
            seed = derived_seed(self.seed, name, 0 if by_rows else first + index, period)
            if share and by_rows and side == "left":
                out.copy_(_project_rows(matrix, rank, seed, first))
                dist.all_reduce(out, group=share)
            else:
                self.project(matrix, rank, seed, side, out=out)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(projected, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(projected, projected, value=1 - betas[1])
        direction = (m / (1 - betas[0] ** step)) / (v.sqrt() / math.sqrt(1 - betas[1] ** step) + group["eps"])

        total = share if by_rows else None  # processes that hold other rows of the same matrix
        if group["per"] == "channel":
            dims, over = (-2 if side == "left" else -1), None
        else:
            dims, over = (-2, -1), total if side == "right" else None
        factor = _norm(direction, dims, over) / _norm(projected, dims, over).clamp_min(TINY)
        norm = _norm(_norm(gradient, dims) * factor, (-2, -1), total).view(-1)
        limit = torch.where(state["norm"] > 0, state["norm"] * group["growth"], math.inf)
        shrink = torch.where(norm > limit, limit / norm, 1.0)
        state["norm"] = norm * shrink
        scale = smaller / rank if group["scale"] is None else group["scale"]
        factor = factor * shrink.view(-1, 1, 1) * (-group["lr"] * math.sqrt(scale))
        weight = local(parameter.detach())
        wide = weight.float().view(gradient.shape)  # the weight itself where it is float32
        if group["weight_decay"]:
            wide.mul_(1 - group["lr"] * group["weight_decay"])
        wide.addcmul_(gradient, factor)
        if weight.dtype != torch.float32:
            weight.copy_(wide.view(weight.shape))


def _side(parameter: nn.Parameter) -> str:
    """Which side of the gradient P multiplies, so that the smaller dimension becomes the rank."""
    return "left" if parameter.shape[-2] < parameter.shape[-1] else "right"


def _rank(parameter: nn.Parameter, group: dict) -> int:
    smaller = min(parameter.shape[-2:])
    return min(RANK, max(1, smaller // 4)) if group["rank"] is None else min(group["rank"], smaller)


def _shard(name: str, parameter: nn.Parameter) -> tuple[int, dist.ProcessGroup | None]:
    """First index of the first dimension that this process holds, and the processes that hold the others (None: none)."""
    if not isinstance(parameter, DTensor) or all(placement.is_replicate() for placement in parameter.placements):
        return 0, None
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise TersorError(
            f"{name}: apollo cannot project a tensor placed as {placements} over a mesh of {tuple(mesh.shape)}",
            "shard by rows over one group of processes, or use --optimizer adamw8bit",
        )
    size = parameter.shape[0]
    return min(mesh.get_local_rank() * -(-size // mesh.size()), size), mesh.get_group()


def _project_rows(gradient: Tensor, rank: int, seed: int, first: int) -> Tensor:
    """`P[:, first:first + rows] @ gradient`: what these rows add to `random_projection` of the whole matrix."""
    out = torch.zeros(rank, gradient.shape[1], device=gradient.device)
    step = max(1, PANEL // rank)
    for start in range(0, len(gradient), step):
        rows = gradient[start : start + step]
        panel = normal(seed, (first + start) * rank, len(rows) * rank, gradient.device).view(-1, rank)
        out.addmm_(panel.t(), rows, alpha=rank**-0.5)
    return out


def _norm(tensor: Tensor, dims: int | tuple[int, int], total: dist.ProcessGroup | None = None) -> Tensor:
    """Norm over `dims`, kept as 1; over the rows of all processes in `total`."""
    norm = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    if total is not None:
        dist.all_reduce(norm.square_(), group=total)
        norm.sqrt_()
    return norm

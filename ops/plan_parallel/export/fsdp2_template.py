"""Trains a model of transformers as planned: DTensor tensor parallelism, FSDP2, pipeline stages, experts.

    torchrun --nproc-per-node N fsdp2_plan.py MODEL

It needs torch and transformers alone. `Planned` cuts a model that is whole on every process; read `PLAN` for how. With
pipeline stages, the first stage takes token ids, the others hidden states, and all of them run the model's own forward.
"""

import argparse
import copy
import os
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

PLAN = {}  # the exporter writes the plan here

SCHEDULES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zb-h1": schedules.ScheduleInterleavedZeroBubble,  # with one stage a rank: ZB-H1
    "zbv": schedules.ScheduleZBVZeroBubble,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class SummedGradient(ParallelStyle):
    """A module that sees only this rank's heads, as norms of queries and keys do: every rank has all of its parameters,
    whose gradients are summed."""

    def _apply(self, module, mesh):
        group = mesh.get_group()

        class Sum(torch.autograd.Function):
            @staticmethod
            def forward(ctx, parameter):
                return parameter.view_as(parameter)

            @staticmethod
            def backward(ctx, gradient):
                gradient = gradient.clone()
                dist.all_reduce(gradient, group=group)
                return gradient

        # An entry in __dict__ is found before the parameter of the same name.
        def before(module, arguments):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module.__dict__[name] = Sum.apply(parameter)

        def after(module, arguments, output):
            for name in module._parameters:
                module.__dict__.pop(name, None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
        return module


STYLES = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": SummedGradient,
}


def matching(names: list[str], pattern: str) -> list[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if expression.fullmatch(name)]


class Meshes:
    """The ranks as a grid, pipeline slowest and tensor fastest, and again for experts."""

    def __init__(self, plan: dict, device: str):
        shards = 1 if plan["zero"] == 0 else plan["dp"] // plan["replicate"]
        self.dense = init_device_mesh(
            device,
            (plan["pp"], plan["dp"] // shards, shards, plan["tp"]),
            mesh_dim_names=("pp", "replicate", "shard", "tp"),
        )
        self.data, self.tensor, self.pipeline = self._data(self.dense), self.dense["tp"], self.dense["pp"]
        _, replica, part, _ = self.dense.get_coordinate()
        self.data_rank = replica * shards + part  # which of the `dp` parts of a batch is this rank's
        self.expert = self.expert_data = None
        if plan["ep"] > 1:
            left = plan["dp"] * plan["tp"] // plan["ep"]
            shards = 1 if plan["zero"] == 0 else left
            experts = init_device_mesh(
                device,
                (plan["pp"], left // shards, shards, plan["ep"]),
                mesh_dim_names=("pp", "replicate", "shard", "ep"),
            )
            self.expert, self.expert_data = experts["ep"], self._data(experts)

    @staticmethod
    def _data(mesh):
        return mesh["shard"] if mesh.size(1) == 1 else mesh["replicate", "shard"]


def parallelize(root: nn.Module, model: nn.Module, meshes: Meshes, plan: dict) -> None:
    """Cuts a model in place. `root` is what is called: the model itself, or the stage around a part of it."""
    tied = is_tied(model)
    experts = cut_experts(model, meshes, plan) if meshes.expert is not None else []
    if plan["tp"] > 1:
        cut_tensors(model, meshes, plan, experts)
        if tied:  # cutting has given both parameters of their own
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if plan["dp"] > 1:
        shard(root, model, meshes, plan, experts)


def cut_tensors(model: nn.Module, meshes: Meshes, plan: dict, experts: list[str]) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    others = {}
    for pattern, style in plan["tp_plan"].items():
        for name in matching([*modules, *parameters], pattern):
            elsewhere = isinstance(modules.get(name), nn.Identity)  # on another stage
            if elsewhere or any(f"{name}.".startswith(f"{expert}.") for expert in experts):
                continue
            if name in modules and style in STYLES:
                parallelize_module(modules[name], meshes.tensor, STYLES[style](), src_data_rank=None)
            else:
                others[name] = style
    if others:  # parameters that hold several experts, and what transformers alone knows how to cut
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        apply_tensor_parallelism(model, meshes.tensor, others)


def cut_experts(model: nn.Module, meshes: Meshes, plan: dict) -> list[str]:
    """Whole experts on each rank, which tokens travel to. Returns the modules that hold them."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    found = {}
    for pattern, style in plan["ep_plan"].items():
        found |= dict.fromkeys(matching([*modules, *parameters], pattern), style)
    apply_expert_parallelism(model, meshes.expert, meshes.tensor, found)
    return [name for name in found if name in modules]


def shard(root: nn.Module, model: nn.Module, meshes: Meshes, plan: dict, experts: list[str]) -> None:
    """FSDP2: a group for each block, one for what is left, experts over the ranks that hold the same ones."""
    precision = DTYPES.get(plan["precision"], torch.bfloat16)
    settings = {
        "reshard_after_forward": plan["zero"] == 3,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if plan["offload"] == "states" else OffloadPolicy(),
    }
    for name in experts:
        module = model.get_submodule(name)
        fully_shard(module, mesh=meshes.expert_data, **settings)
        # An expert here has seen the tokens of all data-parallel ranks that its group spans. A divisor that is not the
        # number of ranks makes FSDP2 scale inside of the reduction, which only NCCL can: sum, then divide.
        module.set_gradient_divide_factor(float(plan["dp"]))
        if meshes.expert_data.size(-1) > 1:
            module.set_force_sum_reduction_for_comms(True)
    for block in model.get_submodule(plan["blocks"]):
        fully_shard(block, mesh=meshes.data, **settings)
    fully_shard(root, mesh=meshes.data, **settings)


# --- pipeline stages --------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Some blocks of a model, behind the embedding or before the head where it is the first or the last stage."""

    def __init__(self, model: nn.Module, plan: dict, index: int):
        super().__init__()
        stages = plan["stages"]
        self.first, self.last = index == 0, index == len(stages) - 1
        self.start, count = sum(stages[:index]), stages[index]
        self.base, _, blocks = plan["blocks"].rpartition(".")
        self.model = twin(model)
        base = self.model
        for name in self.base.split(".") if self.base else []:
            base._modules[name] = twin(base.get_submodule(name))
            base = base._modules[name]
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[self.start : self.start + count]
        base.config = config
        embedding = model.get_input_embeddings()
        behind = False
        for name, child in list(base.named_children()):
            if name == blocks:
                base._modules[name] = nn.ModuleList(list(child)[self.start : self.start + count])
                behind = True
            elif child is embedding and not self.first:
                base._modules[name] = nn.Identity()
            elif behind and not self.last and any(True for _ in child.parameters()):
                base._modules[name] = nn.Identity()  # the last norm
            elif child is not embedding and not behind and any(True for _ in child.parameters()):
                raise ValueError(
                    f"{name} stands before the blocks: only an embedding of tokens can be a stage's beginning"
                )
        head = self.model.get_output_embeddings()
        if not self.last:
            self.model.set_output_embeddings(nn.Identity())
        elif is_tied(model):  # this stage has a copy of the shared table
            head = twin(head)
            head._parameters["weight"] = nn.Parameter(head.weight.detach().clone())
            self.model.set_output_embeddings(head)

    def forward(self, given):
        arguments = {"input_ids" if self.first else "inputs_embeds": given, "use_cache": False}
        if self.last:
            return self.model(**arguments).logits
        return self.model.get_submodule(self.base)(**arguments)[0]

    def name_in_model(self, name: str) -> str:
        """Of a parameter of this stage, whose blocks are counted from 0."""
        path = f"{self.base}." if self.base else ""
        found = re.fullmatch(rf"({re.escape(path)}\w+\.)(\d+)(\..+)", name.removeprefix("model."))
        if found is None:
            return name.removeprefix("model.")
        return f"{found[1]}{int(found[2]) + self.start}{found[3]}"


def twin(module: nn.Module) -> nn.Module:
    """The same module, children and parameters, whose children can be replaced without touching the original."""
    made = copy.copy(module)
    made.__dict__ = {
        key: copy.copy(value) if isinstance(value, dict) else value for key, value in made.__dict__.items()
    }
    return made


def stages_of_rank(plan: dict, rank: int) -> list[int]:
    """Stages of a pipeline rank: round and round; zbv goes there and back."""
    pp = plan["pp"]
    if plan["schedule"] == "zbv":
        return [rank, 2 * pp - 1 - rank]
    return [chunk * pp + rank for chunk in range(plan["chunks"])]


# --- training ---------------------------------------------------------------------------------------------------------


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


class Planned:
    """`model` cut as `plan` says. `parts` are what this process holds of it: the model, or its stages."""

    def __init__(self, model: nn.Module, plan: dict, device: torch.device):
        self.plan, self.device = plan, device
        if dist.get_world_size() != plan["pp"] * plan["dp"] * plan["tp"]:
            raise SystemExit(f"this plan is for {plan['pp'] * plan['dp'] * plan['tp']} processes")
        self.meshes = Meshes(plan, device.type)
        if plan["recompute"] == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.schedule, self.tied = None, False
        if plan["pp"] == 1:
            self.parts = [model.to(device)]
            parallelize(model, model, self.meshes, plan)
            return
        rank, group = self.meshes.pipeline.get_local_rank(), self.meshes.pipeline.get_group()
        self.tied = is_tied(model)
        self.parts = [Stage(model, plan, index).to(device) for index in stages_of_rank(plan, rank)]
        stages = []
        for part, index in zip(self.parts, stages_of_rank(plan, rank), strict=True):
            parallelize(part, part.model, self.meshes, plan)
            stages.append(PipelineStage(part, index, len(plan["stages"]), device, group=group))
        kind = SCHEDULES[plan["schedule"]]
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        self.schedule = kind(stages[0] if single else stages, plan["micro_batches"], loss_fn=next_token_loss)
        self.ends = self._groups_of_ends() if self.tied else None

    def _groups_of_ends(self) -> dist.ProcessGroup | None:
        """The first and the last rank of this pipeline, where the last stage is on another rank than the first."""
        if self.plan["schedule"] == "zbv":
            return None
        grid = self.meshes.dense.mesh.flatten(1)
        mine = None
        for pipeline in range(grid.shape[1]):
            ends = [int(grid[0, pipeline]), int(grid[-1, pipeline])]
            group = dist.new_group(ends)
            mine = group if dist.get_rank() in ends else mine
        return mine

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names they have in the model."""
        for part in self.parts:
            for name, parameter in part.named_parameters():
                yield part.name_in_model(name) if isinstance(part, Stage) else name, parameter

    def step(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Forward and backward of this rank's share `[micro_batches * micro_batch, tokens]` of a batch.

        Returns the mean loss of it, on ranks without the last stage None. Gradients are those of the mean over all ranks.
        """
        if self.schedule is None:
            loss = self._whole(ids)
            self._settle()
            return loss
        losses: list[torch.Tensor] = []
        first, last = any(part.first for part in self.parts), any(part.last for part in self.parts)
        self.schedule.step(*([ids] if first else []), **({"target": ids, "losses": losses} if last else {}))
        self._settle()
        if self.tied:
            self._sum_tied()
        return torch.stack(losses).mean().detach() if losses else None

    def _whole(self, ids: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        pieces = ids.chunk(self.plan["micro_batches"])
        for number, piece in enumerate(pieces):
            if self.plan["dp"] > 1 and self.plan["zero"] < 2:  # gradients stay whole until the last micro-batch
                self.parts[0].set_requires_gradient_sync(number == len(pieces) - 1)
            loss = next_token_loss(self.parts[0](input_ids=piece, use_cache=False).logits, piece) / len(pieces)
            loss.backward()
            total += loss.detach()
        return total

    def _settle(self) -> None:
        """Gradients that autograd left as partial sums, or whole, lie as their parameters do."""
        for _, parameter in self.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)

    def _sum_tied(self) -> None:
        """Embedding and head are one table on two stages: each gets the sum of both gradients."""
        gradients = []
        for part in self.parts:
            table = part.model.get_input_embeddings() if part.first else None
            head = part.model.get_output_embeddings() if part.last else None
            tables = [module.weight.grad for module in (table, head) if module is not None]
            gradients += [grad.to_local() if isinstance(grad, DTensor) else grad for grad in tables]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:
            dist.all_reduce(gradients[0], group=self.ends)


def is_tied(model: nn.Module) -> bool:
    head = getattr(model.get_output_embeddings(), "weight", None)
    return head is not None and head is getattr(model.get_input_embeddings(), "weight", None)


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description="Train on random tokens, as a trial of the plan.")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    accelerated = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if accelerated else torch.device("cpu")
    if accelerated:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if accelerated else "gloo")
    # FSDP2 keeps float32 weights and multiplies in the plan's precision; without it weights are in that precision.
    dtype = torch.float32 if PLAN["dp"] > 1 else DTYPES.get(PLAN["precision"], torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).train()
    vocab = model.config.get_text_config().vocab_size
    planned = Planned(model, PLAN, device)
    optimizer = torch.optim.AdamW([parameter for _, parameter in planned.named_parameters()], lr=1e-5)
    generator = torch.Generator().manual_seed(planned.meshes.data_rank)
    for step in range(given.steps):
        shape = (PLAN["micro_batches"] * PLAN["micro_batch"], PLAN["seq_len"])
        loss = planned.step(torch.randint(vocab, shape, generator=generator).to(device))
        optimizer.step()
        optimizer.zero_grad()
        if loss is not None and planned.meshes.data_rank == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

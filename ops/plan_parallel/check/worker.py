"""One process of a check: `torchrun -m tersor.ops.plan_parallel.check.worker FOLDER`.

FOLDER has `job.json` (config, seed, runs with the file that runs each layout) and gets `result.json` from rank 0. Every
process makes the same random model in float32, runs it whole on the whole batch, and then its part of it as planned.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 24  # of a sequence: more than a shrunken window


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(config: dict, seed: int) -> torch.nn.Module:
    """With noise everywhere: a bias or a norm at its initial value would hide a gradient that went astray."""
    torch.manual_seed(seed)
    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for key, value in made.to_dict().items():
        if "drop" in key and isinstance(value, float):  # the class has its own where config.json keeps silent
            setattr(made, key, 0.0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        else:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def reference(module: ModuleType, model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    whole = copy.deepcopy(model)
    loss = module.next_token_loss(whole(input_ids=ids, use_cache=False).logits, ids)
    loss.backward()
    # A table that embedding and head share is listed under both names.
    return loss.item(), {name: parameter.grad for name, parameter in whole.named_parameters(remove_duplicate=False)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placement(parameter: torch.Tensor) -> str:
    """As in `shard:Shard(0) tp:Shard(0), local [16, 64] of [64, 64]`."""
    shape = list(parameter.shape)
    if not isinstance(parameter, DTensor):
        return f"replicated {shape}"
    names = parameter.device_mesh.mesh_dim_names
    axes = " ".join(f"{name}:{where}" for name, where in zip(names, parameter.placements, strict=True))
    return f"{axes}, local {list(parameter.to_local().shape)} of {shape}"


def run(module: ModuleType, config: dict, seed: int) -> dict:
    """What `check.run.Run` holds, the same on every rank."""
    plan = module.PLAN
    model = random_model(config, seed)
    share = plan["micro_batches"] * plan["micro_batch"]
    batch = torch.randint(model.config.vocab_size, (plan["dp"] * share, TOKENS))
    expected, gradients = reference(module, model, batch)
    planned = module.Planned(model, plan, torch.device("cpu"))
    start = planned.meshes.data_rank * share
    loss = planned.step(batch[start : start + share])
    everything = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    differences, layouts = {}, {}
    for name, parameter in planned.named_parameters():
        layouts[name] = placement(parameter)
        wanted = gradients[name]
        got = torch.zeros_like(wanted) if parameter.grad is None else full(parameter.grad)
        differences[name] = ((got - wanted).norm() / (wanted.norm() + 1e-3 * everything)).item()
    # Ranks with the last stage have a loss; each data-parallel rank that of its share.
    mean = torch.tensor([0.0, 0.0] if loss is None else [loss.item(), 1.0])
    dist.all_reduce(mean)
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (differences, layouts))
    worst: dict[str, float] = {}
    for found, _ in everywhere:
        for name, value in found.items():
            worst[name] = max(worst.get(name, 0.0), value if value == value else float("inf"))
    return {
        "loss": (mean[0] / mean[1]).item(),
        "expected_loss": expected,
        "gradients": worst,
        "layouts": {name: text for _, found in reversed(everywhere) for name, text in found.items()},
        "unseen": sorted({name for name, _ in model.named_parameters()} - set(worst)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [run(load(folder / file), job["config"], job["seed"]) for file in job["files"]]
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

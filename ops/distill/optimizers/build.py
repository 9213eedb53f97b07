"""Optimizers by the name that the command line gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.optimizers.adamw8bit import AdamW8bit
from tersor.ops.distill.optimizers.apollo import Apollo
from tersor.ops.distill.optimizers.lion import Lion
from torch import nn

# Peak learning rates for a student that is a damaged copy of its teacher: it is close to a good point, so that a fifth to a
# tenth of the rate it was pre-trained with is enough, and more would first damage it further. 2e-4 is between the 1e-4 with
# which pruned models of billions of weights were distilled over batches of a million tokens (Minitron, arXiv:2407.14679)
# and what models of a hundred million take. APOLLO's updates are as long as AdamW's (see its `scale`); Lion's rate is 5
# times smaller, in the middle of the 3 to 10 of its paper.
LEARNING_RATES = {"adamw": 2e-4, "adamw8bit": 2e-4, "apollo": 2e-4, "apollo-mini": 2e-4, "lion": 4e-5}


def build_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    lr: float | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer `name` (a key of LEARNING_RATES) over `parameters`, by name; `lr` None is its default.

    Give all that will ever train, frozen for now or not: a parameter without a gradient is skipped and takes no state.
    `tables` names embeddings and output layers, which apollo leaves to AdamW. Weight decay is decoupled and spares vectors.
    `seed` decides apollo's projections. Parameters may be DTensors of FSDP2. Raises TersorError for another name or
    nothing to train.
    """
    if name not in LEARNING_RATES:
        raise TersorError(f"optimizer {name!r} is unknown", f"one of {', '.join(LEARNING_RATES)}")
    if not parameters:
        raise TersorError("there is nothing to train", "loosen --train, --include and --exclude")
    lr = LEARNING_RATES[name] if lr is None else lr
    groups = _groups(parameters, weight_decay, tables if name.startswith("apollo") else None)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "adamw8bit":
        return AdamW8bit(groups, lr)
    if name == "lion":
        return Lion(groups, lr)
    mini = {"rank": 1, "per": "tensor"} if name == "apollo-mini" else {}
    return Apollo(groups, lr, seed=seed, **mini)


def _groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, tables: Collection[str] | None) -> list[dict]:
    """Parameter groups: matrices, vectors without weight decay and, where `tables` is given, AdamW's share of apollo."""
    groups: dict[tuple[str, float], dict] = {}
    for name, parameter in parameters.items():
        vector = parameter.ndim < 2
        kind = {} if tables is None else {"kind": "adamw" if vector or name in tables else "apollo"}
        settings = {"weight_decay": 0.0 if vector else weight_decay} | kind
        group = groups.setdefault(tuple(settings.items()), {"params": []} | settings)
        group["params"].append((name, parameter))
    return list(groups.values())

"""Parameters and FLOPs of sub-networks: a fixed part, and a part of every block that depends on its widths."""

from __future__ import annotations

from functools import cache
from math import prod

from tersor.formats.elastic import WIDTHS, SubNetwork
from tersor.ops.distill.elastic.order import Order
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.units import Slot, Units

ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


class Costs:
    """What sub-networks of a model cost.

    Parameters are those of the extracted checkpoint. FLOPs are those of one token of a forward pass: two for each weight
    of a linear layer (of the experts that a token goes to), the head, and attention over half of `seq_len`.
    """

    def __init__(self, order: Order, seq_len: int):
        self.skeleton, self.nesting, self.seq_len = order.skeleton, order.nesting, seq_len
        self.units = order.units
        view, skeleton = self.skeleton.view, self.skeleton
        self.owned: dict[str, list[tuple[str, Units, Slot]]] = {}
        for kind, groups in order.units.items():
            for group in groups:
                for slot in group.slots:
                    self.owned.setdefault(slot.name, []).append((kind, group, slot))
        self.of_block = [skeleton.checkpoint_names(index) for index in range(len(skeleton.blocks))]
        inside = {name for names in self.of_block for name in names}
        self.fixed_parameters = sum(prod(entry.shape) for name, entry in view.tensors.items() if name not in inside)
        head = skeleton.model.get_output_embeddings()
        self.fixed_flops = 0 if head is None else 2 * head.weight.numel()
        self.multiplied = [_multiplied(skeleton, index) for index in range(len(skeleton.blocks))]
        self._block = cache(self._of_block)

    def parameters(self, network: SubNetwork) -> int:
        return self.fixed_parameters + sum(self._costs(network, block)[0] for block in self._kept(network))

    def flops(self, network: SubNetwork) -> float:
        return self.fixed_flops + sum(self._costs(network, block)[1] for block in self._kept(network))

    def _kept(self, network: SubNetwork) -> list[int]:
        return self.nesting.kept_blocks(network.depth)

    def _costs(self, network: SubNetwork, block: int) -> tuple[int, float]:
        return self._block(block, *(network.shares(kind)[block] for kind in WIDTHS))

    def _of_block(self, block: int, *shares: float) -> tuple[int, float]:
        """(parameters, FLOPs) of one block with these shares of neurons and heads."""
        share_of = dict(zip(WIDTHS, shares, strict=True))
        parameters, flops = 0, 0.0
        for name in self.of_block[block]:
            shape = self.skeleton.view.tensors[name].shape
            for kind, group, slot in self.owned.get(name, ()):
                shape = slot.shape(shape, self.nesting.kept_units(group.count, share_of[kind]))
            parameters += prod(shape)
            flops += 2 * prod(shape) * self.multiplied[block].get(name, 0)
        for group in self.units.get("heads", ()):
            if group.block == block:
                width = group.slot(group.readers[0]).index.shape[1]
                kept = self.nesting.kept_units(group.count, share_of["heads"])
                flops += 4 * kept * width * self.seq_len / 2  # scores and sums over what the token sees
        return parameters, flops


def _multiplied(skeleton: Skeleton, index: int) -> dict[str, float]:
    """Weights of a block that a token is multiplied with -> how often: 1, or the share of experts that it goes to."""
    config = skeleton.model.config.get_text_config()
    active = next((value for key in ACTIVE if type(value := getattr(config, key, None)) is int), 1)
    result: dict[str, float] = {}
    names = skeleton.checkpoint_names(index)
    experts = 1 + max((skeleton.sources[name].expert or 0 for name in names), default=0)
    for name in names:
        source = skeleton.sources[name]
        if source.expert is not None:
            result[name] = min(1.0, active / experts)
        elif len(skeleton.view.tensors[name].shape) == 2:  # a router's too
            result[name] = 1.0
    return result

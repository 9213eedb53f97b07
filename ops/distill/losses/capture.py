"""What blocks put out while a model runs: hidden states, and queries, keys and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.losses.projections import Projections
from tersor.ops.model.branches import first_tensor
from torch import Tensor, nn


class Capture:
    """A context in which `outputs[block]` `[B, T, H]` and `attention[block]["q" | "k" | "v"]` `[B, T, heads, d]` are collected.

    `blocks`: modules by number. `outputs`: whose outputs. `projections`: where blocks make their attention's inputs, for
    those that are wanted. Tensors keep their graph, where there is one. Leave the context before the backward pass, which
    runs blocks again where activations are recomputed.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        outputs: Collection[int] = (),
        projections: Mapping[int, Projections] | None = None,
    ):
        self.blocks, self.wanted, self.projections = blocks, list(outputs), projections or {}
        self.outputs: dict[int, Tensor] = {}
        self.attention: dict[int, dict[str, Tensor]] = {}
        self._versions: dict[int, int] = {}
        self._handles: list = []

    def __enter__(self) -> Capture:
        self.outputs, self.attention, self._versions = {}, {}, {}
        for index in self.wanted:
            self._handles.append(self.blocks[index].register_forward_hook(self._output_hook(index)))
        for index, projections in self.projections.items():
            for name in dict.fromkeys(projection.module for projection in projections.values()):
                module = self.blocks[index].get_submodule(name)
                self._handles.append(module.register_forward_hook(self._attention_hook(index, name)))
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        changed = [index for index, version in self._versions.items() if self.outputs[index]._version != version]
        if changed and kind is None:
            raise TersorError(
                f"the output of block {changed[0]} is changed in place by what comes after it",
                "leave hidden out of --loss",
            )

    def _output_hook(self, index: int):
        def hook(_, args, output):
            tensor = first_tensor(output)
            self.outputs[index] = tensor
            if not tensor.is_inference():
                self._versions[index] = tensor._version

        return hook

    def _attention_hook(self, index: int, name: str):
        chosen = {kind: part for kind, part in self.projections[index].items() if part.module == name}

        def hook(_, args, output):
            self.attention.setdefault(index, {}).update({kind: part.split(output) for kind, part in chosen.items()})

        return hook


@torch.no_grad()
def attends_causally(model: nn.Module) -> bool:
    """Whether a token's state is free of what comes after it."""
    table = model.get_input_embeddings().weight
    tokens = torch.tensor([[5, 6, 7], [5, 6, 8]], device=table.device) % len(table)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        states = model.base_model(input_ids=tokens)[0]
    finally:
        for module in training:
            module.training = True
    moved = (states[0, :2] - states[1, :2]).abs().max()
    return float(moved) <= 1e-3 * float((states[0, 2] - states[1, 2]).abs().max())

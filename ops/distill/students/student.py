"""A model in training, and the way back to the checkpoint it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tersor.formats.dense import DenseView
from tersor.formats.writer import Layout
from torch import Tensor, nn

KEPT_WHOLE = 4  # gathered parameters that slices are taken from at a time


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint that is made anew: `of` the parameter's values, where it lies and as it is stored."""

    parameter: str
    of: Callable[[Tensor], Tensor]


class Student:
    """`model` trains; `export` gives its checkpoint.

    A step is: gradients, `before_step()`, the optimizer's step, `after_step()`. Where the loop clips gradients, it does so
    after `before_step`, so that those of weights that stay zero do not count. Parameters may be DTensors (FSDP2); then
    every rank has to go through all of `export`.

    `zeros`: parameter path -> bool, True where a weight stays zero. `scales`: path of a parameter that is a factor on the
    stored scales of some codes -> how large it may get.
    """

    def __init__(
        self,
        model: nn.Module,
        view: DenseView,
        stored: Mapping[str, Stored],
        zeros: Mapping[str, Tensor],
        scales: Mapping[str, float],
    ):
        self.model, self.view = model, view
        self.zeros, self.scales = dict(zeros), dict(scales)
        self._stored = dict(stored)

    @property
    def layout(self) -> Layout:
        """dtype and shape of every tensor of the checkpoint, as `export` gives them."""
        return {name: (info.dtype, info.shape) for name, info in self.view.checkpoint.tensors.items()}

    @property
    def changed(self) -> dict[str, str]:
        """The tensors of the checkpoint that training changes -> the parameter each is made from."""
        return {name: stored.parameter for name, stored in self._stored.items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by module path; what is tied, once."""
        return {path: parameter for path, parameter in self.model.named_parameters() if parameter.requires_grad}

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[vocabulary, hidden]` and bias of the layer that gives the logits, with the gradients they have there.

        Raises ValueError for a model without one.
        """
        layer = self.model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(self.model).__name__} gives no logits")
        dense = getattr(layer, "dense", None)
        return (layer.weight if dense is None else dense(torch.float32)), layer.bias

    def before_step(self) -> None:
        """No gradient for weights that stay zero."""
        for path, zeros in self.zeros.items():
            gradient = self.model.get_parameter(path).grad
            if gradient is not None:
                _local(gradient).masked_fill_(self._share(path, zeros), 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Weights that stay zero are zero, scales are no less than zero and no more than their dtype holds."""
        for path, zeros in self.zeros.items():
            _local(self.model.get_parameter(path)).masked_fill_(self._share(path, zeros), 0)
        for path, largest in self.scales.items():
            _local(self.model.get_parameter(path)).clamp_(0, largest)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint in its order, dtype and form, on the CPU: trained, or as it was read."""
        whole: dict[str, Tensor] = {}
        for name in self.view.checkpoint.tensors:
            stored = self._stored.get(name)
            if stored is None:
                yield name, self.view.checkpoint.read(name)
                continue
            if stored.parameter not in whole:
                if len(whole) >= KEPT_WHOLE:
                    del whole[next(iter(whole))]
                whole[stored.parameter] = _whole(self.model.get_parameter(stored.parameter).detach())
            with torch.no_grad():
                yield name, stored.of(whole[stored.parameter]).cpu().contiguous()

    def _share(self, path: str, zeros: Tensor) -> Tensor:
        """The part of a mask that belongs to this rank's part of the parameter; found once."""
        parameter = self.model.get_parameter(path)
        if hasattr(parameter, "to_local") and zeros.shape != parameter.to_local().shape:
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = parameter.device_mesh, parameter.placements
            zeros = distribute_tensor(zeros, mesh, placements, src_data_rank=None).to_local().clone()
            self.zeros[path] = zeros
        return zeros


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

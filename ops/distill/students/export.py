"""From trained parameters to stored tensors: the same names, dtypes and layouts as in the checkpoint they came from.

Of a quantized weight only what trained is made anew, codes or scales; everything else is given back as it was read. So
nothing hangs on whether an encoding writes just what another tool wrote.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tersor.formats.dense import DenseView
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.header import TORCH_DTYPES
from tersor.ops.distill.students.layers import FakeQuantizedLinear, QuantizedLinear, ScaledLinear
from tersor.ops.distill.students.places import Place
from tersor.ops.distill.students.student import Stored
from torch import Tensor, nn

SCALES = (".weight_scale", ".scales")


def stored_as_is(view: DenseView, name: str, parameter: str, place: Place | None = None) -> dict[str, Stored]:
    """A tensor that the file holds as it is, which is all of a parameter, or its part at `place`."""
    dtype = _dtype(view, name)

    def make(values: Tensor) -> Tensor:
        return (values if place is None else place.of(values)).to(dtype)

    return {name: Stored(parameter, make)}


def stored_layer(view: DenseView, name: str, path: str, layer: nn.Module) -> dict[str, Stored]:
    """What is made anew of weight `name`, whose module at `path` of the model is `layer`."""
    entry = view.tensors[name]
    if entry.factors is not None:
        names = entry.factors.names  # `<module>.lr_a`, and so the parameter of the layer
        return {part: stored_as_is(view, part, f"{path}.{part.rpartition('.')[2]}")[part] for part in names}
    if isinstance(layer, FakeQuantizedLinear):
        return {view.codes_name(name): Stored(f"{path}.weight", _codes(view, name, layer))}
    if isinstance(layer, ScaledLinear):
        return {_one(view, name, SCALES): Stored(f"{path}.gain", _scales(view, name, layer))}
    return stored_as_is(view, name, f"{path}.weight")


def _codes(view: DenseView, name: str, layer: QuantizedLinear):
    """Packed by the encoding itself, which is told of no zero points: it may move them and the codes together, for which
    those in the file would have to change."""
    entry, scheme = view.tensors[name], replace(view.tensors[name].scheme, symmetric=True)
    wanted = view.codes_name(name)

    def make(master: Tensor) -> Tensor:
        scale = layer.scale
        codes = layer.grid.codes(master, scale)
        if bool((scale == 0).any()):  # any code is zero there
            before = view.codes(entry.module).codes.to(codes.device)
            nothing = layer.grid.spread(scale == 0).bool().expand(layer.grid.grouped(master).shape)
            codes = torch.where(nothing.reshape(codes.shape), before, codes)
        weight = QuantizedWeight(codes.cpu(), scale.cpu())
        return view.encoding.encode(entry.module, weight, scheme)[wanted]

    return make


def _scales(view: DenseView, name: str, layer: QuantizedLinear):
    """Rounded to their stored dtype, in their stored shape: gptq has `[G, out]`."""
    wanted = _one(view, name, SCALES)
    info, turned = view.checkpoint.tensors[wanted], wanted.endswith(".scales")

    def make(gain: Tensor) -> Tensor:
        scale = (layer.scale.float() * gain).to(layer.scale.dtype)
        return (scale.T if turned else scale).reshape(info.shape)

    return make


def _one(view: DenseView, name: str, suffixes: tuple[str, ...]) -> str:
    return next(part for part in view.stored_names(name) if part.endswith(suffixes))


def _dtype(view: DenseView, name: str) -> torch.dtype:
    return getattr(torch, TORCH_DTYPES[view.checkpoint.tensors[name].dtype])

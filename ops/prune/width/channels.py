"""Hidden channels: the width of the residual stream, the same channels for the whole model.

Which axes of which tensors are as wide as the stream is what the model's own constructor says when config.json gives it
another hidden size. That the stream may be made narrower depends on its norms. One that subtracts the mean ties all channels
together. An RMS norm divides by sqrt(sum(x^2) / d + eps); where only d' channels are left and the others are zero, the
narrow norm divides by sqrt(sum(x^2) / d' + eps'), which is sqrt(d / d') times as much with eps' = eps d / d'. So gains
times sqrt(d / d') give the very same output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.resize import build_meta, set_keys, shapes_of, top_level
from tersor.ops.model.skeleton import Skeleton, is_linear
from tersor.ops.model.stream import (
    HIDDEN,
    explicit_head_size,
    hidden_states,
    resize_stream,
    stream_slots,
    token_table,
)
from tersor.ops.model.units import Units, block_signature, probe_pass
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.request import Request
from tersor.ops.prune.width.config import build
from tersor.ops.prune.width.cut import Details, mask
from tersor.ops.prune.width.plan import kept_units, lay_out
from torch import nn

WAY_OUT = "keep the shapes and write zeros with --keep-shape, or --remove neurons"
CLOSE = 1e-3
EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Gain:
    """A norm multiplies by its weight plus `offset` (Gemma: 1). `factor` is sqrt(d / d')."""

    offset: float
    factor: float

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight of the narrow norm, in the dtype of `weight`."""
        return ((weight.float() + self.offset) * self.factor - self.offset).to(weight.dtype)

    def masked(self, narrow: torch.Tensor, wide: torch.Tensor, cuts, kept) -> torch.Tensor:
        """The weight of the masked norm that does what the narrow one does, rounded as it is."""
        units, slot = cuts[0]
        places = slot.places(kept[units.module])
        value = (narrow.float() + self.offset) / self.factor - self.offset
        return mask(wide, slot, kept[units.module]).float().index_copy(0, places, value)


def plan_channels(checkpoint: Checkpoint, request: Request, skeleton: Skeleton) -> Plan:
    """Raises TersorError for a model whose stream cannot be made narrower."""
    width = hidden_states(skeleton).shape[-1]
    kept = kept_units(width, request)
    factor = math.sqrt(width / kept)
    offsets: dict[str, float] = {}
    epsilons: set[float] = set()
    if not request.keep_shape:
        offsets, epsilons = _norms(skeleton, width)
        _check_embeddings(skeleton, width)
    fixed: dict[tuple[str, ...], object] = dict(explicit_head_size(skeleton))
    raw = checkpoint.config
    before = shapes_of(build_meta(checkpoint, raw))
    if build(set_keys(raw, fixed), checkpoint).shapes != before:
        fixed = {}
    if len(epsilons) == 1:
        epsilon = next(iter(epsilons))
        keys = [key for key, value in raw.items() if isinstance(value, float) and value == epsilon]
        fixed |= {(key,): epsilon * width / kept for key in keys}
    found = resize_stream(checkpoint, skeleton, before, width, kept, set_keys(raw, fixed))
    if found is None:
        raise TersorError(
            f"{checkpoint.path}: no number in the config.json of {raw.get('model_type')} gives a hidden width of {kept} "
            f"in place of {width} and leaves everything else as it is",
            "the number of heads may have to divide it: --multiple-of; or --remove neurons",
        )
    units = Units(HIDDEN, None, width, list(stream_slots(skeleton, found.axes, width)))
    details = Details("channels", [units], {width: kept}, skeleton, False, False)
    result = Plan(lay_out(checkpoint, request, details), details=details)
    if request.repair:
        result.warnings.append("hidden channels are removed without a refit of the layers that read them")
    if not request.keep_shape:
        details.gains = {name: Gain(offset, factor) for name, offset in offsets.items()}
        result.config = top_level(raw, fixed) | found.config
    return result


def _norms(skeleton: Skeleton, width: int) -> tuple[dict[str, float], set[float]]:
    """Checkpoint name of every norm weight of the stream's width -> its offset, and the eps values of these norms.

    Raises TersorError naming a module with a gain of that width that is no RMS norm.
    """
    offsets: dict[str, float] = {}
    epsilons: set[float] = set()
    inside = {id(module) for block in skeleton.blocks for module in block.modules()}
    outside = [(name, module) for name, module in skeleton.model.named_modules() if id(module) not in inside]
    _collect(skeleton, outside, width, "", offsets, epsilons)
    known: dict[tuple, tuple[str, dict[str, float]]] = {}
    for index, block in enumerate(skeleton.blocks):
        signature, prefix = block_signature(block), skeleton.block_name(index) + "."
        if signature not in known:
            known[signature] = prefix, {}
            with skeleton.filled(index) as filled:
                _collect(skeleton, list(filled.named_modules()), width, prefix, known[signature][1], epsilons)
        first, found = known[signature]
        for name, offset in found.items():
            parameter = skeleton.sources[name].parameter.replace(first, prefix, 1)
            offsets |= dict.fromkeys(skeleton.by_parameter.get(parameter, ()), offset)
    return offsets, epsilons


def _collect(skeleton: Skeleton, modules, width: int, prefix: str, offsets: dict, epsilons: set) -> None:
    for name, module in modules:
        weight = module._parameters.get("weight")
        if weight is None or tuple(weight.shape) != (width,) or is_linear(module):
            continue
        offset = rms_offset(module, width)
        if offset is None:
            raise TersorError(
                f"{prefix}{name} ({type(module).__name__}): is no RMS norm, its output depends on the mean of all hidden "
                "channels or on more than their size",
                "--remove neurons or heads, which are not normalised together",
            )
        for other in skeleton.by_parameter.get(f"{prefix}{name}.weight", ()):
            offsets[other] = offset
        epsilons |= {value for key in EPSILONS if isinstance(value := getattr(module, key, None), float)}


def rms_offset(module: nn.Module, width: int) -> float | None:
    """0 or 1 when the module is x / rms(x) * (weight + that), None when it is anything else."""
    weight = module.weight.float()
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(weight.device) * 3 + 1
    with torch.no_grad():
        unit = x / x.square().mean(-1, keepdim=True).sqrt()
        y = module(x).float()
    for offset in (0.0, 1.0):
        expected = unit * (weight + offset)
        if bool((y - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=1e-30)):
            return offset
    return None


def _check_embeddings(skeleton: Skeleton, width: int) -> None:
    """The embeddings must not be multiplied by the root of the hidden width, which would change with it."""
    run = probe_pass(skeleton)
    hidden = run.hidden.take(0)
    if run.input_name != "input_ids":
        return
    rows = token_table(skeleton)[run.batches[0]].to(hidden.dtype)
    if rows.shape != hidden.shape or not bool(rows.any()):
        return
    ratio = float((hidden * rows).sum() / rows.square().sum())
    if abs(ratio / math.sqrt(width) - 1) < 0.01:
        raise TersorError(
            f"{skeleton.view.checkpoint.path}: the model multiplies its embeddings by the root of its hidden width, "
            f"{ratio:.4g}, and would do so with another factor",
            WAY_OUT,
        )

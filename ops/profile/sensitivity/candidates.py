"""What can be done to a layer: the toolkit's quantization schemes and pruning patterns, each with its bytes on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import CONV1D_FAMILIES
from tersor.formats.errors import TersorError
from tersor.formats.header import tensor_bytes
from tersor.formats.scheme import Scheme
from tersor.ops.model.patterns import Pattern, keep_mask
from tersor.ops.model.schemes import SCHEMES, fit_group, scheme_from_name
from tersor.ops.model.selection import Linear

if TYPE_CHECKING:
    import torch
    from tersor.ops.model.statistics import InputStatistics

EXPERT = re.compile(r"\.experts\.\d+\.")
GROUPED = ("w2a16", "w3a16", "w4a16", "w8a16")
GROUP_SIZES = (32, 64, 128)
KEEP = "keep"
ACTIVATIONS = ("w8a8", "fp8", "fp8-block")  # these quantize activations too, which the damage knows nothing of
AMOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7)
PRUNED = {f"{share:.0%}": (Pattern(), share) for share in AMOUNTS} | {"2:4": (Pattern("n:m", 2, 4), 0.5)}


@dataclass(frozen=True)
class Candidate:
    """`label` names it in reports, `settings` in a policy. `scheme` or `pattern` is what is done; neither: nothing."""

    label: str
    settings: dict
    scheme: Scheme | None = None
    pattern: Pattern | None = None


def candidates() -> list[Candidate]:
    """What the report compares: every scheme, with all group sizes where it has groups, and Wanda's masks."""
    found = []
    for name, scheme in SCHEMES.items():
        if name not in GROUPED:
            found.append(Candidate(name, {"scheme": name}, scheme))
            continue
        for size in GROUP_SIZES:
            settings = {"scheme": name, "group_size": size}
            found.append(Candidate(f"{name}-g{size}", settings, scheme_from_name(name, size)))
    for label, (pattern, share) in PRUNED.items():
        found.append(Candidate(label, {"sparsity": share}, None, pattern))
    return found


class Storage:
    """How `quantize` would store the layers of a checkpoint, as far as bytes are concerned."""

    def __init__(self, checkpoint: Checkpoint, linears: dict[str, Linear]):
        family = (checkpoint.config or {}).get("model_type")
        self.format = "gptq" if family in CONV1D_FAMILIES else "compressed-tensors"
        self._encoding = encodings.encoding(self.format)
        widths = (linear.shape[1] for linear in linears.values() if EXPERT.search(linear.name))
        self._experts = frozenset(widths)  # which run as one kernel and share a group size

    def fitted(self, linear: Linear, scheme: Scheme) -> tuple[Scheme, int] | None:
        """The scheme as it fits the layer's width, and its bytes; None where the format cannot hold it."""
        peers = self._experts if EXPERT.search(linear.name) else frozenset()
        fitted = fit_group(scheme, linear.shape[1], peers)[0]
        try:
            self._encoding.check(linear.module, linear.shape, fitted)
        except TersorError:
            return None
        layout = self._encoding.layout(linear.module, linear.shape, fitted, self.scale_dtype(linear))
        return fitted, sum(tensor_bytes(*entry) for entry in layout.values())

    def scale_dtype(self, linear: Linear) -> str:
        if self.format == "gptq":
            return "F16"
        return "F32" if linear.dtype == "F64" else linear.dtype


def smallest(checkpoint: Checkpoint, linears: dict[str, Linear]) -> int:
    """Bytes of all layers when each is as small as a mix may make it."""
    storage, schemes = Storage(checkpoint, linears), [scheme_from_name("w2a16", size) for size in GROUP_SIZES]
    total = 0
    for name, linear in linears.items():
        fitted = [found[1] for scheme in schemes if (found := storage.fitted(linear, scheme))]
        total += min([checkpoint.tensors[name].nbytes, *fitted])
    return total


def masked(weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern, share: float) -> torch.Tensor:
    """`weight` `[out, in]` as Wanda prunes it: |W_ij| ||X_j|| compared within each row."""
    import torch

    scores = weight.abs() if statistics is None else weight.abs() * statistics.column_norms
    return torch.where(keep_mask(scores, pattern, share, per_row=True), weight, 0)


def unit_of(linear_name: str, owner: dict[str, str]) -> str:
    """Layers with the same unit get the same scheme: servers fuse those that read the same input, and all experts of a
    block."""
    if EXPERT.search(linear_name):
        return linear_name[: EXPERT.search(linear_name).start()] + ".experts"
    return owner.get(linear_name, linear_name)

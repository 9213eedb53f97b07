"""Which tensors of a checkpoint train, and which zeros stay zero."""

from __future__ import annotations

import torch
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES
from tersor.formats.report import Report
from tersor.ops.distill.request import Request
from tersor.ops.model.selection import compile_patterns
from tersor.ops.model.skeleton import Source
from torch import Tensor, nn

TRAIN = ("all", "scales", "norms")
QUANTIZED = ("qat", "scales")
LEAST_ZEROS = 0.01  # a share below that happens by itself


def trained_names(view: DenseView, model: nn.Module, sources: dict[str, Source], request: Request) -> set[str]:
    """Names of the dense tensors that train, of those in `sources`.

    --include and --exclude are searched in these names and in those of the tensors that store them. Raises TersorError for
    a pattern that matches nothing, and when nothing is left.
    """
    if request.train not in TRAIN or request.quantized not in QUANTIZED:
        raise TersorError(
            f"--train {request.train} --quantized {request.quantized}: not known",
            f"--train {', '.join(TRAIN)}; --quantized {', '.join(QUANTIZED)}",
        )
    if request.train == "scales" and not view.is_quantized:
        raise TersorError(
            f"{view.checkpoint.path}: --train scales, but nothing in it is quantized",
            "quantize it first, or --train all",
        )
    included = compile_patterns(request.include, "--include")
    excluded = compile_patterns(request.exclude, "--exclude")
    aliases = {name: (name, *view.stored_names(name)) for name in view.tensors}
    for patterns, option in ((included, "--include"), (excluded, "--exclude")):
        for pattern in patterns:
            if not any(pattern.search(alias) for names in aliases.values() for alias in names):
                raise TersorError(
                    f"{option} {pattern.pattern!r} matches no tensor of {view.checkpoint.path}",
                    f"names look like {next(iter(aliases), '(none)')!r}",
                )

    def named(name: str, patterns: list) -> bool:
        return any(pattern.search(alias) for alias in aliases[name] for pattern in patterns)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = {
        name
        for name, source in sources.items()
        if source.parameter in parameters
        and view.tensors[name].dtype in FLOAT_DTYPES
        and (not included or named(name, included))
        and not named(name, excluded)
        and _is_kind(view, model, name, source, request.train)
    }
    if not result:
        raise TersorError(
            f"{view.checkpoint.path}: --train {request.train}, --include and --exclude leave nothing to train",
            "name fewer tensors in --exclude, or more in --include",
        )
    return result


def _is_kind(view: DenseView, model: nn.Module, name: str, source: Source, kind: str) -> bool:
    if kind == "scales":
        return view.tensors[name].scheme is not None
    owner = model.get_submodule(source.parameter.rpartition(".")[0])
    return kind == "all" or "norm" in type(owner).__name__.lower()


def zeros_of(weight: Tensor) -> Tensor | None:
    """Where a weight is zero, None where less than one in a hundred is."""
    zeros = weight == 0
    return zeros if int(zeros.sum()) >= LEAST_ZEROS * zeros.numel() else None


class ZerosOfCodes:
    """Which zeros of quantized weights were made on purpose. Rounding makes zeros too, and those are free to move.

    On purpose are all of a weight that is packed without its zeros, two of every four, and any in a checkpoint whose history
    has a report of zeros from before it was quantized.
    """

    def __init__(self, view: DenseView):
        self.view = view
        steps = []
        if view.is_quantized and view.checkpoint.path.is_dir():
            steps = Report.history_of(view.checkpoint.path)
        before = steps[
            : next((number for number, step in enumerate(steps) if step["command"] == "quantize"), len(steps))
        ]
        self.pruned = any((step["totals"].get("sparsity") or 0) >= LEAST_ZEROS for step in before)

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """For dense `weight` `[out, in]` of tensor `name`."""
        zeros = zeros_of(weight)
        if zeros is None or self.view.tensors[name].scheme.kind == "float":  # floats are fine around zero
            return zeros
        packed = any(part in self.view.checkpoint.packed for part in self.view.stored_names(name))
        return zeros if self.pruned or packed or _two_of_four(zeros) else None


def _two_of_four(zeros: Tensor) -> bool:
    return zeros.shape[1] % 4 == 0 and bool((zeros.unflatten(1, (-1, 4)).sum(-1, dtype=torch.int8) >= 2).all())

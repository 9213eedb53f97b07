"""`tersor profile --sparse-crossover`: from which sparsity on a sparse product is faster than the dense one, here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.facts import Facts, facts
from tersor.ops.model.operators import kind_of
from tersor.ops.model.sparse_samples import axis, kernel_name
from tersor.ops.model.stored import stored_weights
from tersor.ops.model.tile_costs import KINDS, TileCosts
from tersor.ops.model.timer import device_name
from tersor.ops.profile.request import Workload

STAGE = "timing sparse products"
LINEAR = ("attention", "mlp", "experts", "shared experts")  # kinds of operators whose weights are pruned
SMALLEST_SIDE = 16
SMALL_BATCH = 16  # tokens: timed besides a step and a prompt of the workload
Shape = tuple[int, int]
Progress = Callable[[str, int, int], None]


def sparse_crossover(
    checkpoint: Checkpoint,
    workload: Workload,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
    shapes: Iterable[Shape] | None = None,
) -> dict:
    """The report's `quality["crossover"]`: for every shape `[out, in]` of a linear layer, number of tokens and format.

    What was measured on this device before is not measured again. Raises TersorError for a model without linear layers.
    """
    layers = linear_shapes(checkpoint) if shapes is None else dict.fromkeys(shapes, 1)
    tokens = token_counts(workload)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    costs = TileCosts.measure(device, dtype, layers, tokens, progress=lambda done, total: progress(STAGE, done, total))
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": costs.dtype,
        "tokens": tokens,
        "rows": [_row(costs, shape, count, layers[shape]) for shape in layers for count in tokens],
    }


def token_counts(workload: Workload) -> list[int]:
    """Those of a step that adds a token to every sequence, of a small batch, and of the prompts."""
    return sorted({workload.batch, SMALL_BATCH, workload.batch * workload.prompt})


def linear_shapes(checkpoint: Checkpoint) -> dict[Shape, int]:
    """How many linear layers inside the repeated blocks have each shape. Raises TersorError where there is none."""
    weights = stored_weights(checkpoint)
    try:
        found: Facts | None = facts(checkpoint, weights)
    except TersorError:
        found = None  # the tensors' names tell enough
    shapes: dict[Shape, int] = {}
    for name, weight in weights.items():
        if weight.place is None or len(weight.shape) not in (2, 3) or kind_of(name, weight, found) not in LINEAR:
            continue
        count = 1 if len(weight.shape) == 2 else weight.shape[0]  # all experts in one tensor
        shape = (weight.shape[-2], weight.shape[-1])
        if min(shape) >= SMALLEST_SIDE:
            shapes[shape] = shapes.get(shape, 0) + count
    if not shapes:
        raise TersorError(
            f"{checkpoint.path}: no linear layer inside repeated blocks", "--sparse-crossover times products with those"
        )
    return shapes


def _row(costs: TileCosts, shape: Shape, tokens: int, layers: int) -> dict:
    dense = costs.dense_seconds(shape, tokens)
    formats = []
    for kind in KINDS:
        if not costs.knows(kind, shape, tokens):
            continue
        points = costs.points[kind, shape, tokens]
        formats.append(
            {
                "format": kind[0],
                "tile": kind[1],
                "axis": axis(kind),
                "kernel": kernel_name(kind),
                "faster_from": crossing(points.sparsities, points.seconds, dense),
                "sparsities": list(points.sparsities),
                "seconds": list(points.seconds),
            }
        )
    return {"shape": list(shape), "layers": layers, "tokens": tokens, "dense_seconds": dense, "formats": formats}


def crossing(sparsities: Sequence[float], seconds: Sequence[float], dense: float) -> float | None:
    """The sparsity above which every measured time is less than `dense`; None where not even the last is.

    Linear between two measured sparsities (ascending); the first of them where all are faster.
    """
    slower = [index for index, taken in enumerate(seconds) if taken >= dense]
    if not slower:
        return sparsities[0]
    last = slower[-1]
    if last == len(seconds) - 1:
        return None
    share = (seconds[last] - dense) / (seconds[last] - seconds[last + 1])
    return sparsities[last] + share * (sparsities[last + 1] - sparsities[last])

"""Inputs of linear layers below a threshold become zero, and what that saves is counted.

A zero input makes its column of the weight unnecessary: one that multiplies a single token need not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class InputCounts:
    """Of one layer: how many input vectors came, how many numbers those held, and how many of the numbers were zero.

    `numbers` and `zeros` stay 0 for a layer without a threshold.
    """

    vectors: int = 0
    numbers: int = 0
    zeros: int = 0


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """While this is open, `hook(name, x)` sees the input `[..., in]` of each layer, and may give another in its place."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs[0]))
            stack.callback(handle.remove)
        yield


@contextmanager
def applied(
    layers: Mapping[str, nn.Module], thresholds: Mapping[str, float], counts: dict[str, InputCounts] | None = None
) -> Iterator[None]:
    """While this is open, inputs with |x| <= threshold are zero in the layers that have one; NaN stays NaN.

    Every token is treated alike, also the first ones of a text: it is what happens when a model writes them one by one.
    """

    def hook(name: str, x: torch.Tensor) -> torch.Tensor | None:
        threshold = thresholds.get(name)
        y = x if threshold is None else nn.functional.hardshrink(x, threshold)
        if counts is not None:
            found = counts[name]
            found.vectors += x.numel() // x.shape[-1]
            if threshold is not None:
                found.numbers += x.numel()
                found.zeros += x.numel() - int(torch.count_nonzero(y))
        return None if threshold is None else y

    if counts is not None:
        for name in layers:  # an expert that no token is sent to is counted as well, with nothing
            counts.setdefault(name, InputCounts())
    with hooked(layers, hook):
        yield


def traffic(skeleton, counts: Mapping[str, InputCounts], tokens: int) -> dict:
    """Shares of what is read for one token, from `counts` of all linear layers over `tokens` tokens.

    `inputs_zeroed`: of the inputs of layers with thresholds. `layer_bytes_not_read`: of the bytes of these layers' weights.
    `weight_bytes_not_read`: of all bytes a token needs: every tensor, of experts those it is sent to, of tables for
    lookup nothing. Bytes as stored, each column of a weight having its share of them.
    """
    bytes_of = stored_bytes(skeleton)
    inside = {name: nbytes for name, nbytes in bytes_of.items() if name in counts}
    total = sum(bytes_of.values()) - sum(inside.values())
    total += sum(nbytes * counts[name].vectors / tokens for name, nbytes in inside.items())
    thresholded = {name: found for name, found in counts.items() if found.numbers}
    layers = sum(inside[name] * found.vectors / tokens for name, found in thresholded.items())
    skipped = sum(
        inside[name] * found.vectors / tokens * found.zeros / found.numbers for name, found in thresholded.items()
    )
    numbers, zeros = (sum(getattr(found, key) for found in thresholded.values()) for key in ("numbers", "zeros"))
    return {
        "inputs_zeroed": zeros / numbers if numbers else 0.0,
        "layer_bytes_not_read": skipped / layers if layers else 0.0,
        "weight_bytes_not_read": skipped / total if total else 0.0,
    }


def stored_bytes(skeleton) -> dict[str, int]:
    """Dense tensor name -> bytes in the file, for all that the model of a Skeleton multiplies or adds."""
    view, model = skeleton.view, skeleton.model
    head = model.get_output_embeddings()
    tables = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    return {
        name: sum(view.checkpoint.tensors[part].nbytes for part in view.stored_names(name))
        for name, source in skeleton.sources.items()
        if source.parameter not in tables
    }

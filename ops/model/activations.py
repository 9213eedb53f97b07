"""Bytes that autograd keeps of one block until its backward pass.

Counted, not derived: one block of each kind runs on the CPU at a few short lengths while `saved_tensors_hooks` sees every
tensor that is saved. A storage counts once; parameters do not count, nor do masks and rotary tables, which the model makes
once for all blocks. bytes(s) = c + a*s + b*s^2 is fitted and extrapolated; c is what does not grow, of gains and the like.
The meta device would not do: attention falls back to another path there and saves all scores.

Dropout counts as on a GPU, where its mask takes a byte per number; attention is counted without dropout, as models are
trained today.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.bare import BareModel, run_block
from torch import nn
from torch.utils._pytree import tree_leaves

LENGTHS = (16, 32, 48, 64)  # the last one checks the fit of the first three
NOISE = 1e-5  # of all bytes: less than this is no quadratic part, but what rounding and routing make of it


def saved_bytes(
    source: Checkpoint | object,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    lengths: tuple[int, ...] = LENGTHS,
) -> dict[str, dict]:
    """Kind of block → what one block of that kind keeps for `batch` sequences of `tokens`.

    `source` is a Checkpoint or a config of transformers; `attention` is sdpa or eager; `lengths` are what is run, at
    least three, the last to check the fit where there are more. Each
    entry has `layers` (which blocks are of the kind), `saved_bytes`, of it `squared_bytes` that grow with the square of
    the tokens, `fixed_bytes`, `per_token_bytes`, `per_token_squared_bytes`, `input_bytes` (all that is kept when the block is
    recomputed from its input), `measured` [[tokens, bytes]], `fit_error` (relative, at the last of the lengths) and
    `attention`, the implementation that ran. Raises TersorError for a model that cannot be built or run without data.
    """
    bare = BareModel(source, torch.device("cpu"), dtype, attention)
    limit = getattr(bare.text_config, "max_position_embeddings", None) or max(lengths)
    if max(lengths) > limit:
        lengths = tuple(length * limit // max(lengths) for length in lengths)
    result = {}
    for kind in bare.kinds():
        index = kind.layers[0]
        with training_block(bare, index) as block:
            measured = [[length, count_saved(bare, block, index, length)] for length in lengths]
        bare.empty(index)
        fixed, linear, squared = _fit(measured[:3])
        last, seen = measured[-1]
        result[kind.name] = {
            "layers": kind.layers,
            "saved_bytes": round(batch * (linear * tokens + squared * tokens**2) + fixed),
            "squared_bytes": round(batch * squared * tokens**2),
            "fixed_bytes": fixed,
            "per_token_bytes": linear,
            "per_token_squared_bytes": squared,
            "input_bytes": batch * tokens * hidden_width(bare) * dtype.itemsize,
            "measured": measured,
            "fit_error": abs(fixed + linear * last + squared * last**2 - seen) / seen if seen else 0.0,
            "attention": bare.attention,
        }
    return result


def hidden_width(bare: BareModel) -> int:
    return bare.text_config.hidden_size


@contextlib.contextmanager
def training_block(bare: BareModel, index: int) -> Iterator[nn.Module]:
    """Block `index` with made-up weights, as training runs it: gradients for all weights, dropout on."""
    block = bare.fill(index)
    block.requires_grad_(True)
    for module in block.modules():
        module.training = isinstance(module, nn.Dropout)  # not the attention modules: see the top
    plain = nn.functional.dropout
    nn.functional.dropout = _gpu_dropout
    try:
        yield block
    finally:
        nn.functional.dropout = plain
        block.requires_grad_(False).eval()


def _gpu_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def training_inputs(bare: BareModel, index: int, tokens: int) -> tuple[torch.Tensor, tuple[tuple, dict]]:
    """Hidden states of one made-up sequence of `tokens`, and what else the model calls block `index` with."""
    calls, shape = bare.calls(bare.inputs(1, tokens))
    if not bare.reads_text:  # the block of a vision encoder takes any number of patches
        shape = (1, tokens, shape[-1])
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(bare.device, bare.dtype)
    return hidden.requires_grad_(True), calls[index]


def shared_storages(block: nn.Module, call: tuple[tuple, dict]) -> set[int]:
    """Storages that are there anyway: weights, and what the model makes once for all blocks."""
    made = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in [*block.parameters(), *block.buffers(), *made]}


def count_saved(bare: BareModel, block: nn.Module, index: int, tokens: int) -> int:
    return sum(saved_sizes(bare, block, index, tokens))


def saved_sizes(bare: BareModel, block: nn.Module, index: int, tokens: int) -> list[int]:
    """Bytes of each storage that autograd saves for `tokens`, without those that are not the block's own, in order."""
    hidden, call = training_inputs(bare, index, tokens)
    outside = shared_storages(block, call)
    kept: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_block(block, hidden, call)
    sizes = [storage.nbytes() for storage in kept.values()]
    del output
    return sizes


def _fit(measured: list[list[int]]) -> tuple[float, float, float]:
    """c, a and b of bytes = c + a*s + b*s^2 through three points."""
    (s1, y1), (s2, y2), (s3, y3) = measured
    squared = ((y3 - y2) / (s3 - s2) - (y2 - y1) / (s2 - s1)) / (s3 - s1)
    if squared * s3**2 < NOISE * y3:
        linear = (y3 - y1) / (s3 - s1)
        return y1 - linear * s1, linear, 0.0
    linear = (y2 - y1) / (s2 - s1) - squared * (s1 + s2)
    return y1 - linear * s1 - squared * s1**2, linear, squared

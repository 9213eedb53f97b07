"""Where a block makes queries, keys and values, found by watching which outputs of its linear layers reach what.

Every linear layer of the block puts out noise of its own, so that only what lies between two layers shows: attention,
between those that make Q, K, V and the one that reads its result. Gradients of what that one reads, for the second of two
tokens:

    rows                 second token's row    first token's row    with one token alone
    K                    yes                   yes                  no: a softmax over one token is constant
    V                    yes                   yes                  yes
    Q                    yes                   no                   no

So neither the names of layers nor the layout of fused ones need be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import record_calls
from tersor.ops.model.skeleton import Skeleton, StoredDtype, is_linear, weight_matrix
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FIRST_TOKEN = 5
WAY_OUT = "leave attention out of --loss; hidden works for every block"


@dataclass
class Projection:
    """`heads` heads of a kind (q, k or v) are outputs `rows` of a module of the block; a slice where they adjoin."""

    module: str
    rows: slice | Tensor
    heads: int

    def split(self, output: Tensor) -> Tensor:
        """`[B, T, out]` as `[B, T, heads, d]`."""
        return output[..., self.rows].unflatten(-1, (self.heads, -1))


Projections = dict[str, Projection]


class _Reached(Exception):
    """The block is done; nothing after it matters."""


def projections_of_model(model: nn.Module, blocks: dict[int, nn.Module]) -> dict[int, Projections]:
    """Of some blocks of a transformers model that holds its weights. Runs it on one and on two tokens for each."""
    table = model.get_input_embeddings().weight
    tokens = (torch.arange(FIRST_TOKEN, FIRST_TOKEN + 2) % len(table))[None].to(table.device)
    heads = _heads(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return {
            index: find_projections(block, lambda count: model.base_model(input_ids=tokens[:, :count]), heads, index)
            for index, block in blocks.items()
        }
    finally:
        for module in training:
            module.training = True


def projections_of_skeleton(skeleton: Skeleton, index: int, block: nn.Module) -> Projections:
    """Of a filled block of a streamed model."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(FIRST_TOKEN, FIRST_TOKEN + 2) % rows)[None].to(skeleton.device)

    def run(count: int) -> None:
        args, kwargs = record_calls(skeleton, input_ids=tokens[:, :count])[index].calls[0]
        with StoredDtype(skeleton.dtype):
            block(*args, **kwargs)

    return find_projections(block, run, _heads(skeleton.model), index)


def find_projections(block: nn.Module, run: Callable[[int], object], heads: int, index: int = 0) -> Projections:
    """`q`, `k` and `v` of a block in eval mode; `run(n)` sends n tokens through it. `heads`: of the queries.

    Raises TersorError where they cannot be told apart.
    """
    layers = _linear_layers(block)
    own, first, alone = {}, {}, {}
    reader = None
    with _noisy(block, layers) as watched, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for count in (2, 1):
            with suppress(_Reached):
                run(count)
            noise, inputs = watched.noise, watched.inputs
            if count == 2:
                for name, x in inputs.items():
                    own, first = _reached(x, noise, 1), _reached(x, noise, 1, token=0)
                    if first:
                        reader = name
                        break
                order = list(noise)
            elif reader is not None:
                alone = _reached(inputs[reader], noise, 0)
            watched.clear()
    if reader is None:
        raise TersorError(f"block {index} ({type(block).__name__}) passes nothing between tokens", WAY_OUT)
    none = torch.zeros((), dtype=torch.bool)
    rows: dict[str, tuple[str, Tensor]] = {}
    for name in order:  # the last layer with such rows, where a layer feeds another
        mine, cross, single = (found.get(name, none) for found in (own, first, alone))
        for kind, mask in (("q", mine & ~cross & ~single), ("k", cross & ~single), ("v", cross & single)):
            if bool(mask.any()):
                rows[kind] = name, mask.nonzero()[:, 0]
    missing = [kind for kind in "qkv" if kind not in rows]
    if missing:
        raise TersorError(
            f"block {index} ({type(block).__name__}): no linear layer that makes {', '.join(missing)} of its attention",
            WAY_OUT,
        )
    return _with_heads(rows, heads, index)


def _with_heads(rows: dict[str, tuple[str, Tensor]], heads: int, index: int) -> Projections:
    """Keys have the head width of the queries, and values as many heads as keys."""
    count = len(rows["q"][1])
    if heads < 1 or count % heads:
        raise TersorError(f"block {index}: {count} rows of queries for {heads} heads", WAY_OUT)
    keys = len(rows["k"][1]) / (count // heads)
    values = len(rows["v"][1]) / keys
    if keys < 1 or keys != int(keys) or values != int(values):
        raise TersorError(f"block {index}: keys and values do not divide into heads of {count // heads}", WAY_OUT)
    number = {"q": heads, "k": int(keys), "v": int(keys)}
    return {kind: Projection(name, _as_slice(at), number[kind]) for kind, (name, at) in rows.items()}


def _as_slice(rows: Tensor) -> slice | Tensor:
    start, stop = int(rows[0]), int(rows[-1]) + 1
    return slice(start, stop) if stop - start == len(rows) else rows


def _heads(model: nn.Module) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "num_attention_heads", 0)


def _linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Layers by name that multiply with a matrix, in whatever form they keep it; not their own parts."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and (is_linear(module) or hasattr(module, "out_features")):
            found[name] = module
    return found


class _Watched:
    def __init__(self):
        self.noise: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}

    def clear(self) -> None:
        self.noise, self.inputs = {}, {}


@contextmanager
def _noisy(block: nn.Module, layers: dict[str, nn.Module]) -> Iterator[_Watched]:
    """While it lasts the layers put out noise, which is kept with what they read, and the block ends the run."""
    watched, generator = _Watched(), torch.Generator().manual_seed(0)

    def noisy(name: str, module: nn.Module):
        width = module.out_features if hasattr(module, "out_features") else weight_matrix(module).shape[0]

        def forward(x: Tensor) -> Tensor:
            noise = torch.randn((*x.shape[:-1], width), generator=generator).to(x.device, x.dtype).requires_grad_()
            watched.noise.setdefault(name, noise)
            watched.inputs.setdefault(name, x)
            return noise.clone()  # the model may go on in place

        return forward

    def stop(*_):
        raise _Reached

    before = {module: module.__dict__.get("forward") for module in layers.values()}
    handle = block.register_forward_hook(stop)
    for name, module in layers.items():
        module.forward = noisy(name, module)
    try:
        yield watched
    finally:
        handle.remove()
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _reached(x: Tensor, noise: dict[str, Tensor], position: int, token: int | None = None) -> dict[str, Tensor]:
    """Rows `[out]` bool by layer whose noise for `token` (left out: for `position`) reaches x at `position`."""
    token = position if token is None else token
    per_token = {name: value for name, value in noise.items() if value.numel() == _tokens(x) * value.shape[-1]}
    if not x.requires_grad or x.numel() != _tokens(x) * x.shape[-1]:
        return {}
    values = x.reshape(-1, x.shape[-1])[position]
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    gradients = torch.autograd.grad(
        (values * weights).sum(), list(per_token.values()), retain_graph=True, allow_unused=True
    )
    found = {
        name: (gradient.reshape(-1, gradient.shape[-1])[token] != 0).cpu()
        for name, gradient in zip(per_token, gradients, strict=True)
        if gradient is not None
    }
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()

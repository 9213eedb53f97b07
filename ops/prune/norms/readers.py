"""Who reads the output of a norm: every operation of a forward pass is watched.

A tensor that is a norm's output, or its rows regrouped, picked or converted, is marked. A linear layer may read a marked
tensor; anything else that does (a residual sum, attention, the caller) makes the norm one that has to stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tersor.ops.prune.norms.gain import may_have_gain
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Operations after which the last axis is still the norm's, entry by entry.
REGROUPING = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat_interleave", "transpose",
    "permute", "__getitem__", "index_select", "split", "chunk", "unbind", "to", "type", "type_as", "float", "contiguous",
    "clone", "detach", "dropout",
}  # fmt: skip
VALUE_FREE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
TRANSPOSE = torch.Tensor.T.__get__
MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class ReaderTrace(TorchFunctionMode):
    """`readers`: norm -> ids of the parameters of linear layers that read it; `others`: norm -> what else does."""

    def __init__(self, parameters: dict[int, nn.Parameter]):
        super().__init__()
        self.readers: dict[str, set[int]] = {}
        self.others: dict[str, str] = {}
        self.samples: dict[str, tuple[tuple, dict]] = {}
        self.uses: dict[int, set[str | None]] = {}  # parameter -> norms it is applied to, None for anything else
        self._norm_of: dict[int, str] = {}
        self._parameter_of: dict[int, int] = {key: key for key in parameters}
        self._transpose_of: dict[int, int] = {}
        self._alive: list[object] = []  # marks go by identity: a marked tensor must not be freed and its id reused

    def mark(self, norm: str, output: torch.Tensor, sample: tuple[tuple, dict]) -> None:
        self.readers.setdefault(norm, set())
        self.samples.setdefault(norm, sample)
        self._mark(self._norm_of, output, norm)

    def escape(self, value: object, how: str) -> None:
        """`value` goes where it is not watched."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._norm_of:
                self.others.setdefault(self._norm_of[id(leaf)], how)

    def _mark(self, table: dict, tensor: torch.Tensor, value) -> None:
        table[id(tensor)] = value
        self._alive.append(tensor)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        marked = [leaf for leaf in leaves if id(leaf) in self._norm_of]
        weights = [leaf for leaf in leaves if id(leaf) in self._parameter_of]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = getattr(function, "__name__", str(function))
        flipped = [leaf for leaf in leaves if id(leaf) in self._transpose_of]
        if not (marked or weights or flipped) or not results or name in VALUE_FREE:
            return result
        if function == TRANSPOSE and weights:
            self._mark(self._transpose_of, result, self._parameter_of[id(weights[0])])
            return result
        x, weight, table = self._linear_operands(function, args, kwargs)
        for leaf in flipped:
            if leaf is not weight:
                self.uses.setdefault(self._transpose_of[id(leaf)], set()).add(None)
        if weight is not None and id(weight) in table:
            norm = self._norm_of.get(id(x))
            parameter = table[id(weight)]
            self.uses.setdefault(parameter, set()).add(norm)
            if norm is not None:
                self.readers[norm].add(parameter)
            marked = [leaf for leaf in marked if leaf is not x]
            weights = [leaf for leaf in weights if leaf is not weight and self._parameter_of[id(leaf)] != parameter]
            results = []
        first = args[0] if args else None
        for table, found in ((self._norm_of, marked), (self._parameter_of, weights)):
            for leaf in found:
                if name == "type_as" and leaf is not first:  # lends its dtype only
                    continue
                kept = name in REGROUPING and leaf is first
                same = [piece for piece in results if piece.dim() and piece.shape[-1] == leaf.shape[-1]]
                if kept and len(same) == len(results):
                    for piece in same:
                        self._mark(table, piece, table[id(leaf)])
                elif table is self._norm_of:
                    self.others.setdefault(table[id(leaf)], f"the operation {name.strip('_')} reads it")
                else:
                    self.uses.setdefault(table[id(leaf)], set()).add(None)
        return result

    def _linear_operands(self, function, args: tuple, kwargs: dict) -> tuple[object, object, dict]:
        """Input and weight of a linear layer, of Conv1D's addmm or of Falcon's `x @ W.T`, and the table of such weights."""
        if function is nn.functional.linear:
            return args[0], args[1] if len(args) > 1 else kwargs.get("weight"), self._parameter_of
        if function is torch.addmm and len(args) > 2:
            return args[1], args[2], self._parameter_of
        if function in MATMULS and len(args) == 2:
            return args[0], args[1], self._transpose_of
        return None, None, {}


@contextmanager
def watching(root: nn.Module, trace: ReaderTrace, inside: str = "", skip: tuple[str, ...] = ()) -> Iterator[None]:
    """While this lasts, what the norms of `root` give out is marked under `inside` + their names."""

    def hook(name: str):
        def mark(module, args, kwargs, output):
            if isinstance(output, torch.Tensor) and output.shape[-1] == next(module.parameters()).shape[0]:
                with torch._C.DisableTorchFunction():
                    trace.mark(inside + name, output, (args, kwargs))

        return mark

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in root.named_modules()
        if may_have_gain(module) and not (inside + name).startswith(skip)
    ]
    try:
        with trace:
            yield
    finally:
        for handle in handles:
            handle.remove()

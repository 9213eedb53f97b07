"""Which norms of a model can be folded, proved twice: by watching who reads them, and by doing it.

The first proof is structural: nothing but linear layers reads the norm, and these read nothing else. The second is
numerical: with random gains in the norms, the output of the block stays the same when they are folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tersor.ops.model.blocks import record_calls
from tersor.ops.model.branches import probe_inputs
from tersor.ops.model.initial import initial_value
from tersor.ops.model.skeleton import EXPERTS, Skeleton, StoredDtype, is_linear
from tersor.ops.prune.norms.fold import folded_bias, folded_weight
from tersor.ops.prune.norms.gain import GainLaw, gain_law, may_have_gain
from tersor.ops.prune.norms.plan import Details, Fold, Reader
from tersor.ops.prune.norms.readers import ReaderTrace, watching
from torch import nn

SAME = 1e-4  # of the Frobenius norm of what the block adds
SMALLEST_GAIN = 1e-2  # of the largest: a bias is not divided by less


class NormFinder:
    """Looks through the blocks of a model and what lies outside them; collects in `details`."""

    def __init__(self, skeleton: Skeleton, wanted: set[str]):
        self.skeleton, self.wanted = skeleton, wanted
        self.details = Details()
        self.inputs = probe_inputs(skeleton)
        self.calls = record_calls(skeleton, **self.inputs)

    def everything(self, progress: Callable[[str, int, int], None]) -> Details:
        blocks = len(self.skeleton.blocks)
        for index in range(blocks):
            progress("norms", index, blocks)
            with self.skeleton.filled(index) as block:
                self._block(index, block)
        self._outside()
        progress("norms", blocks, blocks)
        return self.details

    def _block(self, index: int, block: nn.Module) -> None:
        args, kwargs = self.calls[index].calls[0]
        hidden = args[0] if args else kwargs["hidden_states"]

        def run() -> torch.Tensor:
            with StoredDtype(self.skeleton.dtype):
                output = block(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        prefix = self.skeleton.block_name(index) + "."
        with torch.no_grad(), all_experts(block):
            self._fold(block, prefix, run, hidden)

    def _outside(self) -> None:
        """What runs before the first block and after the last one, heads included."""
        model, skeleton = self.skeleton.model, self.skeleton
        inside = tuple(skeleton.block_name(index) + "." for index in range(len(skeleton.blocks)))
        hidden = self.calls[-1].calls[0]
        hidden = (hidden[0][0] if hidden[0] else hidden[1]["hidden_states"]).clone()
        originals = list(skeleton.blocks)
        for index, recorder in enumerate(self.calls):
            recorder.calls.clear()
            recorder.output = hidden
            skeleton.blocks[index] = recorder
        self.calls[-1].output = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)

        def run():
            for recorder in self.calls:
                recorder.calls.clear()
            with StoredDtype(skeleton.dtype):
                return model(**self.inputs)

        try:
            with torch.no_grad():
                self._fold(model, "", run, None, inside)
        finally:
            for index, block in enumerate(originals):
                skeleton.blocks[index] = block

    def _fold(self, root: nn.Module, prefix: str, run: Callable, hidden: torch.Tensor | None, skip=()) -> None:
        """Find the norms of `root` that `run` proves to be foldable."""
        owners = self._matrices(root, prefix, skip)
        trace = ReaderTrace({key: owner[1].weight for key, owner in owners.items()})
        with watching(root, trace, prefix, skip):
            output = run()
        trace.escape(output, "the block gives it out" if prefix else "the model gives it out")
        if not prefix:
            for recorder in self.calls:
                trace.escape(recorder.calls, "the blocks read it as it is")
        modules = dict(root.named_modules())
        candidates: dict[str, tuple[nn.Module, GainLaw, list[int]]] = {}
        for name, module in modules.items():
            if not name or not may_have_gain(module) or (prefix + name).startswith(skip or ("\0",)):
                continue
            law, reason = self._law(prefix + name, module, trace, owners)
            if law is None:
                self._keep(prefix + name, module, reason)
            else:
                candidates[name] = module, law, sorted(trace.readers[prefix + name], key=list(owners).index)
        unsafe = set() if self._proved(candidates, owners, run, hidden) else set(candidates)
        for name in sorted(unsafe):  # one by one, to keep only those that fail by themselves
            if self._proved({name: candidates[name]}, owners, run, hidden):
                unsafe.discard(name)
        for name, (module, law, readers) in candidates.items():
            if name in unsafe:
                self._keep(prefix + name, module, "folding it changes the output: something reads it unseen")
            else:
                self._add(prefix + name, module, law, [owners[key] for key in readers])

    def _matrices(self, root: nn.Module, prefix: str, skip: tuple[str, ...]) -> dict[int, tuple[str | None, nn.Module]]:
        """id of a matrix parameter -> its checkpoint tensor (None: no or several), the module that holds it as `weight`."""
        tensors: dict[int, str] = {}
        if prefix:
            index = int(prefix.rstrip(".").rsplit(".", 1)[1])
            tensors = {id(module.weight): name for name, module in self.skeleton.linears(index).items()}
        owners: dict[int, tuple[str | None, nn.Module]] = {}
        for name, module in root.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 2 or (prefix + name).startswith(skip or ("\0",)):
                continue
            if id(weight) in owners:  # tied: the embeddings are the head
                owners[id(weight)] = None, module
                continue
            found = self.skeleton.by_parameter.get(f"{prefix}{name}.weight", [])
            tensor = tensors.get(id(weight)) or (found[0] if len(found) == 1 else None)
            owners[id(weight)] = tensor, module
        return owners

    def _law(self, name: str, module: nn.Module, trace: ReaderTrace, owners: dict) -> tuple[GainLaw | None, str]:
        if name not in trace.samples:
            return None, "was not reached by the test input"
        if name in trace.others:
            return None, trace.others[name]
        if not trace.readers[name]:
            return None, "no linear layer reads it"
        for key in trace.readers[name]:
            tensor, owner = owners[key]
            if tensor is None:
                return None, f"the {type(owner).__name__} that reads it is tied: it has no tensor of its own"
            if trace.uses[key] != {name}:
                return None, f"{tensor} reads other tensors as well"
        law = gain_law(module, *trace.samples[name])
        if law is None:
            return None, f"{type(module).__name__} is no plain gain"
        missing = [leaf for leaf in (law.gain, law.bias) if leaf and not self._tensor(name, leaf)]
        if missing:
            return None, "has no tensor"
        if not all(self._tensor(name, leaf) in self.wanted for leaf in (law.gain, law.bias) if leaf):
            return None, "left alone by --include or --exclude"
        if law.bias and not self._takes_bias([owners[key][1] for key in trace.readers[name]]):
            factor = law.factor(getattr(module, law.gain)).abs()
            if float(getattr(module, law.bias).abs().max()) and float(factor.min()) < SMALLEST_GAIN * float(
                factor.max()
            ):
                return None, "not every linear layer that reads it has a bias, and its own is too large for its gain"
        return law, ""

    @staticmethod
    def _takes_bias(layers: list[nn.Module]) -> bool:
        return all(getattr(layer, "bias", None) is not None for layer in layers)

    def _tensor(self, module: str, leaf: str) -> str | None:
        found = self.skeleton.by_parameter.get(f"{module}.{leaf}", [])
        return found[0] if len(found) == 1 else None

    def _keep(self, name: str, module: nn.Module, reason: str) -> None:
        for leaf, _ in module.named_parameters():
            if tensor := self._tensor(name, leaf):
                self.details.kept[tensor] = reason

    def _add(self, name: str, module: nn.Module, law: GainLaw, owners: list[tuple[str, nn.Module]]) -> None:
        readers = []
        for tensor, owner in owners:
            bias = tensor.removesuffix("weight") + "bias"
            has = getattr(owner, "bias", None) is not None and bias in self.skeleton.view.tensors
            readers.append(Reader(tensor, bias if has else None, not isinstance(owner, nn.Linear) and is_linear(owner)))
        bias = law.bias and self._tensor(name, law.bias)
        divided = bool(bias) and any(reader.bias is None for reader in readers)
        leaves = {law.gain: law.neutral} | ({law.bias: 0.0} if law.bias and not divided else {})
        droppable = all(
            bool((initial_value(self.skeleton.model, module, leaf) == value).all()) for leaf, value in leaves.items()
        )
        self.details.folds.append(Fold(self._tensor(name, law.gain), bias, law.offset, readers, divided, droppable))

    def _proved(self, candidates: dict, owners: dict, run: Callable, hidden: torch.Tensor | None) -> bool:
        """Whether `run` gives the same with all candidates folded, for their own and for random gains."""
        generator = torch.Generator().manual_seed(0)
        for own in (True, False) if candidates else ():
            with changed_parameters() as change:
                for module, law, _ in candidates.values():
                    for leaf in () if own else filter(None, (law.gain, law.bias)):
                        parameter = getattr(module, leaf)
                        value = torch.rand(parameter.shape, generator=generator).to(parameter) + 0.5
                        change(module, leaf, value - (law.offset if leaf == law.gain else 1.0))
                wanted = _tensor_of(run())
                for module, law, readers in candidates.values():
                    fold_in_place(module, law, [owners[key][1] for key in readers], change)
                found = _tensor_of(run())
            scale = wanted - hidden if hidden is not None and hidden.shape == wanted.shape else wanted
            if not float((found - wanted).norm()) <= SAME * float(scale.norm()):
                return False
        return True


def fold_in_place(module: nn.Module, law: GainLaw, layers: list[nn.Module], change: Callable) -> None:
    """Give the gain of a norm, and its bias where there is a place for it, to the layers that read it."""
    factor = law.factor(getattr(module, law.gain))
    bias = getattr(module, law.bias).float() if law.bias else None
    divided = bias is not None and not NormFinder._takes_bias(layers)
    for layer in layers:
        transposed = not isinstance(layer, nn.Linear) and is_linear(layer)
        if bias is not None and not divided:
            change(layer, "bias", folded_bias(layer.weight, layer.bias, bias, transposed).to(layer.bias.dtype))
        # float32 even for a head that stays in its stored dtype: this asks whether the rule holds, not how it rounds
        change(layer, "weight", folded_weight(layer.weight, factor, transposed))
    change(module, law.gain, torch.full_like(getattr(module, law.gain), law.neutral))
    if bias is not None:
        change(module, law.bias, (bias / factor if divided else torch.zeros_like(bias)).to(factor))


@contextmanager
def changed_parameters() -> Iterator[Callable]:
    """Gives `change(module, leaf, value)`; on leaving, everything is as it was."""
    before: dict[tuple[int, str], tuple[nn.Module, str, nn.Parameter]] = {}

    def change(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
        before.setdefault((id(module), leaf), (module, leaf, module._parameters[leaf]))
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    try:
        yield change
    finally:
        for module, leaf, parameter in before.values():
            module._parameters[leaf] = parameter


@contextmanager
def all_experts(block: nn.Module) -> Iterator[None]:
    """Have every token visit all experts as well, so that none is overlooked."""
    modules = [module for module in block.modules() if getattr(module, EXPERTS, None) is not None]

    def visiting(original: Callable, count: int) -> Callable:
        def forward(hidden_states, top_k_index, top_k_weights):
            everyone = torch.arange(count, device=top_k_index.device).expand(len(top_k_index), count)
            even = torch.full(everyone.shape, 1 / count, dtype=top_k_weights.dtype, device=top_k_weights.device)
            index = torch.cat([top_k_index, everyone.to(top_k_index.dtype)], dim=-1)
            return original(hidden_states, index, torch.cat([top_k_weights, even], dim=-1))

        return forward

    for module in modules:
        module.forward = visiting(module.forward, len(getattr(module, EXPERTS)))
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _tensor_of(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.float()
    return next(iter(output.values())).float()

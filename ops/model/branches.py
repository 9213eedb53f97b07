"""The residual branches of a block, found by running the model's own code; names play no part.

A branch ends in a module whose output is only ever added to the residual stream. That is tried on random weights and a few
tokens: a change of that output must arrive, at the place where the sum is first seen (the input of a norm, the output of
the block), as this change times a constant, and there must be something there that it is added to. What has no way to the
block's output any more once zeros stand in for the branch belongs to the branch, its norms included; autograd's graph
says so, not a tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import record_calls
from tersor.ops.model.skeleton import DROP_LISTS, Skeleton, assign, drop_lists
from torch import nn

PROBE_TOKENS = 8
FIRST_TOKEN = 5  # below are padding and the like, which some models mask
SAME = 1e-4


@dataclass(frozen=True)
class Branch:
    """All names are relative to the block. The branch adds `scale` times the output of `end` to the residual stream."""

    kind: str  # attention: positions mix in it. mlp: they do not
    end: str
    place: str  # the module whose input is the sum, "" for the output of the block
    scale: float
    parameters: frozenset[str]  # what only this branch uses
    projections: frozenset[str]  # those of them whose zeros silence it: its last matrices and their biases


def find_branches(skeleton: Skeleton, index: int, inputs: dict[str, torch.Tensor] | None = None) -> list[Branch]:
    """The branches of block `index`, in the order in which they run."""
    block = skeleton.blocks[index]
    call = record_calls(skeleton, **(inputs or probe_inputs(skeleton)))[index].calls[0]
    with random_weights(skeleton, block):
        return _Probe(skeleton, block, *call).branches()


def find_all_branches(skeleton: Skeleton, indices: list[int]) -> dict[int, list[Branch]]:
    """`find_branches` for several blocks; those that are built alike are looked at once."""
    found: dict[tuple, list[Branch]] = {}
    result = {}
    for index in indices:
        block = skeleton.blocks[index]
        key = type(block), *((name, parameter.shape) for name, parameter in block.named_parameters())
        if key not in found:
            found[key] = find_branches(skeleton, index)
        result[index] = found[key]
    return result


def listed_parameters(skeleton: Skeleton) -> set[str]:
    """Full names of what the branches hold that config.json lists as removed. Raises TersorError for a bad list."""
    lists = drop_lists(skeleton.view.config)
    for kind, indices in lists.items():
        blocks = range(len(skeleton.blocks))
        if not isinstance(indices, list) or any(type(index) is not int or index not in blocks for index in indices):
            raise TersorError(
                f"{skeleton.view.checkpoint.path}: {DROP_LISTS[kind]} in config.json is {str(indices)[:80]}",
                f"it should list blocks, 0 to {len(skeleton.blocks) - 1}",
            )
    branches = find_all_branches(skeleton, sorted(set().union(*lists.values())))
    return {
        f"{skeleton.block_name(index)}.{name}"
        for kind, indices in lists.items()
        for index in indices
        for name in only_branch(skeleton, branches[index], kind, index).parameters
    }


def only_branch(skeleton: Skeleton, branches: list[Branch], kind: str, index: int) -> Branch:
    """The branch of that kind. Raises TersorError where there is not exactly one."""
    found = [branch for branch in branches if branch.kind == kind]
    if len(found) != 1:
        seen = ", ".join(f"{branch.end} ({branch.kind})" for branch in branches) or "none"
        raise TersorError(
            f"{skeleton.block_name(index)}: {len(found)} {kind} branches could be proven, found are: {seen}",
            "--remove layers takes whole blocks",
        )
    return found[0]


def probe_inputs(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """A small input of the kind that the model reads. Raises TersorError for other than tokens and images."""
    model, config = skeleton.model, skeleton.model.config
    kind = model.base_model.main_input_name
    if kind == "input_ids":
        rows = model.get_input_embeddings().weight.shape[0]
        return {kind: (torch.arange(FIRST_TOKEN, FIRST_TOKEN + PROBE_TOKENS) % rows)[None].to(skeleton.device)}
    if kind == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {kind: image.to(skeleton.device, skeleton.dtype)}
    raise TersorError(
        f"{type(model).__name__} reads {kind}, which cannot be made up to look into its blocks",
        "text models and vision encoders can be looked into",
    )


@contextlib.contextmanager
def random_weights(skeleton: Skeleton, *blocks: nn.Module) -> Iterator[None]:
    """`blocks`, which are built alike, with the same seeded weights; empty again on leaving."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in blocks[0].named_parameters()]
    for name in names:
        shape = blocks[0].get_parameter(name).shape
        value = torch.randn(shape, generator=generator)
        value = value.mul_(max(shape[-1], 1) ** -0.5) if len(shape) > 1 else value.mul_(0.1).add_(1)
        for block in blocks:
            assign(block, name, value.to(skeleton.device, skeleton.dtype))
    try:
        yield
    finally:
        for block in blocks:
            for name in names:
                assign(block, name, torch.empty_like(block.get_parameter(name), device="meta"))


def passes_through(skeleton: Skeleton, index: int, branches: list[Branch]) -> bool:
    """Whether a block whose branches are all silent gives its input: not where a norm follows the sum, as in BERT."""
    block = skeleton.blocks[index]
    call = record_calls(skeleton, **probe_inputs(skeleton))[index].calls[0]
    with random_weights(skeleton, block), contextlib.ExitStack() as stack:
        for branch in branches:
            stack.enter_context(silenced(block, branch))
        probe = _Probe(skeleton, block, *call)
        return torch.equal(probe.run().output, probe.hidden)


@contextlib.contextmanager
def observed(block: nn.Module, branch: Branch) -> Iterator[dict[str, torch.Tensor]]:
    """While the block runs: `added`, what the branch adds, and `sum`, what is there then (not for place "": the output)."""
    seen: dict[str, torch.Tensor] = {}

    def added(_, args, output):
        seen["added"] = first_tensor(output).detach() * branch.scale  # a copy: some models add in place

    def arrived(_, args, kwargs):
        seen["sum"] = input_tensor(args, kwargs).detach().clone()

    handles = [block.get_submodule(branch.end).register_forward_hook(added)]
    if branch.place:
        handles.append(block.get_submodule(branch.place).register_forward_pre_hook(arrived, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def silenced(block: nn.Module, branch: Branch) -> Iterator[None]:
    """The block without the branch: zeros are added in its place."""
    with _replaced(block.get_submodule(branch.end), torch.zeros_like):
        yield


def first_tensor(value: object) -> torch.Tensor | None:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def input_tensor(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The hidden states that a module is called with."""
    return first_tensor(args) if args else first_tensor(kwargs.get("hidden_states"))


@contextlib.contextmanager
def _replaced(module: nn.Module, make) -> Iterator[None]:
    """`make(output)` in the place of a module's output, or of the first item of the tuple it returns."""

    def hook(_, args, output):
        made = make(first_tensor(output))
        return type(output)((made, *output[1:])) if isinstance(output, (tuple, list)) else made

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Trace:
    """What one run of the block showed, by module name: inputs as they came, outputs in the order they were done."""

    output: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    calls: dict[str, int]


class _Probe:
    """A filled block, and what the model calls it with."""

    def __init__(self, skeleton: Skeleton, block: nn.Module, args: tuple, kwargs: dict):
        self.block, self.args = block, args[1:]
        self.kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        shape = (args[0] if args else kwargs["hidden_states"]).shape
        self.generator = torch.Generator().manual_seed(1)
        self.hidden = self._random(torch.empty(shape, dtype=skeleton.dtype, device=skeleton.device))
        self.modules = {name: module for name, module in block.named_modules() if name}

    def _random(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device, like.dtype)

    @torch.no_grad()
    def run(self, hidden: torch.Tensor | None = None) -> _Trace:
        trace = _Trace(self.hidden, {}, {}, {})

        def before(name, args, kwargs):
            trace.calls[name] = trace.calls.get(name, 0) + 1
            tensor = input_tensor(args, kwargs)
            if tensor is not None and self._is_hidden(tensor):
                trace.inputs[name] = tensor.reshape(self.hidden.shape).clone()  # some models add in place

        def after(name, output):
            tensor = first_tensor(output)
            if tensor is not None and self._is_hidden(tensor):
                trace.outputs[name] = tensor.reshape(self.hidden.shape).clone()  # some models add in place

        handles = []
        for name, module in self.modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _, args, output, name=name: after(name, output)))
        try:
            trace.output = first_tensor(
                self.block(self.hidden if hidden is None else hidden, *self.args, **self.kwargs)
            )
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def _is_hidden(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() == self.hidden.numel() and tensor.shape[-1] == self.hidden.shape[-1]

    def branches(self) -> list[Branch]:
        self.dense = self.run()
        unused = self._dead()
        found: dict[str, tuple[str, str, float, frozenset[str]]] = {}
        for name, module in self.modules.items():
            inside = any(name.startswith(f"{root}.") for root in found)
            if inside or self.dense.calls.get(name) != 1 or name not in self.dense.outputs:
                continue
            if not any(parameter.dim() > 1 for parameter in module.parameters()):
                continue
            end = self._extend(name)
            sum_place = self._sum(end)
            if sum_place is None:
                continue
            with _replaced(self.modules[end], torch.zeros_like):
                dead = self._dead()
            if dead is not None:
                own = {key for key in dead if key not in unused or key.startswith(f"{name}.")}
                found[name] = (end, *sum_place, frozenset(own))
        largest = [entry for entry in found.values() if not any(entry[3] < other[3] for other in found.values())]
        order = list(self.dense.outputs)
        largest.sort(key=lambda entry: order.index(entry[0]))
        ends = [entry[0] for entry in largest]
        return [
            Branch(self._kind(end, ends), end, place, scale, own, self._projections(end, own))
            for end, place, scale, own in largest
        ]

    def _extend(self, name: str) -> str:
        """The last module that gives nothing but zeros when `name` does: a norm or a dropout behind it."""
        with _replaced(self.modules[name], torch.zeros_like):
            trace = self.run()
        order = list(trace.outputs)
        later = order[order.index(name) :]
        return [
            other
            for other in later
            if trace.calls[other] == 1
            and not bool(trace.outputs[other].any())
            and bool(self.dense.outputs[other].any())
        ][-1]

    def _sum(self, end: str) -> tuple[str, float] | None:
        """Where the output of `end` is added to something, and times what."""
        output = self.dense.outputs[end]
        change = self._random(output)
        with _replaced(self.modules[end], lambda tensor: tensor + change.reshape(tensor.shape)):
            trace = self.run()
        places = [*trace.inputs.items(), ("", trace.output)]
        for place, value in places:
            before = self.dense.output if place == "" else self.dense.inputs.get(place)
            if before is None or (place and trace.calls[place] != 1) or torch.equal(value, before):
                continue
            moved = value - before
            scale = float((moved * change).sum() / change.square().sum())
            if not torch.allclose(moved, scale * change, atol=SAME * float(moved.abs().max()), rtol=0):
                continue
            rest = before - scale * output
            if abs(scale) > SAME and float(rest.abs().max()) > SAME * float(before.abs().max()):
                return place, scale
        return None

    def _dead(self) -> set[str] | None:
        """Parameters that the block's output does not depend on; None when it does not depend on the input either."""
        named = dict(self.block.named_parameters())
        hidden = self.hidden.clone().requires_grad_()
        for parameter in named.values():
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                output = first_tensor(self.block(hidden, *self.args, **self.kwargs))
            reached = _leaves(output)
        finally:
            for parameter in named.values():
                parameter.requires_grad_(False)
        return (
            {name for name, parameter in named.items() if id(parameter) not in reached}
            if id(hidden) in reached
            else None
        )

    def _kind(self, end: str, ends: list[str]) -> str:
        """Whether another first token changes what the branch, alone in its block, gives for the other tokens."""
        other = self.hidden.clone()
        other[:, 0] = self._random(other[:, 0])
        with contextlib.ExitStack() as stack:
            for name in ends:
                if name != end:
                    stack.enter_context(_replaced(self.modules[name], torch.zeros_like))
            before, after = self.run().outputs[end], self.run(other).outputs[end]
        moved = (after - before)[:, 1:].abs().max()
        return "attention" if float(moved) > SAME * float(before.abs().max()) else "mlp"

    def _projections(self, end: str, own: frozenset[str]) -> frozenset[str]:
        """The fewest parameters whose zeros make the branch give zeros, the last ones where there is a choice."""
        order = list(self.dense.calls)
        defined = [name for name, _ in self.block.named_parameters()]
        matrices = {name.rpartition(".")[0] for name in own if self.block.get_parameter(name).dim() > 1}

        def position(name: str) -> tuple[bool, int, int]:
            module = name.rpartition(".")[0]
            return module in matrices, order.index(module) if module in order else -1, defined.index(name)

        kept = {name: self.block.get_parameter(name).data for name in sorted(own, key=position)}
        needed = set(kept)
        try:
            for name in kept:
                self._zero(name)
            if bool(self.run().outputs[end].any()):
                raise TersorError(
                    f"{type(self.block).__name__}: {end} does not give zeros though all its weights are zero",
                    "delete the branch instead: leave --keep-shape out",
                )
            for name, value in kept.items():
                self.block.get_parameter(name).data = value
                if bool(self.run().outputs[end].any()):
                    self._zero(name)
                else:
                    needed.discard(name)
        finally:
            for name, value in kept.items():
                self.block.get_parameter(name).data = value
        return frozenset(needed)

    def _zero(self, name: str) -> None:
        parameter = self.block.get_parameter(name)
        parameter.data = torch.zeros_like(parameter.data)


def _leaves(output: torch.Tensor) -> set[int]:
    """ids of the leaf tensors in the graph behind `output`."""
    seen, todo, leaves = set(), [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [parent for parent, _ in node.next_functions]
    return leaves

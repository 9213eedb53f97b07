"""Chains of element-wise functions in a block's graph, and what other ways to differentiate them would keep in memory.

Read from the graph that autograd builds while one block runs: its nodes, and the tensors they hold. Element-wise nodes
that feed each other are one chain; matrix products, reductions, and sums of two finished branches bound it. For a
chain are counted, in bytes per token, its output included where the next operator keeps it anyway:

- kept: what autograd holds now;
- nested: forward-mode derivatives inside reverse mode (arXiv 2209.10778): one derivative for each differentiable input,
  computed on the way forward, and nothing else; not for chains that depend on a reduction of themselves (norms);
- recompute: the inputs of the chain, and everything else again; recompute_output: the output too, which the next
  operator then does not keep;
- invert: functions of one variable get their derivative from their output, where that is kept anyway, plus a bit where
  two inputs give the same output (arXiv 2407.15545).

SwiGLU keeps gate, silu(gate), up and the product, 4 values; nested two derivatives and the product. For GELU nested
gains nothing: its one derivative is as large as the one input that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch

LINEAR = {"Add", "Sub", "Rsub", "Neg", "ToCopy", "Clone"}
# Functions of one variable; True: one input for each output, or the kept output says which.
UNARY = {
    "Silu": False, "Gelu": False, "Mish": False, "Hardswish": False, "Pow": False, "Abs": False, "Sin": False, "Cos": False,
    "Sigmoid": True, "Tanh": True, "Relu": True, "Exp": True, "Log": True, "Sqrt": True, "Rsqrt": True, "Erf": True,
    "Softplus": True, "LeakyRelu": True, "Elu": True, "Reciprocal": True, "LogSigmoid": True, "Clamp": False,
    "Threshold": True, "Hardtanh": True, "ClampMin": False, "ClampMax": False,
}  # fmt: skip
PRODUCTS = {"Mul", "Div", "NativeDropout", "MaskedFill", "Where"}
ELEMENTWISE = LINEAR | UNARY.keys() | PRODUCTS
VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze", "Squeeze", "T", "Expand", "Alias"}
BIT = 1 / 8
WAYS = ("nested_bytes", "recompute_bytes", "recompute_output_bytes", "invert_bytes")
SMALL = 1 / 16  # chains of tensors that are so much smaller than the largest are left out


@dataclass(eq=False)
class Held:
    """A tensor that a node keeps."""

    storage: int
    nbytes: float
    fixed: bool  # made without the graph: a weight, a mask
    shared: bool  # there anyway


@dataclass(eq=False)
class Node:
    """One entry of autograd's graph; views are skipped, so that `inputs` are what computes something."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    inputs: list[Node | None] = field(default_factory=list)
    users: list[Node] = field(default_factory=list)
    held: dict[str, Held] = field(default_factory=dict)
    output: int | None = None  # storage of its result, where somebody keeps it
    is_parameter: bool = False

    @property
    def nbytes(self) -> float:
        return prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


def find_chains(output: torch.Tensor, tokens: int, shared: set[int]) -> list[dict]:
    """The chains behind `output`, a block's result for `tokens`; `shared` are storages (`_cdata`) that do not count:
    weights, and masks and tables that the model makes once for all blocks.

    Equal chains are one entry with a `count`. Largest saving first.
    """
    nodes = _read_graph(output, shared)
    members = _components(nodes)
    largest = max((max(node.nbytes for node in chain) for chain in members), default=0)
    found: dict[tuple, dict] = {}
    for chain in members:
        entry = _describe(chain, tokens)
        if entry is not None and max(node.nbytes for node in chain) >= SMALL * largest:
            key = tuple(entry.items())
            found[key] = entry | {"count": found[key]["count"] + 1 if key in found else 1}
    return sorted(found.values(), key=lambda entry: -entry["count"] * (entry["kept_bytes"] - best_bytes(entry)))


def best_bytes(entry: dict) -> float:
    """What the most saving way keeps."""
    return min(entry[way] for way in WAYS if entry[way] is not None)


def _read_graph(output: torch.Tensor, shared: set[int]) -> list[Node]:
    """All nodes, those nearest to the output first. Tensors that nodes hold tell whose results are kept."""
    known: dict[object, Node] = {}  # holds autograd's nodes too, so that each stays the same object
    todo, order = [output.grad_fn], []
    while todo:
        raw = todo.pop(0)
        if raw is None or raw in known:
            continue
        known[raw] = node = _node(raw, shared)
        order.append((raw, node))
        todo += [parent for parent, _ in raw.next_functions]
    producers: dict[int, Node] = {}
    for raw, node in order:
        node.inputs = [_source(parent, known) for parent, _ in raw.next_functions]
        if node.op not in VIEWS:
            for parent in node.inputs:
                if parent is not None:
                    parent.users.append(node)
        for name, tensor in _saved(raw):
            storage = tensor.untyped_storage()
            made_by = _source(tensor.grad_fn, known)
            node.held[name] = Held(storage._cdata, storage.nbytes(), made_by is None, storage._cdata in shared)
            if made_by is not None:
                producers[storage._cdata] = made_by
    for storage, node in producers.items():
        node.output = storage
    return [node for _, node in order if node.op not in VIEWS]


def _node(raw, shared: set[int]) -> Node:
    op = raw.name().removeprefix("torch::autograd::").rstrip("0123456789").removesuffix("Backward")
    try:
        meta = raw._input_metadata[0]
        shape, dtype = tuple(meta.shape), meta.dtype
    except (AttributeError, IndexError, RuntimeError):
        shape, dtype = (), None
    is_parameter = op == "AccumulateGrad" and raw.variable.untyped_storage()._cdata in shared
    return Node(op, shape, dtype, is_parameter=is_parameter)


def _source(raw, known: dict[object, Node]) -> Node | None:
    """The node behind `raw` that computes something."""
    while raw is not None and raw in known and known[raw].op in VIEWS:
        raw = raw.next_functions[0][0]
    return known.get(raw)


def _saved(raw) -> Iterator[tuple[str, torch.Tensor]]:
    for name in dir(raw):
        if not name.startswith("_saved_") or name.startswith("_saved_tensors"):
            continue
        try:
            value = getattr(raw, name)
        except RuntimeError:  # changed in place since
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                yield name.removeprefix("_saved_"), tensor


def _components(nodes: list[Node]) -> list[list[Node]]:
    """Element-wise nodes that feed each other, sums of branches left out; inputs before what they feed."""
    roots: dict[Node, frozenset[Node]] = {}
    for node in _inputs_first(nodes):
        sources = [roots[one] for one in node.inputs if one is not None and not one.is_parameter]
        joins = (
            node.op in ("Add", "Sub")
            and len(sources) == 2
            and not (sources[0] <= sources[1] or sources[1] <= sources[0])
        )
        inside = node.op in ELEMENTWISE and not joins
        roots[node] = frozenset().union(*sources) if inside else frozenset({node})
    left = {node: None for node in roots if node not in roots[node]}
    chains = []
    while left:
        chain, todo = set(), [next(iter(left))]
        while todo:
            node = todo.pop()
            if node in left:
                del left[node]
                chain.add(node)
                todo += [near for near in [*node.inputs, *node.users] if near is not None]
        chains.append([node for node in roots if node in chain])
    return chains


def _inputs_first(nodes: list[Node]) -> list[Node]:
    done: dict[Node, None] = {}
    for start in nodes:
        todo = [start]
        while todo:
            node = todo[-1]
            waiting = [one for one in node.inputs if one is not None and one not in done]
            if waiting and node not in done:
                todo += waiting
            else:
                done.setdefault(todo.pop())
    return list(done)


def _describe(chain: list[Node], tokens: int) -> dict | None:
    """Bytes per token of each way, None for a chain that keeps nothing."""
    members = set(chain)
    inputs = _unique(source for node in chain for source in node.inputs if source is not None and source not in members)
    outputs = [node for node in chain if not node.users or any(user not in members for user in node.users)]
    own: dict[int, float] = {}
    for node in chain:
        own |= {held.storage: held.nbytes for held in node.held.values() if not held.shared}
    after: dict[int, float] = {}  # outputs that the next operators keep
    for node in outputs:
        for user in node.users:
            if user not in members:
                after |= {one.storage: one.nbytes for one in user.held.values() if one.storage == node.output}
    kept = sum((own | after).values())
    if not own:
        return None
    rest = sum(after.values())
    activations = [source for source in inputs if not source.is_parameter]
    constants = {
        one.storage: one.nbytes for node in chain for one in node.held.values() if one.fixed and not one.shared
    }
    again = sum(source.nbytes for source in activations) + sum(constants.values())
    feeds_itself = any(_behind(source, members) for source in activations)
    return {
        "chain": " → ".join(_spelled(node) for node in chain if node.op not in ("ToCopy", "Clone")),
        "width": max(prod(node.shape) for node in chain) // tokens,
        "kept_bytes": kept / tokens,
        "nested_bytes": None if feeds_itself else min(_derivatives(outputs, inputs, members) + rest, kept) / tokens,
        "recompute_bytes": min(again + rest, kept) / tokens,
        "recompute_output_bytes": min(again, kept) / tokens,
        "invert_bytes": _inverted(chain, own, after) / tokens,
    }


def _unique(nodes) -> list[Node]:
    return list(dict.fromkeys(nodes))


def _spelled(node: Node) -> str:
    return {"Mul": "×", "Add": "+", "Sub": "−", "NativeDropout": "dropout"}.get(node.op, node.op.lower())


def _behind(start: Node, members: set[Node]) -> bool:
    """Whether a member is among what `start` was computed from."""
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in members:
            return True
        todo += [source for source in node.inputs if source is not None]
    return False


def _derivatives(outputs: list[Node], inputs: list[Node], members: set[Node]) -> float:
    """Bytes of the derivatives of `outputs` by `inputs`; equal ones count once, constant ones nothing.

    A derivative is followed as the set of factors that it is the product of; a sum over several ways is a new factor.
    More than one factor of full size are multiplied and kept as one tensor.
    """
    total: dict[tuple, float] = {}
    for output in outputs:
        ways: dict[Node, list[frozenset]] = {output: [frozenset()]}
        order = _from_output(output, members)
        for node in order:
            mine = _sum(ways[node], node)
            for place, source in enumerate(node.inputs):
                if source is not None and (source in members or source in inputs):
                    ways.setdefault(source, []).append(mine | _factor(node, place))
        for source in inputs:
            if source not in ways:
                continue
            factors = _sum(ways[source], source)
            if factors:
                full = prod(source.shape) if not source.is_parameter else 0
                full = max(full, max(count for _, count, _ in factors))
                nbytes = min(sum(size for _, _, size in factors), full * (output.dtype or source.dtype).itemsize)
                total[tuple(sorted(key for key, _, _ in factors))] = nbytes
    return sum(total.values())


def _from_output(output: Node, members: set[Node]) -> list[Node]:
    """The members behind `output`, each after all of its users."""
    reached, todo = set(), [output]
    while todo:
        node = todo.pop()
        if node in members and node not in reached:
            reached.add(node)
            todo += [source for source in node.inputs if source is not None]
    order, done = [], set()
    ready = [output]
    while ready:
        node = ready.pop()
        done.add(node)
        order.append(node)
        for source in _unique(source for source in node.inputs if source in reached):
            if source not in done and all(user in done for user in source.users if user in reached):
                ready.append(source)
    return order


def _sum(ways: list[frozenset], node: Node) -> frozenset:
    """(key, numbers, bytes) of the factors of a sum of products."""
    if len(ways) == 1 or all(way == ways[0] for way in ways):
        return ways[0]
    return frozenset({(f"sum {id(node)}", prod(node.shape), node.nbytes)})


def _factor(node: Node, place: int) -> frozenset:
    """The derivative of `node` by its input at `place`: nothing where it is constant."""
    if node.op in LINEAR:
        return frozenset()
    if node.op in UNARY:
        return frozenset({(f"unary {id(node)}", prod(node.shape), node.nbytes)})
    other = ("other", "self")[place] if node.op in ("Mul", "Div") else None
    if node.op == "Div" and place == 1:
        return frozenset({(f"div {id(node)}", prod(node.shape), node.nbytes)})
    held = node.held.get(other) if other else next(iter(node.held.values()), None)
    if held is None:  # times a number
        return frozenset()
    return frozenset({(f"held {held.storage}", prod(node.shape), 0.0 if held.shared else held.nbytes)})


def _inverted(chain: list[Node], own: dict[int, float], after: dict[int, float]) -> float:
    """Bytes when functions of one variable work from their output, if somebody else keeps that."""
    dropped, bits = set(), 0.0
    for node in chain:
        held = [one for one in node.held.values() if not one.shared]
        if node.op not in UNARY or len(held) != 1 or held[0].storage == node.output:
            continue
        needed = any(
            one.storage == held[0].storage for other in chain if other is not node for one in other.held.values()
        )
        output_kept = node.output is not None and node.output in own | after
        if output_kept and not needed and held[0].storage not in after:
            dropped.add(held[0].storage)
            bits += 0.0 if UNARY[node.op] else BIT * prod(node.shape)
    return sum(size for storage, size in (own | after).items() if storage not in dropped) + bits

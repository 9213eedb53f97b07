"""Along which dimension each operator of a block is cut: the cheapest choice for all of them together.

nnScaler's dynamic programme over operators in order, with a Pareto list of (bytes of weights, seconds) for every way in
which the tensors lie that are still needed. Between two operators the cheapest path of collectives is taken, forward and, for
gradients, backward; a tensor that several operators want in the same way is converted once. Megatron-LM's column and row
pattern is not built in: it comes out wherever weights have to be cut to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.dependencies.layout import Group, placed
from tersor.ops.plan_parallel.dependencies.path import Cost, Path, cheapest
from tersor.ops.plan_parallel.transform.annotation import Place, R, Split, V, splits
from tersor.ops.plan_parallel.transform.operators import Node

AXIS = "tp"
BACKWARD_WORK = 2  # of a forward pass


class Device(NamedTuple):
    flops_per_second: float
    bytes_per_second: float


class Chosen(NamedTuple):
    """`splits` by operator; `paths` are the collectives between them: (tensor, operator that reads it, forward | backward,
    path). `seconds` are of one forward and backward pass."""

    splits: dict[str, Split]
    seconds: float
    weight_bytes: float
    paths: tuple[tuple[str, str, str, Path], ...]

    def along(self) -> dict[str, str | None]:
        """Operator -> the name it is cut along, None where all ranks do the same."""
        return {name: split.name for name, split in self.splits.items()}


class Live(NamedTuple):
    """A tensor that is still needed: the ways it lies in by now, the gradient its producer takes, and the gradients that
    have been brought there."""

    places: frozenset[Place]
    gradient: Place
    returned: frozenset[Place]


class Entry(NamedTuple):
    weight_bytes: float
    seconds: float
    splits: tuple[Split, ...]
    paths: tuple[tuple[str, str, str, Path], ...]


class Chooser:
    """Prices of cutting over `n` ranks. `micro_batches`: the gradients of weights are reduced once for so many passes."""

    def __init__(
        self, n: int, cost: Cost, device: Device, micro_batches: int = 1, nbytes: int = 2, gradient_bytes: int = 4
    ):
        self.n, self.cost, self.device = n, cost, device
        self.micro_batches, self.nbytes, self.gradient_bytes = micro_batches, nbytes, gradient_bytes
        self._paths: dict[tuple, Path] = {}

    def path(self, shape: tuple[int, ...], source: Place, target: Place) -> Path | None:
        """None where the shape does not divide."""
        key = shape, source, target
        if key not in self._paths:
            if any(isinstance(place, int) and shape[place] % self.n for place in (source, target)):
                self._paths[key] = None
            else:
                ends = (placed({AXIS: self.n}, {AXIS: place}, len(shape)) for place in (source, target))
                self._paths[key] = cheapest(*ends, shape, self.nbytes, self.cost)
        return self._paths[key]

    def run(self, node: Node, split: Split) -> tuple[float, float]:
        """(seconds, bytes of weights) of an operator on one rank, forward and backward, without what comes before it."""
        inputs, outputs = node.shapes()
        share = 1 if split.name in (None, "partial") else self.n
        moved, held, seconds = 0.0, 0.0, 0.0
        for name, shape, place, gradient in zip(node.inputs, inputs, split.inputs, split.input_gradients, strict=True):
            nbytes = prod(shape) * self.nbytes / (self.n if isinstance(place, int) else 1)
            moved += nbytes
            if name in node.weights:
                held += nbytes
                if place == R and gradient == V:
                    full = prod(shape) * self.gradient_bytes
                    seconds += self.cost("all_reduce", full, Group(self.n, (AXIS,))) / self.micro_batches
        moved += sum(
            prod(shape) * self.nbytes / (self.n if isinstance(place, int) else 1)
            for shape, place in zip(outputs, split.outputs, strict=True)
        )
        compute = node.flops / share / self.device.flops_per_second
        seconds += (1 + BACKWARD_WORK) * max(compute, moved / self.device.bytes_per_second)
        return seconds, held


def choose(nodes: Sequence[Node], chooser: Chooser, limit: float = inf, streams: Sequence[Place] = (R, 1)) -> Chosen:
    """The fastest way to run a block on `chooser.n` ranks that holds at most `limit` bytes of weights on each.

    The block takes tensor `x` and leaves its result in the same layout, one of `streams` (replicated, or cut along the
    sequence), so that blocks can follow each other. Raises TersorError where nothing keeps to the limit.
    """
    found = [best for stream in streams if (best := _with_stream(nodes, chooser, limit, stream)) is not None]
    if not found:
        raise TersorError(
            f"no way to cut the block over {chooser.n} ranks holds its weights in {limit:,.0f} bytes", "use more ranks"
        )
    return min(found, key=lambda chosen: chosen.seconds)


def _with_stream(nodes: Sequence[Node], chooser: Chooser, limit: float, stream: Place) -> Chosen | None:
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    start = (("x", Live(frozenset([stream]), R if stream == R else stream, frozenset())),)
    front: dict[tuple, list[Entry]] = {start: [Entry(0.0, 0.0, (), ())]}
    for index, node in enumerate(nodes):
        after: dict[tuple, list[Entry]] = {}
        options = [(split, *chooser.run(node, split)) for split in splits(node.annotation, node.sizes, chooser.n)]
        for live, entries in front.items():
            for split, seconds, held in options:
                moved = _convert(dict(live), node, split, chooser)
                if moved is None:
                    continue
                tensors, transfer, paths = moved
                for name, place, gradient in zip(node.outputs, split.outputs, split.output_gradients, strict=True):
                    tensors[name] = Live(frozenset([place]), gradient, frozenset())
                kept = tuple(
                    sorted(
                        ((name, state) for name, state in tensors.items() if last_use.get(name, len(nodes)) > index),
                        key=lambda item: item[0],
                    )
                )
                for entry in entries:
                    grown = Entry(
                        entry.weight_bytes + held, entry.seconds + seconds + transfer, (*entry.splits, split),
                        (*entry.paths, *paths),
                    )  # fmt: skip
                    if grown.weight_bytes <= limit:
                        after.setdefault(kept, []).append(grown)
        front = {live: pareto(entries) for live, entries in after.items()}
    return _finish(nodes, chooser, front, stream)


def _finish(nodes: Sequence[Node], chooser: Chooser, front: dict, stream: Place) -> Chosen | None:
    """Bring the result into the layout that the block began with."""
    output, best = nodes[-1].outputs[0], None
    shape = nodes[-1].shapes()[1][0]
    for live, entries in front.items():
        state = dict(live)[output]
        (place,) = state.places
        forward, backward = chooser.path(shape, place, stream), chooser.path(shape, stream, state.gradient)
        if forward is None or backward is None:
            continue
        for entry in entries:
            seconds = entry.seconds + forward.seconds + backward.seconds
            if best is None or seconds < best.seconds:
                ends = ((output, "next block", "forward", forward), (output, "next block", "backward", backward))
                paths = tuple(path for path in (*entry.paths, *ends) if path[3].steps)
                names = (node.name for node in nodes)
                best = Chosen(dict(zip(names, entry.splits, strict=True)), seconds, entry.weight_bytes, paths)
    return best


def _convert(live: dict[str, Live], node: Node, split: Split, chooser: Chooser):
    """(tensors, seconds, paths) after the inputs of `node` have been brought to where `split` wants them; None where they
    cannot be. Weights are made where they are wanted."""
    seconds, paths = 0.0, []
    inputs, _ = node.shapes()
    for name, shape, place, gradient in zip(node.inputs, inputs, split.inputs, split.input_gradients, strict=True):
        if name in node.weights:
            continue
        state = live[name]
        if place not in state.places:
            ways: list[Path | None] = [chooser.path(shape, source, place) for source in state.places]
            way = min((path for path in ways if path is not None), key=_seconds, default=None)
            if way is None:
                return None
            seconds += way.seconds
            paths.append((name, node.name, "forward", way))
        if gradient not in state.returned and gradient != state.gradient:
            way = chooser.path(shape, gradient, state.gradient)
            if way is None:
                return None
            seconds += way.seconds
            paths.append((name, node.name, "backward", way))
        live[name] = Live(state.places | {place}, state.gradient, state.returned | {gradient})
    return live, seconds, tuple(path for path in paths if path[3].steps)


def _seconds(path: Path) -> float:
    return path.seconds


def pareto(entries: list[Entry]) -> list[Entry]:
    """Those that no other beats in both bytes and seconds."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.weight_bytes, entry.seconds)):
        if not kept or entry.seconds < kept[-1].seconds:
            kept.append(entry)
    return kept

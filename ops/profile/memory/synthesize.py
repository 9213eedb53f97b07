"""A training step's allocations without running it: from what one block saves, and the schedule that runs the blocks.

The order is that of eager PyTorch: an operation's scratch memory and result are taken before its inputs are given up; a
backward pass takes the gradient of a saved tensor, then frees the tensor and the gradient that came in; the gradients
of weights appear in the first backward pass and stay to the end of the step (`zero_grad(set_to_none=True)`), in later ones
they are taken, added and freed; optimizer states appear in the first optimizer step and stay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tersor.formats.errors import TersorError
from tersor.formats.memory_trace import Trace, TraceBuilder
from tersor.ops.profile.memory.schedules import passes

OUTSIDE = -1  # stands where a layer's number does, for weights outside of the blocks
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Experts:
    """Tensors whose size the router decides: `tensors` per expert, all experts' together of `bytes` per micro-batch.

    Shares are drawn from a Dirichlet distribution; `concentration` 1 is very uneven, 100 nearly even.
    """

    count: int
    bytes: int
    tensors: int = 2
    concentration: float = 8.0


@dataclass
class _Stage:
    """What the walk over a step carries along."""

    builder: TraceBuilder
    random: random.Random
    saved: Sequence[int]
    temporaries: Sequence[int]
    weights: Sequence[int]
    dropped: frozenset[int]
    full: bool
    experts: Experts | None
    phase: str = ""
    number: int = 0
    length: float = 1.0  # of the micro-batch at hand, as share of the longest
    kept: dict[tuple, list] = field(default_factory=dict)  # (micro-batch, layer) → (id, bytes, index, dynamic)
    gradients: dict[int, list[str]] = field(default_factory=dict)

    def take(self, nbytes: int, label: str, dynamic: bool = False) -> str:
        self.number += 1
        id = f"{self.number}"
        self.builder.alloc(id, nbytes, 0, label, self.phase, dynamic)
        return id

    def sized(self, nbytes: int) -> int:
        """Bytes of what is as long as the micro-batch."""
        return int(nbytes * self.length)

    def free(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.builder.free(id)


def synthetic_trace(
    saved: Sequence[int],
    temporaries: Sequence[int] = (),
    layers: int = 1,
    *,
    weights: Sequence[int] = (),
    optimizer: Sequence[int] = (),
    head: Sequence[int] = (),
    rest: Sequence[int] = (),
    rest_optimizer: Sequence[int] = (),
    micro_batches: int = 1,
    stage: int = 0,
    stages: int = 1,
    chunks: int = 1,
    schedule: str = "1f1b",
    recompute: str = "none",
    dropped: Sequence[int] | None = None,
    experts: Experts | None = None,
    shortest: float = 1.0,
    steps: int = 2,
    seed: int = 0,
    name: str = "",
) -> Trace:
    """Allocations of `steps` training steps on one pipeline stage; all sizes in bytes, of one micro-batch.

    `saved` are the tensors that one block saves for its backward pass, in the order they are made, the block's input
    first. `temporaries` is scratch memory, one for each saved tensor in turn. `weights` are one block's parameters, which
    have gradients of the same sizes; `optimizer` the optimizer's states of one block. `head` are the tensors that the loss
    saves (logits), on the last stage. `rest` are this stage's weights outside of the blocks (embedding, head), with
    `rest_optimizer` their states; their gradients come at the end of a backward pass. `layers` are the blocks of the whole
    model, split evenly over `stages` x `chunks`.

    `recompute`: `full` keeps a block's input only and runs the block again before its backward pass; `selective` does so
    for the tensors `dropped` (indices into `saved`; by default the largest ones that make up half of the bytes).
    `shortest` below 1: micro-batches of unequal length, as without padding, each of `shortest` to 1 times the sizes.
    Raises TersorError when the numbers make no schedule.
    """
    if recompute not in RECOMPUTE:
        raise TersorError(f"recompute {recompute!r} is not known", f"it is one of {', '.join(RECOMPUTE)}")
    if not saved or min((*saved, *temporaries, *weights, *optimizer, *head, *rest, *rest_optimizer)) < 0:
        raise TersorError("a block saves no tensor, or one of negative size", "give the bytes of each saved tensor")
    if not 0 < shortest <= 1:
        raise TersorError(f"the shortest micro-batch is {shortest} of the longest", "give a share above 0, up to 1")
    if layers < stages * chunks or steps < 1:
        raise TersorError(
            f"{layers} layers are too few for {stages} stages of {chunks} chunks, or {steps} steps are",
            "use fewer stages, and at least one step",
        )
    order = passes(schedule, micro_batches, stage, stages, chunks)
    if recompute == "full":
        dropped = range(1, len(saved))
    elif recompute == "none":
        dropped = ()
    elif dropped is None:
        dropped = _largest_half(saved)
    builder = TraceBuilder(name or f"{schedule}, {layers} layers, {micro_batches} micro-batches", "synthetic trace")
    run = _Stage(
        builder,
        random.Random(seed),
        saved,
        temporaries,
        weights,
        frozenset(dropped) - {0},
        recompute == "full",
        experts,
        "weights",
    )
    parts = _chunk_layers(layers, stage, stages, chunks)
    owners = [(OUTSIDE, "", rest, rest_optimizer)] if rest or rest_optimizer else []
    owners += [(layer, f"layer {layer} ", weights, optimizer) for part in parts for layer in part]
    for _, label, sizes, _ in owners:
        for nbytes in sizes:
            run.take(nbytes, f"{label}weight")
    for step in range(steps):
        lengths = [run.random.uniform(shortest, 1) if shortest < 1 else 1.0 for _ in range(micro_batches)]
        for kind, micro_batch, chunk in order:
            run.length = lengths[micro_batch]
            last = stage == stages - 1 and chunk == chunks - 1
            if kind == "forward":
                for layer in parts[chunk]:
                    run.phase = f"step {step} forward {micro_batch} layer {layer}"
                    _forward(run, micro_batch, layer)
                if last and head:
                    run.phase = f"step {step} loss {micro_batch}"
                    run.kept[micro_batch, -1] = [
                        (run.take(size, "loss"), size, 0, False) for size in map(run.sized, head)
                    ]
            else:
                _backward_pass(run, step, micro_batch, parts[chunk], last and bool(head))
                if chunk == 0:
                    _weight_gradients(run, OUTSIDE, rest, "")
        run.phase = f"step {step} optimizer"
        for _, label, sizes, states in owners:
            for nbytes in states if step == 0 else ():
                run.take(nbytes, f"{label}optimizer state")
            for nbytes in sizes:  # the update of one weight, before it is added
                run.free([run.take(nbytes, f"{label}update")])
        for layer in list(run.gradients):
            run.free(run.gradients.pop(layer))
    return builder.finish()


def _largest_half(saved: Sequence[int]) -> list[int]:
    """The largest tensors but the input, until half of the bytes are dropped."""
    dropped, so_far = [], 0
    for index in sorted(range(1, len(saved)), key=lambda index: -saved[index]):
        if 2 * so_far >= sum(saved):
            break
        dropped.append(index)
        so_far += saved[index]
    return dropped


def _chunk_layers(layers: int, stage: int, stages: int, chunks: int) -> list[range]:
    """Layers of each chunk of `stage`: chunk c of stage i is part c * stages + i of the model."""
    parts = stages * chunks
    cuts = [layers * part // parts for part in range(parts + 1)]
    return [range(cuts[chunk * stages + stage], cuts[chunk * stages + stage + 1]) for chunk in range(chunks)]


def _scratch(run: _Stage, layer: int, index: int) -> list[str]:
    """The scratch memory beside saved tensor `index`, which need not have any."""
    if not 0 <= index < len(run.temporaries):
        return []
    return [run.take(run.sized(run.temporaries[index]), f"layer {layer} scratch")]


def _run_block(run: _Stage, layer: int, indices: Sequence[int]) -> list[tuple]:
    """Make the saved tensors `indices` of a block, each with its scratch memory."""
    made = []
    for index in indices:
        scratch = _scratch(run, layer, index)
        size = run.sized(run.saved[index])
        made.append((run.take(size, f"layer {layer} activation {index}"), size, index, False))
        run.free(scratch)
    return made


def _routed(run: _Stage, layer: int) -> list[tuple]:
    """The experts' tensors, of sizes drawn anew for each micro-batch."""
    if run.experts is None:
        return []
    drawn = [run.random.gammavariate(run.experts.concentration, 1) for _ in range(run.experts.count)]
    made = []
    for expert, share in enumerate(drawn):
        size = int(run.sized(run.experts.bytes) * share / sum(drawn) / run.experts.tensors)
        for _ in range(run.experts.tensors):
            made.append((run.take(size, f"layer {layer} expert {expert} activation", True), size, -1, True))
    return made


def _forward(run: _Stage, micro_batch: int, layer: int) -> None:
    made = _run_block(run, layer, range(len(run.saved))) + _routed(run, layer)
    dropped = [tensor for tensor in made if tensor[2] in run.dropped or (run.full and tensor[3])]
    run.free([tensor[0] for tensor in dropped])
    run.kept[micro_batch, layer] = [tensor for tensor in made if tensor not in dropped]


def _backward_pass(run: _Stage, step: int, micro_batch: int, layers: range, loss: bool) -> None:
    run.phase = f"step {step} backward {micro_batch}"
    if loss:
        for id, size, _, _ in reversed(run.kept.pop((micro_batch, -1))):
            run.free([run.take(size, "gradient of the loss"), id])
    incoming = run.take(run.sized(run.saved[0]), "gradient of the output")
    for layer in reversed(layers):
        run.phase = f"step {step} backward {micro_batch} layer {layer}"
        kept = run.kept.pop((micro_batch, layer))
        kept += _run_block(run, layer, sorted(run.dropped))
        if run.full:
            kept += _routed(run, layer)
        kept.sort(key=lambda tensor: (tensor[3], tensor[2]))
        fresh = layer not in run.gradients
        for position, (id, size, index, dynamic) in reversed(list(enumerate(kept))):
            outgoing = run.take(size, f"layer {layer} activation gradient", dynamic)
            scratch = _scratch(run, layer, index)
            run.free([*scratch, incoming, id])
            incoming = outgoing
            _weight_gradients(run, layer, run.weights[position : position + 1], f"layer {layer} ", fresh)
        _weight_gradients(run, layer, run.weights[len(kept) :], f"layer {layer} ", fresh)
    run.free([incoming])


def _weight_gradients(run: _Stage, layer: int, sizes: Sequence[int], label: str, fresh: bool | None = None) -> None:
    """The first gradients of a step stay; later ones are added to them and freed."""
    fresh = layer not in run.gradients if fresh is None else fresh
    for nbytes in sizes:
        gradient = run.take(nbytes, f"{label}weight gradient")
        if fresh:
            run.gradients.setdefault(layer, []).append(gradient)
        else:
            run.free([gradient])

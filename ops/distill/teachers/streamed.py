"""A teacher larger than memory: one pass, block by block, over the windows of the next steps.

What the losses need of these steps is kept in memory up to a cap and on disk past it. The more steps a pass serves, the
less often the teacher is read; memory decides how many. Passes are cut so that windows always go through the blocks in
the same company, whatever the cap and wherever a run was resumed: the same bits come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from math import lcm
from pathlib import Path

import torch
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.data import TrainingData
from tersor.ops.distill.losses.capture import Capture
from tersor.ops.distill.losses.heads import Head, read_head
from tersor.ops.distill.losses.projections import Projections, projections_of_skeleton
from tersor.ops.distill.teachers.targets import Targets, Wanted, probe_ids, rows_of
from tersor.ops.model import blocks as block_pass
from tersor.ops.model.bare import free_bytes
from tersor.ops.model.blocks import BlockPass, HiddenStates
from tersor.ops.model.device import pick_device
from tersor.ops.model.memory import parking_space
from tersor.ops.model.skeleton import Skeleton, StoredDtype
from tersor.ops.model.spill import SpillPool
from torch import Tensor

ROOM = 1 << 30  # bytes of activations without --max-memory


class Streamed:
    """`data` tells which windows come next; a pass runs when a step is asked for that the last one did not serve."""

    mode = "streamed"

    def __init__(
        self,
        path: Path,
        wanted: Wanted,
        data: TrainingData,
        device: str = "auto",
        max_memory_bytes: int | None = None,
        student_bytes: int = 0,
    ):
        """`student_bytes`: what the student is still going to take of `max_memory_bytes`. Raises TersorError when the
        largest block does not fit beside it, or for what a model lacks."""
        checkpoint = open_checkpoint(path)
        checkpoint.require_config("which says what model the teacher is")
        self.fingerprint = checkpoint.fingerprint()
        self.wanted, self.data = wanted, data
        self.skeleton = Skeleton(DenseView(checkpoint), pick_device(device))
        self.passes = self.spilled_bytes = 0
        model = self.skeleton.model
        self.blocks, self.hidden_size = len(self.skeleton.blocks), model.config.get_text_config().hidden_size
        wanted.check(path, self.blocks)
        self.embeddings = len(model.get_input_embeddings().weight)
        self._projections: dict[int, Projections] = {}
        self.vocabulary, self.head = None, None
        if wanted.logits:
            self._read_head(probe_ids(model))
        self._per_batch = max(1, block_pass.TOKENS_PER_BATCH // data.seq_len)
        # Steps after which the batches of the pass begin with a step again.
        self._unit = lcm(data.rows, self._per_batch) // data.rows
        self._room = self._room_beside(max_memory_bytes, student_bytes)
        self._begin()

    @torch.no_grad()
    def _read_head(self, ids: Tensor) -> None:
        run = BlockPass(self.skeleton, ids)
        with _only_ends(run), _Widened(self.skeleton.dtype):
            self.head = read_head(self.skeleton.model, {"input_ids": ids})
        states = _head_inputs(run, self.head, 0)
        with StoredDtype(self.skeleton.dtype):
            self.vocabulary = self.head.logits(states[0, :1]).shape[-1]

    def _begin(self) -> None:
        self._steps = range(0)
        self._final: HiddenStates | None = None
        self._outputs: dict[int, HiddenStates] = {}
        self._attention: dict[int, dict[str, HiddenStates]] = {}
        self._pool = SpillPool(0)

    def _room_beside(self, max_memory_bytes: int | None, student_bytes: int) -> int:
        room = parking_space(max_memory_bytes, self.skeleton)
        if room is None:
            return ROOM
        if room < student_bytes:
            raise TersorError(
                f"--max-memory {max_memory_bytes} bytes is {student_bytes - room} too little: a block of the teacher and the "
                f"student ({student_bytes} bytes) do not fit together",
                "raise --max-memory, lower --micro-batch, or read the teacher from a file that --cache-teacher wrote",
            )
        return room - student_bytes

    @property
    def step_bytes(self) -> int:
        """Activations of one step during a pass: what goes from block to block, and what is kept."""
        kept = int(self.wanted.logits) + len(self.wanted.blocks) + 3 * len(self.wanted.attention)
        return 4 * self.data.rows * self.data.seq_len * self.hidden_size * (1 + kept)

    def targets(self, step: int, ids: Tensor) -> Targets:
        if step not in self._steps:
            self._stream(step)
        device = self.skeleton.device
        first = (step - self._steps.start) * self.data.rows
        places = [divmod(first + row, self._per_batch) for row in rows_of(self.data.ids(step), ids)]
        targets = Targets(
            blocks={index: _rows(kept, places, device) for index, kept in self._outputs.items()},
            attention={
                index: {key: _rows(kept, places, device) for key, kept in parts.items()}
                for index, parts in self._attention.items()
            },
        )
        if self.head is not None:
            targets.hidden, targets.head = _rows(self._final, places, device), self.head
        return targets

    @torch.no_grad()
    def _stream(self, step: int) -> None:
        """Run the windows of the steps from `step` on through the model."""
        self.close()
        device = self.skeleton.device
        room = self._room if device.type == "cpu" else min(self._room, free_bytes(device) // 4)
        start = step - step % self._unit
        left = -(-(max(self.data.steps, step + 1) - start) // self._unit)
        units = min(left, max(1, room // (self.step_bytes * self._unit)))
        steps = range(start, start + units * self._unit)
        windows = torch.cat([self.data.ids(each) for each in steps])
        self._pool = SpillPool(room)
        run = BlockPass(self.skeleton, windows, self._pool if device.type == "cpu" else None)
        inside = (*self.wanted.blocks, *self.wanted.attention)
        for index in range(len(run) if self.head is not None else 1 + max(inside, default=-1)):
            with self.skeleton.filled(index) as block:
                self._run_block(run, index, block)
        if self.head is not None:
            self._final = HiddenStates(self._pool)
            for batch in range(len(run.hidden)):
                self._final.append(_own(_head_inputs(run, self.head, batch)))
                run.hidden.put(batch, run.hidden.take(batch).new_empty(0))  # not needed any more
        self._steps, self.passes = steps, self.passes + 1

    def _run_block(self, run: BlockPass, index: int, block: torch.nn.Module) -> None:
        if index in self.wanted.attention:
            if index not in self._projections:
                self._projections[index] = projections_of_skeleton(self.skeleton, index, block)
            capture = Capture({index: block}, (), {index: self._projections[index]})
            self._attention[index] = parts = {}
            for batch in range(len(run.hidden)):
                hidden = run.hidden.take(batch)
                with capture as seen:
                    output = run.apply(index, block, batch, hidden)
                for kind, tensor in seen.attention[index].items():
                    parts.setdefault(kind, HiddenStates(self._pool)).append(_own(tensor))
                run.hidden.put(batch, output)
        else:
            run.run(index, block)
        if index in self.wanted.blocks:
            self._outputs[index] = kept = HiddenStates(self._pool)
            for batch in range(len(run.hidden)):
                output = run.hidden.take(batch)
                kept.append(_own(output))
                run.hidden.put(batch, output)

    def close(self) -> None:
        """Let go of what is kept."""
        self.spilled_bytes = max(self.spilled_bytes, self._pool.peak_spilled_bytes)
        self._pool.close()
        self._begin()


class _Widened(StoredDtype):
    """Also for states that are in a head's stored dtype, which its bias is not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = (args[0].to(self.dtype), *args[1:])
        return super().__torch_function__(function, types, args, kwargs)


@contextmanager
def _only_ends(run: BlockPass) -> Iterator[None]:
    """Meanwhile a forward pass of the model runs what comes before and after the blocks: they hand on the first batch."""
    chunks = run.logits(0)
    next(chunks)
    try:
        yield
    finally:
        chunks.close()


def _head_inputs(run: BlockPass, head: Head, batch: int) -> Tensor:
    """What the head reads after the last block, `[windows, positions, hidden]`."""
    states: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        states.append(x)
        return x[..., :1]

    head.module.forward = note
    try:
        for _ in run.logits(batch, chunk=run.windows.shape[1]):
            pass
    finally:
        del head.module.forward
    return states[-1]


def _own(tensor: Tensor) -> Tensor:
    """A copy in host memory whose storage is nobody else's: it will be emptied when it goes to disk."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _rows(kept: HiddenStates, places: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """Rows of several batches: `places` are (batch, row)."""
    parts = []
    for batch, rows in groupby(places, key=lambda place: place[0]):
        whole = kept.take(batch)
        parts.append(whole[[row for _, row in rows]].to(device))
        kept.put(batch, whole)
    return torch.cat(parts)

"""The block-by-block pass: every calibration window goes through one block before the next block is touched.

Within a block all windows advance together. Each window's forward pass is a coroutine (a greenlet) that stops where a
linear layer reads its input; when every window that comes this way has stopped there, the statistics are complete, the
layer is replaced, and all go on with the new weights. So a block runs once, not once for statistics and again for
outputs, and a later layer sees what the earlier ones really produce. What waits can go to disk (`SpillPool`).
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Set

import torch
from greenlet import getcurrent, greenlet
from tersor.formats.errors import TersorError
from tersor.ops.model.skeleton import Skeleton, StoredDtype
from tersor.ops.model.spill import LiveTensors, SpillPool
from tersor.ops.model.statistics import InputStatistics
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

TOKENS_PER_BATCH = 2048
IS_EXPERT = re.compile(r"\.experts\.\d+\.")
Ready = Callable[[str, InputStatistics], None]


class _Recorder(nn.Module):
    """Stands in for a block while the model's own code prepares the arguments of every block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.calls: list[tuple[tuple, dict]] = []
        self.returns_tuple = False
        self.output: torch.Tensor | None = None
        self._block = [block]  # in a list, so that it is not a submodule

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)  # layer type flags and the like

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if self.output is None else self.output
        return (hidden,) if self.returns_tuple else hidden


class HiddenStates:
    """The activations of all batches between two blocks, parked past the memory cap."""

    def __init__(self, pool: SpillPool):
        self.pool = pool
        self._batches: list[torch.Tensor] = []
        self._parked: list[list] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, batch: torch.Tensor) -> None:
        self._batches.append(batch)
        self._parked.append(self.pool.park([batch.untyped_storage()]))

    def take(self, index: int) -> torch.Tensor:
        """A batch, back in memory; `put` lets it wait again."""
        self.pool.restore(self._parked[index])
        self._parked[index] = []
        return self._batches[index]

    def put(self, index: int, batch: torch.Tensor) -> None:
        self._batches[index] = batch
        self._parked[index] = self.pool.park([batch.untyped_storage()])


class BlockPass:
    """Runs token windows `[windows, seq_len]` through the model of a checkpoint, block by block.

    With another `input_name` the windows are what the model calls so: images for `pixel_values`.
    """

    def __init__(
        self, skeleton: Skeleton, windows: torch.Tensor, pool: SpillPool | None = None, input_name: str = "input_ids"
    ):
        self.skeleton, self.pool, self.input_name = skeleton, pool or SpillPool(None), input_name
        self.windows = windows
        per_batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
        self.batches = [batch.to(skeleton.device) for batch in windows.split(per_batch)]
        self.hidden = HiddenStates(self.pool)
        self._calls: list[list[tuple[tuple, dict]]] = []
        self._capture()

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    @torch.no_grad()
    def _capture(self) -> None:
        """Arguments of every block for every batch, as the model's own code prepares them."""
        for index, batch in enumerate(self.batches):
            recorders = record_calls(self.skeleton, **{self.input_name: batch})
            self.returns_tuple = recorders[0].returns_tuple
            first = recorders[0].calls[0]
            self.hidden.append(_hidden_of(first).detach().clone())
            calls = [_without_hidden(recorder.calls[0]) for recorder in recorders]
            if index and _same(calls, self._calls[0]):
                calls = self._calls[0]  # equal windows give equal masks and positions: hold them once
            self._calls.append(calls)

    @torch.no_grad()
    def run(self, index: int, block: nn.Module) -> None:
        """Send every batch through a filled block, without looking inside."""
        with StoredDtype(self.skeleton.dtype):
            for batch in range(len(self.hidden)):
                self.hidden.put(batch, self._call(index, block, batch, self.hidden.take(batch)))

    def _call(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[batch][index]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def apply(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of a filled block for `hidden` `[windows, positions, hidden]` in the place of what `batch` has there."""
        with StoredDtype(self.skeleton.dtype):
            return self._call(index, block, batch, hidden)

    def probe(self, index: int, block: nn.Module) -> torch.Tensor:
        """Output of a filled block for the first batch; nothing is kept."""
        hidden = self.hidden.take(0)
        output = self.apply(index, block, 0, hidden)
        self.hidden.put(0, hidden)
        return output

    @torch.no_grad()
    def final_states(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's own tail (its last norm, no head) makes of `hidden` after the last block. Same shape."""
        with _replaced_blocks(self.skeleton, self.returns_tuple) as recorders, StoredDtype(self.skeleton.dtype):
            recorders[-1].output = hidden
            return self.skeleton.model.base_model(input_ids=self.batches[batch])[0]

    @torch.no_grad()
    def run_staged(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, nn.Module],
        needs: Set[str],
        ready: Ready,
        keep_inputs: bool = False,
    ) -> list[str]:
        """Send every batch through a filled block, stopping at each of `linears`.

        When the inputs of a layer are complete, `ready(name, statistics)` is called and may change its weight. Layers
        that read the very same tensor share one statistics object. Layers no token reached (experts) get none: they
        are returned. With `keep_inputs` the outputs are dropped and the block can be run again.
        """
        stages = _Stages(linears, needs, self.pool, self._shared_storages(index, block))

        def task(batch: int) -> torch.Tensor:
            hidden = self.hidden.take(batch)
            stages.note(hidden)
            output = self._call(index, block, batch, hidden)
            return hidden if keep_inputs else output

        with StoredDtype(self.skeleton.dtype), stages.hooked(ready):
            for batch, output in stages.run(task, len(self.hidden)):
                self.hidden.put(batch, output)
        return [name for name in linears if name not in stages.finished]

    def _shared_storages(self, index: int, block: nn.Module) -> set[int]:
        """What several batches use, which therefore never waits on disk: weights, buffers, masks, positions."""
        if not self.pool.active:
            return set()
        tensors = [*block.parameters(), *block.buffers()]
        for calls in self._calls:
            tensors += [leaf for leaf in tree_leaves(calls[index]) if isinstance(leaf, torch.Tensor)]
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    @torch.no_grad()
    def logits(self, batch: int, chunk: int = 256) -> Iterator[tuple[slice, torch.Tensor]]:
        """After the last block: the model's own tail (norm, head, scaling) on `chunk` positions at a time.

        Yields (positions, logits `[windows, positions, vocab]`).
        """
        yield from self.tail(batch, chunk)

    def tail(self, batch: int, chunk: int = 256) -> Iterator[tuple[slice, torch.Tensor]]:
        """`logits` with whatever gradient mode is on, for those who need the way back to the last block's output."""
        hidden = self.hidden.take(batch)
        with _replaced_blocks(self.skeleton, False) as recorders, StoredDtype(self.skeleton.dtype):
            returns_tuple = not _accepts_tensor(self.skeleton, recorders, self.batches[batch][:, :2])
            for recorder in recorders:
                recorder.returns_tuple = returns_tuple
            for start in range(0, hidden.shape[1], chunk):
                positions = slice(start, min(start + chunk, hidden.shape[1]))
                recorders[-1].output = hidden[:, positions]
                output = self.skeleton.model(input_ids=self.batches[batch][:, positions])
                if not hasattr(output, "logits"):
                    raise TersorError(
                        f"{type(self.skeleton.model).__name__} gives no logits", "evaluate needs a causal LM"
                    )
                yield positions, output.logits
        self.hidden.put(batch, hidden)


class _Stages:
    """The coroutines of one block and where each of them waits."""

    def __init__(self, linears: dict[str, nn.Module], needs: Set[str], pool: SpillPool, shared: set[int]):
        self.linears, self.needs, self.pool = linears, needs, pool
        self.finished: set[str] = set()
        self._statistics: dict[str, InputStatistics] = {}
        self._last: InputStatistics | None = None
        self._last_inputs: dict[int, weakref.ref] = {}
        self._inputs: dict[str, dict[int, weakref.ref]] = {}
        self._batch = -1
        self._live = LiveTensors() if pool.active else None
        self._shared = shared

    @contextlib.contextmanager
    def hooked(self, ready: Ready):
        self._ready = ready
        for name, layer in self.linears.items():
            layer.forward = self._pausing(name, layer, layer.forward)
        try:
            with self._live or contextlib.nullcontext():
                yield
        finally:
            for layer in self.linears.values():
                del layer.forward

    def _pausing(self, name: str, layer: nn.Module, forward: Callable) -> Callable:
        def paused_forward(x: torch.Tensor) -> torch.Tensor:
            if name not in self.finished:
                previous = self._last_inputs.get(self._batch)
                if previous is not None and previous() is x:
                    self._finish(name, self._last)
                else:
                    with _disable_current_modes():  # statistics belong to no batch and must not be parked with one
                        self._statistics.setdefault(name, InputStatistics(self.needs)).add(x)
                    self._inputs.setdefault(name, {})[self._batch] = weakref.ref(x)
                    getcurrent().parent.switch(name)
            return forward(x)

        return paused_forward

    def _finish(self, name: str, statistics: InputStatistics) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # algorithms make many small calls
            self._ready(name, statistics)
        self.finished.add(name)

    def _not_to_park(self) -> set[int]:
        """The shared storages, and the weights that `ready` may have put in place since."""
        weights = (parameter for layer in self.linears.values() for parameter in layer.parameters())
        return self._shared | {parameter.untyped_storage()._cdata for parameter in weights}

    def note(self, tensor: torch.Tensor) -> None:
        """Have a tensor made elsewhere parked with those of the current batch."""
        if self._live:
            self._live.note(tensor.untyped_storage())

    def run(self, task: Callable[[int], torch.Tensor], count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Run `task(batch)` for each batch as a coroutine. Yields (batch, output) as batches come out of the block."""
        coroutines = [greenlet(functools.partial(task, batch)) for batch in range(count)]
        waiting: dict[int, str] = {}
        parked: dict[int, list] = {}
        order = list(self.linears)

        def advance(batch: int):
            self._batch = batch
            self._resume(parked.pop(batch, []))
            result = coroutines[batch].switch()
            if not coroutines[batch].dead:
                waiting[batch] = result
                parked[batch] = self.pool.park(self._live.alive(self._not_to_park()) if self._live else [])
                return
            if self._live:
                self._live.storages.clear()
            yield batch, result

        for batch in range(count):
            yield from advance(batch)
        while waiting:
            # Every batch reaches a dense layer, so one is complete when nothing is left at an expert. Experts run in
            # order, and a batch without tokens for one waits at a later one: the earliest is complete.
            name = min(set(waiting.values()), key=lambda place: (not IS_EXPERT.search(place), order.index(place)))
            self._last, self._last_inputs = self._statistics.pop(name), self._inputs.pop(name)
            self._finish(name, self._last)
            for batch in sorted(batch for batch, place in waiting.items() if place == name):
                del waiting[batch]
                yield from advance(batch)

    def _resume(self, parked: list) -> None:
        self.pool.restore(parked)
        if self._live:
            for storage, _, _ in parked:
                self._live.note(storage)


def record_calls(skeleton: Skeleton, **inputs: torch.Tensor) -> list[_Recorder]:
    """Have the model's own code prepare the arguments of every block for `inputs`, without running a block."""
    model = skeleton.model
    for returns_tuple in (False, True):
        with _replaced_blocks(skeleton, returns_tuple) as recorders, StoredDtype(skeleton.dtype):
            try:
                model.base_model(**inputs)
            except TypeError as error:
                raise TersorError(
                    f"{type(model).__name__} does not read {' '.join(inputs)} ({error})",
                    "use a method without calibration",
                ) from error
            except (ValueError, IndexError, RuntimeError):
                if returns_tuple:
                    raise
                continue
        shapes = {_hidden_of(recorder.calls[0]).dim() for recorder in recorders if recorder.calls}
        if len(shapes) == 1 and all(recorder.calls for recorder in recorders):
            return recorders
    raise TersorError(
        f"{type(model).__name__}: blocks are not called one after another",
        "use a method that runs no text (rtn of quantize, magnitude of prune)",
    )


@contextlib.contextmanager
def _replaced_blocks(skeleton: Skeleton, returns_tuple: bool) -> Iterator[list[_Recorder]]:
    originals = list(skeleton.blocks)
    recorders = [_Recorder(block) for block in originals]
    for index, recorder in enumerate(recorders):
        recorder.returns_tuple = returns_tuple
        skeleton.blocks[index] = recorder
    try:
        yield recorders
    finally:
        for index, block in enumerate(originals):
            skeleton.blocks[index] = block


def _accepts_tensor(skeleton: Skeleton, recorders: list[_Recorder], ids: torch.Tensor) -> bool:
    """Whether the model's loop takes a block's output as it is, or the first item of a tuple."""
    try:
        skeleton.model.base_model(input_ids=ids)
        return len({_hidden_of(recorder.calls[0]).dim() for recorder in recorders}) == 1
    except (ValueError, IndexError, RuntimeError):
        return False
    finally:
        for recorder in recorders:
            recorder.calls.clear()


def _hidden_of(call: tuple[tuple, dict]) -> torch.Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    args, kwargs = call
    return args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left is right or left == right

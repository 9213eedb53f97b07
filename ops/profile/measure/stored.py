"""What the stored form of a quantized, packed or factorised checkpoint does to speed: layer by layer, and the whole model.

Every distinct kind of linear layer (form and shape) is timed on its own kernel, with weights out of the file, against a
dense layer of the same shape with made-up ones; several layers in turn, as many as it takes to overflow the last cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.low_rank import Factors
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.model import load
from tersor.ops.model.bare import BareModel, free_bytes
from tersor.ops.model.choose_linear import packed_tensor, stored_linear
from tersor.ops.model.linears import StoredLinear
from tersor.ops.model.runtime import bare_model, definition, stored_linears
from tersor.ops.model.skeleton import map_names
from tersor.ops.model.timer import cache_bytes, seconds, spread
from tersor.ops.profile.measure.runtime import prompt_sizes
from tersor.ops.profile.measure.stand import CACHES, forward_options
from tersor.ops.profile.measure.whole import HEADROOM
from tersor.ops.profile.request import Workload

ROUNDS, ENOUGH_SECONDS = 7, 2.0  # no further round once one kind at one number of tokens took that long
LEAST_ROUNDS = 3
MOST_LAYERS = 8


@dataclass
class Kind:
    """Linear layers that are stored alike: form in words, shape `[out, in]`, names of their weights."""

    form: str
    shape: tuple[int, int]
    names: list[str] = field(default_factory=list)
    stored_bytes: int = 0


def measure_stored(
    checkpoint: Checkpoint,
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict | None:
    """`kinds` and `whole` of the report's `stored`; None for a checkpoint of dense layers only.

    `dtype` is that of activations and of the dense layers. Raises TersorError for a damaged checkpoint.
    """
    checkpoint = open_checkpoint(checkpoint.path)
    view = DenseView(checkpoint)
    kinds = find_kinds(view)
    if not kinds:
        return None
    rows = []
    for done, kind in enumerate(kinds):
        progress(done, len(kinds) + 1)
        rows.append(_time_kind(view, kind, workload, device, dtype))
    progress(len(kinds), len(kinds) + 1)
    return {"kinds": rows, "whole": _time_whole(checkpoint, workload, device, dtype)}


def find_kinds(view: DenseView) -> list[Kind]:
    """Those of the file, the one with the most bytes first."""
    class_, config = definition(view)
    bare = bare_model(class_, config, view.checkpoint.path)
    found: dict[tuple, Kind] = {}
    for name in stored_linears(view, bare, map_names(bare, view)):
        entry, packed = view.tensors[name], packed_tensor(view, name)
        transposed = entry.transposed or (packed is not None and entry.scheme is None and packed.transposed)
        shape = entry.shape[::-1] if transposed else entry.shape
        form = form_of(entry.scheme, packed, entry.factors)
        kind = found.setdefault((form, shape), Kind(form, tuple(shape)))
        kind.names.append(name)
        kind.stored_bytes += sum(view.checkpoint.tensors[part].nbytes for part in view.stored_names(name))
    return sorted(found.values(), key=lambda kind: -kind.stored_bytes)


def form_of(scheme: Scheme | None, packed: Packed | None, factors: Factors | None) -> str:
    """In a few words: `int4 by 64`, `vector 32x1`, `int4 by 64, sparse-bitmask`, `rank 22`."""
    if factors is not None:
        return f"rank {factors.count}" if factors.grid is None else f"{factors.count} Kronecker terms"
    words = []
    if scheme is not None:
        size = scheme.group_size if scheme.strategy == "group" else scheme.strategy
        words.append(f"{'fp' if scheme.kind == 'float' else 'int'}{scheme.bits} by {size}")
        words += [f"{scheme.activations} activations"] if scheme.activations else []
    if packed is not None:
        words.append(packed.format + (f" {packed.tile[0]}x{packed.tile[1]}" if packed.tile else ""))
    return ", ".join(words)


@torch.no_grad()
def _time_kind(view: DenseView, kind: Kind, workload: Workload, device: torch.device, dtype: torch.dtype) -> dict:
    rows, columns = kind.shape
    dense_bytes = rows * columns * dtype.itemsize
    copies = max(1, min(len(kind.names), MOST_LAYERS, 1 + CACHES * cache_bytes(device) // dense_bytes))
    stored = [stored_linear(view, name, device, dtype, True) for name in kind.names[:copies]]
    generator = torch.Generator().manual_seed(0)
    dense = [(torch.randn(kind.shape, generator=generator) / columns**0.5).to(device, dtype) for _ in range(copies)]
    times = []
    for tokens in dict.fromkeys((workload.batch, workload.batch * max(workload.prompt, 1))):
        x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
        times.append({"tokens": tokens, **_race(stored, dense, x, device)})
    chosen = stored_linear(view, kind.names[0], device, dtype, None)
    return {
        "form": kind.form,
        "shape": list(kind.shape),
        "layers": len(kind.names),
        "timed_layers": copies,
        "kernel": type(stored[0]).__name__,
        "runs_stored": chosen is not None,
        "file_bytes": kind.stored_bytes // len(kind.names),
        "memory_bytes": stored[0].stored_bytes,
        "dense_bytes": dense_bytes,
        "times": times,
    }


def _race(stored: list[StoredLinear], dense: list[torch.Tensor], x: torch.Tensor, device: torch.device) -> dict:
    """Both in turn, so that a machine that slows down slows both. Seconds are of one layer."""

    def run_stored() -> None:
        for layer in stored:
            layer(x)

    def run_dense() -> None:
        for weight in dense:
            torch.nn.functional.linear(x, weight)

    for work in (run_stored, run_dense):
        work()
    samples: dict[str, list[float]] = {"stored": [], "dense": []}
    while len(samples["dense"]) < ROUNDS:
        for name, work in (("stored", run_stored), ("dense", run_dense)):
            samples[name].append(seconds(work, device) / len(stored))
        spent = len(stored) * sum(map(sum, samples.values()))
        if len(samples["dense"]) >= LEAST_ROUNDS and spent > ENOUGH_SECONDS:
            break
    found = {name: spread(times) for name, times in samples.items()}
    return found | {"speedup": found["dense"]["seconds"] / found["stored"]["seconds"]}


def _time_whole(checkpoint: Checkpoint, workload: Workload, device: torch.device, dtype: torch.dtype) -> dict:
    """A prompt through the whole model: with every layer as it is stored, all dense, and as `load` chooses."""
    bare = BareModel(checkpoint, device, dtype)
    needed = HEADROOM * sum(parameter.numel() for parameter in bare.model.parameters()) * dtype.itemsize
    if needed > (free := free_bytes(device)):
        reason = f"the model takes up to {needed / 1e9:.1f} GB while it is loaded, {free / 1e9:.1f} GB are free"
        return {"rows": [], "left_out_because": reason}
    tokens = prompt_sizes(bare, max(workload.prompt, 1))[-1] if bare.reads_text else None
    try:
        inputs = bare.inputs(workload.batch, tokens or 1) | forward_options(bare, None)
        rows = []
        for keep_packed, name in ((None, "as loaded"), (True, "stored"), (False, "dense")):
            row = _time_model(load(checkpoint.path, str(device), dtype, keep_packed), inputs, device)
            if not any(row["layers"] == other["layers"] for other in rows):
                rows.append({"form": name, "tokens": tokens, **row})
    except TersorError as error:
        return {"rows": [], "left_out_because": str(error)}
    return {"rows": rows, "left_out_because": None}


@torch.no_grad()
def _time_model(model: torch.nn.Module, inputs: dict, device: torch.device) -> dict:
    kinds = Counter(type(module).__name__ for module in model.modules() if isinstance(module, StoredLinear))
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model(**inputs)
    times: list[float] = []
    while len(times) < LEAST_ROUNDS or (len(times) < ROUNDS and sum(times) < ENOUGH_SECONDS):
        times.append(seconds(lambda: model(**inputs), device))
    return {"layers": dict(sorted(kinds.items())), "memory_bytes": nbytes, **spread(times)}

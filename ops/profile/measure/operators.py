"""Real time of every operator inside a block, and next to it what the roofline says for this very machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import Hardware
from tersor.ops.model.bare import BareModel, Kind
from tersor.ops.model.facts import facts
from tersor.ops.model.operators import ACTIVATION_BYTES, Linear, Pass, operators
from tersor.ops.model.skeleton import map_names
from tersor.ops.model.stored import stored_weights
from tersor.ops.model.timer import spread, synchronize
from tersor.ops.profile.headers.roofline import predict
from tersor.ops.profile.measure.stand import Stand
from torch import nn

ATTENTION = "scores and values"
NORMS = "norms"
EMBEDDING = "embedding"
REST = "element-wise and the rest"
RUNS = 9
FEWEST_RUNS, ENOUGH_SECONDS = 3, 10.0  # no more runs than the first once the blocks of a kind took the second
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Stopwatch:
    """Times the parts of modules while they run; on a GPU by events, so that nothing waits in between."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, object, object]] = []

    def mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, name: str, began: object) -> None:
        self._marks.append((name, began, self.mark()))

    def collect(self) -> dict[str, list[float]]:
        """Seconds of each part since the last call, in the order of running."""
        synchronize(self.device)
        found: dict[str, list[float]] = {}
        for name, began, ended in self._marks:
            took = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
            found.setdefault(name, []).append(took)
        self._marks.clear()
        return found


def part_name(name: str, module: nn.Module) -> str:
    """All norms are one operator, so are all embeddings; other modules go by their name."""
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return NORMS if "norm" in type(module).__name__.lower() else name


@contextlib.contextmanager
def watched(root: nn.Module, watch: Stopwatch, implementation: str) -> Iterator[None]:
    """While it is open, `watch` notes every innermost module of `root` that has weights, and attention itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    began: dict[nn.Module, object] = {}
    handles = []

    def before(module, args):
        began[module] = watch.mark()

    for name, module in root.named_modules():
        own = len(list(module.parameters(recurse=False)))
        if name and own and own == len(list(module.parameters())):  # nothing inside is noted too

            def after(module, args, output, name=name):
                watch.note(part_name(name, module), began[module])

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if attention is not None:

        def timed(*args, **kwargs):
            start = watch.mark()
            output = attention(*args, **kwargs)
            watch.note(ATTENTION, start)
            return output

        ALL_ATTENTION_FUNCTIONS[implementation] = timed
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if attention is not None:
            del ALL_ATTENTION_FUNCTIONS[implementation]


def time_operators(bare: BareModel, kinds: list[Kind], stand: Stand, step: bool) -> list[dict]:
    """A row per operator: `seconds` with quartiles are of one, `total_seconds` of all blocks that have it.

    `step`: one more token on a full cache, instead of the prompt.
    """
    watch = Stopwatch(bare.device)
    rows: dict[str, dict] = {}
    for kind in kinds:
        samples: dict[str, list[float]] = {}
        blocks = stand.chosen[kind.name]
        with contextlib.ExitStack() as stack:
            for index in blocks:
                stack.enter_context(watched(bare.blocks[index], watch, bare.attention if index == blocks[0] else ""))
            spent = 0.0
            for run in range(RUNS):
                if run > FEWEST_RUNS and spent > ENOUGH_SECONDS:
                    break
                took = (stand.step(kind.name) if step else stand.prompt(kind.name)) * len(blocks)
                spent += took
                parts = watch.collect()
                if run == 0:  # warms up
                    continue
                for name, times in parts.items():
                    samples.setdefault(name, []).append(sum(times) / len(blocks))
                rest = took - sum(map(sum, parts.values()))
                samples.setdefault(REST, []).append(max(rest, 0.0) / len(blocks))
        for name, times in samples.items():
            add_row(rows, name, len(kind.layers), times)
    with watched(bare.model, watch, ""):
        shell: dict[str, list[float]] = {}
        for run in range(RUNS):
            took = stand.step_shell() if step else stand.prompt_shell()
            parts = watch.collect()
            if run:
                for name, times in parts.items():
                    shell.setdefault(name, []).append(sum(times))
                shell.setdefault(REST, []).append(max(took - sum(map(sum, parts.values())), 0.0))
    for name, times in shell.items():
        add_row(rows, name, 1, times)
    return list(rows.values())


def add_row(rows: dict[str, dict], name: str, count: int, times: list[float]) -> None:
    """Operators of one name in blocks of several kinds are one row: their times are means over the blocks."""
    new = {"name": name, "count": count, **spread(times)}
    new["total_seconds"] = count * new["seconds"]
    old = rows.get(name)
    if old is not None:
        both = old["count"] + count
        for key in ("seconds", "low_seconds", "high_seconds"):
            new[key] = (old["count"] * old[key] + count * new[key]) / both
        new |= {"count": both, "total_seconds": old["total_seconds"] + new["total_seconds"]}
    rows[name] = new


@dataclass(frozen=True)
class Roofline:
    """What `predict(run)` says for this machine, and which of its operators a module of the running model is."""

    predict: Callable[[Pass], dict]
    modules: dict[str, set[str]]

    def add(self, rows: list[dict], prediction: dict) -> None:
        """`predicted_seconds` (of all blocks) and `bound` for each row that the roofline knows: not for element-wise work."""
        for row in rows:
            names = self.modules.get(row["name"], set())
            same = [one for one in prediction["operators"] if one["name"] in names | {row["name"]}]
            same += [one for one in prediction["operators"] if one["name"].startswith(f"{row['name']} (")]
            row["predicted_seconds"] = sum(one["seconds"] for one in same) if same else None
            row["bound"] = max(same, key=lambda one: one["seconds"])["bound"] if same else None


def roofline(checkpoint: Checkpoint, bare: BareModel, hardware: Hardware) -> Roofline:
    """For the dense model in the dtype that is computed in, whatever is stored. Raises TersorError where headers do not tell.

    The roofline counts numbers of 2 bytes; wider ones are a memory that is slower by as much.
    """
    weights = stored_weights(checkpoint)
    found = facts(checkpoint, weights)
    peak = hardware.peak_flops[hardware.computes_in(PRECISION[bare.dtype])]
    seen = replace(
        hardware,
        peak_flops={"bf16": peak},
        memory_gbps=hardware.memory_gbps * ACTIVATION_BYTES / bare.dtype.itemsize,
    )
    work = []
    for one in operators(found, weights):
        if isinstance(one, Linear):
            macs = prod(one.shape)
            one = replace(
                one, macs=macs, weight_bytes=macs * ACTIVATION_BYTES, precision="bf16", unpacks=False, speedup=1.0
            )
        work.append(one)
    modules: dict[str, set[str]] = {}
    inside = f"{bare.block_prefix}."
    for name, source in map_names(bare.model, SimpleNamespace(tensors=weights)).items():
        module = source.parameter.rpartition(".")[0]
        if module.startswith(inside):
            module = module.removeprefix(inside).partition(".")[2]
        place = weights[name].place
        stored = name if place is None or place.blocks != found.block_prefix else place.rest
        modules.setdefault(module, set()).add(stored.removesuffix(".weight"))
    names = {id(module): name for name, module in bare.model.named_modules()}
    head = names.get(id(bare.model.get_output_embeddings()))
    if head is not None:
        modules.setdefault(head, {one.name for one in work if one.kind == "head" and one.name not in names.values()})
    return Roofline(lambda run: predict(found, work, run, seen), modules)

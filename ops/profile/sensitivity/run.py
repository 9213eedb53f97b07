"""What every scheme would do to every layer, measured on calibration text; what to collect for later; what to suggest.

Two passes over the blocks, none of which changes a weight. Forward: statistics of each layer's input, the error of its
output under every scheme, what each block does to the residual stream, where routers send tokens. Backward: the Fisher
information of each weight, which turns a scheme's error into an expected change of the model's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from tersor.formats import encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.statistics import FILE_NAME, KINDS, StatisticsWriter
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.branches import Branch, find_all_branches, observed
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.copy import check_finite
from tersor.ops.model.gradients import is_causal, sampled_gradients, sweep_back
from tersor.ops.model.memory import parking_space
from tersor.ops.model.selection import Selection, select
from tersor.ops.model.skeleton import Skeleton, weight_matrix
from tersor.ops.model.spill import SpillPool
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.profile.request import Request
from tersor.ops.profile.sensitivity.candidates import smallest, unit_of
from tersor.ops.profile.sensitivity.depth import Contribution
from tersor.ops.profile.sensitivity.fisher import FisherDiagonal
from tersor.ops.profile.sensitivity.inputs import InputCollector
from tersor.ops.profile.sensitivity.layer import LayerMeter
from tersor.ops.profile.sensitivity.lim import Lim
from tersor.ops.profile.sensitivity.routing import Routing, expert_modules
from tersor.ops.profile.sensitivity.suggest import check_possible
from tersor.ops.profile.sensitivity.zd import zd_score
from torch import nn

Progress = Callable[[str, int, int], None]
GRADIENT_TOKENS = 4096  # enough for the sums over a layer's weights; more make them no better
DATA_FREE = "give the .safetensors file itself: ZD, the SQNR of every scheme and the 8-bit formats need no text"


def analyse(
    checkpoint: Checkpoint,
    request: Request,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
    folder: Path | None = None,
) -> dict:
    """The numbers of `--sensitivity`, and `stats.safetensors` in `folder` where the request says `--collect`.

    A bare `.safetensors` file gets what needs no text. Raises TersorError for a model that reads no text, one that is
    quantized already, and an unknown kind of statistics.
    """
    selection = _check(checkpoint, request)
    if checkpoint.config is None:
        return _without_text(checkpoint, selection, request, device, progress)
    skeleton = Skeleton(DenseView(checkpoint), device)
    reads = skeleton.model.base_model.main_input_name
    if reads != "input_ids":
        raise TersorError(
            f"{checkpoint.path}: {type(skeleton.model).__name__} reads {reads}, no text can be sent through it",
            f"{DATA_FREE}; headers, cost and --measure need none either",
        )
    windows = load_windows(checkpoint.path, request.calib, request.samples, request.seq_len, request.seed)
    job = _Analysis(checkpoint, selection, request, skeleton, windows, progress)
    return job.run(folder or request.output)


def _check(checkpoint: Checkpoint, request: Request) -> Selection:
    unknown = [kind for kind in request.collect if kind not in KINDS]
    if unknown:
        raise TersorError(f"--collect {unknown[0]!r} is not known", f"any of {','.join(KINDS)}")
    if encodings.detect(checkpoint.config, checkpoint.tensors) is not None:
        raise TersorError(
            f"{checkpoint.path}: is quantized, what a scheme does is measured on dense weights",
            "make it dense first: tersor convert MODEL --to dense -o DENSE",
        )
    low_rank.refuse(checkpoint, "their schemes are those of the dense weights")
    if request.collect and checkpoint.config is None:
        raise TersorError(
            f"{checkpoint.path}: no config.json, --collect runs the model", "give the whole checkpoint folder"
        )
    selection = select(checkpoint)
    if not selection.linears:
        raise TersorError(
            f"{checkpoint.path}: no linear layer inside a repeated block", "nothing of it can be quantized"
        )
    if request.suggest is not None:
        check_possible(_frame(checkpoint, selection, None), request.suggest, smallest(checkpoint, selection.linears))
    return selection


def _frame(checkpoint: Checkpoint, selection: Selection, causal: bool | None) -> dict:
    """What every answer begins with."""
    inside = sum(checkpoint.tensors[name].nbytes for name in selection.linears)
    return {
        "damage_is": {
            True: "nats per token",
            False: "squared relative change of the output",
            None: "relative error of the weight",
        }[causal],
        "other_bytes": checkpoint.nbytes - inside,
        "weights": sum(checkpoint.tensors[name].params for name in selection.linears),
        "tensors": {},
        "blocks": [],
        "routing": {},
        "warnings": [],
    }


def _without_text(
    checkpoint: Checkpoint, selection: Selection, request: Request, device: torch.device, progress: Progress
) -> dict:
    """Layer by layer from the file. The damage of a scheme is the relative error of the weight, times its size."""
    found = _frame(checkpoint, selection, None)
    meter = LayerMeter(checkpoint, selection.linears)
    total = sum(checkpoint.tensors[name].params for name in selection.linears)
    blocks: dict[str, list[str]] = {}
    for count, (name, linear) in enumerate(selection.linears.items()):
        progress("tensors", count, len(selection.linears))
        blocks.setdefault(_block_of(name), []).append(name)
        weight = checkpoint.read(name)
        check_finite(weight, name, checkpoint)
        weight = (weight.T if linear.transposed else weight).to(device, torch.float32).contiguous()
        numbers = meter.weight_numbers(linear, weight) | {
            "unit": unit_of(name, {}),
            "schemes": meter.schemes(linear, weight),
        }
        share = checkpoint.tensors[name].params / total
        for scheme in numbers["schemes"].values():
            scheme["damage"] = scheme["relative_mse"] * share
        found["tensors"][name] = numbers
    for block, names in blocks.items():
        zd = zd_score(lambda names=names: map(checkpoint.read, names))
        found["blocks"].append({"name": block, "zd": zd})
    progress("tensors", len(selection.linears), len(selection.linears))
    found["warnings"].append("a bare file: no text was run, so damage is the relative error of the weights alone")
    return found


def _block_of(name: str) -> str:
    parts = name.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


class _Analysis:
    """One model, its text, and what is found out about it."""

    def __init__(
        self, checkpoint, selection: Selection, request: Request, skeleton: Skeleton, windows, progress: Progress
    ):
        self.checkpoint, self.linears, self.request = checkpoint, selection.linears, request
        self.skeleton, self.windows, self.progress = skeleton, windows, progress
        self.judged = request.sensitivity or request.suggest is not None
        self.causal = is_causal(skeleton)
        self.meter = LayerMeter(checkpoint, selection.linears)
        self.found = _frame(checkpoint, selection, self.causal)
        self.routing = Routing()
        self.inputs: dict[str, InputStatistics | None] = {}  # sums of squares alone, for the way back

    def run(self, folder: Path | None) -> dict:
        branches = find_all_branches(self.skeleton, list(range(len(self.skeleton.blocks)))) if self.judged else {}
        with self._writer(folder) as writer:
            self._forward(branches, writer)
            for name, counts in self.routing.counts.items():
                if writer is not None and "routing" in writer.kinds:
                    writer.add_routing(name, counts, self.routing.transitions.get(name))
        if "routing" in self.request.collect and not self.routing.counts:
            self.found["warnings"].append("no mixture of experts in this model: there is no routing to collect")
        if self.judged:
            self.found["routing"] = {name: self.routing.numbers(name) for name in self.routing.counts}
            self._backward()
        return self.found

    def _pass(self, windows: torch.Tensor) -> BlockPass:
        return BlockPass(self.skeleton, windows, SpillPool(parking_space(self.request.max_memory_bytes, self.skeleton)))

    def _writer(self, folder: Path | None):
        if not self.request.collect:
            return nullcontext()
        if folder is None:
            raise TersorError("--collect needs a folder to write to", "give -o DIR")
        folder.mkdir(parents=True, exist_ok=True)
        modules = [
            f"{self.skeleton.block_name(index)}.{name}"
            for index, block in enumerate(self.skeleton.blocks)
            for name in expert_modules(block)
        ]
        facts = {
            "fingerprint": self.checkpoint.fingerprint(),
            "calibration": self.request.calib or "default",
            "samples": self.request.samples,
            "seq_len": self.request.seq_len,
            "seed": self.request.seed,
            "kinds": [kind for kind in KINDS if kind in self.request.collect],
        }
        inputs = {name: linear.shape[1] for name, linear in self.linears.items()}
        return StatisticsWriter(folder / FILE_NAME, inputs, dict.fromkeys(modules, 0), facts)

    def _needs(self) -> set[str]:
        needs = {"column_norms"} if self.judged or "norms" in self.request.collect else set()
        return needs | ({"hessian"} if self.judged or "hessian" in self.request.collect else set())

    @torch.no_grad()
    def _forward(self, branches: dict[int, list[Branch]], writer: StatisticsWriter | None) -> None:
        run = self._pass(self.windows)
        for index in range(len(run)):
            self.progress("blocks", index, len(run))
            with self.skeleton.filled(index) as block:
                layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in self.linears}
                for name, layer in layers.items():
                    check_finite(layer.weight, name, self.checkpoint)
                collector = InputCollector(self._needs())
                row = self._send(run, index, block, layers, branches.get(index, []), collector)
                if writer is not None:
                    self._collect(writer, layers, collector)
                if self.judged:
                    weights = [layer.weight for layer in layers.values()]
                    self.found["blocks"].append(row | {"zd": zd_score(weights.__iter__)})
                    for name, layer in layers.items():
                        self.found["tensors"][name] = self._layer(index, name, layer, collector)
        self.progress("blocks", len(run), len(run))
        self.found["warnings"] += run.pool.warnings()

    def _send(
        self,
        run: BlockPass,
        index: int,
        block: nn.Module,
        layers: dict,
        branches: list[Branch],
        collector: InputCollector,
    ) -> dict:
        """The text goes through a block; what was seen of block and branches."""
        lim, whole = Lim(), Contribution()
        parts = [Contribution() for _ in branches]
        prefix = self.skeleton.block_name(index)
        with ExitStack() as stack:
            if self._needs():
                stack.enter_context(collector.watching(layers))
            stack.enter_context(self.routing.watching(block, prefix))
            seen = [stack.enter_context(observed(block, branch)) for branch in branches]
            for batch in range(len(run.hidden)):
                self.routing.start(batch)
                before = run.hidden.take(batch)
                after = run.apply(index, block, batch, before.clone())  # some models add in place
                if self.judged:
                    lim.add(before, after)
                    whole.add(before, after)
                for branch, part, values in zip(branches, parts, seen, strict=True):
                    total = values["sum"] if branch.place else after
                    part.add(total - values["added"].reshape(total.shape), total)
                run.hidden.put(batch, after)
        rows = [{"end": b.end, "kind": b.kind, **part.numbers()} for b, part in zip(branches, parts, strict=True)]
        return {"name": prefix, "lim": lim.score, **whole.numbers(), "branches": rows}

    def _collect(self, writer: StatisticsWriter, layers: dict[str, nn.Module], collector: InputCollector) -> None:
        for name in layers if {"norms", "hessian"} & set(writer.kinds) else ():
            found = collector.of(name)
            if found is None:
                writer.miss(name)
            elif collector.owner[name] != name:
                writer.share(name, collector.owner[name])
            else:
                squares = found.squares if "norms" in writer.kinds else None
                writer.add(name, found.tokens, squares, found.hessian if "hessian" in writer.kinds else None)

    def _layer(self, index: int, name: str, layer: nn.Module, collector: InputCollector) -> dict:
        linear, statistics = self.linears[name], collector.of(name)
        weight = weight_matrix(layer).float().contiguous()
        self.inputs[name] = statistics and InputStatistics.restored(statistics.tokens, statistics.squares)
        return {
            "block": index,
            "unit": unit_of(name, collector.owner),
            **self.meter.weight_numbers(linear, weight),
            **self.meter.input_numbers(statistics),
            "schemes": self.meter.schemes(linear, weight, statistics),
        }

    def _backward(self) -> None:
        windows = self.windows[: max(1, GRADIENT_TOKENS // self.windows.shape[1])]

        @contextmanager
        def visit(index: int, block: nn.Module) -> Iterator[None]:
            layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in self.linears}
            fishers = {name: FisherDiagonal() for name in layers}
            handles = [layer.register_forward_hook(_to_fisher(fishers[name])) for name, layer in layers.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            for name, layer in layers.items():
                weight = weight_matrix(layer).float().contiguous()
                rows = self.found["tensors"][name]["schemes"]
                for label, changed in self.meter.changed(self.linears[name], weight, self.inputs[name]):
                    rows[label]["damage"] = fishers[name].damage(changed - weight, windows.numel())

        sweep_back(self._pass(windows), visit, self.progress, sampled_gradients(self.request.seed))


def _to_fisher(fisher: FisherDiagonal):
    """A forward hook that pairs a layer's input with the gradient of its output, when that comes."""

    def hook(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda gradient: fisher.add(x, gradient))

    return hook

"""AWQ: inputs that carry much signal get finer steps, by scaling their columns up before rounding.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023). Column j of a group of layers that read one tensor is
multiplied by s_j = mean|x_j|^a (normalised), and whatever produces the tensor is divided by s_j, so the function stays
the same; `a` is the one with the least output error after rounding. The error of rounding W to W' is
tr((W - W') H (W - W')^T) with H = X^T X / tokens, so no activations need to be kept.

Which layer produces the tensor is not looked up by architecture: a norm or an earlier layer of the block is a candidate
when it delivers that many channels, and it is taken when scaling both by random numbers leaves the block's output as it
was. That proof also finds the other readers of the tensor (a residual, a router), which make folding wrong.
"""

from __future__ import annotations

import contextlib
import re

import torch
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.scheme import Scheme
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.skeleton import EXPERTS, weight_matrix
from tersor.ops.model.statistics import FEWEST_TOKENS, InputStatistics
from torch import nn

# The paper's is twice as fine. Here every candidate is rounded on clipped ranges, which costs as much and gains more.
GRID = 10
SMALLEST_SCALE = 1e-4
# Largest change of a block's output, relative to its largest value, that counts as float rounding.
SAME_OUTPUT = 1e-4
EXPERT_PATH = re.compile(rf".*\.{EXPERTS}\.\d+\.")
EXPERT_NUMBER = re.compile(rf"(?<=\.{EXPERTS}\.)\d+(?=\.)")


class AWQ:
    """Scale search, then rounding on a clipped grid weighted by the input energies."""

    needs = frozenset({"hessian", "column_means"})

    def __init__(self, clip: bool = True):
        self.clip = clip
        self.notes: dict[str, str] = {}
        self._folds: dict[tuple, list[tuple[str, list[str]]]] = {}  # kind of block -> producer, consumers

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics | None, scheme: Scheme, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """`weight` `[out, in]`, its inputs already scaled; `statistics` are those of the scaled inputs."""
        energy = None if statistics is None else statistics.column_norms.square()
        return round_to_nearest(weight, scheme, scale_dtype, energy, self.clip)

    def fold(
        self, run, index: int, block: nn.Module, layers: dict, statistics: dict, plan
    ) -> tuple[set[str], set[str]]:
        """Scale what can be scaled in a filled block, changing its weights and the statistics.

        Returns the paths of the block's modules whose own parameters changed, and the names of the layers whose inputs
        are scaled now.
        """
        paths = dict(block.named_modules())
        names = {id(layer): name for name, layer in layers.items()}
        changed: set[str] = set()
        scaled: set[str] = set()
        for producer_path, consumer_paths in self._find_folds(run, index, block, layers, statistics):
            producer = paths[producer_path]
            consumers = [names.get(id(paths[path])) for path in consumer_paths]
            if any(name not in statistics or statistics[name].tokens < FEWEST_TOKENS for name in consumers):
                continue
            if not is_norm(producer) and id(producer) not in names:  # this expert's is to stay dense
                continue
            parameter = f"{run.skeleton.block_name(index)}.{producer_path}.weight"
            if is_norm(producer) and parameter not in run.skeleton.by_parameter:  # folded away: no tensor holds a scale
                continue
            steps = [plan.steps[name] for name in consumers]
            weights = [weight_matrix(layers[name]) for name in consumers]
            grids = [(step.scheme, getattr(torch, TORCH_DTYPES[step.scale_dtype])) for step in steps]
            scale, exponent = search_scale(weights, statistics[consumers[0]], grids, self.clip)
            if exponent == 0:
                continue
            if is_norm(producer):
                stored = getattr(torch, TORCH_DTYPES[run.skeleton.stored_dtype(index, producer_path)])
                scale = storable_scale(producer, scale, stored)
            apply_scale(producer, [layers[name] for name in consumers], scale)
            statistics[consumers[0]].rescale(1 / scale)
            for name in consumers:
                scaled.add(name)
                self.notes[name] = f"exponent {exponent:.2f}, folded into {producer_path}"
            changed.add(producer_path)
        return changed, scaled

    def _find_folds(
        self, run, index: int, block: nn.Module, layers: dict, statistics: dict
    ) -> list[tuple[str, list[str]]]:
        """(producer, consumers) as module paths.

        Proved on the first block of each kind, and for experts on the first one that this text reaches, then reused: what
        feeds what is the same in all of them.
        """
        paths = {id(module): path for path, module in block.named_modules()}
        kind = type(block), tuple(sorted(paths[id(layer)] for layer in layers.values()))
        if kind not in self._folds:
            readers: dict[int, list[nn.Module]] = {}
            for name, layer in layers.items():
                if name in statistics:
                    readers.setdefault(id(statistics[name]), []).append(layer)
            allowed = {id(layer) for layer in layers.values()}  # a layer that is to stay dense is not touched
            allowed |= {id(module) for module in block.modules() if is_norm(module)}
            found: dict[tuple[str, ...], str | None] = {}
            for group in readers.values():
                consumers = tuple(EXPERT_NUMBER.sub("#", paths[id(layer)]) for layer in group)
                if consumers not in found and self._matters(run, index, block, group):
                    producer = self._producer(run, index, block, group, paths, allowed)
                    found[consumers] = producer and EXPERT_NUMBER.sub("#", paths[id(producer)])
            self._folds[kind] = [(producer, list(group)) for group, producer in found.items() if producer]
        numbers = {match[0]: None for path in paths.values() if (match := EXPERT_NUMBER.search(path))}
        return [
            (producer.replace("#", number), [path.replace("#", number) for path in group])
            for producer, group in self._folds[kind]
            for number in (numbers if "#" in group[0] else [""])
        ]

    def _matters(self, run, index: int, block: nn.Module, group: list[nn.Module]) -> bool:
        """Whether scaling the inputs of the group alone changes the output: only then can a scaling be disproved."""
        reference = run.probe(index, block)
        with _scaled(None, group, _trial_scale(group)):
            return bool((run.probe(index, block) - reference).abs().max() > SAME_OUTPUT * reference.abs().max())

    def _producer(
        self, run, index: int, block: nn.Module, group: list[nn.Module], paths: dict, allowed: set[int]
    ) -> nn.Module | None:
        """The module of `allowed` whose output the group reads, proved by scaling; the last of the block that passes."""
        width = weight_matrix(group[0]).shape[1]
        expert = EXPERT_PATH.match(paths[id(group[0])])
        candidates = [
            module
            for module in block.modules()
            if id(module) in allowed
            and all(module is not layer for layer in group)
            and _channels(module) == width
            and (expert is None or paths[id(module)].startswith(expert[0]))
        ]
        reference = run.probe(index, block)
        tolerance = SAME_OUTPUT * reference.abs().max()
        for producer in reversed(candidates):
            with _scaled(producer, group, _trial_scale(group)):
                if bool((run.probe(index, block) - reference).abs().max() <= tolerance):
                    return producer
        return None


def _trial_scale(group: list[nn.Module]) -> torch.Tensor:
    width = weight_matrix(group[0]).shape[1]
    return 0.5 + torch.rand(width, generator=torch.Generator().manual_seed(0)).to(group[0].weight.device)


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _channels(module: nn.Module) -> int:
    """How many channels a norm or a linear layer delivers."""
    return module.weight.shape[0] if is_norm(module) else weight_matrix(module).shape[0]


@contextlib.contextmanager
def _scaled(producer: nn.Module | None, consumers: list[nn.Module], scale: torch.Tensor):
    """Scaled for a trial; the exact weights come back afterwards."""
    modules = [*consumers, *([] if producer is None else [producer])]
    before = [
        (parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters(recurse=False)
    ]
    apply_scale(producer, consumers, scale)
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.copy_(value)


def storable_scale(producer: nn.Module, scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The scale near `scale` that a norm's weight can express exactly in the dtype it is stored in."""
    offset = 1.0 if is_offset_norm(producer) else 0.0
    gain = producer.weight + offset
    rounded = (gain / scale - offset).to(stored).float() + offset
    usable = (rounded != 0) & (gain != 0) & ((gain / rounded) > 0)
    return torch.where(usable, gain / rounded, scale)


def apply_scale(producer: nn.Module | None, consumers: list[nn.Module], scale: torch.Tensor) -> None:
    """Divide what `producer` delivers by `scale` `[channels]` and multiply the inputs of `consumers` by it, in place."""
    for layer in consumers:
        weight_matrix(layer).mul_(scale)
    if producer is None:
        return
    if is_norm(producer):
        # Gemma's norms multiply by (1 + weight): recognised by their weight being an offset from one.
        offset = 1.0 if is_offset_norm(producer) else 0.0
        producer.weight.add_(offset).div_(scale).sub_(offset)
    else:
        weight_matrix(producer).div_(scale[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(scale)


def is_offset_norm(module: nn.Module) -> bool:
    """Whether a norm multiplies by (1 + weight): asked of the module itself, with a weight of zeros."""
    weight = module.weight.data
    try:
        module.weight.data = torch.zeros_like(weight)
        return bool(module(torch.ones(1, 1, len(weight), device=weight.device).cumsum(-1)).abs().max() > 0) and (
            getattr(module, "bias", None) is None
        )
    finally:
        module.weight.data = weight


def search_scale(
    weights: list[torch.Tensor],
    statistics: InputStatistics,
    schemes: list[tuple[Scheme, torch.dtype]],
    clip: bool = True,
) -> tuple[torch.Tensor, float]:
    """The scale `[in]` among s = mean|x|^a, a in 0, 0.1 … 0.9, with the least output error of all `weights`.

    Weights are rounded as they will be in the end, clipped ranges included: these gain from loud inputs too, so that
    the best scale without them can be worse than none. a = 0 is among the candidates, and no scale.
    """
    means, hessian = statistics.column_means, statistics.hessian
    energy = hessian.diagonal()
    best_error, best_scale, best_exponent = float("inf"), torch.ones_like(means), 0.0
    for step in range(GRID):
        exponent = step / GRID
        scale = means.clamp(min=SMALLEST_SCALE) ** exponent
        scale /= (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, (scheme, scale_dtype) in zip(weights, schemes, strict=True):
            quantized = round_to_nearest(weight * scale, scheme, scale_dtype, energy / scale.square(), clip)
            difference = dequantize(quantized, scheme) / scale - weight
            error += float((difference @ hessian * difference).sum())
        if error < best_error:
            best_error, best_scale, best_exponent = error, scale, exponent
    return best_scale, best_exponent

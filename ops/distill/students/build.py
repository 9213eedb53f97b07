"""A checkpoint of any kind as a model that trains: transformers' own model with float32 parameters.

Plain weights are parameters as they are; a quantized layer trains dense weights that are rounded to its grid in each pass
(`quantized="qat"`) or its scales alone (`"scales"`); factors train as factors, packed weights unpacked. Experts stay
fused into one tensor, unless some are quantized, factors, frozen or have a threshold: then each is a layer of its own.
Dropout is off: what a student imitates has none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tersor.formats.activation_thresholds import threshold_of
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.choice import ZerosOfCodes, trained_names, zeros_of
from tersor.ops.distill.students.export import stored_as_is, stored_layer
from tersor.ops.distill.students.layers import FakeQuantizedLinear, ScaledLinear
from tersor.ops.distill.students.places import places
from tersor.ops.distill.students.student import Stored, Student
from tersor.ops.model.initial import fill_buffers, folded_parameters, initial_value
from tersor.ops.model.linears import KroneckerLinear, LowRankLinear, RemovedLinear
from tersor.ops.model.runtime import UNUSED, bare_model, definition
from tersor.ops.model.runtime_experts import modules_of, unfuse
from tersor.ops.model.skeleton import EXPERTS, Skeleton, assign, drop_lists, is_linear, map_names, weight_matrix
from torch import Tensor, nn


def build(view: DenseView, request: Request, device: torch.device) -> Student:
    """The student of a checkpoint, on `device`, in training mode.

    Raises TersorError when transformers has no definition of the model, tensors are missing, a quantized tensor is no
    linear layer, or nothing is left to train.
    """
    return assemble(view, *definition(view), request, device)


def assemble(view: DenseView, class_: type, config, request: Request, device: torch.device) -> Student:
    """`build` for a model class and its configuration."""
    return _Assembly(view, class_, config, request, device).student()


class _Assembly:
    def __init__(self, view: DenseView, class_: type, config, request: Request, device: torch.device):
        self.view, self.request, self.device = view, request, device
        self.path = view.checkpoint.path
        config.use_cache, config.dtype = False, torch.float32
        without_dropout(config)
        self.model = bare_model(class_, config, self.path)
        sources = map_names(self.model, view)
        removed = any(drop_lists(view.config).values())
        self.dropped = Skeleton(view, torch.device("cpu"), thresholds={}).dropped if removed else set()
        self.sources = {name: source for name, source in sources.items() if source.parameter not in self.dropped}
        self.folded = folded_parameters(self.model, view.config)
        self.thresholds = threshold_of(view.checkpoint)
        self.trained = trained_names(view, self.model, self.sources, request)
        fused = modules_of(self.sources)
        self.apart = {path: names for path, names in fused.items() if self._differ(names)}

    def student(self) -> Student:
        layers = self._layers()
        self._fill(layers)
        paths = self._put(layers)
        self._remove_branches()
        stored = self._stored(paths)
        self._hook_thresholds(paths)
        wanted = {entry.parameter for entry in stored.values()}
        for path in wanted:
            self.model.get_parameter(path).requires_grad_(True)
        scales = {}
        for name, path in paths.items():
            layer = self.model.get_submodule(path)
            if name in self.trained and isinstance(layer, ScaledLinear):
                scales[f"{path}.gain"] = layer.largest_gain
        zeros = self._zeros(paths) if self.request.keep_zeros else {}
        return Student(self.model.train(), self.view, stored, zeros, scales)

    def _differ(self, names: list[str]) -> bool:
        """Whether fused experts have to become layers of their own."""
        entries = self.view.tensors
        some = any(name in self.trained for name in names) and not all(name in self.trained for name in names)
        return some or any(name in self.thresholds or not entries[name].is_stored for name in names)

    def _layers(self) -> dict[str, nn.Module]:
        """Checkpoint weight -> the layer that takes the place of the model's own, still without its bias."""
        result = {name: self._layer(name) for names in self.apart.values() for name in names}
        for name, source in self.sources.items():
            if name in result or self.view.tensors[name].is_stored:
                continue
            if not is_linear(self.model.get_submodule(source.parameter.removesuffix(".weight"))):
                raise TersorError(
                    f"{self.path}: {name!r} is quantized or factors, but belongs to no linear layer",
                    "make it dense first: tersor convert --to dense",
                )
            result[name] = self._layer(name)
        return result

    def _layer(self, name: str) -> nn.Module:
        entry = self.view.tensors[name]
        if entry.factors is not None:
            pair = (self.view.checkpoint.read(part).float() for part in entry.factors.names)
            layer = (LowRankLinear if entry.factors.grid is None else KroneckerLinear)(*pair)
        elif entry.scheme is not None:
            weight, scheme = self.view.codes(entry.module), entry.scheme
            if self.sources[name].expert is not None:
                scheme = replace(scheme, activations=None)  # as transformers' fused experts have it
            dense = name in self.trained and "scales" not in (self.request.quantized, self.request.train)
            layer = (FakeQuantizedLinear if dense else ScaledLinear)(weight, scheme)
        else:
            weight = self.view.read(name).float()
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight)
        return layer.requires_grad_(False).to(self.device)

    def _fill(self, layers: dict[str, nn.Module]) -> None:
        """Every parameter and buffer of the model that no layer takes the place of."""
        where = places(self.model, self.sources, {name: entry.shape for name, entry in self.view.tensors.items()})
        self.places = {name: place for name, place in where.items() if name not in layers}
        replaced = {self.sources[name].parameter for name in layers}
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        by_parameter: dict[str, list[str]] = {}
        for name, place in self.places.items():
            by_parameter.setdefault(place.parameter, []).append(name)
        for alias, parameter in tied.items():
            if parameter not in by_parameter and alias in by_parameter:
                by_parameter[parameter] = by_parameter[alias]
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if name in replaced or (name in tied and name not in tied.values()):
                continue
            assign(self.model, name, self._value(name, parameter, by_parameter.get(name, [])))
        self.model.tie_weights()
        for module in list(self.model.modules()):
            fill_buffers(self.model, module, self.device)
        for name, buffer in list(self.model.named_buffers()):
            if sources := by_parameter.get(name):
                assign(self.model, name, self.view.read(sources[0]).to(self.device, buffer.dtype))

    def _value(self, path: str, parameter: nn.Parameter, names: list[str]) -> Tensor:
        if path in self.dropped:
            return torch.zeros(parameter.shape, device=self.device)
        if not names:
            if path not in self.folded and not UNUSED.search(path):
                raise TersorError(
                    f"{self.path}: tensor {path!r} is missing for a {type(self.model).__name__}",
                    "the checkpoint does not fit its config.json",
                )
            owner, _, leaf = path.rpartition(".")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return initial_value(self.model, self.model.get_submodule(owner), leaf).to(self.device).float()
        if self.places[names[0]].expert is None:
            return self.view.read(names[0]).to(self.device, torch.float32)
        value = torch.full(parameter.shape, torch.nan, device=self.device)
        for name in names:
            part, weight = self.places[name].of(value), self.view.read(name)
            if part.shape != weight.shape:
                raise TersorError(
                    f"{name}: checkpoint has shape {list(weight.shape)}, the model {list(part.shape)}",
                    "the checkpoint does not fit its config.json",
                )
            part.copy_(weight)
        return value

    def _put(self, layers: dict[str, nn.Module]) -> dict[str, str]:
        """Layers into the model: checkpoint weight -> the path of its module."""
        paths = {}
        experts = {name for names in self.apart.values() for name in names}
        for name, layer in layers.items():
            source = self.sources[name]
            if name in experts:
                module = source.parameter.rpartition(".")[0]
                paths[name] = f"{module}.{EXPERTS}.{source.expert}.{name.split('.')[-2]}"
                continue
            paths[name] = source.parameter.removesuffix(".weight")
            layer.bias = self.model.get_submodule(paths[name]).bias
            self.model.set_submodule(paths[name], layer)
        unfuse(self.model, self.sources, self.apart, layers)
        return paths

    def _remove_branches(self) -> None:
        """What config.json lists as removed adds nothing."""
        for name in sorted(self.dropped):
            module = self.model.get_submodule(name.rpartition(".")[0])
            if is_linear(module) and name.endswith(".weight"):
                shape = tuple(weight_matrix(module).shape)
                self.model.set_submodule(name.removesuffix(".weight"), RemovedLinear(shape, torch.float32))

    def _stored(self, paths: dict[str, str]) -> dict[str, Stored]:
        result: dict[str, Stored] = {}
        for name in self.sources:
            if name not in self.trained:
                continue
            if name in paths:
                result |= stored_layer(self.view, name, paths[name], self.model.get_submodule(paths[name]))
            else:
                result |= stored_as_is(self.view, name, self.places[name].parameter, self.places[name])
        return result

    def _hook_thresholds(self, paths: dict[str, str]) -> None:
        for name, threshold in self.thresholds.items():
            if name not in self.sources:
                continue
            path = paths.get(name, self.sources[name].parameter.removesuffix(".weight"))
            self.model.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, limit=threshold: (nn.functional.hardshrink(inputs[0], limit), *inputs[1:])
            )

    def _zeros(self, paths: dict[str, str]) -> dict[str, Tensor]:
        """Parameter path -> True where a weight of a linear layer is to stay zero."""
        of_codes = ZerosOfCodes(self.view)
        tables = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        result: dict[str, Tensor] = {}
        for name in sorted(self.trained):
            if name in paths:
                layer, path = self.model.get_submodule(paths[name]), paths[name]
                if isinstance(layer, FakeQuantizedLinear):
                    result[f"{path}.weight"] = of_codes.of(name, layer.weight.detach())
                elif not isinstance(layer, ScaledLinear):
                    matrices = (part for part in layer.named_parameters(recurse=False) if part[0] != "bias")
                    result |= {f"{path}.{leaf}": zeros_of(value.detach()) for leaf, value in matrices}
                continue
            place = self.places[name]
            parameter = self.model.get_parameter(place.parameter).detach()
            owner = self.model.get_submodule(place.parameter.rpartition(".")[0])
            if id(self.model.get_parameter(place.parameter)) in tables:
                continue
            if place.expert is None and not (is_linear(owner) and parameter.dim() == 2) and parameter.dim() != 3:
                continue
            zeros = zeros_of(place.of(parameter))
            if zeros is not None:
                whole = result.get(place.parameter)
                if whole is None:
                    whole = result[place.parameter] = torch.zeros_like(parameter, dtype=torch.bool)
                place.of(whole).copy_(zeros)
        return {path: zeros for path, zeros in result.items() if zeros is not None}


def without_dropout(config) -> None:
    """Set every share of what a configuration drops at random to zero, those of its parts too."""
    for key, value in list(vars(config).items()):
        if "drop" in key and type(value) is float:
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            without_dropout(value)

"""A checkpoint as a model that runs as it is stored: transformers' own model, its linear layers on this toolkit's kernels.

    from tersor.ops.model import load
    model = load("OUT")                      # dense, pruned, quantized, factors, sparse; also combined
    model.generate(**tokenizer("Hello", return_tensors="pt"))

On a GPU every layer stays in its stored form and a Triton kernel unpacks it on chip. On a CPU a layer becomes a dense
matrix once, while it is loaded, unless its stored form is the faster one there: int8 weights with int8 activations where
the processor multiplies those, factors, tiles that leave most of the matrix out, and with `dtype=torch.bfloat16` 4-bit
codes and large bitmaps. `keep_packed=True` keeps the stored form everywhere, for the memory; `keep_packed=False` makes
everything dense.

Logits are those of the decoded model (`tersor convert --to dense`) up to rounding; where a scheme quantizes activations,
so does the layer, and inputs below a threshold of `sparsify --activations` are zero. Experts that transformers fuses into
one tensor are decoded while they are loaded, since its kernels for those know dense weights only; with `keep_packed=True`
or thresholds each is a layer of its own. Either way they take activations as they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tersor.formats.activation_thresholds import WAY_OUT, threshold_of
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.model.choose_linear import packed_tensor, stored_linear
from tersor.ops.model.device import pick_device
from tersor.ops.model.initial import folded_parameters
from tersor.ops.model.linears import ActiveLinear, DenseLinear, RemovedLinear, StoredLinear
from tersor.ops.model.runtime_experts import modules_of, unfuse
from tersor.ops.model.skeleton import (
    Skeleton,
    Source,
    assign,
    drop_lists,
    is_linear,
    map_names,
    weight_matrix,
)
from torch import nn

UNUSED = re.compile(r"pooler")  # not saved with every model, and no part of what is computed from text


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    keep_packed: bool | None = None,
) -> nn.Module:
    """The transformers model of a checkpoint folder (or Hub id), in evaluation mode.

    `device`: auto, cpu, cuda or cuda:0. `dtype` of activations and dense weights: None is float32 on a CPU, where that is
    fastest as a rule, and the dtype of config.json on a GPU. `keep_packed`: None takes the faster form of each layer, True
    the stored one, False a dense one. Raises TersorError when the folder is damaged, or transformers has no model for it.
    """
    place = pick_device(device)
    checkpoint = open_checkpoint(locate(str(path)))
    checkpoint.require_config("which says what model this is")
    return _Loader(DenseView(checkpoint), place, dtype, keep_packed).load()


class _Lazy:
    """What transformers takes for a tensor of a file: read, decoded where it must be, when it is its turn."""

    def __init__(self, view: DenseView, name: str, errors: list[TersorError]):
        self.view, self.name, self.errors = view, name, errors

    def __getitem__(self, everything) -> torch.Tensor:
        try:
            return self.view.read(self.name)
        except TersorError as error:  # transformers would tell of another one
            self.errors.append(error)
            raise


class _Loader:
    def __init__(self, view: DenseView, device: torch.device, dtype: torch.dtype | None, keep_packed: bool | None):
        self.view, self.device, self.keep_packed = view, device, keep_packed
        self.path = view.checkpoint.path
        self.thresholds = threshold_of(view.checkpoint)
        self.class_, self.config = definition(view)
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else self.config.dtype or torch.bfloat16)

    def load(self) -> nn.Module:
        bare = bare_model(self.class_, self.config, self.path)
        sources = map_names(bare, self.view)
        self.folded = folded_parameters(bare, self.view.config)
        removed = any(drop_lists(self.view.config).values())
        self.dropped = Skeleton(self.view, torch.device("cpu"), thresholds={}).dropped if removed else set()
        self.sources = {name: source for name, source in sources.items() if source.parameter not in self.dropped}
        self.skipped = sources.keys() - self.sources.keys()
        modules = stored_linears(self.view, bare, self.sources)
        layers = {name: layer for name in modules if (layer := self._layer(name)) is not None}
        fused = {path: names for path, names in modules_of(self.sources).items() if self._apart(names)}
        experts = {name: self._expert(name) for names in fused.values() for name in names}
        model = self._from_transformers(bare, layers, experts)
        for name, layer in layers.items():
            layer.bias = model.get_submodule(modules[name]).bias
            model.set_submodule(modules[name], layer)
        unfuse(model, self.sources, fused, experts)
        for name in dict.fromkeys([*modules, *self.thresholds]):
            if name not in layers and name not in experts:
                self._adapt_dense(model, name)
        self._remove_branches(model)
        return model.to(self.device).eval()

    def _layer(self, name: str, quantize_inputs: bool = True) -> StoredLinear | None:
        layer = stored_linear(self.view, name, self.device, self.dtype, self.keep_packed, quantize_inputs)
        if layer is not None:
            layer.threshold = self.thresholds.get(name)
        return layer

    def _apart(self, names: list[str]) -> bool:
        """Whether these experts run as layers of their own."""
        packed = self.keep_packed and any(not self._is_plain(name) for name in names)
        return packed or any(name in self.thresholds for name in names)

    def _expert(self, name: str) -> StoredLinear:
        """The layer of one expert; like transformers' fused ones it takes activations as they are."""
        layer = self._layer(name, quantize_inputs=False)
        if layer is not None:
            return layer
        weight, threshold = self.view.read(name).to(self.device, self.dtype), self.thresholds.get(name)
        return DenseLinear(weight, None, None) if threshold is None else ActiveLinear(weight, None, threshold)

    def _adapt_dense(self, model: nn.Module, name: str) -> None:
        """A dense layer whose inputs are rounded, or zero below a threshold."""
        scheme, threshold = self.view.tensors[name].scheme, self.thresholds.get(name)
        activations = scheme.activations if scheme is not None else None
        if (activations is None and threshold is None) or name in self.skipped:
            return
        module = self.sources[name].parameter.removesuffix(".weight") if name in self.sources else ""
        dense = model.get_submodule(module)
        if not is_linear(dense):
            raise TersorError(f"{self.path}: {name!r} has a threshold, but is no linear layer", WAY_OUT)
        matrix = weight_matrix(dense).detach()
        if activations is None:
            layer = ActiveLinear(matrix, dense.bias, threshold)
        else:
            layer = DenseLinear(matrix.contiguous(), dense.bias, activations)
            layer.threshold = threshold
        model.set_submodule(module, layer)

    def _from_transformers(self, bare: nn.Module, layers: dict, experts: dict) -> nn.Module:
        """transformers' own loading. What is replaced afterwards is zeros without memory until then."""
        errors: list[TersorError] = []
        zero = torch.zeros((), dtype=self.dtype)
        state = {}
        for name, entry in self.view.tensors.items():
            source = self.sources.get(name)
            if name in experts:
                state[source.parameter] = zero.expand(bare.get_parameter(source.parameter).shape)
            elif name not in self.skipped:
                state[name] = zero.expand(entry.shape) if name in layers else _Lazy(self.view, name, errors)
        try:
            with _named_errors(self.path), _quiet():
                model, info = self.class_.from_pretrained(
                    None, config=self.config, state_dict=state, dtype=self.dtype, output_loading_info=True
                )
        except TersorError:
            if errors:
                raise errors[0] from None
            raise
        self._check(model, info)
        if model.can_generate() and (self.path / "generation_config.json").is_file():
            from transformers import GenerationConfig

            with _named_errors(self.path):
                model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return model

    def _check(self, model: nn.Module, info: dict) -> None:
        """Raises TersorError for stored weights that the model has no place for, and for places that nothing fills."""
        unused = [name for name in sorted(info["unexpected_keys"]) if not self._is_plain(name)]
        known = self.folded | self.dropped
        missing = [name for name in sorted(info["missing_keys"]) if name not in known and not UNUSED.search(name)]
        if unused or missing:
            what = f"weight {unused[0]!r} has no place in" if unused else f"tensor {missing[0]!r} is missing for"
            raise TersorError(
                f"{self.path}: {what} a {type(model).__name__}", "the checkpoint does not fit its config.json"
            )

    def _is_plain(self, name: str) -> bool:
        """Whether a tensor is a matrix in the file, not codes, factors or values without their zeros."""
        known = self.view.tensors.get(name)
        return known is None or (known.is_stored and packed_tensor(self.view, name) is None)

    def _remove_branches(self, model: nn.Module) -> None:
        """What config.json lists as removed adds nothing."""
        for name in sorted(self.dropped, key=lambda name: name.endswith(".weight")):  # biases first
            parameter = model.get_parameter(name)
            module = model.get_submodule(name.rpartition(".")[0])
            if is_linear(module) and name.endswith(".weight"):
                shape = tuple(weight_matrix(module).shape)
                model.set_submodule(name.removesuffix(".weight"), RemovedLinear(shape, self.dtype))
            else:
                assign(model, name, torch.zeros_like(parameter))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bar, and without its tale of missing tensors, which is told by `_check`."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """What transformers raises, as a TersorError."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise TersorError(
            f"{path}: transformers cannot load this model ({reason})",
            "update transformers, or check that config.json belongs to these weights",
        ) from error


def stored_linears(view: DenseView, bare: nn.Module, sources: dict[str, Source]) -> dict[str, str]:
    """Weight name → module of each linear layer that is not stored as a plain matrix, and is no part of fused experts."""
    found = {}
    for name, source in sources.items():
        if not name.endswith(".weight") or source.expert is not None:
            continue
        if view.tensors[name].is_stored and packed_tensor(view, name) is None:
            continue
        module = source.parameter.removesuffix(".weight")
        if is_linear(bare.get_submodule(module)):
            found[name] = module
    return found


def bare_model(class_: type, config, path: Path) -> nn.Module:
    """The model without weights. Raises TersorError where transformers cannot build it."""
    with _named_errors(path), torch.device("meta"):
        return class_._from_config(config)


def definition(view: DenseView) -> tuple[type, object]:
    """Model class and config. Raises TersorError for a kind of model that transformers does not know."""
    import transformers

    path = view.checkpoint.path
    with _named_errors(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the layers decode themselves
        names = view.checkpoint.config.get("architectures") or [""]
        class_ = getattr(transformers, names[0], None) or transformers.MODEL_MAPPING[type(config)]
    return class_, config

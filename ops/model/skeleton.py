"""A model without its weights, filled from the checkpoint one block at a time.

Definitions come from transformers. The model is built on the meta device; what lies outside the repeated blocks is
filled once (tables stay in the file and are read by the page), a block is filled when its turn comes and emptied after.

transformers renames some checkpoint tensors and fuses experts when it loads. That mapping lives here and nowhere else:
everything above speaks of checkpoint names. A fused experts module gets a linear layer per checkpoint tensor while its
block is filled, so that an algorithm sees the layers that the file holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tersor.formats.activation_thresholds import threshold_of
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model.initial import fill_buffers, folded_parameters, initial_value
from tersor.ops.model.input_thresholds import InputCounts, applied
from torch import nn
from torch.overrides import TorchFunctionMode

PANEL_ROWS = 8192
EXPERTS = "tersor"
DROP_LISTS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}


@dataclass
class Source:
    """Where one checkpoint tensor goes: a parameter of the model, or a slice of fused experts."""

    parameter: str
    pattern: str | None = None
    expert: int | None = None


class ExpertLayers(nn.Module):
    """The linear layers of one expert, named by the last part of their checkpoint names."""


class Skeleton:
    """`model` on the meta device and the map between its parameters and checkpoint tensors."""

    def __init__(
        self,
        view: DenseView,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        thresholds: dict[str, float] | None = None,
    ):
        """Raises TersorError when transformers has no definition, or tensors are missing."""
        self.view, self.device, self.dtype = view, device, dtype
        # Inputs of layers below these are zero in filled blocks, by weight name; the counts say what that came to.
        self.thresholds = threshold_of(view.checkpoint) if thresholds is None else thresholds
        self.input_counts: dict[str, InputCounts] = {}
        self.model = _build(view)
        self.sources = map_names(self.model, view)
        self.folded = folded_parameters(self.model, view.config)
        self.block_prefix, self.blocks = find_blocks(self.model)
        self.by_parameter: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            self.by_parameter.setdefault(source.parameter, []).append(name)
        self._fill_shell()
        self.dropped = self._dropped()
        self._check_complete()

    def _check_complete(self) -> None:
        tied = _tied_parameters(self.model)
        missing = [
            name
            for name, _ in self.model.named_parameters()
            if name not in self.by_parameter and name not in tied | self.dropped | self.folded and not _optional(name)
        ]
        if missing:
            raise TersorError(
                f"{self.view.checkpoint.path}: {len(missing)} tensors are missing, for example {missing[0]!r}",
                "the checkpoint does not fit its config.json",
            )

    def _dropped(self) -> set[str]:
        """Parameters of the residual branches that config.json lists as removed; a tensor for one is not looked at."""
        if not any(drop_lists(self.view.config).values()):
            return set()
        from tersor.ops.model.branches import listed_parameters  # which runs the blocks of this very class

        dropped = listed_parameters(self)
        for parameter in dropped:
            for name in self.by_parameter.pop(parameter, []):
                del self.sources[name]
        return dropped

    def block_name(self, index: int) -> str:
        return f"{self.block_prefix}.{index}"

    def checkpoint_names(self, index: int) -> list[str]:
        """Checkpoint tensors of one block."""
        prefix = self.block_name(index) + "."
        return [name for name, source in self.sources.items() if source.parameter.startswith(prefix)]

    def stored_dtype(self, index: int, module: str) -> str:
        """The dtype in which the file holds the weight of a block's module."""
        return self.view.tensors[self.by_parameter[f"{self.block_name(index)}.{module}.weight"][0]].dtype

    def _fill_shell(self) -> None:
        """Everything outside the blocks: tables and heads stay mapped in their stored dtype, the rest is read."""
        inside = tuple(self.block_name(index) + "." for index in range(len(self.blocks)))
        for name, parameter in list(self.model.named_parameters()):
            if name.startswith(inside) or name not in self.by_parameter:
                continue
            source = self.by_parameter[name][0]
            if parameter.dim() == 2:
                assign(self.model, name, self.view.map(source).to(self.device))
            else:
                assign(self.model, name, self.view.read(source).to(self.device, self.dtype))
        self.model.tie_weights()
        for name, module in self.model.named_modules():
            fill_buffers(self.model, module, self.device)
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}" if name else key
                if parameter.is_meta and full in self.folded and not full.startswith(inside):
                    assign(self.model, full, initial_value(self.model, module, key).to(self.device, self.dtype))
                elif parameter.is_meta and not full.startswith(inside):
                    assign(self.model, full, torch.zeros(parameter.shape, dtype=self.dtype, device=self.device))
        for name, buffer in list(self.model.named_buffers()):
            if name in self.view.tensors and not name.startswith(inside):
                assign(self.model, name, self.view.read(name).to(self.device, buffer.dtype))

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in the compute dtype; emptied again on leaving."""
        prefix = self.block_name(index)
        block = self.blocks[index]
        fused = self._unfuse(prefix, block)
        for name, _ in list(block.named_parameters()):
            if name.rsplit(".", 1)[0] in fused or any(name.startswith(f"{module}.{EXPERTS}.") for module in fused):
                continue
            if f"{prefix}.{name}" in self.folded - self.by_parameter.keys():
                path, _, leaf = name.rpartition(".")
                value = initial_value(self.model, block.get_submodule(path), leaf)
                assign(block, name, value.to(self.device, self.dtype))
                continue
            if f"{prefix}.{name}" in self.dropped:  # zeros without memory: the branch adds nothing
                zero = torch.zeros((), dtype=self.dtype, device=self.device)
                assign(block, name, zero.expand(block.get_parameter(name).shape))
                continue
            sources = self.by_parameter.get(f"{prefix}.{name}", [])
            if len(sources) != 1 or self.sources[sources[0]].expert is not None:
                raise TersorError(
                    f"{prefix}.{name}: made of {len(sources)} checkpoint tensors in a way that is not known here",
                    "use a method that runs no text (rtn of quantize, magnitude of prune)",
                )
            assign(block, name, self.view.read(sources[0]).to(self.device, self.dtype))
        for name, buffer in list(block.named_buffers()):  # the correction bias of a router
            if sources := self.by_parameter.get(f"{prefix}.{name}"):
                assign(block, name, self.view.read(sources[0]).to(self.device, buffer.dtype))
        layers = self.linears(index) if self.thresholds else {}
        try:
            with applied(layers, self.thresholds, self.input_counts):
                yield block
        finally:
            for module in fused:
                delattr(block.get_submodule(module), EXPERTS)
            for name, parameter in list(block.named_parameters()):
                assign(block, name, torch.empty_like(parameter, device="meta"))

    def _unfuse(self, prefix: str, block: nn.Module) -> dict[str, list[str]]:
        """Give each experts module of the block a linear per checkpoint tensor: module name -> its sources."""
        fused: dict[str, list[str]] = {}
        for name, _ in block.named_parameters():
            sources = self.by_parameter.get(f"{prefix}.{name}", [])
            if sources and all(self.sources[source].expert is not None for source in sources):
                fused.setdefault(name.rsplit(".", 1)[0], []).extend(sources)
        for module_name, sources in fused.items():
            module = block.get_submodule(module_name)
            count = 1 + max(self.sources[source].expert for source in sources)
            experts = nn.ModuleList(ExpertLayers() for _ in range(count))
            for source in sorted(sources, key=lambda name: (self.sources[name].expert, self.sources[name].pattern)):
                weight = self.view.read(source).to(self.device, self.dtype)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                experts[self.sources[source].expert].add_module(source.split(".")[-2], linear)
            setattr(module, EXPERTS, experts)
            module.tersor_gate_up, module.tersor_down = expert_roles(self.model, self.sources, sources)
        return fused

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Checkpoint weight name -> linear layer (nn.Linear or Conv1D) of a filled block."""
        prefix = self.block_name(index)
        found: dict[str, nn.Module] = {}
        for name, module in self.blocks[index].named_modules():
            if not is_linear(module):
                continue
            if f".{EXPERTS}." in f".{name}":
                experts, _, rest = name.partition(f".{EXPERTS}.")
                expert, leaf = rest.split(".")
                for source_name, source in self.sources.items():
                    if (
                        source.expert == int(expert)
                        and source.parameter.startswith(f"{prefix}.{experts}.")
                        and source_name.split(".")[-2] == leaf
                    ):
                        found[source_name] = module
            else:
                for source_name in self.by_parameter.get(f"{prefix}.{name}.weight", []):
                    found[source_name] = module
        return found


def drop_lists(config: dict | None) -> dict[str, list[int]]:
    """Blocks that lack their attention, and blocks that lack their mlp, as LLM-Drop notes them in config.json."""
    return {kind: (config or {}).get(key) or [] for kind, key in DROP_LISTS.items()}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The weight as `[out, in]`, a view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def experts_forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
    """Experts one after another through their own linear layers, as the model's eager code does with fused tensors.

    Registered with transformers as an experts implementation. hidden_states `[tokens, hidden]`, top_k_* `[tokens, k]`.
    """
    layers = getattr(self, EXPERTS, None)
    if layers is None:
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    result = torch.zeros_like(hidden_states)
    for index, expert in enumerate(layers):
        token, position = torch.where(top_k_index == index)
        if len(token) == 0:
            continue
        x = hidden_states[token]
        hidden = torch.cat([getattr(expert, name)(x) for name in self.tersor_gate_up], dim=-1)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        output = getattr(expert, self.tersor_down[0])(hidden)
        result.index_add_(0, token, output * top_k_weights[token, position, None].to(output.dtype))
    return result


def expert_roles(model: nn.Module, sources: dict[str, Source], names: list[str]) -> tuple[list[str], list[str]]:
    """What `experts_forward` asks of the experts that checkpoint tensors `names` are part of: the names of the layers
    that make gate_up (in the order they are concatenated), and of the one that makes down."""
    converters = {pattern: converter for converter in transforms(model)[1] for pattern in converter.source_patterns}
    leaf = {sources[name].pattern: name.split(".")[-2] for name in names}
    roles: tuple[list[str], list[str]] = ([], [])
    for pattern, converter in converters.items():
        if pattern in leaf:
            roles["down" in converter.target_patterns[0]].append(leaf[pattern])
    return roles


class StoredDtype(TorchFunctionMode):
    """Lets tables and heads stay in the dtype and place they are stored in, while everything else computes in another.

    An embedding looks up first and converts the rows it found; a linear layer converts its weight in panels of rows.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.embedding and args[1].dtype != self.dtype:
            return function(*args, **kwargs).to(self.dtype)
        if function is nn.functional.linear and args[0].dtype == self.dtype and args[1].dtype != self.dtype:
            x, weight = args[0], args[1]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            panels = [nn.functional.linear(x, panel.to(self.dtype)) for panel in weight.split(PANEL_ROWS)]
            result = torch.cat(panels, dim=-1)
            return result if bias is None else result + bias.to(self.dtype)
        return function(*args, **kwargs)


def _build(view: DenseView) -> nn.Module:
    import transformers
    from transformers import AutoConfig, AutoModel

    config_dict = view.checkpoint.require_config("which says what model this is")
    path = view.checkpoint.path
    register_experts()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # weights reach the model decoded
        names = config_dict.get("architectures") or []
        class_ = getattr(transformers, names[0], None) if names else None
        config._attn_implementation = "sdpa" if class_ is None or getattr(class_, "_supports_sdpa", True) else "eager"
        config._experts_implementation = EXPERTS
        config.use_cache = False
        with torch.device("meta"):
            model = class_._from_config(config) if class_ is not None else AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise TersorError(
            f"{path}: transformers cannot build this model ({str(error).splitlines()[0][:160]})",
            "update transformers, or use a method that runs no text (rtn of quantize, magnitude of prune)",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise TersorError(
            f"{path}: an encoder-decoder ({config.model_type}), which is not run block by block yet",
            "use a method that runs no text (rtn of quantize, magnitude of prune)",
        )
    model.config._experts_implementation = EXPERTS
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = EXPERTS
    return model.eval().requires_grad_(False)


def register_experts() -> None:
    """Make transformers know `experts_forward`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


def transforms(model: nn.Module) -> tuple[list, list]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model)
    converters = [transform for transform in found if isinstance(transform, WeightConverter)]
    return [transform for transform in found if not isinstance(transform, WeightConverter)], converters


def map_names(model: nn.Module, view: DenseView) -> dict[str, Source]:
    """Where every checkpoint tensor of `view` goes in `model`. Raises TersorError for a way of loading not known here."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = transforms(model)
    state = dict(model.state_dict())
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    for name in view.tensors:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        if pattern is None:
            sources[name] = Source(target)
            continue
        converter = next(item for item in converters if pattern in item.source_patterns)
        kinds = [type(operation).__name__ for operation in converter.operations]
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert is None or kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            raise TersorError(
                f"{name}: transformers loads it through {', '.join(kinds)}, which the block pass does not do",
                "use a method that runs no text (rtn of quantize, magnitude of prune)",
            )
        sources[name] = Source(target, pattern, int(expert[1]))
    return sources


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one kind that hold linear layers: decoder layers, encoder layers, ViT blocks."""
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or re.search(r"\.\d+(\.|$)", name):
            continue
        if not any(is_linear(child) for child in module[0].modules()) or type(module[0]) is nn.Linear:
            continue
        if best is None or len(module) > len(best[1]):
            best = name, module
    if best is None:
        raise TersorError(f"{type(model).__name__} has no list of blocks", "use a method that needs no forward pass")
    return best


def _tied_parameters(model: nn.Module) -> set[str]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    return tied | {name for name in dict(model.named_parameters(remove_duplicate=False)) if name in tied}


def _optional(name: str) -> bool:
    """Heads that a base checkpoint does not carry; they play no part before the last block."""
    return bool(re.search(r"pooler|classifier|score|cls\.|lm_head|qa_outputs|embed_out", name))


def assign(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of a parameter or buffer. Raises TersorError for a parameter of another shape."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        if leaf in module._parameters and module._parameters[leaf].shape != value.shape:
            raise TersorError(
                f"{name}: checkpoint has shape {list(value.shape)}, the model {list(module._parameters[leaf].shape)}",
                "the checkpoint does not fit its config.json",
            )
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

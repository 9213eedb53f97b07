"""A model without its checkpoint's weights: what it costs to run depends on shapes, not on values.

The definition comes from transformers and stands on the meta device; single blocks, or all of it, get made-up weights of
the right scale. So any model can be looked into in the memory of one block, however its weights are stored. What a
router decides is then as good as chance.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import record_calls
from tersor.ops.model.initial import fill_buffers
from tersor.ops.model.skeleton import assign, drop_lists, find_blocks
from torch import nn

FIRST_TOKEN = 5  # below are padding and the like
PATTERN = 1_000_003  # made-up numbers before they repeat; a prime, so that rows differ
PLACES = ("layer_idx", "layer_id", "layer_index", "block_idx", "layer_number")  # what tells equal blocks apart


@dataclass
class Kind:
    """Blocks that are built alike: `layers` are their numbers."""

    name: str
    layers: list[int] = field(default_factory=list)
    parameter_bytes: int = 0


class BareModel:
    """`model` on the meta device, its repeated `blocks`, and what is needed to run them on `device` in `dtype`."""

    def __init__(self, source, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"):
        """`source` is a Checkpoint or a config of transformers; `attention` is sdpa or eager.

        Raises TersorError when transformers has no definition, for encoder-decoders, and for models with blocks of which
        parts were removed.
        """
        self.device, self.dtype = device, dtype
        self.model = _build(_config(source), dtype, attention)
        self.attention = self.model.config._attn_implementation
        self.block_prefix, self.blocks = find_blocks(self.model)
        self._inside = tuple(f"{self.block_prefix}.{index}." for index in range(len(self.blocks)))
        for name, module in self.model.named_modules():
            fill_buffers(self.model, module, device)
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}" if name else key
                if not full.startswith(self._inside):  # zeros without memory
                    assign(self.model, full, torch.zeros((), dtype=dtype, device=device).expand(parameter.shape))
        self.model.tie_weights()

    @property
    def reads_text(self) -> bool:
        return self.model.base_model.main_input_name == "input_ids"

    @property
    def causal(self) -> bool:
        """Whether it writes token after token, with a cache."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        kind = type(self.model.config)
        lists = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
        return self.reads_text and (self.model.can_generate() or lists)

    @property
    def text_config(self):
        return self.model.config.get_text_config(decoder=True)

    def kinds(self) -> list[Kind]:
        """Equal blocks put together, in the order of their first."""
        found: dict[tuple, Kind] = {}
        types = getattr(self.text_config, "layer_types", None) or []
        for index, block in enumerate(self.blocks):
            kind = found.setdefault(_build_of(block), Kind(""))
            if not kind.layers:
                parts = [types[index].replace("_", " ")] if index < len(types) and len(set(types)) > 1 else []
                parts += ["experts"] if any(p.dim() > 2 for p in block.parameters()) else []
                kind.name = type(block).__name__ + (f" ({', '.join(parts)})" if parts else "")
                kind.parameter_bytes = sum(p.numel() for p in block.parameters()) * self.dtype.itemsize
            kind.layers.append(index)
        names = [kind.name for kind in found.values()]
        for kind in found.values():
            if names.count(kind.name) > 1:
                kind.name += f" like {kind.layers[0]}"
        return list(found.values())

    @property
    def shell(self) -> list[nn.Parameter]:
        """The weights outside the blocks."""
        return [p for name, p in self.model.named_parameters() if not name.startswith(self._inside)]

    @property
    def shell_bytes(self) -> int:
        """What they take once they are filled."""
        return sum(parameter.numel() for parameter in self.shell) * self.dtype.itemsize

    def fill(self, index: int, seed: int = 0) -> nn.Module:
        """Block `index` with made-up weights, in eval mode. Raises TersorError where there is no memory for it."""
        block = self.blocks[index]
        needed = sum(parameter.numel() for parameter in block.parameters()) * self.dtype.itemsize
        if needed > (free := free_bytes(self.device)):
            raise TersorError(
                f"{self.block_prefix}.{index} takes {needed} bytes as it is run here, {free} are free",
                "run it on a machine with more memory",
            )
        self._fill(block, seed + index)
        return block

    def fill_shell(self, seed: int = 0) -> None:
        """Made-up weights for everything outside the blocks, which are zeros without memory before."""
        blocks, self.blocks._modules = self.blocks._modules, {}
        try:
            self._fill(self.model, seed)
            self.model.tie_weights()
        finally:
            self.blocks._modules = blocks

    def empty(self, index: int) -> None:
        for name, parameter in list(self.blocks[index].named_parameters()):
            assign(self.blocks[index], name, torch.empty(parameter.shape, dtype=self.dtype, device="meta"))

    def _fill(self, root: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pattern = torch.randn(PATTERN, generator=generator)
        for name, parameter in list(root.named_parameters()):
            shape = parameter.shape
            value = torch.empty(prod(shape), dtype=self.dtype, device=self.device)
            scale, shift = (max(shape[-1], 1) ** -0.5, 0.0) if len(shape) > 1 else (0.1, 1.0)
            scaled = (pattern * scale + shift).to(self.device, self.dtype)
            for start in range(0, len(value), PATTERN):
                part = value[start : start + PATTERN]
                part.copy_(scaled[: len(part)])
            assign(root, name, value.view(shape))

    @contextlib.contextmanager
    def without_blocks(self) -> Iterator[nn.Module]:
        """The model with no block at all: embedding, masks and positions, last norm, head."""
        blocks, self.blocks._modules = self.blocks._modules, {}
        try:
            yield self.model
        finally:
            self.blocks._modules = blocks

    def new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def inputs(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        """Made-up tokens `[batch, tokens]`, or images of the size that the model is built for.

        Raises TersorError for a model that reads neither.
        """
        name = self.model.base_model.main_input_name
        generator = torch.Generator().manual_seed(tokens)
        if name == "input_ids":
            rows = self.model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(min(FIRST_TOKEN, rows - 1), rows, (batch, tokens), generator=generator)
            return {name: ids.to(self.device)}
        side = getattr(self.model.config, "image_size", None)
        if name == "pixel_values" and side:
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            channels = getattr(self.model.config, "num_channels", 3)
            image = torch.randn(batch, channels, height, width, generator=generator)
            return {name: image.to(self.device, self.dtype)}
        raise TersorError(
            f"{type(self.model).__name__} reads {name}, which cannot be made up",
            "text models and vision encoders can be run without data",
        )

    @torch.no_grad()
    def calls(self, inputs: dict[str, torch.Tensor], cache=None) -> tuple[list[tuple[tuple, dict]], torch.Size]:
        """What the model's own code calls each block with, without its hidden states, and the shape of those."""
        extra = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        try:
            recorders = record_calls(self, **inputs, **extra)
        except (TersorError, ValueError, IndexError, RuntimeError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise TersorError(
                f"{type(self.model).__name__}: its blocks cannot be run one by one ({reason})",
                "the profile from headers needs no run: leave --measure out",
            ) from error
        calls = [recorder.calls[0] for recorder in recorders]
        first = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
        rest = [
            (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})
            for args, kwargs in calls
        ]
        return rest, first.shape


def run_block(block: nn.Module, hidden: torch.Tensor, call: tuple[tuple, dict]) -> torch.Tensor:
    """Hidden states after `block`, `call` being its entry of `BareModel.calls`."""
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _config(source):
    if not isinstance(source, Checkpoint):
        return copy.deepcopy(source)
    from transformers import AutoConfig

    content = source.require_config("which says what model this is")
    if any(drop_lists(content).values()):
        raise TersorError(
            f"{source.path}: parts of some blocks were removed, which transformers' own code would run as if they were there",
            "measure the model before its removal, or remove whole blocks: prune --remove layers",
        )
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise _unknown(str(source.path), error) from error
    return config


def _build(config, dtype: torch.dtype, attention: str) -> nn.Module:
    import transformers
    from transformers import AutoModel

    if getattr(config, "is_encoder_decoder", False):
        raise TersorError(
            f"an encoder-decoder ({config.model_type}), which is not run block by block yet",
            "models of one stack of blocks can be run",
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = getattr(config, "architectures", None) or []
    class_ = getattr(transformers, names[0], None) if names else None
    if attention == "sdpa" and not getattr(class_, "_supports_sdpa", True):
        attention = "eager"
    config._attn_implementation = attention
    config.use_cache = False
    config.dtype = dtype
    try:
        with torch.device("meta"):
            model = class_._from_config(config) if class_ is not None else AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise _unknown(str(getattr(config, "model_type", "config")), error) from error
    return model.eval().requires_grad_(False)


def _unknown(what: str, error: Exception) -> TersorError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return TersorError(f"{what}: transformers cannot build this model ({reason})", "update transformers")


def _build_of(block: nn.Module) -> tuple:
    """What makes two blocks alike: classes, shapes and plain settings of all their modules."""
    parts = [tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())]
    for name, module in block.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if key not in PLACES and isinstance(value, (bool, int, str, type(None)))
        )
        parts.append((name, type(module), settings))
    return tuple(parts)

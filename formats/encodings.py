"""Quantized weights on disk: one interface over the encodings, and what all of them share.

An encoding is a module with `layout`, `check`, `encode`, `decode`, `dense_shape`, `tensor_names`, `modules`,
`quantization_config` and `scheme_map`. All of them speak of `QuantizedWeight`, so that changing the encoding of a
checkpoint is decode followed by encode.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("compressed-tensors", "gptq")
SchemeMap = Callable[[str], Scheme | None]


class QuantizedWeight(NamedTuple):
    """A weight as codes and scales: `weight ≈ (codes - zero_point) * scale`, per group of columns.

    codes: int8 `[out, in]`, signed, or float8_e4m3fn for float schemes. scale: `[out, G]`, `[1]` or one per block.
    zero_point: int8 `[out, G]`, signed, or None. group_index: int `[in]`, the group of each column where groups are not
    consecutive (GPTQ checkpoints with desc_act), else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_index: Tensor | None = None


def encoding(name: str) -> ModuleType:
    if name not in NAMES:
        raise TersorError(f"unknown encoding {name!r}", f"one of {' '.join(NAMES)}")
    return importlib.import_module(f"tersor.formats.{name.replace('-', '_')}")


def detect(config: dict | None, names: Collection[str]) -> ModuleType | None:
    """The encoding of a checkpoint, None when it is dense. Raises TersorError for a kind that is not read here."""
    settings = (config or {}).get("quantization_config")
    if not settings:
        if any(name.endswith((".weight_packed", ".qweight")) for name in names):
            raise TersorError(
                "packed weights, but no quantization_config that says how", "add the config.json that belongs to them"
            )
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in NAMES:
        return encoding(method)
    raise TersorError(
        f"quantization_config has quant_method {method!r}, which is not read here", f"read are {' and '.join(NAMES)}"
    )


def schemes(module: ModuleType, config: dict, names: Collection[str]) -> dict[str, Scheme]:
    """Scheme of every quantized module found among the tensor `names`. Raises TersorError when config and names disagree."""
    scheme_of = module.scheme_map(config)
    found = {}
    for name in module.modules(names):
        scheme = scheme_of(name)
        if scheme is None:
            raise TersorError(
                f"module {name!r} has quantized tensors, but the quantization_config leaves it out",
                "the config.json does not belong to these weights",
            )
        found[name] = scheme
    return found


def scheme_map(module: ModuleType, config: dict) -> SchemeMap:
    return module.scheme_map(config)


def dequantize(weight: QuantizedWeight, scheme: Scheme) -> Tensor:
    """float32 `[out, in]`. Raises TersorError when scale and codes do not fit each other."""
    import torch

    codes, scale = weight.codes, weight.scale.float()
    out, columns = codes.shape
    if scheme.strategy in ("tensor", "block"):
        rows, width = scheme.block or (out, columns)
        tiles = (-(-out // rows), -(-columns // width))
        if scale.numel() != tiles[0] * tiles[1] or (scale.dim() == 2 and tuple(scale.shape) != tiles):
            raise TersorError(
                f"scales {list(scale.shape)} do not fit a weight {[out, columns]} in tiles of {[rows, width]}",
                "the tensor is damaged",
            )

        def spread(values: Tensor) -> Tensor:
            values = values.float().reshape(tiles)
            return values.repeat_interleave(rows, 0)[:out].repeat_interleave(width, 1)[:, :columns]

        values = codes.float() if weight.zero_point is None else codes.float() - spread(weight.zero_point)
        return values.mul_(spread(scale))
    groups = scale.shape[1]
    if scale.shape[0] != out or (weight.group_index is None and columns % groups):
        raise TersorError(f"scales {list(scale.shape)} do not fit a weight {[out, columns]}", "the tensor is damaged")
    if weight.group_index is not None:
        index = weight.group_index.long()
        values = codes.float()
        if weight.zero_point is not None:
            values -= weight.zero_point.float()[:, index]
        return values * scale[:, index]
    values = codes.reshape(out, groups, columns // groups).to(torch.float32)
    if weight.zero_point is not None:
        values -= weight.zero_point.to(torch.float32)[:, :, None]
    return values.mul_(scale[:, :, None]).reshape(out, columns)


def patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names to put into a config: `re:` patterns over layer numbers where they hit `modules` only, else the names.

    `others` are the modules that a pattern must not hit.
    """
    wild = re.compile(r"(?<=\.)\d+(?=\.|$)")
    taken = {wild.sub("#", name) for name in others}
    found: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        found[wild.sub("#", name)].append(name)
    result = []
    for shape, names in found.items():
        if len(names) < 2 or shape in taken:
            result += sorted(names)
        else:
            result.append("re:^" + re.escape(shape).replace(r"\#", r"\d+").replace("#", r"\d+") + "$")
    return result


def checked_group_index(name: str, index: Tensor, columns: int, groups: int) -> Tensor:
    """The group of each column. Raises TersorError when it does not name a group for every column."""
    if tuple(index.shape) != (columns,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise TersorError(f"tensor {name!r} does not name groups 0 … {groups - 1}", "the checkpoint is damaged")
    return index


def is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def compiled(pattern: str) -> re.Pattern:
    """A pattern out of a config. Raises TersorError when it is none."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise TersorError(
            f"quantization_config: {pattern!r} is not a regular expression ({error})", "the config.json is damaged"
        ) from error


def need(read: Callable[[str], Tensor], names: Collection[str], name: str) -> Tensor:
    """A tensor that an encoding cannot do without. Raises TersorError naming it."""
    if name not in names:
        raise TersorError(f"tensor {name!r} is missing", "the checkpoint is incomplete")
    return read(name)

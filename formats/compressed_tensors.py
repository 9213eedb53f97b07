"""compressed-tensors, the format of llm-compressor and vLLM: pack-quantized, int-quantized and float-quantized.

https://github.com/vllm-project/compressed-tensors. 3-bit weights use the layout of releases ≥ 0.18 (dense across words);
older files packed ten to a word under the same name and are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from tersor.formats.encodings import (
    QuantizedWeight,
    SchemeMap,
    checked_group_index,
    compiled,
    is_extent,
    need,
    patterns,
)
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "0.19.0"  # of the format written; readers ignore it, but 3-bit layouts differ by it
FIRST_DENSE_3BIT = (0, 18)
SUFFIXES = (
    ".weight_packed", ".weight", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".input_scale",
    ".input_zero_point",
)  # fmt: skip
READ_FORMATS = ("float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized")
ACTIVATIONS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8-group": {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True,
    },
}  # fmt: skip


def format_of(scheme: Scheme) -> str:
    if scheme.kind == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def check(module: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Raises TersorError when `scheme` cannot be stored for `[out, in]` `shape`."""
    if scheme.kind == "int" and scheme.bits not in (2, 3, 4, 8):
        raise TersorError(f"{module}: {scheme.bits} bits", "compressed-tensors is written with 2, 3, 4 or 8 bits")
    if scheme.strategy == "group" and shape[1] % scheme.group_size:
        raise TersorError(
            f"{module}: {shape[1]} columns are not divisible by {scheme.group_size}",
            "choose a --group-size that divides them",
        )


def _scale_shape(shape: tuple[int, int], scheme: Scheme) -> tuple[int, ...]:
    if scheme.strategy == "tensor":
        return (1,)
    if scheme.strategy == "block":
        return -(-shape[0] // scheme.block[0]), -(-shape[1] // scheme.block[1])
    return shape[0], scheme.groups(shape[1])


def layout(
    module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that store a weight `[out, in]`: name -> (dtype, shape)."""
    out, columns = shape
    scale = _scale_shape(shape, scheme)
    if format_of(scheme) == "pack-quantized":
        tensors = {
            f"{module}.weight_packed": ("I32", (out, -(-columns * scheme.bits // 32))),
            f"{module}.weight_scale": (scale_dtype, scale),
            f"{module}.weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            tensors[f"{module}.weight_zero_point"] = ("I32", (-(-out * scheme.bits // 32), scale[1]))
        return tensors
    tensors = {
        f"{module}.weight": ("I8" if scheme.kind == "int" else "F8_E4M3", (out, columns)),
        f"{module}.weight_scale": (scale_dtype, scale),
    }
    if not scheme.symmetric:
        tensors[f"{module}.weight_zero_point"] = ("I8", scale)
    return tensors


def encode(module: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `layout`."""
    import torch
    from tersor.formats.packing import pack_rows

    if weight.group_index is not None:
        raise TersorError(
            f"{module}: its groups are not runs of columns (desc_act)", "go through dense: tersor convert --to dense"
        )
    if (weight.zero_point is None) != scheme.symmetric:
        raise TersorError(
            f"{module}: zero points that do not go with a {'' if scheme.symmetric else 'a'}symmetric scheme",
            "go through dense: tersor convert --to dense",
        )
    scale = weight.scale.contiguous()
    if format_of(scheme) != "pack-quantized":
        tensors = {f"{module}.weight": weight.codes.contiguous(), f"{module}.weight_scale": scale}
        if weight.zero_point is not None:
            tensors[f"{module}.weight_zero_point"] = weight.zero_point.contiguous()
        return tensors
    half = 2 ** (scheme.bits - 1)  # signed codes are stored from 0 on
    tensors = {
        f"{module}.weight_packed": pack_rows(weight.codes.view(torch.uint8), scheme.bits, half),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:  # packed along the rows of the weight
        zero_point = weight.zero_point.view(torch.uint8).T.contiguous()
        tensors[f"{module}.weight_zero_point"] = pack_rows(zero_point, scheme.bits, half).T.contiguous()
    return tensors


def _signed(codes: Tensor, bits: int) -> Tensor:
    import torch

    return (codes - 2 ** (bits - 1)).view(torch.int8)


def decode(module: str, read: Callable[[str], Tensor], names: Collection[str], scheme: Scheme) -> QuantizedWeight:
    """Codes and scales of a module. Raises TersorError when a tensor is missing or its shape is wrong."""
    import torch
    from tersor.formats.packing import unpack_rows

    scale = need(read, names, f"{module}.weight_scale")
    zero_name = f"{module}.weight_zero_point"
    if format_of(scheme) != "pack-quantized":
        codes = need(read, names, f"{module}.weight")
        dtype = torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
        if codes.dtype != dtype or codes.dim() != 2:
            raise TersorError(
                f"tensor '{module}.weight' is {codes.dtype} {list(codes.shape)}, expected {dtype} [out, in]",
                "the config.json does not belong to these weights",
            )
        _expect(f"{module}.weight_scale", scale, _scale_shape(tuple(codes.shape), scheme), scheme)
        zero_point = None
        if not scheme.symmetric:
            zero_point = need(read, names, zero_name)
            _expect(zero_name, zero_point, tuple(scale.shape))
        return QuantizedWeight(codes, scale, zero_point)
    packed = need(read, names, f"{module}.weight_packed")
    out, columns = _stored_shape(module, read, names)
    try:
        codes = _signed(unpack_rows(packed, scheme.bits, columns), scheme.bits)
    except TersorError as error:
        raise TersorError(f"{module}.weight_packed: {error}", error.hint) from error
    _expect(f"{module}.weight_packed", codes, (out, columns))
    _expect(f"{module}.weight_scale", scale, _scale_shape((out, columns), scheme), scheme)
    zero_point = None
    if not scheme.symmetric:
        try:
            rows = unpack_rows(need(read, names, zero_name).transpose(0, -1).contiguous(), scheme.bits, out)
        except TersorError as error:
            raise TersorError(f"{zero_name}: {error}", error.hint) from error
        zero_point = _signed(rows.T.contiguous(), scheme.bits)
        _expect(zero_name, zero_point, tuple(scale.shape))
    return QuantizedWeight(codes, scale, zero_point, _group_index(module, read, names, columns, scale.shape[-1]))


def _group_index(
    module: str, read: Callable[[str], Tensor], names: Collection[str], columns: int, groups: int
) -> Tensor | None:
    name = f"{module}.weight_g_idx"
    if name not in names:
        return None
    index = read(name)
    if bool((index == -1).any()):  # how the library marks one that was never set
        return None
    return checked_group_index(name, index, columns, groups)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], scheme: Scheme | None = None) -> None:
    found = tuple(tensor.shape)
    if scheme is not None and scheme.strategy == "tensor" and tensor.numel() == 1:
        return
    if found != tuple(shape):
        raise TersorError(
            f"tensor {name!r} has shape {list(found)}, expected {list(shape)}", "the checkpoint is damaged"
        )


def _stored_shape(module: str, read: Callable[[str], Tensor], names: Collection[str]) -> tuple[int, int]:
    values = need(read, names, f"{module}.weight_shape").flatten().tolist()
    if len(values) != 2 or not all(isinstance(value, int) and value > 0 for value in values):
        raise TersorError(
            f"tensor '{module}.weight_shape' holds {values}, expected [out, in]", "the checkpoint is damaged"
        )
    return values[0], values[1]


def dense_shape(module: str, infos: dict, scheme: Scheme, read: Callable[[str], Tensor]) -> tuple[tuple[int, int], str]:
    """Shape `[out, in]` of the weight and the dtype its scales are stored in."""
    if f"{module}.weight_scale" not in infos:
        raise TersorError(f"tensor '{module}.weight_scale' is missing", "the checkpoint is incomplete")
    dtype = infos[f"{module}.weight_scale"].dtype
    if f"{module}.weight_packed" in infos:
        return _stored_shape(module, read, infos), dtype
    if f"{module}.weight" not in infos:
        raise TersorError(f"tensor '{module}.weight' is missing", "the checkpoint is incomplete")
    shape = infos[f"{module}.weight"].shape
    if len(shape) != 2:
        raise TersorError(f"tensor '{module}.weight' has shape {list(shape)}, expected [out, in]", "it is damaged")
    return shape, dtype


def modules(names: Collection[str]) -> list[str]:
    """Quantized modules among tensor names, in order."""
    found = {}
    for name in names:
        for suffix in (".weight_packed", ".weight_scale"):
            if name.endswith(suffix):
                found[name.removesuffix(suffix)] = None
    return list(found)


def tensor_names(module: str, names: Collection[str]) -> list[str]:
    return [module + suffix for suffix in SUFFIXES if module + suffix in names]


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict:
    """The `quantization_config` of config.json: the most common scheme for every Linear, exceptions by name.

    Loaders prefer an exact name, then a pattern, then the class name. `ignore` names every linear layer that stays dense.
    """
    common = Counter(schemes.values()).most_common()
    groups = {}
    for number, (scheme, _) in enumerate(common):
        mine = [module for module, other in schemes.items() if other == scheme]
        rest = [module for module, other in schemes.items() if other != scheme]
        groups[f"group_{number}"] = _group(scheme, ["Linear"] if number == 0 else patterns(mine, [*rest, *ignore]))
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(dict.fromkeys(patterns(ignore, schemes))),
        "config_groups": groups,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict:
    weights = {
        "num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric, "strategy": scheme.strategy,
        "dynamic": False,
    }  # fmt: skip
    if scheme.strategy == "group":
        weights["group_size"] = scheme.group_size
    if scheme.strategy == "block":
        weights["block_structure"] = list(scheme.block)
    activations = None if scheme.activations is None else dict(ACTIVATIONS[scheme.activations])
    return {
        "targets": targets, "format": format_of(scheme), "weights": weights, "input_activations": activations,
        "output_activations": None,
    }  # fmt: skip


def scheme_map(config: dict) -> SchemeMap:
    """Module name -> Scheme, None for what stays dense; every module is taken to be a Linear.

    Raises TersorError for a config that is malformed or of a kind that is not read here.
    """
    settings = config["quantization_config"]
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise TersorError("quantization_config has no config_groups", "the config.json is damaged")
    if settings.get("format") not in READ_FORMATS:
        raise TersorError(
            f"compressed-tensors format {settings.get('format')!r} is not read here",
            f"read are {' '.join(READ_FORMATS)}",
        )
    ignore = _matcher(settings.get("ignore") or [])
    ranked = []  # an exact name wins over a pattern, a pattern over the class
    for name, group in groups.items():
        scheme, targets = _parse_group(name, group, settings), group["targets"]
        exact = [target for target in targets if target != "Linear" and not target.startswith("re:")]
        ranked.append((0, _matcher(exact), scheme))
        ranked.append((1, _matcher([target for target in targets if target.startswith("re:")]), scheme))
        if "Linear" in targets:
            ranked.append((2, lambda module: True, scheme))
    ranked.sort(key=lambda entry: entry[0])

    def scheme_of(module: str) -> Scheme | None:
        if ignore(module):
            return None
        return next((scheme for _, matches, scheme in ranked if matches(module)), None)

    return scheme_of


def _matcher(targets: object) -> Callable[[str], bool]:
    """Whether a module is among `targets`: names, and patterns that start with `re:`."""
    if not _are_strings(targets):
        raise TersorError(f"quantization_config: {targets!r} is not a list of modules", "the config.json is damaged")
    exact = {target for target in targets if not target.startswith("re:")}
    regexes = [compiled(target[3:]) for target in targets if target.startswith("re:")]
    return lambda module: module in exact or any(regex.match(module) for regex in regexes)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse_group(name: str, group: dict, settings: dict) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict) or not _are_strings(group.get("targets")):
        raise TersorError(f"quantization_config: group {name!r} lacks weights or targets", "the config.json is damaged")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    known = (kind == "int" and bits in (2, 3, 4, 8)) or (kind == "float" and bits == 8)
    if not known or not is_extent(bits) or strategy not in ("group", "channel", "tensor", "block"):
        raise TersorError(
            f"quantization_config: {kind} {bits} bit by {strategy} is not read here", "convert it with its own tool"
        )
    if kind == "int" and bits == 3 and _version(settings) < FIRST_DENSE_3BIT:
        raise TersorError(
            f"3-bit weights of compressed-tensors {settings.get('version')}: packed ten to a word",
            "quantize again; releases from 0.18 on pack densely",
        )
    inputs = group.get("input_activations") or {}
    if not isinstance(inputs, dict):
        raise TersorError(f"quantization_config: group {name!r} has input_activations {inputs!r}", "it is damaged")
    activations = None
    if inputs:
        activations = (
            "int8" if inputs.get("type") == "int" else "fp8-group" if inputs.get("strategy") == "group" else "fp8"
        )
    block = weights.get("block_structure")
    size = weights.get("group_size")
    strategy = "channel" if strategy == "group" and size == -1 else strategy
    if strategy == "group" and not is_extent(size):
        raise TersorError(f"quantization_config: group {name!r} has group_size {size!r}", "the config.json is damaged")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(map(is_extent, block))):
        raise TersorError(f"quantization_config: group {name!r} has block_structure {block!r}", "it is damaged")
    return Scheme(
        bits, kind, bool(weights.get("symmetric", True)), strategy, size if strategy == "group" else None,
        tuple(block) if strategy == "block" else None, activations,
    )  # fmt: skip


def _version(settings: dict) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(settings.get("version") or ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)

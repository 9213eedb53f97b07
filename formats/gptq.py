"""GPTQ v1, the format of AutoGPTQ and GPTQModel. v2 (`checkpoint_format: gptq_v2`) is read too.

qweight packs along the input, qzeros along the output. v1 stores each zero point minus one, modulo 2^bits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from tersor import __version__
from tersor.formats.encodings import QuantizedWeight, SchemeMap, need, patterns
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
STEP = 32


def check(module: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Raises TersorError when `scheme` cannot be stored for `[out, in]` `shape`."""
    if scheme.kind != "int" or scheme.activations is not None or scheme.bits not in (2, 3, 4, 8):
        raise TersorError(
            f"{module}: gptq stores integer weights of 2, 3, 4 or 8 bits, weights only",
            "use --format compressed-tensors",
        )
    if shape[0] % STEP or shape[1] % STEP:
        raise TersorError(
            f"{module}: gptq needs sides that are multiples of {STEP}, this one is {list(shape)}",
            "use --format compressed-tensors, or --exclude the layer",
        )
    if scheme.strategy not in ("group", "channel"):
        raise TersorError(f"{module}: gptq knows groups and whole rows only", "use --format compressed-tensors")
    if scheme.strategy == "group" and shape[1] % scheme.group_size:
        raise TersorError(
            f"{module}: {shape[1]} columns are not divisible by {scheme.group_size}",
            "choose a --group-size that divides them",
        )


def layout(
    module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that store a weight `[out, in]`: name -> (dtype, shape). Scales are fp16 whatever was asked for."""
    out, columns = shape
    groups = scheme.groups(columns)
    return {
        f"{module}.qweight": ("I32", (columns * scheme.bits // 32, out)),
        f"{module}.qzeros": ("I32", (groups, out * scheme.bits // 32)),
        f"{module}.scales": ("F16", (groups, out)),
        f"{module}.g_idx": ("I32", (columns,)),
    }


def encode(module: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `layout`. Raises TersorError when a scale does not fit fp16."""
    import torch
    from tersor.formats.packing import pack_rows

    half, levels = 2 ** (scheme.bits - 1), 2**scheme.bits
    scale = weight.scale.to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise TersorError(f"{module}: a scale is too large for fp16", "use --format compressed-tensors")
    columns, groups = weight.codes.shape[1], scale.shape[1]
    unsigned = (weight.codes.to(torch.int16) + half).to(torch.uint8)
    if weight.zero_point is None:
        zeros = torch.full_like(scale, half, dtype=torch.int16)
    else:
        zeros = weight.zero_point.to(torch.int16) + half
    index = weight.group_index
    if index is None:
        index = torch.arange(columns) // (columns // groups)
    return {
        f"{module}.qweight": pack_rows(unsigned, scheme.bits).T.contiguous(),
        f"{module}.qzeros": pack_rows(((zeros - 1) % levels).to(torch.uint8).T.contiguous(), scheme.bits),
        f"{module}.scales": scale.T.contiguous(),
        f"{module}.g_idx": index.to(torch.int32),
    }


def decode(module: str, read: Callable[[str], Tensor], names: Collection[str], scheme: Scheme) -> QuantizedWeight:
    """Codes and scales of a module. Raises TersorError when a tensor is missing or its shape is wrong."""
    import torch
    from tersor.formats.packing import unpack_rows

    half, levels = 2 ** (scheme.bits - 1), 2**scheme.bits
    packed = need(read, names, f"{module}.qweight")
    scale = need(read, names, f"{module}.scales").T.contiguous()
    out, columns = packed.shape[1], packed.shape[0] * 32 // scheme.bits
    if scale.shape[0] != out or columns % max(scale.shape[1], 1):
        raise TersorError(
            f"tensor '{module}.scales' has shape {list(scale.shape[::-1])}, which does not fit {columns} inputs and {out} outputs",
            "the checkpoint is damaged",
        )
    codes = (unpack_rows(packed.T.contiguous(), scheme.bits, columns).to(torch.int16) - half).to(torch.int8)
    try:
        zeros = unpack_rows(need(read, names, f"{module}.qzeros"), scheme.bits, out)
    except TersorError as error:
        raise TersorError(f"{module}.qzeros: {error}", error.hint) from error
    if zeros.shape[0] != scale.shape[1]:
        raise TersorError(
            f"tensor '{module}.qzeros' has {zeros.shape[0]} groups, the scales {scale.shape[1]}", "it is damaged"
        )
    zeros = (zeros.to(torch.int16).T + (0 if scheme.gptq_v2 else 1)) % levels - half
    zero_point = None if bool((zeros == 0).all()) and scheme.symmetric else zeros.to(torch.int8).contiguous()
    group_index = None
    if f"{module}.g_idx" in names:
        group_index = read(f"{module}.g_idx")
        if group_index.shape != (columns,) or int(group_index.min()) < 0 or int(group_index.max()) >= scale.shape[1]:
            raise TersorError(f"tensor '{module}.g_idx' does not name groups 0 … {scale.shape[1] - 1}", "it is damaged")
        if torch.equal(group_index.long(), torch.arange(columns) // (columns // scale.shape[1])):
            group_index = None
    return QuantizedWeight(codes, scale, zero_point, group_index)


def dense_shape(module: str, infos: dict, scheme: Scheme, read: Callable[[str], Tensor]) -> tuple[tuple[int, int], str]:
    """Shape `[out, in]` of the weight and the dtype its scales are stored in."""
    for suffix in (".qweight", ".scales"):
        if module + suffix not in infos or len(infos[module + suffix].shape) != 2:
            raise TersorError(f"tensor {module + suffix!r} is missing or not 2-D", "the checkpoint is incomplete")
    rows, out = infos[f"{module}.qweight"].shape
    return (out, rows * 32 // scheme.bits), infos[f"{module}.scales"].dtype


def modules(names: Collection[str]) -> list[str]:
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def tensor_names(module: str, names: Collection[str]) -> list[str]:
    return [module + suffix for suffix in SUFFIXES if module + suffix in names]


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict:
    """The `quantization_config` of config.json, also written as quantize_config.json.

    One scheme is the default; modules that differ and modules in a block that stay dense are `dynamic` rules.
    """
    default = Counter(schemes.values()).most_common(1)[0][0]
    dynamic: dict[str, dict] = {}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != default:
            mine = [module for module, other in schemes.items() if other == scheme]
            rest = [module for module, other in schemes.items() if other != scheme]
            settings = {"bits": scheme.bits, "group_size": _size(scheme), "sym": scheme.symmetric}
            dynamic |= {"+:" + _regex(pattern): settings for pattern in patterns(mine, [*rest, *ignore])}
    in_blocks = [module for module in ignore if re.search(r"\.\d+\.", module)]
    dynamic |= {"-:" + _regex(pattern): {} for pattern in patterns(in_blocks, schemes)}
    config = {
        "quant_method": "gptq", "bits": default.bits, "group_size": _size(default), "desc_act": False,
        "sym": default.symmetric, "lm_head": any(module.startswith("lm_head") for module in schemes),
        "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": [f"tersor:{__version__}"]},
    }  # fmt: skip
    return config | ({"dynamic": dynamic} if dynamic else {})


def _size(scheme: Scheme) -> int:
    return -1 if scheme.strategy == "channel" else scheme.group_size


def _regex(pattern: str) -> str:
    return pattern[3:] if pattern.startswith("re:") else "^" + re.escape(pattern) + "$"


def scheme_map(config: dict) -> SchemeMap:
    """Module name -> Scheme, None for what stays dense. Raises TersorError for a config that is malformed."""
    settings = config["quantization_config"]
    form = settings.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise TersorError(f"gptq checkpoint_format {form!r} is not read here", "read are gptq and gptq_v2")
    if settings.get("bits") not in (2, 3, 4, 8):
        raise TersorError(f"gptq with {settings.get('bits')} bits is not read here", "read are 2, 3, 4 and 8")
    dynamic = settings.get("dynamic") or {}

    def scheme_of(module: str) -> Scheme | None:
        found = dict(settings)
        for pattern, override in dynamic.items():
            regex = re.compile(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern)
            if regex.match(module):
                if pattern.startswith("-:"):
                    return None
                found |= override
                break
        if not re.search(r"\.\d+\.", module) and not found.get("lm_head"):
            return None
        size = found.get("group_size", 128)
        strategy = "channel" if size == -1 else "group"
        group_size = None if size == -1 else size
        symmetric = bool(found.get("sym", True))
        return Scheme(found["bits"], "int", symmetric, strategy, group_size, gptq_v2=form == "gptq_v2")

    return scheme_of

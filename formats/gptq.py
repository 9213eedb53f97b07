"""GPTQ v1, the format of AutoGPTQ and GPTQModel. v2 (`checkpoint_format: gptq_v2`) is read too.

qweight packs along the input, qzeros along the output. v1 stores each zero point less one, which leaves no way to store a
zero point of 0 (unsigned) that all readers agree on: GPTQModel adds the ones to whole words, so that a field of 2^bits - 1
carries into its neighbour, and vLLM reads it as 2^bits. It is therefore read as GPTQModel and AutoRound write it, and
never written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from tersor import __version__
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

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
STEP = 32
IN_BLOCK = re.compile(r"\.\d+\.")  # readers look for quantized modules in the numbered blocks, and at lm_head


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
    if not IN_BLOCK.search(module) and not _is_head(module):
        raise TersorError(
            f"{module}: gptq readers quantize the layers of numbered blocks and lm_head only",
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
    """The tensors of `layout`. Raises TersorError when a scale does not fit fp16, or a zero point the format."""
    import torch
    from tersor.formats.packing import pack_rows

    if weight.group_index is not None:  # readers take it from the config, which speaks for all modules at once
        raise TersorError(
            f"{module}: its groups are not runs of columns (desc_act)", "go through dense: tersor convert --to dense"
        )
    half = 2 ** (scheme.bits - 1)
    scale = weight.scale.to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise TersorError(f"{module}: a scale is too large for fp16", "use --format compressed-tensors")
    columns, groups = weight.codes.shape[1], scale.shape[1]
    unsigned = (weight.codes.to(torch.int16) + half).to(torch.uint8)
    if weight.zero_point is None:
        zeros = torch.full_like(scale, half, dtype=torch.int16)
    else:
        zeros = weight.zero_point.to(torch.int16) + half
        unsigned, zeros = _without_zero(module, unsigned, zeros, scheme.bits)
    index = torch.arange(columns) // (columns // groups)
    return {
        f"{module}.qweight": pack_rows(unsigned, scheme.bits).T.contiguous(),
        f"{module}.qzeros": pack_rows((zeros - 1).to(torch.uint8).T.contiguous(), scheme.bits),
        f"{module}.scales": scale.T.contiguous(),
        f"{module}.g_idx": index.to(torch.int32),
    }


def _without_zero(module: str, unsigned: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]` and zero points `[out, G]`, both one higher in the groups whose zero point is 0.

    That changes no weight. Raises TersorError when such a group uses the highest code, which has none above it.
    """
    import torch

    missing = zeros == 0
    if not bool(missing.any()):
        return unsigned, zeros
    out, groups = zeros.shape
    grouped = unsigned.reshape(out, groups, -1)
    if bool((grouped.amax(dim=2)[missing] == 2**bits - 1).any()):
        raise TersorError(
            f"{module}: a group without negative weights has zero point 0, which gptq cannot store",
            "quantize without --asymmetric, or use --format compressed-tensors",
        )
    return (grouped + missing[:, :, None].to(torch.uint8)).reshape(unsigned.shape), zeros + missing


def _ones(bits: int) -> int:
    """A word with a one in each of its fields."""
    return sum(1 << position for position in range(0, 32, bits))


def decode(module: str, read: Callable[[str], Tensor], names: Collection[str], scheme: Scheme) -> QuantizedWeight:
    """Codes and scales of a module. Raises TersorError when a tensor is missing or its shape is wrong."""
    import torch
    from tersor.formats.packing import unpack_rows

    half, levels = 2 ** (scheme.bits - 1), 2**scheme.bits
    packed = need(read, names, f"{module}.qweight")
    scales = need(read, names, f"{module}.scales")
    if packed.dim() != 2 or packed.shape[0] * 32 % scheme.bits:
        raise TersorError(
            f"tensor '{module}.qweight' has shape {list(packed.shape)}, no rows of {scheme.bits}-bit words",
            "the checkpoint is damaged",
        )
    out, columns = packed.shape[1], packed.shape[0] * 32 // scheme.bits
    if scales.dim() != 2 or scales.shape[1] != out or scales.shape[0] < 1 or columns % scales.shape[0]:
        raise TersorError(
            f"tensor '{module}.scales' has shape {list(scales.shape)}, which does not fit {columns} inputs and {out} outputs",
            "the checkpoint is damaged",
        )
    scale = scales.T.contiguous()
    try:
        codes = unpack_rows(packed.T.contiguous(), scheme.bits, columns)
    except TersorError as error:
        raise TersorError(f"{module}.qweight: {error}", error.hint) from error
    codes = (codes.to(torch.int16) - half).to(torch.int8)
    qzeros = need(read, names, f"{module}.qzeros")
    by_word = not scheme.gptq_v2 and scheme.bits != 3 and qzeros.dtype == torch.int32  # see the top of this file
    try:
        zeros = unpack_rows(qzeros + _ones(scheme.bits) if by_word else qzeros, scheme.bits, out)
    except TersorError as error:
        raise TersorError(f"{module}.qzeros: {error}", error.hint) from error
    if zeros.shape[0] != scale.shape[1]:
        raise TersorError(
            f"tensor '{module}.qzeros' has {zeros.shape[0]} groups, the scales {scale.shape[1]}", "it is damaged"
        )
    zeros = (zeros.to(torch.int16).T + int(not scheme.gptq_v2 and not by_word)) % levels - half
    if scheme.symmetric and not scheme.gptq_v2 and bool((zeros == 1).all()):
        zeros = torch.zeros_like(zeros)  # v2 that calls itself v1 (vllm#38966): a symmetric zero point is the middle
    zero_point = None if bool((zeros == 0).all()) and scheme.symmetric else zeros.to(torch.int8).contiguous()
    group_index = None
    if f"{module}.g_idx" in names:
        group_index = checked_group_index(f"{module}.g_idx", read(f"{module}.g_idx"), columns, scale.shape[1])
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
    in_blocks = [module for module in ignore if IN_BLOCK.search(module)]
    dynamic |= {"-:" + _regex(pattern): {} for pattern in patterns(in_blocks, schemes)}
    config = {
        "quant_method": "gptq", "bits": default.bits, "group_size": _size(default), "desc_act": False,
        "sym": default.symmetric, "lm_head": any(map(_is_head, schemes)),
        "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": [f"tersor:{__version__}"]},
    }  # fmt: skip
    return config | ({"dynamic": dynamic} if dynamic else {})


def _is_head(module: str) -> bool:
    return module.rsplit(".", 1)[-1] == "lm_head"


def _size(scheme: Scheme) -> int:
    return -1 if scheme.strategy == "channel" else scheme.group_size


def _regex(pattern: str) -> str:
    return pattern[3:] if pattern.startswith("re:") else "^" + re.escape(pattern) + "$"


def scheme_map(config: dict) -> SchemeMap:
    """Module name -> Scheme, None for what stays dense. Raises TersorError for a config that is malformed."""
    settings = config["quantization_config"]
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise TersorError(f"gptq checkpoint_format {form!r} is not read here", "read are gptq and gptq_v2")
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(override, dict) for override in dynamic.values()):
        raise TersorError("quantization_config: dynamic is not an object of objects", "the config.json is damaged")
    default = _scheme(settings, form)
    rules = [  # the first that matches counts
        (compiled(re.sub("^[+-]:", "", rule)), None if rule.startswith("-:") else _scheme(settings | override, form))
        for rule, override in dynamic.items()
    ]

    def scheme_of(module: str) -> Scheme | None:
        found = next((scheme for regex, scheme in rules if regex.match(module)), default)
        return found if IN_BLOCK.search(module) or settings.get("lm_head") else None

    return scheme_of


def _scheme(settings: dict, form: str) -> Scheme:
    bits, size = settings.get("bits"), settings.get("group_size", 128)
    if not is_extent(bits) or bits not in (2, 3, 4, 8):
        raise TersorError(f"gptq with {bits!r} bits is not read here", "read are 2, 3, 4 and 8")
    if size != -1 and not is_extent(size):
        raise TersorError(f"quantization_config: group_size {size!r}", "the config.json is damaged")
    symmetric, group_size = bool(settings.get("sym", True)), None if size == -1 else size
    strategy = "channel" if size == -1 else "group"
    return Scheme(bits, "int", symmetric, strategy, group_size, gptq_v2=form == "gptq_v2")

"""The weights of a checkpoint as its headers describe them: dense shape, bytes as stored, how they are encoded.

No torch: codes and scales are counted, not read. Quantized checkpoints of compressed-tensors, gptq, awq and fp8 (as
DeepSeek stores it) are understood, and weights stored as factors.
"""

from __future__ import annotations

import re
import struct
import sys
from math import prod
from typing import NamedTuple

from tersor.formats import encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import CONV1D_MODULES, is_transposed
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

SPARSE = " sparse"  # ends the label of what is packed
LABELS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
CONV1D = tuple(f"{module}.weight" for module in CONV1D_MODULES)
FP8_SCALES = (".weight_scale_inv", ".weight_scale", ".input_scale", ".activation_scale")


BLOCK = re.compile(r"(?:(.*?)\.)?([0-9]{1,9})\.(.+)")
EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


class Place(NamedTuple):
    """Where in the repeated blocks a tensor is: `model.layers`, 3, `mlp.experts.*.up_proj.weight` (`numbered`: of one expert)."""

    blocks: str
    index: int
    rest: str
    numbered: bool = False


def place_of(name: str) -> Place | None:
    """None outside numbered blocks."""
    found = BLOCK.match(name)
    if found is None:
        return None
    blocks, index, rest = found.groups()
    numbered = 0
    if "experts." in rest:
        rest, numbered = EXPERT.subn("*", rest)
    return Place(sys.intern(blocks or ""), int(index), sys.intern(rest), numbered > 0)


class Stored(NamedTuple):
    """One dense tensor. `shape` is `[out, in]` for linear layers, also where the file holds the transpose.

    `macs` are the multiply-accumulates of one input vector, fewer than the parameters for factors. `nbytes` counts
    everything that is stored for it: codes, scales, zero points. `label` is the storage in a word: bf16, int4, fp8.
    """

    shape: tuple[int, ...]
    params: int
    nbytes: int
    label: str
    scheme: Scheme | None = None
    macs: int = 0
    place: Place | None = None


def stored_weights(checkpoint: Checkpoint) -> dict[str, Stored]:
    """By the name that the dense tensor has. Raises TersorError for an encoding that is not read here."""
    config, tensors = checkpoint.config or {}, checkpoint.tensors
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    result: dict[str, Stored] = {}
    if method == "fp8":
        owned = _fp8(checkpoint, settings, result)
    elif method == "awq":
        owned = _awq(checkpoint, settings, result)
    else:
        owned = _encoded(checkpoint, result)
    owned |= _factors(checkpoint, result)
    for name, info in tensors.items():
        if name not in owned:
            shape = info.shape
            if len(shape) == 2 and name.endswith(CONV1D) and is_transposed(checkpoint, name):
                shape = shape[::-1]
            params = info.params
            label = LABELS.get(info.dtype, info.dtype.lower()) + (SPARSE if name in checkpoint.packed else "")
            result[name] = Stored(shape, params, info.nbytes, label, None, params, place_of(name))
    return result


def _encoded(checkpoint: Checkpoint, result: dict[str, Stored]) -> set[str]:
    """compressed-tensors and gptq. Returns the tensors that belong to an entry of `result`."""
    tensors = checkpoint.tensors
    encoding = encodings.detect(checkpoint.config, tensors)
    if encoding is None:
        return set()
    owned: set[str] = set()
    for module, scheme in encodings.schemes(encoding, checkpoint.config, tensors).items():
        names = encoding.tensor_names(module, tensors)
        owned.update(names)
        packed = tensors.get(f"{module}.weight_packed")
        if packed is None:
            shape, _ = encoding.dense_shape(module, tensors, scheme, None)
        else:
            shape = _unpacked(checkpoint, module, packed.shape, scheme)
        nbytes = sum(tensors[name].nbytes for name in names)
        label = f"{'fp' if scheme.kind == 'float' else 'int'}{scheme.bits}"
        label += SPARSE if any(name in checkpoint.packed for name in names) else ""
        result[f"{module}.weight"] = Stored(
            shape, prod(shape), nbytes, label, scheme, prod(shape), place_of(f"{module}.weight")
        )
    return owned


def _unpacked(checkpoint: Checkpoint, module: str, packed: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    """`[out, in]` of a packed weight: the two numbers of weight_shape, read only where the headers leave a doubt."""
    scale = checkpoint.tensors.get(f"{module}.weight_scale")
    if len(packed) != 2 or scale is None:
        raise TersorError(f"{module}: weight_packed is not 2-D or has no weight_scale", "the checkpoint is incomplete")
    if scheme.strategy == "group" and len(scale.shape) == 2:
        return packed[0], scale.shape[1] * scheme.group_size
    if 32 % scheme.bits == 0 and not (packed[1] * 32 // scheme.bits) % 32:
        return packed[0], packed[1] * 32 // scheme.bits
    info = checkpoint.tensors.get(f"{module}.weight_shape")
    if info is None or info.nbytes != 16:
        raise TersorError(f"tensor '{module}.weight_shape' is missing", "the checkpoint is incomplete")
    raw = bytearray(16)
    checkpoint.read_bytes(info.file, info.offset, memoryview(raw))
    return struct.unpack("<2q", raw)


def _fp8(checkpoint: Checkpoint, settings: dict, result: dict[str, Stored]) -> set[str]:
    """8-bit floats with `weight_scale_inv` beside them, in blocks or one for all, as DeepSeek and transformers do."""
    block = settings.get("weight_block_size")
    static = settings.get("activation_scheme") is None
    strategy, activations = ("block", "fp8-group") if block else ("tensor", "fp8")
    scheme = Scheme(8, "float", True, strategy, None, tuple(block) if block else None, None if static else activations)
    owned: set[str] = set()
    for name, info in checkpoint.tensors.items():
        if info.dtype.startswith("F8_E") and info.dtype != "F8_E8M0" and len(info.shape) >= 2:
            base = name.removesuffix(".weight")
            beside = [base + suffix for suffix in FP8_SCALES] if name.endswith(".weight") else [f"{name}_scale_inv"]
            names = [name, *(other for other in beside if other in checkpoint.tensors)]
            owned.update(names)
            nbytes = sum(checkpoint.tensors[other].nbytes for other in names)
            result[name] = Stored(info.shape, prod(info.shape), nbytes, "fp8", scheme, prod(info.shape), place_of(name))
    return owned


def _awq(checkpoint: Checkpoint, settings: dict, result: dict[str, Stored]) -> set[str]:
    """AWQ: `qweight` `[in, out / codes per word]`, `qzeros` and `scales` beside it."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    size = settings.get("group_size", settings.get("q_group_size", 128))
    if bits not in (2, 4, 8):
        raise TersorError(f"{checkpoint.path}: awq with {bits!r} bits is not read here", "read are 2, 4 and 8")
    whole_rows = not isinstance(size, int) or size < 1
    symmetric = not settings.get("zero_point", True)
    scheme = Scheme(bits, "int", symmetric, "channel" if whole_rows else "group", None if whole_rows else size)
    owned: set[str] = set()
    for name, info in checkpoint.tensors.items():
        if name.endswith(".qweight") and len(info.shape) == 2:
            module = name.removesuffix(".qweight")
            names = [module + suffix for suffix in (".qweight", ".qzeros", ".scales")]
            names = [other for other in names if other in checkpoint.tensors]
            owned.update(names)
            shape = info.shape[1] * 32 // bits, info.shape[0]
            nbytes = sum(checkpoint.tensors[other].nbytes for other in names)
            result[f"{module}.weight"] = Stored(
                shape, prod(shape), nbytes, f"int{bits}", scheme, prod(shape), place_of(f"{module}.weight")
            )
    return owned


def _factors(checkpoint: Checkpoint, result: dict[str, Stored]) -> set[str]:
    """Weights stored as factors: a product of two matrices, or a sum of Kronecker products."""
    owned: set[str] = set()
    for factors in low_rank.detect(checkpoint).values():
        owned.update(factors.names)
        if factors.grid is None:
            macs = factors.params
        else:  # (B ⊗ C) x is B X Cᵀ, with x as a matrix X [n1, n2]; the cheaper order of the two
            (out, inputs), (rows, columns) = factors.shape, factors.grid
            high, wide = out // rows, inputs // columns
            macs = factors.count * min(
                columns * wide * high + rows * columns * high, rows * columns * wide + rows * wide * high
            )
        label = LABELS.get(factors.dtype, factors.dtype.lower())
        result[factors.name] = Stored(
            factors.shape, factors.params, factors.nbytes, label, None, macs, place_of(factors.name)
        )
    return owned

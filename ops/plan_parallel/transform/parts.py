"""The stored tensors of one weight, and how a dimension of the weight lies in each: codes, scales, zero points, factors.

A cut of the weight `[out, in]` is carried over to everything stored for it, so that a packed word, a group that shares a
scale and a tile that shares a scale are never cut.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from math import gcd
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tersor.formats import low_rank
from tersor.formats.conv1d import is_transposed
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.ops.model.stored import FP8_SCALES, Stored
from tersor.ops.plan_parallel.model import PlanModel

OUT, IN = 0, 1


class Along(NamedTuple):
    """Dimension `dim` of a stored tensor has `words` numbers for every `granule` numbers of the weight's dimension."""

    dim: int
    granule: int = 1
    words: int = 1

    def place(self, number: int) -> int:
        return -(-number * self.words // self.granule)

    def fits(self, number: int) -> bool:
        return number % self.granule == 0


TURNED = {OUT: Along(1), IN: Along(0)}  # GPT-2's Conv1D


@cache
def _as_it_is(dimensions: int) -> dict[int, Along]:
    return {dim: Along(dim) for dim in range(dimensions)}


class Part(NamedTuple):
    """One stored tensor. `axes`: dimension of the weight -> how it lies here; a dimension that is missing is not in it."""

    name: str
    axes: dict[int, Along]


_KNOWN: WeakKeyDictionary[PlanModel, dict[str, tuple[Part, ...]]] = WeakKeyDictionary()


def parts_of(model: PlanModel) -> dict[str, tuple[Part, ...]]:
    """Every weight of `model.stored` -> the tensors of the file that hold it; each stored tensor belongs to one weight."""
    if model not in _KNOWN:
        _KNOWN[model] = _parts(model)
    return _KNOWN[model]


def _parts(model: PlanModel) -> dict[str, tuple[Part, ...]]:
    tensors, settings = model.checkpoint.tensors, (model.checkpoint.config or {}).get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    factors = {found.name: found for found in low_rank.detect(model.checkpoint).values()}
    result = {}
    for name, weight in model.stored.items():
        if name in factors:
            result[name] = _of_factors(factors[name])
        elif weight.scheme is not None:
            result[name] = tuple(
                Part(stored, axes)
                for stored, axes in _quantized(name, weight, settings, tensors).items()
                if stored in tensors
            )
        else:
            flipped = len(weight.shape) == 2 and is_transposed(model.checkpoint, name)
            axes = TURNED if flipped else _as_it_is(len(weight.shape))
            if name in model.checkpoint.packed and len(weight.shape) == 2:
                axes = _of_tiles(axes, model.checkpoint.packed[name])
            result[name] = (Part(name, axes),)
    return result


def _of_tiles(axes: dict[int, Along], packed: Packed) -> dict[int, Along]:
    """Where zeros are left out by tiles, or two of four columns, these stay together."""
    rows, columns = packed.tile or (1, 4 if packed.format == "sparse-24-bitmask" else 1)
    return {OUT: Along(axes[OUT].dim, rows, rows), IN: Along(axes[IN].dim, columns, columns)}


def _of_factors(found: low_rank.Factors) -> tuple[Part, ...]:
    """W = A B: the outputs are rows of A, the inputs columns of B. B (x) C: rows of B are runs of rows of W, as many as C has."""
    first, second = found.names
    if found.grid is None:
        return Part(first, {OUT: Along(0)}), Part(second, {IN: Along(1)})
    rows, columns = found.grid
    axes = {OUT: Along(1, found.shape[0] // rows), IN: Along(2, found.shape[1] // columns)}
    return Part(first, axes), Part(second, {})


def _packed(bits: int) -> tuple[int, int]:
    """(codes, int32 words) of the shortest run of codes that ends with a word."""
    shared = gcd(bits, 32)
    return 32 // shared, bits // shared


def _quantized(name: str, weight: Stored, settings: dict, tensors: Collection[str]) -> dict[str, dict[int, Along]]:
    """Of the names that the encodings know, those that are missing in a checkpoint included."""
    scheme, module = weight.scheme, name.removesuffix(".weight")
    method = settings.get("quant_method")
    if method == "gptq":
        return _gptq(module, scheme, bool(settings.get("desc_act")))
    if method == "awq":
        codes, words = _packed(scheme.bits)
        columns = Along(1, codes, words)
        groups = {IN: Along(0, scheme.group_size)} if scheme.strategy == "group" else {}
        return {
            f"{module}.qweight": {IN: Along(0), OUT: columns},
            f"{module}.qzeros": {OUT: columns} | groups,
            f"{module}.scales": {OUT: Along(1)} | groups,
        }
    if method == "fp8":
        plain = _as_it_is(len(weight.shape))
        scales = _scales(scheme, len(weight.shape))
        beside = {module + suffix: scales for suffix in FP8_SCALES[:2]} if name.endswith(".weight") else {}
        return {
            name: plain,
            f"{name}_scale_inv": scales,
            **beside,
            **{module + suffix: {} for suffix in FP8_SCALES[2:]},
        }
    return _compressed_tensors(module, scheme, tensors)


def _scales(scheme: Scheme, dimensions: int = 2) -> dict[int, Along]:
    """Scales `[out, groups]`, `[out, 1]`, `[1]`, or one per tile of the last two dimensions."""
    if scheme.strategy == "tensor":
        return {}
    if scheme.strategy == "block":
        before = dimensions - 2
        rows, columns = scheme.block
        leading = {dim: Along(dim) for dim in range(before)}
        return leading | {before + OUT: Along(before, rows), before + IN: Along(before + 1, columns)}
    grouped = {IN: Along(1, scheme.group_size)} if scheme.strategy == "group" else {}
    return {OUT: Along(0)} | grouped


def _compressed_tensors(module: str, scheme: Scheme, tensors: Collection[str]) -> dict[str, dict[int, Along]]:
    """Packed zero points lie along the rows of the weight. Groups listed column by column may be anywhere, see `_gptq`."""
    codes, words = _packed(scheme.bits)
    scales = _scales(scheme)
    if f"{module}.weight_g_idx" in tensors:
        scales.pop(IN, None)
    packed = f"{module}.weight_packed" in tensors
    zeros = scales | ({OUT: Along(0, codes, words)} if packed and scheme.strategy != "tensor" else {})
    return {
        f"{module}.weight_packed": {OUT: Along(0), IN: Along(1, codes, words)},
        f"{module}.weight": {OUT: Along(0), IN: Along(1)},
        f"{module}.weight_scale": scales,
        f"{module}.weight_zero_point": zeros,
        f"{module}.weight_shape": {},
        f"{module}.weight_g_idx": {IN: Along(0)},
        f"{module}.input_scale": {},
        f"{module}.input_zero_point": {},
    }


def _gptq(module: str, scheme: Scheme, any_order: bool) -> dict[str, dict[int, Along]]:
    """Everything transposed. With desc_act a column's group may be anywhere, so that inputs can be cut but scales cannot."""
    codes, words = _packed(scheme.bits)
    groups = {IN: Along(0, scheme.group_size)} if scheme.strategy == "group" and not any_order else {}
    return {
        f"{module}.qweight": {IN: Along(0, codes, words), OUT: Along(1)},
        f"{module}.qzeros": {OUT: Along(1, codes, words)} | groups,
        f"{module}.scales": {OUT: Along(1)} | groups,
        f"{module}.g_idx": {IN: Along(0)},
    }

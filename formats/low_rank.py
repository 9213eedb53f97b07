"""Weights stored as factors: the tensors, `lowrank.json` that says what they stand for, and the way back.

Two kinds, both of a weight W `[out, in]`, in W's own dtype; biases stay as they are:

- `low_rank`: W = A B. `<module>.lr_a` `[out, rank]`, `<module>.lr_b` `[rank, in]`.
- `kronecker`: W = sum_k B_k (x) C_k. `<module>.kron_b` `[terms, m1, n1]`, `<module>.kron_c` `[terms, m2, n2]`, with
  m1 m2 = out and n1 n2 = in.

`lowrank.json` is `{"schema": "tersor.lowrank/1", "modules": {module: entry}}`, where an entry is kind, `rank` or `terms`,
`shape` [out, in], `dtype`, and `transposed`: whether the dense tensor `<module>.weight` is stored as [in, out] (GPT-2's
Conv1D). Nothing in it is believed before the tensors themselves have confirmed it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.described import damaged as damaged_file
from tersor.formats.described import read_entries
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES, TORCH_DTYPES, tensor_bytes
from tersor.formats.writer import Layout

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "tersor.lowrank/1"
FILE_NAME = "lowrank.json"
SUFFIXES = {"low_rank": (".lr_a", ".lr_b"), "kronecker": (".kron_b", ".kron_c")}
COUNT_KEY = {"low_rank": "rank", "kronecker": "terms"}
ALL_SUFFIXES = tuple(suffix for pair in SUFFIXES.values() for suffix in pair)


@dataclass(frozen=True)
class Factors:
    """How one weight `[out, in]` is stored. `count` is the rank or the number of terms, `grid` (m1, n1) of a Kronecker sum."""

    module: str
    kind: str
    count: int
    shape: tuple[int, int]
    dtype: str
    transposed: bool = False
    grid: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The dense tensor they stand for."""
        return f"{self.module}.weight"

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the dense tensor in a file."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def names(self) -> tuple[str, str]:
        first, second = SUFFIXES[self.kind]
        return f"{self.module}{first}", f"{self.module}{second}"

    @property
    def layout(self) -> Layout:
        (out, inputs), count = self.shape, self.count
        if self.grid is None:
            shapes: tuple[tuple[int, ...], ...] = (out, count), (count, inputs)
        else:
            rows, columns = self.grid
            shapes = (count, rows, columns), (count, out // rows, inputs // columns)
        return {name: (self.dtype, shape) for name, shape in zip(self.names, shapes, strict=True)}

    @property
    def params(self) -> int:
        return sum(prod(shape) for _, shape in self.layout.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.layout.values())


def description(all_factors: Iterable[Factors]) -> dict:
    """The content of `lowrank.json`."""
    return {
        "schema": SCHEMA,
        "modules": {
            factors.module: {
                "kind": factors.kind,
                COUNT_KEY[factors.kind]: factors.count,
                "shape": list(factors.shape),
                "dtype": factors.dtype,
                "transposed": factors.transposed,
            }
            for factors in all_factors
        },
    }


def encode(factors: Factors, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Both factors in the stored dtype, by tensor name."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES[factors.dtype])
    return {name: tensor.to(dtype) for name, tensor in zip(factors.names, (first, second), strict=True)}


def decode(factors: Factors, read: Callable[[str], Tensor]) -> Tensor:
    """The weight they stand for, float32 `[out, in]`. `read` gives a stored tensor by its name."""
    first, second = (read(name).float() for name in factors.names)
    return first @ second if factors.grid is None else kronecker_sum(first, second)


def kronecker_sum(first: Tensor, second: Tensor) -> Tensor:
    """sum_k B_k (x) C_k `[m1 m2, n1 n2]` of B `[terms, m1, n1]` and C `[terms, m2, n2]`."""
    terms, m1, n1 = first.shape
    _, m2, n2 = second.shape
    products = first.reshape(terms, -1).T @ second.reshape(terms, -1)  # [m1 n1, m2 n2]
    return products.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)


def detect(checkpoint: Checkpoint) -> dict[str, Factors]:
    """Every module of `checkpoint` that is stored as factors, by module name; none for a dense one.

    Raises TersorError when factors and `lowrank.json` do not fit each other.
    """
    found = [name for name in checkpoint.tensors if name.endswith(ALL_SUFFIXES)]
    lacking = "is a factor, but there is no {file} that says of what"
    modules = read_entries(checkpoint.path / FILE_NAME, SCHEMA, "modules", found, lacking)
    result = {module: _factors(checkpoint, module, entry) for module, entry in modules.items()}
    owned = {name for factors in result.values() for name in factors.names}
    for name in found:
        if name not in owned:
            raise damaged_file(checkpoint.path / FILE_NAME, f"it does not list the module of tensor {name!r}")
    return result


def refuse(checkpoint: Checkpoint, why: str) -> None:
    """Raises TersorError for a checkpoint with factors, saying how to get dense weights."""
    modules = detect(checkpoint)
    if modules:
        raise TersorError(
            f"{checkpoint.path}: {len(modules)} layers are stored as factors, for example {next(iter(modules))!r}; {why}",
            "fold them back first: tersor convert MODEL --to dense -o DENSE",
        )


def _factors(checkpoint: Checkpoint, module: str, entry: object) -> Factors:
    """One entry, checked against the tensors it speaks of."""

    def damaged(what: str) -> TersorError:
        return damaged_file(checkpoint.path / FILE_NAME, f"module {module!r}: {what}")

    if not isinstance(entry, dict) or entry.get("kind") not in tuple(SUFFIXES):
        raise damaged(f"kind is not {' or '.join(SUFFIXES)}")
    kind = entry["kind"]
    for key in (COUNT_KEY[kind], "shape", "dtype", "transposed"):
        if key not in entry:
            raise damaged(f"key {key!r} is missing")
    count, shape, dtype, transposed = (entry[key] for key in (COUNT_KEY[kind], "shape", "dtype", "transposed"))
    if not _is_extent(count) or not isinstance(transposed, bool) or dtype not in tuple(FLOAT_DTYPES):
        raise damaged(f"{COUNT_KEY[kind]} {count!r}, dtype {dtype!r}, transposed {transposed!r} cannot be")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_extent, shape)):
        raise damaged(f"shape {shape!r} is not [out, in]")
    factors = Factors(module, kind, count, tuple(shape), dtype, transposed, _grid(checkpoint.tensors, module, kind))
    if factors.grid is not None and (shape[0] % factors.grid[0] or shape[1] % factors.grid[1]):
        raise damaged(f"shape {shape} is no multiple of {list(factors.grid)}, the shape of its first factors")
    for name, (stored, extents) in factors.layout.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise damaged(f"tensor {name!r} is missing")
        if (info.dtype, info.shape) != (stored, extents):
            raise damaged(f"tensor {name!r} is {info.dtype} {list(info.shape)}, expected {stored} {list(extents)}")
    if factors.name in checkpoint.tensors:
        raise damaged(f"tensor {factors.name!r} is there as well, dense")
    if checkpoint.config is not None and transposed != is_transposed(checkpoint, factors.name):
        raise damaged(f"transposed is {transposed}, which does not fit the model of config.json")
    return factors


def _grid(tensors: Collection, module: str, kind: str) -> tuple[int, int] | None:
    """(m1, n1) as the first Kronecker factor has it; (1, 1), which no tensor will confirm, where that is missing."""
    if kind != "kronecker":
        return None
    info = tensors.get(module + SUFFIXES[kind][0])
    return tuple(max(extent, 1) for extent in info.shape[1:]) if info is not None and len(info.shape) == 3 else (1, 1)


def _is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

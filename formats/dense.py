"""A checkpoint seen as dense weights, whatever encoding it is stored in.

Readers that want weights (a forward pass, `convert --to dense`, `verify`) ask this view for `X.weight` and get it, decoded
from codes and scales where the checkpoint is quantized, multiplied out where it is stored as factors. Decoded weights are
float32: the product of an integer and a bf16 or fp16 scale is exact there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tersor.formats import encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

if TYPE_CHECKING:
    import torch


CODES = (".weight_packed", ".weight", ".qweight")


class DenseTensor(NamedTuple):
    """One dense tensor, and how it is stored: as codes of `scheme`, as `factors`, or as it is."""

    dtype: str
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    module: str | None = None
    transposed: bool = False
    factors: low_rank.Factors | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the file holds this very tensor."""
        return self.scheme is None and self.factors is None

    @property
    def storage(self) -> str:
        """In a word, for reports: int4, float8, or the dtype."""
        return self.dtype if self.scheme is None else f"{self.scheme.kind}{self.scheme.bits}"


class DenseView:
    """The dense tensors of `checkpoint`, by the names they had before they were quantized or factorised."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises TersorError for a quantization_config of a kind that is not read here, or damaged factors."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.encoding = encodings.detect(checkpoint.config, checkpoint.tensors)
        self.tensors: dict[str, DenseTensor] = {}
        schemes: dict[str, Scheme] = {}
        owner: dict[str, str] = {}  # stored tensor -> quantized module
        if self.encoding is not None:
            schemes = encodings.schemes(self.encoding, checkpoint.config, checkpoint.tensors)
            owner = {
                name: module for module in schemes for name in self.encoding.tensor_names(module, checkpoint.tensors)
            }
        factorised = low_rank.detect(checkpoint)
        if factorised and self.encoding is not None:
            raise TersorError(f"{checkpoint.path}: holds both codes and factors", "no command writes such a folder")
        factors_of = {name: factors for factors in factorised.values() for name in factors.names}
        for name, info in checkpoint.tensors.items():
            module = owner.get(name)
            if name in factors_of:
                found = factors_of[name]
                entry = DenseTensor(found.dtype, found.stored_shape, None, found.module, found.transposed, found)
                self.tensors.setdefault(found.name, entry)
            elif module is None:
                self.tensors[name] = DenseTensor(info.dtype, info.shape)
            elif f"{module}.weight" not in self.tensors:
                shape, dtype = self.encoding.dense_shape(module, checkpoint.tensors, schemes[module], checkpoint.read)
                transposed = is_transposed(checkpoint, f"{module}.weight")
                shape = shape[::-1] if transposed else shape
                self.tensors[f"{module}.weight"] = DenseTensor(dtype, shape, schemes[module], module, transposed)

    @property
    def is_quantized(self) -> bool:
        return self.encoding is not None

    @property
    def is_factorised(self) -> bool:
        return any(entry.factors is not None for entry in self.tensors.values())

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The tensors of the file that hold dense tensor `name`."""
        entry = self.tensors[name]
        if entry.factors is not None:
            return entry.factors.names
        if entry.scheme is None:
            return (name,)
        return tuple(self.encoding.tensor_names(entry.module, self.checkpoint.tensors))

    def codes_name(self, name: str) -> str:
        """The tensor of the file with the codes of quantized tensor `name`."""
        return next(part for part in self.stored_names(name) if part.endswith(CODES))

    def codes(self, module: str) -> encodings.QuantizedWeight:
        """Codes, scales and zero points of a quantized module, `[out, in]`."""
        entry = self.tensors[f"{module}.weight"]
        return self.encoding.decode(module, self.checkpoint.read, set(self.checkpoint.tensors), entry.scheme)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype, or in float32 when it had to be decoded."""
        entry = self.tensors.get(name)
        if entry is None or entry.is_stored:
            return self.checkpoint.read(name)
        if entry.factors is not None:
            weight = low_rank.decode(entry.factors, self.checkpoint.read)
        else:
            weight = encodings.dequantize(self.codes(entry.module), entry.scheme)
        return weight.T.contiguous() if entry.transposed else weight

    def map(self, name: str) -> torch.Tensor:
        """Like `read`, but backed by the file where that is possible."""
        entry = self.tensors.get(name)
        return self.checkpoint.map(name) if entry is None or entry.is_stored else self.read(name)

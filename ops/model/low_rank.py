"""Running a checkpoint whose weights are stored as factors (`tersor prune --remove ranks`): the layers, and the way to load.

    from tersor.ops.model.low_rank import load_low_rank
    model = load_low_rank("pruned")

gives the transformers model of config.json with a `LowRankLinear` (two stacked linears) or a `KroneckerLinear` in place of
each factorised layer. Its outputs are those of the folded-back checkpoint (`tersor convert --to dense`) up to the rounding
of the products to the stored dtype. Experts that transformers fuses into one tensor are folded back while they are
loaded: its kernels for fused experts know dense weights only.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.low_rank import Factors, kronecker_sum
from tersor.ops.model.skeleton import map_names
from torch import nn

IN_BLOCK = re.compile(r"\.\d+\.")


class LowRankLinear(nn.Module):
    """y = A (B x) + bias, with A `[out, rank]` and B `[rank, in]`: two stacked linears without anything in between."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.lr_a, self.lr_b = nn.Parameter(a), nn.Parameter(b)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def in_features(self) -> int:
        return self.lr_b.shape[1]

    @property
    def out_features(self) -> int:
        return self.lr_a.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The product `[out, in]`, for code that looks at it; made anew each time."""
        return self.lr_a @ self.lr_b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        return nn.functional.linear(nn.functional.linear(x, self.lr_b), self.lr_a, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.lr_b)}"


class KroneckerLinear(nn.Module):
    """y = sum_k (B_k (x) C_k) x + bias, with B `[terms, m1, n1]` and C `[terms, m2, n2]`, never multiplied out.

    For x as a matrix X `[n1, n2]` each term is B_k X C_k^T.
    """

    def __init__(self, b: torch.Tensor, c: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.kron_b, self.kron_c = nn.Parameter(b), nn.Parameter(c)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def in_features(self) -> int:
        return self.kron_b.shape[2] * self.kron_c.shape[2]

    @property
    def out_features(self) -> int:
        return self.kron_b.shape[1] * self.kron_c.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """The sum `[out, in]`, for code that looks at it; made anew each time."""
        return kronecker_sum(self.kron_b, self.kron_c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        terms, m1, n1 = self.kron_b.shape
        _, m2, n2 = self.kron_c.shape
        inner = x.reshape(-1, n1, n2) @ self.kron_c.reshape(terms * m2, n2).T  # [tokens, n1, terms m2]
        inner = inner.reshape(-1, n1, terms, m2).transpose(1, 2).reshape(-1, terms * n1, m2)
        outer = self.kron_b.transpose(0, 1).reshape(m1, terms * n1)
        y = (outer @ inner).reshape(*x.shape[:-1], m1 * m2)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, terms={len(self.kron_b)}"


def load_low_rank(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a checkpoint folder with factors, in evaluation mode, on the CPU.

    `dtype` is that of the parameters, the one of config.json where it is None. A checkpoint without factors loads as well.
    Raises TersorError when the folder is damaged, or transformers has no model for it.
    """
    checkpoint = Checkpoint(path)
    config_dict = checkpoint.require_config("which says what model this is")
    view = DenseView(checkpoint)
    if view.is_quantized:
        raise TersorError(f"{path}: is quantized", "load it with transformers' from_pretrained")
    model = _load_dense(path, config_dict, view, dtype)
    sources = map_names(model, view)
    for name, entry in view.tensors.items():
        if entry.factors is None or name not in sources or sources[name].expert is not None:
            continue
        module_path = sources[name].parameter.removesuffix(".weight")
        model.set_submodule(module_path, _layer(checkpoint, entry.factors, model.get_submodule(module_path)))
    return model


def _load_dense(path: str | Path, config_dict: dict, view: DenseView, dtype: torch.dtype | None) -> nn.Module:
    """transformers' own loading, with weights in place of the factors; they are dropped when their layers are replaced."""
    import transformers

    class_ = getattr(transformers, (config_dict.get("architectures") or ["AutoModel"])[0], transformers.AutoModel)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        dtype = dtype or config.dtype or torch.float32
        state = {
            name: view.read(name) if entry.is_stored else view.read(name).to(dtype)
            for name, entry in view.tensors.items()
        }
        model, info = class_.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TersorError(
            f"{path}: transformers cannot load this model ({str(error).splitlines()[0][:160]})",
            "update transformers, or fold the factors back: tersor convert --to dense",
        ) from error
    unused = [name for name in sorted(info["unexpected_keys"]) if name in view.tensors and view.tensors[name].factors]
    missing = [name for name in sorted(info["missing_keys"]) if IN_BLOCK.search(name)]  # a head may be missing
    if unused or missing:
        what = f"weight {unused[0]!r} has no place in" if unused else f"tensor {missing[0]!r} is missing for"
        raise TersorError(f"{path}: {what} a {type(model).__name__}", "the checkpoint does not fit its config.json")
    return model.eval()


def _layer(checkpoint: Checkpoint, factors: Factors, dense: nn.Module) -> nn.Module:
    """What takes the place of a linear layer (or a Conv1D, whose weight is transposed but whose function is the same)."""
    first, second = (checkpoint.read(name).to(dense.weight.dtype) for name in factors.names)
    kind = LowRankLinear if factors.grid is None else KroneckerLinear
    return kind(first, second, None if dense.bias is None else dense.bias.detach()).train(dense.training)

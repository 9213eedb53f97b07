"""How a model makes logits of its last hidden states: found out by running it, not looked up.

The head is the module that transformers calls the output embeddings; what it reads are the final hidden states. What the
model does to its output (a factor in Cohere and Granite, a soft cap in Gemma 2) is seen by handing the model's own forward
pass an output of the head that was made up, with everything before the head replaced by what it gave for a probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.skeleton import is_linear, weight_matrix
from torch import Tensor, nn

PROBE_TOKENS, FIRST_TOKEN = 3, 5
PROBE_LOGITS = 60.0  # as large as logits get, so that a soft cap shows


@dataclass
class Head:
    """Logits are `after(module(x))`, which is `scale * module(x)` where `scale` is not None.

    `linear`: module(x) is x weight^T + bias. Weight and bias are read anew each time, as gradients should reach whatever
    they are made of (factors, quantized weights).
    """

    module: nn.Module
    linear: bool = True
    scale: float | None = 1.0
    after: Callable[[Tensor], Tensor] | None = None

    @property
    def direct(self) -> bool:
        """Whether logits are a product of weight and hidden states, and a factor: what the fused kernel knows."""
        return self.linear and self.scale is not None

    @property
    def weight(self) -> Tensor:
        """`[V, H]` as the module multiplies with it, which need not be the parameter of that name."""
        return effective_weight(self.module)

    @property
    def rows(self) -> int:
        """Length of the vocabulary, of a linear head."""
        return getattr(self.module, "out_features", None) or len(self.weight)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def logits(self, x: Tensor) -> Tensor:
        """`[n, V]` of hidden states `[n, H]`, the way the model makes them."""
        stored = self.linear and not hasattr(self.module, "dense") and not torch.is_autocast_enabled(x.device.type)
        if stored and x.dtype != (weight := self.weight).dtype:  # a table in the dtype of its file
            bias = None if self.bias is None else self.bias.to(x.dtype)
            raw = nn.functional.linear(x, weight.to(x.dtype), bias)
        else:
            raw = self.module(x)
        return raw * self.scale if self.scale is not None else self.after(raw)

    def describe(self) -> str | None:
        """Why the fused kernel cannot do it, for the report; None where it can."""
        if self.direct:
            return None
        what = "is not a plain product" if not self.linear else "is followed by more than a factor"
        return f"the output head {what}: its logits are made in chunks by the model's own code"


def effective_weight(module: nn.Module) -> Tensor:
    """`[out, in]` of a linear layer in any form. Layers that make it of something else have `dense(dtype)` for it."""
    if hasattr(module, "dense"):
        return module.dense(getattr(module, "dtype", torch.float32))
    return weight_matrix(module) if is_linear(module) else module.weight


class _Table(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = (
            None if tensor is None else nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def plain_head(weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Head:
    """Of a table `[V, H]` that is not trained."""
    return Head(_Table(weight, bias), scale=scale)


def read_head(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Head:
    """The head of a transformers model with logits. `inputs`: of a probe; a few tokens where left out.

    Raises TersorError for a model without logits, or whose logits depend on more than the head's output.
    """
    module = _module(model)
    if inputs is None:
        tokens = torch.arange(FIRST_TOKEN, FIRST_TOKEN + PROBE_TOKENS) % model.get_input_embeddings().weight.shape[0]
        inputs = {"input_ids": tokens[None].to(model.get_input_embeddings().weight.device)}
    with torch.no_grad():
        before, raw, logits = _trace(model, module, inputs)
        head = Head(module, linear=_is_product(module))
        head.after = lambda values: _after(model, module, inputs, before, values)
        generator = torch.Generator().manual_seed(0)
        made_up = torch.randn(raw.shape, generator=generator).to(raw) * PROBE_LOGITS / 3
        seen, other = head.after(made_up), {key: value.roll(1, -1) for key, value in inputs.items()}
        head.scale = _factor(made_up, seen)
        _, raw, logits = _trace(model, module, other)
        own = head.after(raw)
    if own.shape != logits.shape or not _close(own, logits):
        raise TersorError(
            f"{type(model).__name__}: its logits depend on more than the output of {type(module).__name__}, its head",
            "use --loss hidden or attention, which look at no logits",
        )
    return head


def final_states(model: nn.Module, head: Head, **inputs: Tensor) -> Tensor:
    """What the head reads, `[B, T, H]`: a forward pass of the model that makes no logits."""
    states: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        states.append(x)
        return x[..., :1].detach()

    with _replaced({head.module: note}):
        model(**inputs)
    return states[-1]


def _module(model: nn.Module) -> nn.Module:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise TersorError(
            f"{type(model).__name__} has no output head, so there are no logits to compare",
            "use --loss hidden or attention for an encoder without one",
        )
    return module


def _trace(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]):
    """One run: (outputs of the outermost modules that were done before the head, its output `[n, V]`, logits `[n, V]`)."""
    done: dict[str, list] = {}
    raw: list[Tensor] = []

    def after(name):
        def hook(module, _, output):
            if module is head:
                raw.append(output.detach().clone())  # the model may go on in place
            elif not raw:
                done.setdefault(name, []).append(output)

        return hook

    handles = [module.register_forward_hook(after(name)) for name, module in model.named_modules() if name]
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(raw) != 1 or not hasattr(output, "logits"):
        raise TersorError(
            f"{type(model).__name__} runs its output head {len(raw)} times for its logits",
            "use --loss hidden or attention, which look at no logits",
        )
    outermost = {
        name: outputs for name, outputs in done.items() if not any(name.startswith(f"{other}.") for other in done)
    }
    return outermost, raw[0].flatten(0, -2), output.logits.flatten(0, -2)


def _after(model: nn.Module, head: nn.Module, inputs: Mapping, before: dict[str, list], raw: Tensor) -> Tensor:
    """Logits `[n, V]` that the model makes when the head puts out `raw` `[n, V]`, with gradients."""

    def again(outputs: list):
        rest = iter(outputs)
        return lambda *args, **kwargs: next(rest)

    made = {model.get_submodule(name): again(outputs) for name, outputs in before.items()}
    with _replaced(made | {head: lambda x: raw[None]}):
        return model(**inputs).logits.flatten(0, -2)


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _is_product(module: nn.Module) -> bool:
    if not hasattr(module, "dense") and getattr(module, "weight", None) is None:
        return False
    weight = effective_weight(module)
    if weight.dim() != 2:
        return False
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        return _close(module(x), nn.functional.linear(x, weight, getattr(module, "bias", None)))


def _factor(raw: Tensor, logits: Tensor) -> float | None:
    """The number that makes logits of the head's output, None where it takes more than one number."""
    if logits.shape != raw.shape:
        return None
    if torch.equal(logits.float(), raw.float()):
        return 1.0
    factor = float((logits.double() * raw.double()).sum() / raw.double().square().sum())
    return factor if _close(logits, raw.double() * factor) else None


def _close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding, to the precision of the narrower one."""
    precision = max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = (2 if precision > 1e-4 else 100) * precision
    return bool((left.double() - right.double()).abs().max() <= tolerance * right.double().abs().max())

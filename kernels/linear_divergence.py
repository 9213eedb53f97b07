"""Output layer and distillation loss in one: `[tokens, vocab]` logits never exist.

Student and teacher logits are made for as many tokens as a budget of bytes holds; `divergence_rows_` goes through each row,
adds up every loss that was asked for (their definitions are there) and replaces the student's logits by their gradient,
which two products turn into gradients of the hidden states and of the weight. All of it happens in the forward pass; the
backward pass only scales. As in Liger-Kernel's fused linear cross entropy (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tersor.kernels.dispatch import check
from tersor.kernels.divergence import CLOSE, KINDS, divergence_rows_, top_k_divergence_rows_
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BUDGET, GPU_BUDGET = 128 << 20, 512 << 20  # bytes of one chunk of logits, student's and teacher's together

# ---------------------------------------------------------------- chunks of tokens


def _logits(x, weight, bias):
    """`x @ weight^T + bias` in float32 (float64 for float64)."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)  # not rounded to 16 bits on the way
    else:
        out = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    return out if bias is None else out.add_(bias.to(out.dtype))


def _operand(tensor):
    """What products take: on a CPU float32, which is faster there than 16 bits."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(wide if tensor.device.type == "cpu" else tensor.dtype)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, score: Callable, rows, step, scales, wanted):
        """`score(logits, chosen)` returns losses `[6, n]` of tokens `chosen` and overwrites their logits. `rows`: kept
        tokens; `scales` float64 `[6]`: what each sum of losses is multiplied by in the result."""
        w = _operand(weight)
        sums = torch.zeros(len(KINDS), dtype=torch.float64, device=hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grads = [
            torch.zeros(t.shape, dtype=wide, device=t.device) if want else None
            for t, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        for first in range(0, len(rows), step):
            chosen = rows[first : first + step]
            x = _operand(hidden[chosen])
            logits = _logits(x, w, bias)
            sums += score(logits, chosen).double().sum(1)
            if wanted[2]:
                grads[2] += logits.sum(0)
            gradient = logits.to(x.dtype)
            if wanted[0]:
                grads[0][chosen] = (gradient @ w).to(wide)
            if wanted[1]:
                grads[1].addmm_(gradient.t(), x) if wide == x.dtype else grads[1].add_(gradient.t() @ x)
        ctx.grads = [None if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, weight, bias), strict=True)]
        loss = (sums * scales).sum().to(wide)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        if ctx.grads is None:
            raise RuntimeError("linear_divergence keeps its gradients for one backward pass only")
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(gradient) for grad in grads), None, None, None, None, None


# ---------------------------------------------------------------- public


def _step(device, row_bytes, rows, budget_bytes):
    """Tokens per chunk: chunks of one size that keep to the budget."""
    budget = budget_bytes or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET)
    chunks = -(-rows * row_bytes // budget)
    return max(1, -(-rows // max(1, chunks)))


def _run(hidden, weight, bias, terms, labels, keep, count, row_bytes, budget_bytes, score):
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1], "hidden and weight do not fit")
    check(
        keep is None or (keep.dtype == torch.bool and keep.shape == hidden.shape[:1]),
        "keep must be bool, one per token",
    )
    everything = torch.arange(len(hidden), device=hidden.device)
    rows = everything if keep is None else everything[keep]
    tokens = dict.fromkeys(KINDS, len(rows))
    if "next_token" in terms:
        check(labels is not None and labels.shape == hidden.shape[:1], "next_token needs one label per token")
        chosen = labels[rows]
        highest, tokens["next_token"] = (int(n) for n in (chosen.max() if len(rows) else -1, (chosen >= 0).sum()))
        check(highest < len(weight), f"label {highest} of a vocabulary of {len(weight)}")
    share = {kind: 1 / (max(1, tokens[kind]) if count is None else float(count)) for kind in KINDS}
    weights = {kind: terms[kind] * share[kind] for kind in terms}
    scales = torch.tensor([weights.get(kind, 0.0) for kind in KINDS], dtype=torch.float64, device=hidden.device)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    step = _step(hidden.device, row_bytes, len(rows), budget_bytes)
    score_rows = lambda logits, part: score(logits, part, weights)  # noqa: E731
    loss, sums = _LinearDivergence.apply(hidden, weight, bias, score_rows, rows, step, scales, wanted)
    return loss, {kind: sums[KINDS.index(kind)] * share[kind] for kind in terms}


def _checked_terms(terms, allowed, beta, temperature):
    terms = {terms: 1.0} if isinstance(terms, str) else dict(terms)
    check(len(terms) > 0, "no loss was asked for")
    for kind in terms:
        check(kind in allowed, f"{kind!r} is not one of {', '.join(allowed)}")
    check(0 < beta < 1, f"beta {beta} is not within 0..1")
    check(temperature > 0, f"temperature {temperature} is not positive")
    return terms


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    terms: str | Mapping[str, float],
    *,
    labels: Tensor | None = None,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    balance: float = 2 / 3,
    count: float | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of losses between `hidden @ weight^T + bias` and the teacher's logits, and each loss by itself.

    `hidden` `[T, H_s]`, `weight` `[V, H_s]`, `teacher_hidden` `[T, H_t]`, `teacher_weight` `[V_t, H_t]` (both None where
    next_token alone is wanted); `terms`: one of KINDS, or weights by kind. All terms share each chunk of logits. Where
    vocabularies differ in length the first min(V, V_t) entries count, renormalised on both sides; next_token sees all V.

    `labels` int64 `[T]`: the token that each position should predict, negative for none. `keep` bool `[T]`: positions that
    count. A loss is the mean over its positions (those kept; for next_token those with a label too), or, with `count`, the
    sum divided by it: in a batch that is cut up, the number of positions of all pieces. No position: 0.

    Gradients reach `hidden`, `weight` and `bias`, once; the losses in the dict are numbers. Arithmetic is float32 (float64
    for float64); on a GPU 16-bit products round the gradient of a chunk of logits to 16 bits. `budget_bytes`: of a chunk
    of both logits; default 128 MiB on a CPU, 512 MiB on a GPU. A CPU keeps float32 copies of 16-bit weights meanwhile.
    Raises ValueError when shapes disagree, and RuntimeError at a second backward pass."""
    terms = _checked_terms(terms, KINDS, beta, temperature)
    alone = set(terms) == {"next_token"}
    row = len(weight)
    if not alone:
        check(teacher_hidden is not None and teacher_weight is not None, f"{', '.join(terms)} need a teacher")
        check(
            teacher_hidden.shape == (len(hidden), teacher_weight.shape[1]),
            "teacher_hidden and teacher_weight do not fit",
        )
        teacher, row = _operand(teacher_weight), row + len(teacher_weight)

    def score(logits, chosen, weights):
        other = None
        if not alone:
            other = _logits(_operand(teacher_hidden[chosen]), teacher, teacher_bias).to(logits.dtype)
        label = labels[chosen] if "next_token" in weights else None
        return divergence_rows_(logits, other, label, weights, temperature, beta, balance)

    return _run(hidden, weight, bias, terms, labels, keep, count, 4 * row, budget_bytes, score)


def linear_top_k_divergence(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    values: Tensor,
    log_rest: Tensor | None,
    terms: str | Mapping[str, float],
    *,
    labels: Tensor | None = None,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    balance: float = 2 / 3,
    count: float | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_divergence` against the top entries of a teacher, as `linear_top_k` makes them.

    `indices` int `[T, k]`, distinct in a row; `values` `[T, k]`: log-probabilities at `temperature`, or logits divided by
    it; `log_rest` `[T]`: the logarithm of what all other entries sum to, on the same scale. With `log_rest` both sides are
    distributions over k + 1 buckets, the last one all other entries; without, both are renormalised over the k entries.
    The divergence of buckets is at most that of whole distributions. Not for logit_mse, which needs the logits."""
    terms = _checked_terms(terms, (*CLOSE, "next_token"), beta, temperature)
    check(
        indices.ndim == 2 and indices.shape == values.shape and len(indices) == len(hidden),
        "indices or values do not fit",
    )
    check(log_rest is None or log_rest.shape == hidden.shape[:1], "log_rest must have one number per token")
    lowest, highest = (int(n) for n in indices.aminmax()) if indices.numel() else (0, 0)
    check(lowest >= 0 and highest < len(weight), f"index {highest} of a vocabulary of {len(weight)}")

    def score(logits, chosen, weights):
        label = labels[chosen] if "next_token" in weights else None
        rest = None if log_rest is None else log_rest[chosen]
        top = indices[chosen].long(), values[chosen], rest
        return top_k_divergence_rows_(logits, *top, label, weights, temperature, beta, balance)

    return _run(hidden, weight, bias, terms, labels, keep, count, 4 * len(weight), budget_bytes, score)


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable entries of each token: `indices` int64 `[T, k]`, `values` `[T, k]` (log-probabilities at
    `temperature`), and `log_rest` `[T]`, the logarithm of the others' probability; -inf where k is all there is.

    `vocabulary`: only so many first entries count, those that a student has too. A chunk of logits at a time."""
    weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    check(1 <= k <= len(weight), f"top {k} of a vocabulary of {len(weight)}")
    w, parts = _operand(weight), []
    step = _step(hidden.device, 4 * len(weight), len(hidden), budget_bytes)
    for first in range(0, max(1, len(hidden)), step):
        logits = _logits(_operand(hidden[first : first + step]), w, bias).div_(temperature)
        total = logits.logsumexp(1, keepdim=True)
        values, indices = logits.topk(k, 1)
        rest = logits.scatter_(1, indices, float("-inf")).logsumexp(1)
        parts.append((indices, values - total, rest - total[:, 0]))
    return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))

"""Divergences of student from teacher logits, row by row: losses, and the logits' gradient in their place.

Losses of one token, of teacher probabilities q and student probabilities p (both at the temperature t, over the common
vocabulary) and logits s, u:

    forward_kl      t^2 sum q log(q / p)
    reverse_kl      t^2 sum p log(p / q)
    jensen_shannon  t^2 (beta KL(q | m) + (1 - beta) KL(p | m)), m = beta q + (1 - beta) p (arXiv:2306.13649)
    balanced        a forward_kl + (1 - a) reverse_kl, a = `balance` where the student is the more confident one (its entropy
                    is lower), so that it widens, else 1 - balance; nothing flows through the choice
    logit_mse       mean over the common vocabulary of (s - u)^2
    next_token      -log of the label's probability at temperature 1, over the student's whole vocabulary

The common vocabulary is the first entries that both have; both are renormalised over it. `balanced` follows BD-KD
(arXiv:2212.12965), which weighs the two divergences per sample by the gap of entropies; its exact weights were not
available, hence the parameter. The factor t^2 keeps gradients of one size at all temperatures.
"""

from __future__ import annotations

import math

import torch
from tersor.kernels.dispatch import backend, tl, triton

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "balanced", "logit_mse", "next_token")
CLOSE = KINDS[:4]  # divergences of two distributions
ROWS = 1 << 18  # logits that the CPU takes through all steps at a time: they stay in its cache
FLOOR = 80.0  # a bucket holds at least e^-80 of the largest probability: finite logarithms

# ---------------------------------------------------------------- definitions


def reference_divergence(student, teacher, kind, temperature=1.0, beta=0.5, balance=2 / 3, labels=None):
    """The definition: losses `[rows]` of logits `[rows, V]`, which autograd differentiates."""
    if kind == "next_token":
        return torch.nn.functional.cross_entropy(student, labels, reduction="none")
    common = min(student.shape[1], teacher.shape[1])
    student, teacher = student[:, :common], teacher[:, :common]
    if kind == "logit_mse":
        return (student - teacher).square().mean(1)
    log_p, log_q = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "jensen_shannon":
        log_m = (beta * q + (1 - beta) * p).log()
        return temperature**2 * (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(1)
    forward, reverse = (q * (log_q - log_p)).sum(1), (p * (log_p - log_q)).sum(1)
    wider = ((p * log_p).sum(1) > (q * log_q).sum(1)).detach()
    share = {"forward_kl": 1, "reverse_kl": 0}.get(kind, torch.where(wider, balance, 1 - balance))
    return temperature**2 * (share * forward + (1 - share) * reverse)


def reference_buckets(logits, indices, values, log_rest, temperature):
    """Student and teacher log-weights `[rows, k]` of the teacher's top entries and, with `log_rest`, `[rows, k + 1]`."""
    student = logits / temperature
    picked = student.gather(1, indices)
    if log_rest is None:
        return picked, values
    rest = student.scatter(1, indices, -math.inf).logsumexp(1)
    return (
        torch.cat([both, torch.maximum(others, both.amax(1) - FLOOR)[:, None]], 1)
        for both, others in ((picked, rest), (values, log_rest))
    )


# ---------------------------------------------------------------- rows: losses, and logits replaced by gradients


def _divergence_rows(x, y, weights, beta, balance):
    """Losses `[4, rows]` of log-weights `x` (student) and `y` (teacher) `[rows, C]`, and the gradient of x of their sum
    under `weights` (by kind), both without the temperature's factor."""
    log_p, log_q = x.log_softmax(1), y.log_softmax(1)
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    reverse, forward = torch.linalg.vecdot(p, gap), -torch.linalg.vecdot(q, gap)
    losses = torch.zeros(4, len(x), dtype=x.dtype, device=x.device)
    losses[0], losses[1] = forward, reverse
    towards_forward, towards_reverse, mixed = (weights.get(kind, 0.0) for kind in CLOSE[:3])
    if "balanced" in weights:
        wider = torch.linalg.vecdot(p, log_p) > torch.linalg.vecdot(q, log_q)
        share = torch.where(wider, balance, 1 - balance).to(x.dtype)
        losses[3] = share * forward + (1 - share) * reverse
        towards_forward = (towards_forward + weights["balanced"] * share)[:, None]
        towards_reverse = (towards_reverse + weights["balanced"] * (1 - share))[:, None]
    gradient = (p - q).mul_(towards_forward)
    if "jensen_shannon" in weights:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        mean = torch.linalg.vecdot(p, log_p.sub_(log_m))
        losses[2] = beta * torch.linalg.vecdot(q, log_q - log_m) + (1 - beta) * mean
        gradient.addcmul_(p, log_p.sub_(mean[:, None]), value=mixed * (1 - beta))
    if "reverse_kl" in weights or "balanced" in weights:
        gradient += gap.sub_(reverse[:, None]).mul_(towards_reverse).mul_(p)
    return losses, gradient


def _next_token_rows(logits, labels, weight):
    """Losses `[rows]`, 0 without a label, and the gradient of their sum times `weight`."""
    log_p, inside = logits.log_softmax(1), (labels >= 0).to(logits.dtype)
    at = labels.clamp(min=0)[:, None]
    losses = -log_p.gather(1, at)[:, 0] * inside
    gradient = log_p.exp_()
    gradient.scatter_add_(1, at, torch.full_like(gradient[:, :1], -1.0))
    return losses, gradient.mul_((weight * inside)[:, None])


def _dense_rows(student, teacher, labels, weights, temperature, beta, balance):
    """Losses `[6, rows]`; `student` `[rows, V]` becomes the gradient of their weighted sum."""
    losses = torch.zeros(len(KINDS), len(student), dtype=student.dtype, device=student.device)
    gradient = None
    if "next_token" in weights:
        losses[5], gradient = _next_token_rows(student, labels, weights["next_token"])
    total = torch.zeros_like(student) if gradient is None else gradient
    if teacher is not None:
        common = min(student.shape[1], teacher.shape[1])
        s, t = student[:, :common], teacher[:, :common]
        if any(kind in weights for kind in CLOSE):
            losses[:4], gradient = _divergence_rows(s / temperature, t / temperature, weights, beta, balance)
            losses[:4] *= temperature**2
            total[:, :common].add_(gradient, alpha=temperature)
        if "logit_mse" in weights:
            difference = s - t
            losses[4] = difference.square().mean(1)
            total[:, :common].add_(difference, alpha=2 * weights["logit_mse"] / common)
    student.copy_(total)
    return losses


def _top_k_rows(student, indices, values, log_rest, labels, weights, temperature, beta, balance):
    """Losses `[6, rows]` against a teacher's top entries; `student` becomes the gradient."""
    losses = torch.zeros(len(KINDS), len(student), dtype=student.dtype, device=student.device)
    gradient = None
    if "next_token" in weights:
        losses[5], gradient = _next_token_rows(student, labels, weights["next_token"])
    if not any(kind in weights for kind in CLOSE):
        student.copy_(gradient)
        return losses
    x, y = reference_buckets(student, indices, values, log_rest, temperature)
    losses[:4], inner = _divergence_rows(x, y, weights, beta, balance)
    losses[:4] *= temperature**2
    inner *= temperature
    k = indices.shape[1]
    if log_rest is None:
        student.zero_()
    else:  # the bucket's gradient goes to its entries by their share of it
        student.scatter_(1, indices, -math.inf)
        student.div_(temperature).sub_(x[:, k:]).exp_().mul_(inner[:, k:])
    student.scatter_add_(1, indices, inner[:, :k])
    if gradient is not None:
        student += gradient
    return losses


# ---------------------------------------------------------------- Triton


@triton.jit
def _log_sum_exp(top, total, x):
    """Running maximum and sum of exponentials, with `x` added."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit
def _log_m(log_p, log_q, log_beta, log_other):
    a, b = log_q + log_beta, log_p + log_other
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def _divergence_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    losses_ptr,
    numbers_ptr,
    V,
    C,
    student_stride,
    teacher_stride,
    DIVERGES: tl.constexpr,
    TEACHER: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row, three times through it. `numbers`: weights of the six losses, temperature, beta, balance, log
    beta, log(1 - beta)."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    t, beta, balance = tl.load(numbers_ptr + 6), tl.load(numbers_ptr + 7), tl.load(numbers_ptr + 8)
    log_beta, log_other = tl.load(numbers_ptr + 9), tl.load(numbers_ptr + 10)
    lane = tl.arange(0, BLOCK)
    p_top, q_top, n_top = float("-inf"), float("-inf"), float("-inf")
    p_sum, q_sum, n_sum = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + lane
        s = tl.load(student_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        if NEXT:
            n_top, n_sum = _log_sum_exp(n_top, n_sum, s)
        if DIVERGES:
            p_top, p_sum = _log_sum_exp(p_top, p_sum, tl.where(at < C, s / t, float("-inf")))
            u = tl.load(teacher_ptr + at, mask=at < C, other=float("-inf")).to(tl.float32)
            q_top, q_sum = _log_sum_exp(q_top, q_sum, u / t)
    p_log, q_log, n_log = p_top + tl.log(p_sum), q_top + tl.log(q_sum), n_top + tl.log(n_sum)
    forward, reverse, p_mixed, q_mixed, p_spread, q_spread = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if DIVERGES:
        for start in range(0, C, BLOCK):
            at = start + lane
            log_p = tl.load(student_ptr + at, mask=at < C, other=0.0).to(tl.float32) / t - p_log
            log_q = tl.load(teacher_ptr + at, mask=at < C, other=0.0).to(tl.float32) / t - q_log
            p, q = tl.where(at < C, tl.exp(log_p), 0.0), tl.where(at < C, tl.exp(log_q), 0.0)
            log_m = _log_m(log_p, log_q, log_beta, log_other)
            forward += tl.sum(q * (log_q - log_p), 0)
            reverse += tl.sum(p * (log_p - log_q), 0)
            p_mixed += tl.sum(p * (log_p - log_m), 0)
            q_mixed += tl.sum(q * (log_q - log_m), 0)
            p_spread += tl.sum(p * log_p, 0)
            q_spread += tl.sum(q * log_q, 0)
    share = tl.where(p_spread > q_spread, balance, 1 - balance)
    balanced = tl.load(numbers_ptr + 3)
    towards_forward = (tl.load(numbers_ptr) + balanced * share) * t
    towards_reverse = (tl.load(numbers_ptr + 1) + balanced * (1 - share)) * t
    mixed = tl.load(numbers_ptr + 2) * (1 - beta) * t
    squared = tl.load(numbers_ptr + 4) * 2 / C
    label, next_weight = -1, 0.0
    if NEXT:
        label = tl.load(labels_ptr + row).to(tl.int32)
        next_weight = tl.where(label >= 0, tl.load(numbers_ptr + 5), 0.0)
        chosen = tl.load(student_ptr + tl.maximum(label, 0)).to(tl.float32)
        tl.store(losses_ptr + row * 6 + 5, tl.where(label >= 0, n_log - chosen, 0.0))
    error = 0.0
    tl.debug_barrier()  # the label's logit is read before any is overwritten
    for start in range(0, V, BLOCK):
        at = start + lane
        s = tl.load(student_ptr + at, mask=at < V, other=0.0).to(tl.float32)
        gradient = tl.zeros([BLOCK], tl.float32)
        if NEXT:
            gradient += next_weight * (tl.exp(s - n_log) - tl.where(at == label, 1.0, 0.0))
        if TEACHER:
            u = tl.load(teacher_ptr + at, mask=at < C, other=0.0).to(tl.float32)
            difference = tl.where(at < C, s - u, 0.0)
            error += tl.sum(difference * difference, 0)
            gradient += squared * difference
            if DIVERGES:
                log_p, log_q = s / t - p_log, u / t - q_log
                p, q = tl.exp(log_p), tl.exp(log_q)
                log_m = _log_m(log_p, log_q, log_beta, log_other)
                pull = towards_reverse * (log_p - log_q - reverse) + mixed * (log_p - log_m - p_mixed)
                gradient += tl.where(at < C, towards_forward * (p - q) + p * pull, 0.0)
        tl.store(student_ptr + at, gradient.to(student_ptr.dtype.element_ty), mask=at < V)
    if TEACHER:
        factor = t * t
        tl.store(losses_ptr + row * 6, forward * factor)
        tl.store(losses_ptr + row * 6 + 1, reverse * factor)
        tl.store(losses_ptr + row * 6 + 2, (beta * q_mixed + (1 - beta) * p_mixed) * factor)
        tl.store(losses_ptr + row * 6 + 3, (share * forward + (1 - share) * reverse) * factor)
        tl.store(losses_ptr + row * 6 + 4, error / C)


# ---------------------------------------------------------------- public


def _in_pieces(function, student, *others):
    """Losses of all rows; the CPU takes few at a time, which stay in its cache."""
    step = max(1, ROWS // student.shape[1]) if student.device.type == "cpu" else max(1, len(student))
    parts = [slice(first, first + step) for first in range(0, len(student), step)]
    losses = [function(*(None if x is None else x[part] for x in (student, *others))) for part in parts]
    return torch.cat(losses, 1)


def divergence_rows_(student, teacher, labels, weights, temperature=1.0, beta=0.5, balance=2 / 3):
    """Losses `[6, n]` in the order of KINDS; `student` `[n, V]` becomes the gradient of their sum under `weights` (by kind).

    `student` and `teacher` `[n, V_t]` are float32 (or float64) with contiguous rows; `teacher` is None where next_token
    alone is wanted, `labels` int64 `[n]` where it is not; a negative label counts for nothing. Losses that `weights` does
    not name may be anything."""
    if backend(student) != "triton" or student.dtype == torch.float64:
        return _in_pieces(lambda *x: _dense_rows(*x, weights, temperature, beta, balance), student, teacher, labels)
    numbers = [weights.get(kind, 0.0) for kind in KINDS]
    numbers = torch.tensor([*numbers, temperature, beta, balance, math.log(beta), math.log1p(-beta)])
    losses = torch.zeros(len(student), len(KINDS), device=student.device)
    _divergence_kernel[(len(student),)](
        student,
        student if teacher is None else teacher,
        student if labels is None else labels,
        losses,
        numbers.to(student.device, non_blocking=True),
        student.shape[1],
        student.shape[1] if teacher is None else min(student.shape[1], teacher.shape[1]),
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        **launch_options(student.shape[1], weights, teacher is not None),
    )
    return losses.t()


def launch_options(vocabulary, weights, teacher):
    return {
        "DIVERGES": any(kind in weights for kind in CLOSE),
        "TEACHER": teacher,
        "NEXT": "next_token" in weights,
        "BLOCK": min(4096, triton.next_power_of_2(vocabulary)),
        "num_warps": 8,
    }


def top_k_divergence_rows_(
    student, indices, values, log_rest, labels, weights, temperature=1.0, beta=0.5, balance=2 / 3
):
    """`divergence_rows_` against the top entries of a teacher: `indices` and `values` `[n, k]`, `log_rest` `[n]` or None;
    see `linear_top_k_divergence`. Plain torch on every device."""
    others = indices, values.to(student.dtype), log_rest if log_rest is None else log_rest.to(student.dtype), labels
    return _in_pieces(lambda *x: _top_k_rows(*x, weights, temperature, beta, balance), student, *others)

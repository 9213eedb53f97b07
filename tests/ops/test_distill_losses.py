"""Losses on logits against their plain definitions, with heads of many kinds."""

from __future__ import annotations

import pytest
import torch
import transformers
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme
from tersor.kernels.divergence import reference_buckets, reference_divergence
from tersor.ops.distill.losses.heads import Head, final_states, plain_head, read_head
from tersor.ops.distill.losses.logits import LogitLosses, LogitTargets, TopK, within
from tersor.ops.distill.losses.parse import parse_loss
from tersor.ops.distill.students.layers import FakeQuantizedLinear, ScaledLinear
from tiny_models import BASE, FAMILIES
from torch import nn

DENSE = {
    "kl": "forward_kl",
    "reverse-kl": "reverse_kl",
    "js": "jensen_shannon",
    "bd-kd": "balanced",
    "mse": "logit_mse",
}
B, T, H, V = 2, 6, 8, 31
CAPPED = ("Gemma2ForCausalLM", "Gemma2Config", BASE | {"head_dim": 16, "final_logit_softcapping": 3.0})
COHERE = ("CohereForCausalLM", "CohereConfig", BASE | {"logit_scale": 0.25})
GRANITE = ("GraniteForCausalLM", "GraniteConfig", BASE | {"logits_scaling": 8.0})


def model_of(kind, seed=0, **changes):
    model_class, config_class, settings = kind
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def trained(rows=V, width=H, seed=1, bias=True):
    head = nn.Linear(width, rows, bias=bias, dtype=torch.float64)
    head.weight.data = draw(rows, width, seed=seed)
    if bias:
        head.bias.data = draw(rows, seed=seed + 1)
    return Head(head)


class Capped(nn.Module):
    """A head that is no product: its input is rounded, so that the plain product would be wrong."""

    def __init__(self, rows=V):
        super().__init__()
        self.inner = trained(rows).module

    def forward(self, x):
        return self.inner(torch.tanh(x))


def case(rows=V, teacher_rows=V, width=H):
    """hidden, head, ids, keep, teacher hidden, teacher head; float64."""
    ids = torch.randint(0, min(rows, teacher_rows), (B, T), generator=torch.Generator().manual_seed(9))
    keep = torch.rand(B, T, generator=torch.Generator().manual_seed(8)) < 0.7
    keep[:, -1] = False
    teacher = plain_head(draw(teacher_rows, width, seed=5), draw(teacher_rows, seed=6))
    return draw(B, T, H, seed=3).requires_grad_(), trained(rows), ids, keep, draw(B, T, width, seed=4), teacher


def expected(terms, student, teacher, ids, keep, temperature=1.0, common=None):
    """The definition, over logits `[B, T, V]` of both."""
    total = 0.0
    for term in terms:
        beta, balance = (term.parameter if term.name == name else 0.5 for name in ("js", "bd-kd"))
        rows = slice(None) if term.name == "next" else slice(common)
        losses = reference_divergence(
            student[:, :-1][keep[:, :-1]][:, rows], teacher[:, :-1][keep[:, :-1]][:, rows], term.kind, temperature,
            beta, balance, labels=ids[:, 1:][keep[:, :-1]],
        )  # fmt: skip
        total = total + term.weight * losses.sum()
    return total


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "text", [*DENSE, "js:0.2=3", "next", "kl=1,reverse-kl=0.5,js:0.7=2,bd-kd=0.1,mse=0.3,next=0.2"]
)
def test_is_the_definition(text, temperature):
    hidden, head, ids, keep, other, teacher = case(width=11)
    terms = parse_loss(text)
    losses = LogitLosses(terms, temperature, budget_bytes=2000)
    loss, parts = losses(hidden, head, ids, keep, LogitTargets(other, teacher))
    want = expected(terms, head.module(hidden), teacher.logits(other), ids, keep, temperature)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(sum(term.weight * parts[term.name] for term in terms), want.detach())
    for got, right in zip(
        gradients(loss, hidden, head.weight, head.bias), gradients(want, hidden, head.weight, head.bias), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)  # balanced: a share in float32


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("text", [*DENSE, "next", "kl=1,mse=1,next=0.5"])
@pytest.mark.parametrize(("rows", "teacher_rows", "common"), [(31, 37, None), (37, 31, None), (37, 35, 30)])
def test_vocabularies_of_unequal_length(text, rows, teacher_rows, common, own):
    hidden, head, ids, keep, other, teacher = case(rows, teacher_rows)
    terms = parse_loss(text)
    if own:
        head = Head(Capped(rows), linear=False)
    loss, _ = LogitLosses(terms, common=common)(hidden, head, ids, keep, LogitTargets(other, teacher))
    want = expected(terms, head.logits(hidden), teacher.logits(other), ids, keep, common=common)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(gradients(3 * value, hidden)[0] for value in (loss, want)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["kl=1,mse=0.1,next=0.3", "top-k-kl=1"])
def test_a_factor_after_the_bias(text):
    hidden, head, ids, keep, other, teacher = case()
    head.scale = 0.3
    factored, scaled = (
        LogitTargets(other, plain_head(teacher.weight * a, teacher.bias * a, b)) for a, b in ((1, 0.2), (0.2, 1))
    )
    losses = LogitLosses(parse_loss(text), k=5)
    loss, _ = losses(hidden, head, ids, keep, factored)
    want, _ = losses(hidden, Head(head.module, linear=False, scale=0.3), ids, keep, scaled)
    for found, right in zip((loss, *gradients(loss, hidden, head.bias)), (want, *gradients(want, hidden, head.bias)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [*DENSE, "top-k-kl", "next", "kl=1,top-k-kl=0.5,next=1"])
def test_pieces_of_a_batch_add_up(text):
    hidden, head, ids, keep, other, teacher = case()
    losses = LogitLosses(parse_loss(text), k=5)
    whole, parts = losses(hidden, head, ids, keep, LogitTargets(other, teacher))
    pieces = [
        losses(hidden[b : b + 1], head, ids[b : b + 1], keep[b : b + 1], LogitTargets(other[b : b + 1], teacher))
        for b in range(B)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole)
    for name in parts:
        torch.testing.assert_close(sum(part[name] for _, part in pieces), parts[name])
    torch.testing.assert_close(
        gradients(sum(loss for loss, _ in pieces), head.weight)[0], gradients(whole, head.weight)[0]
    )
    none = torch.zeros_like(keep)
    assert losses(hidden, head, ids, none, LogitTargets(other, teacher))[0].item() == 0


@pytest.mark.parametrize("text", [*DENSE, "top-k-kl"])
def test_zero_when_equal_and_more_when_not(text):
    hidden, head, ids, keep, _, _ = case()
    losses = LogitLosses(parse_loss(text), k=5)
    same = LogitTargets(hidden.detach(), Head(head.module))
    values = [
        losses(hidden + draw(B, T, H, seed=7, scale=scale), head, ids, keep, same)[0].item()
        for scale in (0.0, 0.05, 0.5)
    ]
    assert abs(values[0]) < 1e-12 < values[1] < values[2]


@pytest.mark.parametrize("own", [False, True])
def test_top_k_of_a_teacher_with_all_logits(own):
    hidden, head, ids, keep, other, teacher = case()
    if own:
        head, teacher = Head(Capped(), linear=False), Head(Capped(V), linear=False)
    loss, _ = LogitLosses(parse_loss("top-k-kl"), 2.0, k=4)(hidden, head, ids, keep, LogitTargets(other, teacher))
    scores = teacher.logits(other)[keep] / 2.0
    values, indices = scores.topk(4, 1)
    rest = scores.scatter(1, indices, float("-inf")).logsumexp(1)
    x, y = (z.log_softmax(1) for z in reference_buckets(head.logits(hidden)[keep], indices, values, rest, 2.0))
    want = 4.0 * (y.exp() * (y - x)).sum()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(gradients(value, hidden)[0] for value in (loss, want)), rtol=1e-5, atol=1e-6)
    dense = LogitLosses(parse_loss("kl"), 2.0)(hidden, head, ids, keep, LogitTargets(other, teacher))[0]
    assert loss.item() < dense.item()


@pytest.mark.parametrize("text", ["kl", "reverse-kl", "js", "bd-kd"])
def test_all_entries_cached_are_all_logits(text):
    hidden, head, ids, keep, other, teacher = case()
    logs = teacher.logits(other).log_softmax(-1)
    values, indices = logs.topk(V, -1)
    cached = LogitTargets(top_k=TopK(indices.int(), values))
    loss, _ = LogitLosses(parse_loss(text))(hidden, head, ids, keep, cached)
    dense, _ = LogitLosses(parse_loss(text))(hidden, head, ids, keep, LogitTargets(other, teacher))
    torch.testing.assert_close(loss, dense, rtol=1e-3, atol=1e-4)


def test_cached_teacher():
    hidden, head, ids, keep, other, teacher = case()
    values, indices = teacher.logits(other).log_softmax(-1).topk(6, -1)
    cached = LogitTargets(top_k=TopK(indices, values))
    loss, parts = LogitLosses(parse_loss("kl=1,top-k-kl=2,next=0.5"))(hidden, head, ids, keep, cached)
    assert float(parts["kl"]) == float(parts["top-k-kl"])
    dense, same = LogitLosses(parse_loss("top-k-kl=3,next=0.5"), k=6)(
        hidden, head, ids, keep, LogitTargets(other, teacher)
    )
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts["next"], same["next"])
    # at another temperature than it was made for: both renormalised over the entries
    loss, _ = LogitLosses(parse_loss("kl"), temperature=2.0)(hidden, head, ids, keep, cached)
    x = (head.module(hidden)[keep].gather(1, indices[keep]) / 2).log_softmax(1)
    y = (values[keep] / 2).log_softmax(1)
    torch.testing.assert_close(loss, 4 * (y.exp() * (y - x)).sum(), rtol=1e-5, atol=1e-5)


def test_top_entries_outside_the_common_vocabulary():
    hidden, head, ids, keep, other, teacher = case(rows=31, teacher_rows=40)
    values, indices = teacher.logits(other).log_softmax(-1).topk(6, -1)
    assert bool((indices[keep] >= 31).any())
    loss, _ = LogitLosses(parse_loss("kl"))(hidden, head, ids, keep, LogitTargets(top_k=TopK(indices, values)))
    assert bool(loss.isfinite()) and loss.item() > 0
    rest = (1 - values.exp().sum(-1)).log()
    found, logs, _ = within(indices[keep], values[keep], rest[keep], 31)
    assert int(found.max()) < 31 and all(len(set(row)) == 6 for row in found.tolist())
    inside = indices[keep] < 31
    assert torch.equal(found[inside], indices[keep][inside]) and torch.equal(logs[inside], values[keep][inside])
    torch.testing.assert_close(logs[~inside], (rest[keep] - torch.tensor(25.0).log())[:, None].expand(-1, 6)[~inside])


def test_top_k_of_a_longer_vocabulary():
    """A teacher with all logits is asked for the best of what the student has too."""
    hidden, head, ids, keep, other, teacher = case(rows=31, teacher_rows=40)
    losses, short = LogitLosses(parse_loss("top-k-kl"), k=20), plain_head(teacher.weight[:31], teacher.bias[:31])
    loss, _ = losses(hidden, head, ids, keep, LogitTargets(other, teacher))
    torch.testing.assert_close(loss, losses(hidden, head, ids, keep, LogitTargets(other, short))[0])


def test_without_a_teacher():
    hidden, head, ids, keep, _, _ = case()
    loss, _ = LogitLosses(parse_loss("next"))(hidden, head, ids, keep)
    want = nn.functional.cross_entropy(
        head.module(hidden)[:, :-1][keep[:, :-1]], ids[:, 1:][keep[:, :-1]], reduction="sum"
    )
    torch.testing.assert_close(loss, want)
    with pytest.raises(TersorError, match="no teacher"):
        LogitLosses(parse_loss("kl"))(hidden, head, ids, keep)


def test_bfloat16():
    hidden, head, ids, keep, other, teacher = case()
    narrow = Head(nn.Linear(H, V, dtype=torch.bfloat16))
    narrow.module.load_state_dict(head.module.state_dict())
    small = plain_head(teacher.weight.bfloat16(), teacher.bias.bfloat16())
    rounded = hidden.detach().bfloat16().requires_grad_()
    losses = LogitLosses(parse_loss("kl=1,next=1"))
    loss, _ = losses(rounded, narrow, ids, keep, LogitTargets(other.bfloat16(), small))
    want = expected(losses.terms, head.module(hidden), teacher.logits(other), ids, keep)
    assert loss.dtype == torch.float32 and abs(loss.item() / want.item() - 1) < 0.02
    (gradient,) = gradients(loss, rounded)
    (right,) = gradients(want, hidden)
    assert float((gradient - right).norm() / right.norm()) < 0.03


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("llama", 1.0), ("llama-tied", 1.0), ("gpt2", 1.0), ("opt", 1.0), ("phi", 1.0), ("falcon", 1.0), ("bert-mlm", 1.0),
        (COHERE, 0.25), (GRANITE, 0.125), (CAPPED, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_reads_the_head_as_the_model_applies_it(kind, scale):
    model = model_of(FAMILIES[kind] if isinstance(kind, str) else kind)
    head = read_head(model)
    assert head.linear and head.direct == (scale is not None)
    assert scale is None or head.scale == pytest.approx(scale, rel=1e-5)
    assert (head.describe() is None) == head.direct
    ids = torch.randint(5, 256, (B, T), generator=torch.Generator().manual_seed(2))
    states = final_states(model, head, input_ids=ids)
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(states.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert states.requires_grad and "forward" not in model.base_model.__dict__


@pytest.mark.parametrize(
    "kinds", [(CAPPED, CAPPED), ("llama", CAPPED), (CAPPED, "llama"), (COHERE, GRANITE), ("phi", "phi")]
)
@pytest.mark.parametrize("text", ["kl=1,reverse-kl=0.5,mse=0.1,next=0.3", "top-k-kl=1,next=1"])
def test_trains_like_the_model_itself(kinds, text):
    """Loss and gradients of all parameters, against logits that the models make themselves."""
    student, teacher = (
        model_of(FAMILIES[kind] if isinstance(kind, str) else kind, seed) for seed, kind in enumerate(kinds)
    )
    ids = torch.randint(5, 256, (B, T), generator=torch.Generator().manual_seed(2))
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[:, -1] = False
    head, other = read_head(student), read_head(teacher)
    terms, k = parse_loss(text), 10
    with torch.no_grad():
        target = LogitTargets(final_states(teacher, other, input_ids=ids), other)
    losses = LogitLosses(terms, k=k, budget_bytes=8 * 256 * 3)
    loss, _ = losses(final_states(student, head, input_ids=ids), head, ids, keep, target)
    loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    logits, right = student(input_ids=ids).logits.double(), teacher(input_ids=ids).logits.detach().double()
    plain = [term for term in terms if term.name != "top-k-kl"]
    want = expected(plain, logits, right, ids, keep)
    if plain != terms:
        values, indices = right[keep].topk(k, 1)
        rest = right[keep].scatter(1, indices, float("-inf")).logsumexp(1)
        x, y = (z.log_softmax(1) for z in reference_buckets(logits[keep], indices, values, rest, 1.0))
        want = want + (y.exp() * (y - x)).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-4)
    want.backward()
    for name, parameter in student.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_a_head_that_is_no_product(family):
    model = transformers.AutoModelForCausalLM.from_pretrained(family("llama", "float32"))

    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward((x * 8).round() / 8 + 0 * x)

    model.lm_head = Rounding(64, 256, bias=False)
    head = read_head(model)
    assert not head.linear and not head.direct and "not a plain product" in head.describe()


def test_gradients_pass_through_what_a_weight_is_made_of():
    """A head whose weight is computed from parameters: they get the gradients."""
    hidden, _, ids, keep, other, teacher = case()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    linear = nn.Linear(H, V, bias=False, dtype=torch.float64)
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    losses, targets = LogitLosses(parse_loss("kl")), LogitTargets(other, teacher)
    losses(hidden, Head(linear), ids, keep, targets)[0].backward()
    found = linear.parametrizations.weight.original.grad.clone()
    linear.zero_grad()
    losses(hidden, Head(linear, linear=False), ids, keep, targets)[0].backward()
    assert float(found.abs().max()) > 0
    torch.testing.assert_close(found, linear.parametrizations.weight.original.grad)


@pytest.mark.parametrize("kind", [FakeQuantizedLinear, ScaledLinear])
def test_a_quantized_head(kind, family):
    """The logits are those of the rounded weight, before and after a step moved what it is rounded from."""
    model = transformers.AutoModelForCausalLM.from_pretrained(family("llama", "float32"))
    scheme = Scheme(bits=4, kind="int", symmetric=True, strategy="group", group_size=32)
    groups = model.lm_head.weight.detach().unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round().to(torch.int8).flatten(1)
    model.lm_head = kind(QuantizedWeight(codes, scale, None), scheme)
    head = read_head(model)
    assert head.direct and head.rows == 256
    parameter = getattr(model.lm_head, kind.trained)
    with torch.no_grad():
        parameter.add_(0.3 * parameter.abs().mean())
    ids = torch.randint(5, 256, (B, T), generator=torch.Generator().manual_seed(2))
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[:, -1] = False
    losses = LogitLosses(parse_loss("next"))
    results = []
    for each in (head, Head(model.lm_head, linear=False)):
        loss, _ = losses(final_states(model, head, input_ids=ids), each, ids, keep)
        results.append((loss, *gradients(loss, parameter)))
    logits = model(input_ids=ids).logits
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    for loss, gradient in results:
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradient, gradients(want, parameter)[0], rtol=1e-3, atol=1e-4)


def test_no_head(family):
    with pytest.raises(TersorError, match="no output head"):
        read_head(transformers.AutoModel.from_pretrained(family("bert", "float32")))

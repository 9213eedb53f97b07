import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.kernels import divergence as rows_module
from tersor.kernels.divergence import CLOSE, KINDS, divergence_rows_, reference_buckets, reference_divergence
from tersor.kernels.linear_divergence import linear_divergence, linear_top_k, linear_top_k_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of the largest value. float32: logits of size 5 to 20 round at 1e-6, and a gradient is a sum over tokens. bfloat16:
# gradients are rounded to it once, 2^-9; everything before is float32 on a CPU.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
TERMS = st.one_of(
    st.sampled_from(KINDS).map(lambda kind: {kind: 1.0}),
    st.dictionaries(st.sampled_from(KINDS), st.sampled_from([0.3, 1.0, 2.5]), min_size=1),
)
TOP_TERMS = st.dictionaries(st.sampled_from((*CLOSE, "next_token")), st.sampled_from([0.3, 1.0]), min_size=1)
SETTINGS = {
    "temperature": st.sampled_from([0.7, 1.0, 3.0]),
    "beta": st.sampled_from([0.1, 0.5]),
    "balance": st.sampled_from([0.5, 0.8]),
}


def batch(tokens, vocabulary, teacher_vocabulary, dtype=torch.float32, seed=0, bias=True, width=6):
    g = torch.Generator().manual_seed(seed)
    spread = {
        "hidden": torch.randn(tokens, width, generator=g),
        "weight": torch.randn(vocabulary, width, generator=g),
        "teacher_hidden": torch.randn(tokens, 9, generator=g),
        "teacher_weight": torch.randn(teacher_vocabulary, 9, generator=g) * 0.7,
        "bias": torch.randn(vocabulary, generator=g) if bias else None,
        "teacher_bias": torch.randn(teacher_vocabulary, generator=g) if bias else None,
    }
    tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in spread.items()}
    labels = torch.randint(-1, vocabulary, (tokens,), generator=g)
    return tensors | {"labels": labels, "keep": torch.rand(tokens, generator=g) < 0.7}


def leaves(tensors):
    """Copies that take gradients, for the student's side."""
    names = [name for name in ("hidden", "weight", "bias") if tensors[name] is not None]
    return tensors | {name: tensors[name].detach().clone().requires_grad_() for name in names}, names


def wide(tensors):
    return {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}


def plain(tensors, terms, temperature, beta, balance, buckets=None):
    """The definition on whole logits, by autograd."""
    rows = torch.arange(len(tensors["hidden"])) if tensors["keep"] is None else tensors["keep"].nonzero()[:, 0]
    logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"], tensors["bias"])[rows]
    teacher = torch.nn.functional.linear(tensors["teacher_hidden"], tensors["teacher_weight"], tensors["teacher_bias"])[
        rows
    ]
    losses = {}
    for kind in terms:
        if kind == "next_token":
            labelled = tensors["labels"][rows] >= 0
            each = reference_divergence(logits[labelled], None, kind, labels=tensors["labels"][rows][labelled])
        elif buckets is None:
            each = reference_divergence(logits, teacher, kind, temperature, beta, balance)
        else:
            top = [None if tensor is None else tensor[rows] for tensor in buckets]
            sides = reference_buckets(logits, *top, temperature)
            each = temperature**2 * reference_divergence(*sides, kind, 1.0, beta, balance)
        losses[kind] = each.mean() if len(each) else logits.sum() * 0
    return sum(terms[kind] * losses[kind] for kind in terms), losses


def check_equal(loss, values, names, tensors, expected, expected_values, expected_tensors, tolerance):
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    assert {kind: value.item() for kind, value in values.items()} == pytest.approx(
        {kind: value.item() for kind, value in expected_values.items()}, rel=tolerance, abs=tolerance
    )
    (loss * 2).backward()
    (expected * 2).backward()
    for name in names:
        found, wanted = tensors[name].grad, expected_tensors[name].grad
        assert found.dtype == tensors[name].dtype
        assert (found.double() - wanted).abs().max() <= tolerance * max(0.1, wanted.abs().max()), name


def fused(tensors, terms, settings_, **more):
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    others = {name: tensors[name] for name in ("labels", "keep", "bias", "teacher_bias")}
    return linear_divergence(*(tensors[name] for name in names), terms, **others, **settings_, **more)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 40]),
    sizes=st.sampled_from([(5, 5), (33, 40), (40, 33), (1, 1)]),
    terms=TERMS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    keep=st.booleans(),
    budget=st.sampled_from([1, 1 << 10, None]),
    seed=st.integers(0, 99),
    **SETTINGS,
)
def test_equals_float64_autograd_of_the_definition(tokens, sizes, terms, dtype, bias, keep, budget, seed, **settings_):
    tensors = batch(tokens, *sizes, dtype, seed, bias)
    tensors["keep"] = tensors["keep"] if keep else None
    found, names = leaves(tensors)
    exact, _ = leaves(wide(tensors))
    loss, values = fused(found, terms, settings_, budget_bytes=budget)
    check_equal(loss, values, names, found, *plain(exact, terms, **settings_), exact, TOLERANCE[dtype])


@settings(max_examples=30, deadline=None)
@given(
    terms=TOP_TERMS,
    k=st.sampled_from([1, 4, 33]),
    rest=st.booleans(),
    budget=st.sampled_from([1, None]),
    seed=st.integers(0, 99),
    **SETTINGS,
)
def test_top_k_equals_float64_autograd_of_the_definition(terms, k, rest, budget, seed, **settings_):
    tensors = batch(11, 40, 33, seed=seed)
    found, names = leaves(tensors)
    exact, _ = leaves(wide(tensors))
    temperature = settings_["temperature"]
    buckets = linear_top_k(
        exact["teacher_hidden"], exact["teacher_weight"], k, exact["teacher_bias"], temperature, budget_bytes=budget
    )
    buckets = buckets if rest else (*buckets[:2], None)
    others = {name: found[name] for name in ("labels", "keep", "bias")}
    loss, values = linear_top_k_divergence(
        found["hidden"], found["weight"], *buckets, terms, **others, **settings_, budget_bytes=budget
    )
    check_equal(loss, values, names, found, *plain(exact, terms, **settings_, buckets=buckets), exact, 1e-5)


@pytest.mark.parametrize("terms", [{kind: 1.0} for kind in KINDS] + [dict.fromkeys(KINDS, 0.5)], ids=str)
def test_gradients_are_slopes(terms):
    """Differences of the loss itself in float64, along a random direction."""
    tensors, names = leaves(wide(batch(4, 7, 9)))
    options = {"temperature": 2.0, "beta": 0.3}
    fused(tensors, terms, options, budget_bytes=600)[0].backward()
    generator = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(tensors[name].shape, generator=generator).double() for name in names}
    ends = [
        fused(tensors | {name: tensors[name] + step * direction[name] for name in names}, terms, options)[0].item()
        for step in (1e-5, -1e-5)
    ]
    slope = sum((tensors[name].grad * direction[name]).sum().item() for name in names)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_top_k_of_all_entries_is_the_whole_divergence():
    tensors = batch(9, 12, 12)
    indices, values, rest = linear_top_k(
        tensors["teacher_hidden"], tensors["teacher_weight"], 12, tensors["teacher_bias"]
    )
    assert (rest == -math.inf).all()
    for log_rest in (rest, None):
        for kind in CLOSE:
            expected, _ = fused(tensors, kind, {})
            found, _ = linear_top_k_divergence(
                tensors["hidden"],
                tensors["weight"],
                indices,
                values,
                log_rest,
                kind,
                keep=tensors["keep"],
                bias=tensors["bias"],
            )
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_buckets_give_less_than_the_whole_and_more_with_more_of_them():
    tensors = batch(20, 50, 50)
    whole = fused(tensors, "forward_kl", {})[0].item()
    by_k = []
    for k in (1, 5, 20):
        top = linear_top_k(tensors["teacher_hidden"], tensors["teacher_weight"], k, tensors["teacher_bias"])
        loss, _ = linear_top_k_divergence(
            tensors["hidden"], tensors["weight"], *top, "forward_kl", keep=tensors["keep"], bias=tensors["bias"]
        )
        by_k.append(loss.item())
    assert by_k == sorted(by_k) and 0 < by_k[0] < by_k[-1] < whole


def test_top_k_probabilities_and_what_is_left():
    tensors = batch(6, 12, 30)
    logits = tensors["teacher_hidden"] @ tensors["teacher_weight"][:12].t()
    log_q = (logits / 2).log_softmax(1)
    indices, values, rest = linear_top_k(
        tensors["teacher_hidden"], tensors["teacher_weight"], 3, temperature=2.0, vocabulary=12, budget_bytes=100
    )
    torch.testing.assert_close(values, log_q.topk(3, 1).values)
    torch.testing.assert_close(log_q.gather(1, indices), values)
    torch.testing.assert_close(values.exp().sum(1) + rest.exp(), torch.ones(6))


@pytest.mark.parametrize("confident", [True, False])
def test_balance_favours_what_the_student_needs(confident):
    """A student more confident than its teacher is drawn by forward KL above all."""
    logits, sharp = torch.randn(5, 9), 4.0 if confident else 0.25
    weights = {"balanced": 1.0}
    losses = divergence_rows_(logits * sharp, logits.clone(), None, weights, balance=0.9)
    share = 0.9 if confident else 0.1
    torch.testing.assert_close(losses[3], share * losses[0] + (1 - share) * losses[1])


def test_identical_models_have_nothing_to_learn():
    tensors = batch(8, 15, 15)
    same = tensors | {f"teacher_{n}": tensors[n] for n in ("hidden", "weight", "bias")}
    found, names = leaves(same)
    loss, values = fused(found, dict.fromkeys(KINDS[:5], 1.0), {"temperature": 2.0})
    loss.backward()
    assert loss.abs() < 1e-5 and all(abs(value) < 1e-5 for value in values.values())
    assert all(found[name].grad.abs().max() < 1e-6 for name in names)


def test_far_apart_logits_stay_finite():
    """Probabilities that float32 cannot hold: a difference of 400 in logits."""
    tensors = batch(3, 8, 8, bias=False) | {"keep": None}
    tensors["hidden"], tensors["teacher_hidden"] = tensors["hidden"] * 100, tensors["teacher_hidden"] * 100
    found, names = leaves(tensors)
    loss, _ = fused(found, dict.fromkeys(KINDS, 1.0), {})
    loss.backward()
    assert loss.isfinite() and all(found[name].grad.isfinite().all() for name in names)


def test_pieces_with_the_count_of_all_add_up():
    tensors = batch(30, 12, 12)
    tensors["keep"] = tensors["labels"] >= 0
    terms = {"forward_kl": 0.7, "next_token": 0.3}
    whole, _ = fused(tensors, terms, {})
    per_token = ("hidden", "teacher_hidden", "labels", "keep")
    halves = [tensors | {name: tensors[name][part] for name in per_token} for part in (slice(0, 13), slice(13, None))]
    count = tensors["keep"].sum()
    assert sum(fused(half, terms, {}, count=count)[0] for half in halves).item() == pytest.approx(
        whole.item(), rel=1e-5
    )


def test_no_position_at_all():
    tensors = batch(4, 6, 6) | {"keep": torch.zeros(4, dtype=torch.bool)}
    found, names = leaves(tensors)
    loss, values = fused(found, dict.fromkeys(KINDS, 1.0), {})
    loss.backward()
    assert loss == 0 and set(values) == set(KINDS)
    assert all(not found[name].grad.any() for name in names)


def test_only_what_needs_gradients_gets_them():
    tensors = batch(6, 9, 9)
    tensors["hidden"].requires_grad_()
    fused(tensors, "forward_kl", {})[0].backward()
    assert tensors["hidden"].grad is not None and tensors["weight"].grad is None
    with torch.no_grad():
        assert not fused(tensors, "forward_kl", {})[0].requires_grad


def test_a_second_backward_pass_is_refused():
    tensors, _ = leaves(batch(6, 9, 9))
    loss, _ = fused(tensors, "forward_kl", {})
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_fused_cross_entropy_needs_no_teacher():
    tensors, _ = leaves(batch(10, 20, 20))
    loss, _ = linear_divergence(
        tensors["hidden"], tensors["weight"], None, None, "next_token", labels=tensors["labels"]
    )
    logits = tensors["hidden"] @ tensors["weight"].t()
    expected = torch.nn.functional.cross_entropy(logits, tensors["labels"], ignore_index=-1)
    torch.testing.assert_close(loss, expected)


class Largest(TorchDispatchMode):
    """Most bytes of a storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("top_k", [False, True])
def test_whole_logits_never_exist(top_k):
    """512 tokens of a vocabulary of 2000: 4 MB of logits. No tensor is larger than the budget or the weight."""
    tensors, budget = batch(512, 2000, 2100, width=8), 200_000
    tensors["keep"] = None
    tensors, _ = leaves(tensors)
    top = linear_top_k(tensors["teacher_hidden"], tensors["teacher_weight"], 5, vocabulary=2000)
    with Largest() as largest:
        terms = {"reverse_kl": 1.0, "next_token": 1.0}
        if top_k:
            student = [tensors[name] for name in ("hidden", "weight")]
            loss, _ = linear_top_k_divergence(*student, *top, terms, labels=tensors["labels"], budget_bytes=budget)
        else:
            loss, _ = fused(tensors, terms, {}, budget_bytes=budget)
        loss.backward()
    assert largest.nbytes <= max(budget, tensors["weight"].nbytes, tensors["teacher_weight"].nbytes)
    assert largest.nbytes < 512 * 2000 * 4 / 10
    with Largest() as largest:
        plain(tensors, {"reverse_kl": 1.0}, 1.0, 0.5, 0.5)
    assert largest.nbytes >= 512 * 2000 * 4


def test_pieces_of_rows_do_not_matter(monkeypatch):
    tensors = batch(20, 30, 30)
    expected, _ = fused(tensors, dict.fromkeys(KINDS, 1.0), {})
    monkeypatch.setattr(rows_module, "ROWS", 70)
    assert fused(tensors, dict.fromkeys(KINDS, 1.0), {})[0].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": "huber"}, "huber"),
        ({"terms": {}}, "no loss"),
        ({"terms": "next_token", "labels": None}, "label"),
        ({"terms": "next_token", "labels": torch.full((4,), 6)}, "label 6"),
        ({"weight": torch.ones(6, 5)}, "do not fit"),
        ({"teacher_hidden": torch.ones(3, 9)}, "do not fit"),
        ({"teacher_hidden": None}, "need a teacher"),
        ({"keep": torch.ones(4)}, "keep"),
        ({"beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(batch(4, 6, 6) | {"terms": "forward_kl"} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": "logit_mse"}, "logit_mse"),
        ({"indices": torch.full((4, 2), 6)}, "index 6"),
        ({"values": torch.zeros(4, 3)}, "do not fit"),
        ({"log_rest": torch.zeros(3)}, "log_rest"),
    ],
)
def test_wrong_top_k_arguments_are_refused(change, message):
    tensors = {name: batch(4, 6, 6)[name] for name in ("hidden", "weight")}
    tensors |= {"indices": torch.arange(2).expand(4, 2), "values": torch.zeros(4, 2), "log_rest": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        linear_top_k_divergence(**(tensors | {"terms": "forward_kl"} | change))


@pytest.mark.triton
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.sampled_from([(5, 5), (33, 40), (40, 33)]),
    terms=TERMS,
    seed=st.integers(0, 99),
    block=st.sampled_from([16, 4096]),
    **SETTINGS,
)
def test_triton_equals_float64_autograd(on_triton, sizes, terms, seed, block, **settings_):
    tensors = batch(4, *sizes, seed=seed)
    exact, names = leaves(wide(tensors))
    options = rows_module.launch_options
    small = lambda *a: options(*a) | {"BLOCK": min(block, options(*a)["BLOCK"])}  # noqa: E731

    def step(*given_):
        found, _ = leaves(dict(zip(tensors, given_, strict=True)))
        loss, values = fused(found, terms, settings_)
        loss.backward()
        return (loss.detach(), *values.values(), *(found[name].grad for name in names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "launch_options", small)
        found = on_triton(step, *tensors.values())
    loss, values = plain(exact, terms, **settings_)
    loss.backward()
    expected = [loss, *values.values(), *(exact[name].grad for name in names)]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= 2e-5 * max(0.1, b.abs().max())


@pytest.mark.triton
def test_triton_buckets(on_triton):
    tensors = batch(5, 20, 20)
    top = linear_top_k(tensors["teacher_hidden"], tensors["teacher_weight"], 4)
    arguments = tensors["hidden"], tensors["weight"], *top, {"reverse_kl": 1.0}
    assert on_triton(linear_top_k_divergence, *arguments)[0].item() == pytest.approx(
        linear_top_k_divergence(*arguments)[0].item(), rel=1e-5
    )

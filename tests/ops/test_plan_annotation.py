"""Annotations and the cuts that follow from them: run on arrays, the parts give what the whole gives."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.transform.annotation import R, V, can_cut, parse, splits

LINEAR = "b s i+, o i+ -> b s o"


def linear(x, w):
    return x @ w.T


def silu(x):
    return x / (1 + np.exp(-x))


def normed(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def attention(q, k, v, sizes):
    b, s, g, heads, d, width = (sizes[name] for name in "bsgqdv")
    q, k, v = q.reshape(b, s, g, heads, d), k.reshape(b, -1, g, d), v.reshape(b, -1, g, width)
    scores = np.einsum("bsgqd,btgd->bgqst", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bgqst,btgv->bsgqv", weights, v).reshape(b, s, -1)


def experts_up(x, w):
    return np.einsum("bse,xfe->bsxf", x, w)


def experts_down(y, gates, w):
    return np.einsum("bsxf,bsx,xef->bse", y, gates, w)


def lookup(ids, table):
    return ids @ table  # one-hot ids, so that a cut vocabulary is an ordinary sum


OPERATORS = {
    "linear": (LINEAR, linear, {"b": 2, "s": 4, "i": 6, "o": 8}),
    "norm": ("b s e^, e^ -> b s e^", normed, {"b": 2, "s": 4, "e": 6}),
    "activation": ("b s f -> b s f", silu, {"b": 2, "s": 4, "f": 6}),
    "product": ("b s f, b s f -> b s f", lambda x, y: silu(x) * y, {"b": 2, "s": 4, "f": 6}),
    "embedding": ("b s v+, v+ e -> b s e", lookup, {"b": 2, "s": 4, "v": 8, "e": 6}),
    "attention": ("b s (g q d^), b t^ (g d^), b t^ (g v^) -> b s (g q v^)", attention,
                  {"b": 2, "s": 4, "t": 4, "g": 2, "q": 3, "d": 4, "v": 2}),
    "experts.up": ("b s e+, x f e+ -> b s x f", experts_up, {"b": 2, "s": 4, "e": 6, "x": 4, "f": 2}),
    "experts.down": ("b s x+ f+, b s x+, x e f+ -> b s e", experts_down, {"b": 2, "s": 4, "e": 6, "x": 4, "f": 2}),
}  # fmt: skip
CUT = {
    "linear": "b s i o", "norm": "b s", "activation": "b s f", "product": "b s f", "embedding": "b s v e", "attention": "b s g",
    "experts.up": "b s e x f", "experts.down": "b s x f e",
}  # fmt: skip


def part(array: np.ndarray, place, n: int, rank: int) -> np.ndarray:
    return array if place == R else np.split(array, n, axis=place)[rank]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("adds", [False, True])
def test_cut_operators_give_the_same(name, adds):
    text, function, sizes = OPERATORS[name]
    annotation, n = parse(text), 2
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal(annotation.shape(dims, sizes)) for dims in annotation.inputs]
    call = function if name != "attention" else lambda *given, extra=sizes: function(*given, extra)
    whole = call(*inputs)
    found = splits(annotation, sizes, n)
    assert {split.name for split in found} == {None, *CUT[name].split()}
    for split in found:
        results = []
        for rank in range(n):
            mine = [part(array, place, n, rank) for array, place in zip(inputs, split.inputs, strict=True)]
            local = {key: size // n if key == split.name else size for key, size in sizes.items()}
            results.append(function(*mine, local) if name == "attention" else function(*mine))
        (place,) = split.outputs
        if place == V:
            np.testing.assert_allclose(sum(results), whole, atol=1e-9)
        else:
            for rank in range(n):
                np.testing.assert_allclose(results[rank], part(whole, place, n, rank), atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "product", "activation"])
def test_gradients_lie_where_it_says(name):
    """By finite differences of a random weighing of the results."""
    text, function, sizes = OPERATORS[name]
    annotation, n = parse(text), 2
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal(annotation.shape(dims, sizes)) for dims in annotation.inputs]
    weighing = generator.standard_normal(function(*inputs).shape)

    def gradient(given: list[np.ndarray], index: int, weights: np.ndarray) -> np.ndarray:
        result = np.zeros_like(given[index])
        for place in np.ndindex(result.shape):
            low, high = ([array.copy() for array in given] for _ in range(2))
            low[index][place] -= 1e-5
            high[index][place] += 1e-5
            result[place] = ((function(*high) - function(*low)) * weights).sum() / 2e-5
        return result

    for index in range(len(inputs)):
        whole = gradient(inputs, index, weighing)
        for split in splits(annotation, sizes, n):
            found = []
            for rank in range(n):
                mine = [part(array, place, n, rank) for array, place in zip(inputs, split.inputs, strict=True)]
                found.append(gradient(mine, index, part(weighing, split.output_gradients[0], n, rank)))
            place = split.input_gradients[index]
            if place == V:
                np.testing.assert_allclose(sum(found), whole, atol=1e-6)
            else:
                for rank in range(n):
                    np.testing.assert_allclose(found[rank], part(whole, place, n, rank), atol=1e-6)


def test_column_and_row_of_a_linear_layer():
    by_name = {split.name: split for split in splits(parse(LINEAR), {"b": 2, "s": 4, "i": 6, "o": 8}, 2)}
    assert by_name["o"].inputs == (R, 0) and by_name["o"].outputs == (2,) and by_name["o"].input_gradients == (V, 0)
    assert by_name["i"].inputs == (2, 1) and by_name["i"].outputs == (V,) and by_name["i"].output_gradients == (R,)
    assert by_name["s"].inputs == (1, R) and by_name["s"].input_gradients == (1, V)
    assert by_name[None].inputs == (R, R) and by_name[None].input_gradients == (R, R)


def test_sums_run_on_partial_values():
    annotation = parse("b s o, o -> b s o", True)
    partial = next(split for split in splits(annotation, {"b": 2, "s": 4, "o": 8}, 2) if split.name == "partial")
    assert partial.inputs == (V, V) and partial.outputs == (V,) and partial.input_gradients == (R, R)


def test_only_what_divides_and_is_outermost():
    annotation, sizes = parse(OPERATORS["attention"][0]), {"b": 1, "s": 6, "t": 6, "g": 2, "q": 4, "d": 4, "v": 4}
    assert can_cut(annotation, "g", sizes, 2) and not can_cut(annotation, "g", sizes, 4)
    assert not can_cut(annotation, "q", sizes, 4) and not can_cut(annotation, "d", sizes, 2)
    assert not can_cut(annotation, "t", sizes, 2) and not can_cut(annotation, "b", sizes, 2)
    assert annotation.shape(annotation.outputs[0], sizes) == (1, 6, prod((2, 4, 4)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b s i+, o i+", "has no ->"), ("b s i+ -> b s i+", "summed over and in a result"),
        ("b s (g (q d)) -> b s", "cannot be read"), ("b s 3d -> b s", "cannot be read"), ("b s () -> b s", "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(text, message):
    with pytest.raises(TersorError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text", ["b s i+, o i+ -> b s o", "b s (g q d^), b t^ (g d^), b t^ (g v^) -> b s (g q v^)", "b s e^, e^ -> b s e^"]
)
def test_an_annotation_is_written_as_it_was_read(text):
    assert parse(text).text == text

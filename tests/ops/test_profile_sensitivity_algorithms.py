"""The measures of `profile --sensitivity`, each against numbers that are known."""

from __future__ import annotations

import math

import pytest
import torch
from tersor.formats.encodings import dequantize
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.schemes import scheme_from_name
from tersor.ops.model.statistics import InputStatistics, output_error
from tersor.ops.profile.sensitivity import formats_sqnr
from tersor.ops.profile.sensitivity.compensation import gptq_share
from tersor.ops.profile.sensitivity.depth import Contribution
from tersor.ops.profile.sensitivity.fisher import FisherDiagonal
from tersor.ops.profile.sensitivity.inputs import InputCollector
from tersor.ops.profile.sensitivity.lim import Lim
from tersor.ops.profile.sensitivity.outliers import outlier_channels
from tersor.ops.profile.sensitivity.routing import transitions
from tersor.ops.profile.sensitivity.zd import zd_score
from tersor.ops.quantize.gptq import GPTQ
from torch import nn

COUNT = 200_000


def drawn(kind: str) -> torch.Tensor:
    torch.manual_seed(1)
    if kind == "uniform":
        return torch.rand(COUNT) * 2 - 1
    if kind == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample((COUNT,))
    values = torch.randn(COUNT)
    if kind == "outliers":
        values[torch.randperm(COUNT)[: COUNT // 1000]] *= 30
    return values


# INT8, E2M5, E3M4, E4M3, E5M2; 200,000 samples, one scale, the clip with the least error
BEST_CLIP = {
    "uniform": (48.1, 44.4, 38.4, 32.4, 26.3),
    "gaussian": (40.8, 42.8, 37.6, 31.6, 25.6),
    "laplace": (35.7, 40.2, 37.6, 31.6, 25.6),
    "outliers": (18.3, 23.5, 37.0, 32.0, 25.9),
}
# the same with a scale per row of 4096, no clipping
PER_ROW = {
    "uniform": (48.1, 44.5, 38.4, 32.2, 25.8),
    "gaussian": (41.3, 43.0, 37.6, 31.6, 25.5),
    "laplace": (37.0, 41.2, 37.6, 31.6, 25.6),
}


@pytest.mark.parametrize("kind", BEST_CLIP)
def test_formats_with_the_best_clip(kind):
    found = [formats_sqnr.sqnr_db(drawn(kind)[None], name) for name in formats_sqnr.FORMATS]
    slack = 1.5 if kind == "outliers" else 0.6  # where the outliers fall decides; a finer search gains up to half a dB
    assert found == pytest.approx(BEST_CLIP[kind], abs=slack)


@pytest.mark.parametrize("kind", PER_ROW)
def test_formats_per_row(kind):
    rows = drawn(kind)[: 48 * 4096].view(48, 4096)
    found = [formats_sqnr.sqnr_db(rows, name, search=False) for name in formats_sqnr.FORMATS]
    assert found == pytest.approx(PER_ROW[kind], abs=0.4)


def test_values_of_e4m3_are_those_of_torch():
    """But for the two codes that torch keeps for NaN."""
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[torch.isfinite(exact)]
    assert formats_sqnr.largest(4, 3) == 2.0**15 * 1.875
    unit = 2.0**7  # torch's smallest step is 2^-9, here it is 2^-2
    assert torch.equal(formats_sqnr.rounded(exact * unit, "E4M3"), exact * unit)
    values = torch.linspace(-400, 400, 5001)
    assert torch.equal(formats_sqnr.rounded(values * unit, "E4M3") / unit, values.to(torch.float8_e4m3fn).float())


def test_int8_unless_the_tail_is_heavy():
    assert formats_sqnr.compare(drawn("gaussian").view(50, -1), 32)["choice"] == "INT8"
    heavy = drawn("outliers").view(50, -1)
    assert formats_sqnr.compare(heavy, 32)["choice"] == "E4M3"
    assert formats_sqnr.compare(torch.zeros(4, 8), 32)["choice"] == "INT8"


def test_kurtosis():
    assert formats_sqnr.kurtosis(drawn("uniform")) == pytest.approx(1.8, abs=0.02)
    assert formats_sqnr.kurtosis(drawn("gaussian")) == pytest.approx(3, abs=0.1)
    assert formats_sqnr.kurtosis(drawn("laplace")) == pytest.approx(6, abs=0.4)


def test_zd_of_a_gaussian_is_what_lies_beyond_one_sigma():
    values = drawn("gaussian")
    expected = 0.5 * math.erfc(1 / math.sqrt(2))
    assert zd_score(lambda: [values]) == pytest.approx(expected, abs=0.003)
    assert zd_score(lambda: values.split(7000)) == zd_score(lambda: [values])
    assert zd_score(lambda: [torch.ones(5)]) == 0.0


def test_zd_by_hand():
    assert zd_score(lambda: [torch.tensor([0.0, 0.0, 0.0]), torch.tensor([4.0])]) == 0.25


def test_lim():
    x = torch.randn(2, 3, 8)
    for factor, expected in ((2.0, -1.0), (-1.0, 1.0)):
        score = Lim()
        score.add(x, factor * x)
        assert score.score == pytest.approx(expected, abs=1e-6)
    whole, parts = Lim(), Lim()
    y = torch.randn(2, 3, 8)
    whole.add(x, y)
    for a, b in zip(x, y, strict=True):
        parts.add(a, b)
    assert parts.score == pytest.approx(whole.score)
    assert whole.score == pytest.approx(-float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)), abs=1e-6)


def test_contribution():
    before = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    after = before + torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])
    found = Contribution()
    found.add(before, after)
    assert found.numbers()["residual_contribution"] == pytest.approx(1.0)
    assert found.numbers()["cosine"] == pytest.approx((math.sqrt(0.5) + 1) / 2)


def test_outlier_channels():
    norms = torch.ones(20)
    norms[7], norms[3] = 9.0, 100.0
    found = outlier_channels(norms)
    assert (found["max_to_median"], found["above_6_medians"], found["channels"]) == (100.0, 2, [3, 7])
    assert outlier_channels(torch.zeros(4))["above_6_medians"] == 0


def test_fisher_foretells_the_divergence():
    """A softmax layer: half of d^T F d against the KL divergence itself, for changes that are independent and small."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 7, bias=False)
    x = torch.randn(400, 5, 12, generator=generator)
    fisher = FisherDiagonal()
    logits = layer(x)
    logits.register_hook(lambda gradient: fisher.add(x, gradient))
    targets = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)[:, 0]
    nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    with torch.no_grad():
        kl, foretold = 0.0, 0.0
        for _ in range(30):
            change = torch.randn(7, 12, generator=generator) * 0.02
            new = nn.functional.linear(x, layer.weight + change).log_softmax(-1)
            old = logits.log_softmax(-1)
            kl += float((old.exp() * (old - new)).sum(-1).mean())
            foretold += fisher.damage(change, 2000)
    assert foretold == pytest.approx(kl, rel=0.15)


def test_fisher_of_windows_is_a_sum():
    x, g = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    whole, rows = FisherDiagonal(), FisherDiagonal()
    whole.add(x, g)
    for one, other in zip(x, g, strict=True):
        rows.add(one, other)  # an expert's tokens
    change = torch.randn(2, 5)
    expected = sum(((b.T @ a) * change).square().sum() for a, b in zip(x, g, strict=True)) / 2 / 12
    assert whole.damage(change, 12) == pytest.approx(float(expected), rel=1e-5)
    assert rows.damage(change, 12) == pytest.approx(float(expected), rel=1e-5)
    assert FisherDiagonal().damage(change, 12) == 0.0


def test_transitions_count_every_pair():
    before, after = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1, 0], [1, 3]])
    expected = torch.zeros(3, 4, dtype=torch.int64)
    for row in range(2):
        for i in before[row].tolist():
            for j in after[row].tolist():
                expected[i, j] += 1
    assert torch.equal(transitions(before, after, (3, 4)), expected)


def test_layers_with_one_input_share_statistics():
    q, k, o = (nn.Linear(4, 4, bias=False) for _ in range(3))
    collector = InputCollector({"column_norms"})
    with collector.watching({"q": q, "k": k, "o": o}):
        for _ in range(2):
            x = torch.randn(3, 4)
            o(q(x) + k(x))
    assert collector.owner == {"q": "q", "k": "q", "o": "o"}
    assert collector.of("k") is collector.of("q") and collector.of("q").tokens == 6
    assert collector.of("o") is not collector.of("q")
    assert not q._forward_pre_hooks


def test_gptq_leaves_what_is_foretold():
    """Against GPTQ itself, without what it does besides."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator) * torch.rand(32, generator=generator).pow(2)
    statistics = InputStatistics({"hessian"})
    statistics.add(torch.randn(2000, 32, generator=generator) @ mix)
    weight, hessian = torch.randn(256, 32, generator=generator), statistics.hessian
    scheme = scheme_from_name("w8a16", -1)
    nearest = dequantize(round_to_nearest(weight, scheme, torch.float32, clip=False), scheme)
    gptq = GPTQ(clip=False, refit=False).quantize(weight, statistics, scheme, torch.float32)
    ratio = output_error(weight, dequantize(gptq, scheme), hessian) / output_error(weight, nearest, hessian)
    assert ratio < 0.6
    assert gptq_share(hessian) == pytest.approx(ratio, rel=0.25)


def test_without_correlation_gptq_gains_nothing():
    assert gptq_share(torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.5]))) == pytest.approx(1.0)
    assert gptq_share(torch.zeros(4, 4)) == 1.0

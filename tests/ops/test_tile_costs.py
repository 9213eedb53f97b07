"""What sparse products cost: read off between measured points, kept, and used again. Times are made up."""

from __future__ import annotations

import json

import pytest
import torch
from tersor.formats.errors import TersorError
from tersor.ops.model import tile_costs
from tersor.ops.model.sparse_samples import DENSE, admits, dense_units, make
from tersor.ops.model.tile_costs import KINDS, SPARSITIES, Points, TileCosts

CPU = torch.device("cpu")
SHAPE = (64, 96)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A cache of its own, and times that are the position of a call among all those of its shape."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def time_calls(calls, device):
        made.append(len(calls))
        return [float(1 + position) for position in range(len(calls))]

    monkeypatch.setattr(tile_costs, "time_calls", time_calls)
    return made


def test_points_are_read_off_linearly():
    points = Points((0.5, 0.8, 0.9), (50.0, 20.0, 10.0), (6.0, 3.0, 2.0))
    assert [points.at(units) for units in (10, 15, 20, 35, 50)] == [2, 2.5, 3, 4.5, 6]
    assert [points.at(units) for units in (0, 5, 100)] == pytest.approx([1, 1.5, 11])


def test_more_work_never_takes_less():
    points = Points((0.5, 0.8, 0.9), (50.0, 20.0, 10.0), (3.0, 5.0, 2.0))
    assert [points.at(units) for units in (10, 20, 35, 50, 80)] == [2, 5, 5, 5, 5]
    assert Points((0.5, 0.9), (50.0, 40.0), (9.0, 1.0)).at(0) == 0.0


def test_one_point_holds_everywhere():
    assert [Points((0.5,), (8.0,), (2.0,)).at(units) for units in (0, 8, 100)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("kind", "per_fibre", "expected"),
    [
        (("vector", (32, 1)), [64, 65, 1, 0], 1 + 2 + 1),
        (("vector", (1, 64)), [64, 65, 1, 0], 1 + 2 + 1),
        (("block", (16, 16)), [4, 5, 1, 0], 1 + 2 + 1),
        (("block", (32, 32)), [4, 5, 1, 0], 2 + 3 + 1),
        (("vector", (2, 128)), [3, 0], 3),
        (("sparse-bitmask", None), [4, 5, 1, 0], 10),
    ],
    ids=str,
)
def test_tiles_are_packed_within_a_fibre(kind, per_fibre, expected):
    assert dense_units(kind, torch.tensor(per_fibre), False) == expected
    assert dense_units(kind, torch.tensor(per_fibre), True) == sum(per_fibre)


@pytest.mark.parametrize("kind", [(DENSE, None), *KINDS], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (50, 70), (100, 132)], ids=str)
def test_samples_are_what_they_say(kind, shape):
    if not admits(kind, shape):
        assert kind[0] == "sparse-24-bitmask" and shape[1] % 4
        return
    sample = make(kind, shape, 0.75, torch.float32, CPU)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(sample.product(x), x @ sample.weight.t(), rtol=1e-4, atol=1e-4)
    if kind[1] is not None:
        one_row = kind[1][0] == 1
        assert len(sample.per_fibre) == -(-shape[one_row] // kind[1][one_row])
        assert sample.per_fibre.min() == sample.per_fibre.max() >= 1
    elif kind[0] != DENSE:
        assert sample.per_fibre.sum() == (sample.weight != 0).sum()


def test_every_kind_is_measured_at_every_sparsity(calls):
    costs = TileCosts.measure(CPU, torch.float32, [SHAPE], [1, 8])
    assert calls == [1 + 1 + (len(KINDS) - 1) * len(SPARSITIES)] * 2
    assert all(costs.knows(kind, SHAPE, tokens) for kind in ((DENSE, None), *KINDS) for tokens in (1, 8))
    assert costs.dense_seconds(SHAPE, 8) == 1.0
    points = costs.points[("vector", (32, 1)), SHAPE, 1]
    assert points.sparsities == pytest.approx(SPARSITIES, abs=0.01)  # in steps of one of 96
    assert costs.seconds("vector", (32, 1), SHAPE, 1, [48, 48]) == points.at(96)
    assert costs.seconds("sparse-24-bitmask", None, SHAPE, 1, [48] * 64) == 2.0
    with pytest.raises(ValueError, match=r"vector was not measured for weights \[64, 96\] and 2 tokens"):
        costs.seconds("vector", (32, 1), SHAPE, 2, [1])
    with pytest.raises(ValueError, match="dense was not measured"):
        costs.dense_seconds((1, 1), 1)


def test_what_was_measured_is_kept(calls):
    first = TileCosts.measure(CPU, torch.float32, [SHAPE], [1])
    assert TileCosts.measure(CPU, torch.float32, [SHAPE], [1]) == first == TileCosts.cached(CPU, torch.float32)
    assert len(calls) == 1
    more = TileCosts.measure(CPU, torch.float32, [SHAPE, (32, 64)], [1, 4])
    assert len(calls) == 4 and first.points.items() <= more.points.items()  # one for the old shape, two for the new one
    TileCosts.measure(CPU, torch.bfloat16, [SHAPE], [1])
    assert TileCosts.cached(CPU, torch.float32) == more
    assert set(TileCosts.cached(CPU, torch.bfloat16).points) == set(first.points)


def test_a_shape_that_does_not_admit_a_format_is_measured_once(calls):
    TileCosts.measure(CPU, torch.float32, [(32, 70)], [1])
    costs = TileCosts.measure(CPU, torch.float32, [(32, 70)], [1])
    assert len(calls) == 1 and not costs.knows(("sparse-24-bitmask", None), (32, 70), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "another"},
        {"kernels": tile_costs.KERNELS + 1},
        {"tersor": "0"},
        {"schema": "tersor.tile-costs/0"},
        {"measurements": [{"dtype": "float32"}]},
        {"measurements": None},
    ],
    ids=str,
)
def test_costs_of_something_else_are_not_believed(change, calls):
    first = TileCosts.measure(CPU, torch.float32, [SHAPE], [1])
    file = tile_costs.path(CPU)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert TileCosts.cached(CPU, torch.float32).points == {}
    assert TileCosts.measure(CPU, torch.float32, [SHAPE], [1]) == first and len(calls) == 2


def test_times_that_are_none_are_not_believed(calls):
    TileCosts.measure(CPU, torch.float32, [SHAPE], [1])
    file = tile_costs.path(CPU)
    content = json.loads(file.read_text())
    content["measurements"][0]["points"][0][2] = 0.0
    file.write_text(json.dumps(content))
    assert TileCosts.cached(CPU, torch.float32).points == {}


def test_a_cache_that_cannot_be_written_is_an_error(calls, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TersorError, match="tile_costs"):
        TileCosts.measure(CPU, torch.float32, [SHAPE], [1])


def test_calls_take_turns(monkeypatch):
    order: list[int] = []
    times = iter([5.0, 4.0, 3.0, 6.0, 4.0, 5.0])
    monkeypatch.setattr(tile_costs, "ROUNDS", 3)
    monkeypatch.setattr(tile_costs, "ENOUGH_SECONDS", 100.0)
    monkeypatch.setattr(tile_costs, "seconds", lambda work, device: (work(), next(times))[1])
    found = tile_costs.time_calls([lambda: order.append(0), lambda: order.append(1)], CPU)
    assert order == [0, 1] * 4 and found == [3.0, 4.0]  # the first round does not count


def test_predictions_are_plain_numbers():
    """Also beyond what was measured: reports cannot hold numpy's."""
    points = Points((0.5, 0.9), (10.0, 50.0), (1.0, 5.0))
    assert [type(points.at(units)) for units in (5.0, 10.0, 30.0, 80.0)] == [float] * 4
    assert points.at(80.0) == pytest.approx(8.0)

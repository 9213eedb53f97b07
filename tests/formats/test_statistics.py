"""Statistics on disk: what comes back is what went in, and nothing that does not fit is taken."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.statistics import Statistics, StatisticsWriter

FACTS = {
    "fingerprint": "f" * 32, "calibration": "default", "samples": 4, "seq_len": 32, "seed": 0,
    "kinds": ["norms", "hessian", "routing"],
}  # fmt: skip


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return matrix @ matrix.T


@pytest.fixture
def written(tmp_path):
    """Two layers with one input, one layer of its own, an expert that no token reached, two mixtures."""
    path = tmp_path / "stats.safetensors"
    names = {"a.0.q.weight": 5, "a.0.k.weight": 5, "a.0.o.weight": 3, "a.0.experts.1.up.weight": 5}
    with StatisticsWriter(path, names, {"a.0.experts": 4, "a.1.experts": 4}, FACTS) as writer:
        writer.add("a.0.q.weight", 17, torch.arange(5.0), symmetric(5))
        writer.share("a.0.k.weight", "a.0.q.weight")
        writer.add("a.0.o.weight", 17, torch.ones(3), symmetric(3, 1))
        writer.miss("a.0.experts.1.up.weight")
        writer.add_routing("a.0.experts", torch.tensor([4, 0, 1, 12]), None)
        writer.add_routing("a.1.experts", torch.tensor([4, 0, 1, 12]), torch.eye(4, dtype=torch.int64))
    return path


def change(path, metadata=None, tensors=None, drop=()):
    """Write the file again with something else in it."""
    with safe_open(path, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        facts = file.metadata()
    facts |= metadata or {}
    held = {name: tensor for name, tensor in (held | (tensors or {})).items() if name not in drop}
    save_file(held, path, {key: value for key, value in facts.items() if value is not None})


def test_comes_back(written):
    found = Statistics(written)
    assert found.kinds == ["norms", "hessian", "routing"]
    assert (found.samples, found.seq_len, found.seed) == (4, 32, 0)
    assert torch.equal(found.squares("a.0.q.weight"), torch.arange(5.0))
    assert torch.equal(found.hessian("a.0.q.weight"), symmetric(5))
    assert torch.equal(found.hessian("a.0.o.weight"), symmetric(3, 1))
    assert found.tokens("a.0.o.weight") == 17


def test_shared_inputs_are_stored_once(written):
    found = Statistics(written)
    assert found.owner("a.0.k.weight") == "a.0.q.weight"
    assert torch.equal(found.hessian("a.0.k.weight"), symmetric(5))
    assert not any(name.startswith("a.0.k.") for name in found.file.tensors)


def test_layers_without_tokens_have_none(written):
    found = Statistics(written)
    found.check("a.0.experts.1.up.weight", 5, "hessian")
    assert found.tokens("a.0.experts.1.up.weight") == 0


def test_routing_comes_back(written):
    routing = Statistics(written).routing()
    assert routing["a.0.experts"][1] is None
    assert torch.equal(routing["a.1.experts"][1], torch.eye(4, dtype=torch.int64))
    assert routing["a.1.experts"][0].tolist() == [4, 0, 1, 12]


def test_other_readers_can_open_it(written):
    """It is a safetensors file, and only the upper triangle is in it."""
    with safe_open(written, "pt") as file:
        assert file.get_tensor("a.0.q.weight.hessian").shape == (15,)
        assert json.loads(file.metadata()["aliases"]) == {"a.0.k.weight": "a.0.q.weight"}


def test_a_folder_is_looked_into(written):
    assert Statistics(written.parent).path == written


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), norms=st.booleans())
def test_any_shapes(tmp_path_factory, sizes, norms):
    path = tmp_path_factory.mktemp("stats") / "s.safetensors"
    names = {f"block.{index}.weight": size for index, size in enumerate(sizes)}
    with StatisticsWriter(path, names, {}, FACTS) as writer:
        for name, size in names.items():
            writer.add(name, size, torch.rand(size) if norms else None, symmetric(size, size))
    found = Statistics(path)
    for name, size in names.items():
        assert torch.equal(found.hessian(name), symmetric(size, size))
        assert found.has(name, "norms") == norms


def test_a_failed_run_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        StatisticsWriter(tmp_path / "s.safetensors", {"a.0.weight": 2}, {}, FACTS) as writer,
    ):
        writer.add("a.0.weight", 1, torch.ones(2))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_of_another_checkpoint(written, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(2)}, other)
    with pytest.raises(TersorError, match="statistics of another checkpoint"):
        Statistics(written).belongs_to(Checkpoint(other))


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"schema": "tersor.stats/9"}, "holds tersor.stats/9"),
        ({"schema": None}, "holds no schema"),
        ({"kinds": None}, "no 'kinds'"),
        ({"kinds": "norms"}, "'kinds' = 'norms'"),
        ({"kinds": "[1]"}, "'kinds'"),
        ({"aliases": "[]"}, "'aliases'"),
        ({"aliases": '{"a": 1}'}, "'aliases'"),
        ({"seq_len": '"long"'}, "'seq_len'"),
    ],
)
def test_wrong_metadata(written, metadata, message):
    change(written, metadata)
    with pytest.raises(TersorError, match=message):
        Statistics(written)


def test_missing_layer(written):
    with pytest.raises(TersorError, match=r"no hessian of a\.7\.q\.weight"):
        Statistics(written).check("a.7.q.weight", 5, "hessian")


def test_missing_kind(written):
    change(written, drop=["a.0.o.weight.squares"])
    found = Statistics(written)
    found.check("a.0.o.weight", 3, "hessian")
    with pytest.raises(TersorError, match=r"no norms of a\.0\.o\.weight"):
        found.check("a.0.o.weight", 3, "norms")


def test_wrong_shape(written):
    with pytest.raises(TersorError, match=r"is F32 \[15\], a\.0\.q\.weight needs F32 \[36\]"):
        Statistics(written).check("a.0.q.weight", 8, "hessian")


def test_wrong_dtype(written):
    change(written, tensors={"a.0.o.weight.squares": torch.ones(3, dtype=torch.float16)})
    with pytest.raises(TersorError, match=r"is F16 \[3\]"):
        Statistics(written).check("a.0.o.weight", 3, "norms")


def test_nan(written):
    change(written, tensors={"a.0.o.weight.squares": torch.full((3,), torch.nan)})
    with pytest.raises(TersorError, match="NaN or Inf"):
        Statistics(written).squares("a.0.o.weight")


def test_not_there(tmp_path):
    with pytest.raises(TersorError, match="no such file"):
        Statistics(tmp_path / "nothing.safetensors")


def test_truncated(written):
    written.write_bytes(written.read_bytes()[:-3])
    with pytest.raises(TersorError, match="truncated"):
        Statistics(written)

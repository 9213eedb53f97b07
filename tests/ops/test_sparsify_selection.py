"""Which format zeros pay in: against brute force over all of them, and what plan.json says of the choice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tersor.formats.errors import TersorError
from tersor.formats.sparse.packed import Packed, codec
from tersor.ops.model.tile_costs import Points, TileCosts
from tersor.ops.sparsify.selection import (
    KINDS,
    break_even,
    candidates,
    choose,
    plan_entry,
    read_plan,
    timed,
    write_plan,
)

BF16 = {"bits": 16, "dtype": "BF16"}


def zeros_at_random(shape: tuple[int, int], sparsity: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= sparsity


def zeros_in_tiles(shape: tuple[int, int], tile: tuple[int, int], sparsity: float) -> torch.Tensor:
    grid = zeros_at_random((-(-shape[0] // tile[0]), -(-shape[1] // tile[1])), sparsity)
    return grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def two_in_four(shape: tuple[int, int]) -> torch.Tensor:
    draw = torch.rand(shape[0], shape[1] // 4, 4, generator=torch.Generator().manual_seed(0))
    return (draw.argsort(-1).argsort(-1) < 2).view(shape)


def found_for(nonzero: torch.Tensor, bits: int = 16, dtype: str = "BF16", in_words: bool = False, **more):
    rows, columns = nonzero.shape
    nbytes = rows * (-(-columns * bits // 32) * 4 if in_words else columns * bits // 8)
    return candidates(nonzero, bits, nbytes, dtype, in_words, **more)


def encoded_bytes(nonzero: torch.Tensor, format: str, tile: tuple[int, int] | None) -> int:
    """Of what the codec makes of 16-bit elements."""
    elements = torch.where(nonzero, 7, 0).to(torch.int16)
    module, (rows, columns) = codec(format), nonzero.shape
    count = module.count(elements, tile)
    packed = Packed("m.weight", format, "BF16", (rows, columns), rows, columns, 16, count, tile=tile)
    return sum(part.nbytes for part in module.encode(packed, elements).values())


MASKS = {
    "dense": torch.ones(64, 128, dtype=torch.bool),
    "all zero": torch.zeros(64, 128, dtype=torch.bool),
    "random 50": zeros_at_random((64, 128), 0.5),
    "random 90": zeros_at_random((128, 256), 0.9),
    "ragged": zeros_at_random((50, 77), 0.8),
    "2:4": two_in_four((64, 128)),
    "vector": zeros_in_tiles((128, 256), (32, 1), 0.7),
    "short vector": zeros_in_tiles((128, 256), (16, 1), 0.7),
    "row": zeros_in_tiles((64, 512), (1, 64), 0.7),
    "block": zeros_in_tiles((128, 256), (32, 32), 0.7),
    "small block": zeros_in_tiles((128, 256), (16, 16), 0.7),
    "ragged block": zeros_in_tiles((100, 200), (32, 32), 0.6),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_smallest_of_all_is_chosen(name):
    """Sizes are to the byte what the codecs write, and what was left out could not have won."""
    nonzero = MASKS[name]
    found = found_for(nonzero)
    chosen = choose(found)
    sizes = {(None, None): 2 * nonzero.numel()}
    for format, tile in KINDS[1:]:
        if format != "sparse-24-bitmask" or name in ("all zero", "2:4"):
            sizes[format, tile] = encoded_bytes(nonzero, format, tile)
    assert chosen.nbytes == min(sizes.values())
    for one in found[1:]:
        assert one.nbytes == sizes[one.kind]
    for kind in sizes.keys() - {one.kind for one in found} - {(None, None)}:
        assert sizes[kind] >= sizes[None, None]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", "dense"),
        ("random 50", "sparse-bitmask"),
        ("random 90", "sparse-bitmask"),
        ("2:4", "sparse-24-bitmask"),
        ("vector", "vector 32x1"),
        ("short vector", "vector 16x1"),
        ("row", "vector 1x64"),
        ("block", "block 32x32"),
        ("small block", "block 16x16"),
    ],
)
def test_zeros_choose_their_format(name, expected):
    assert choose(found_for(MASKS[name])).name == expected


def test_of_equals_the_simpler_is_chosen():
    dense, *others = found_for(MASKS["random 90"])
    same = [replace(one, nbytes=dense.nbytes, seconds={1: 1.0}) for one in others]
    assert choose([*same, dense]) == dense
    assert choose([*same, replace(dense, seconds={1: 1.0})], "time").format == "dense"


@pytest.mark.parametrize(("bits", "in_words"), [(4, True), (8, False), (32, False), (2, True)])
def test_stored_widths(bits, in_words):
    """The fewer bits a weight has, the dearer is the mask."""
    dtype = "I32" if in_words else {8: "I8", 32: "F32"}[bits]
    found = {one.name: one for one in found_for(zeros_at_random((64, 256), 0.6), bits, dtype, in_words)}
    dense, mask = found["dense"].nbytes, found["sparse-bitmask"].nbytes
    assert dense == 64 * 256 * bits // 8
    stored = int(zeros_at_random((64, 256), 0.6).sum())
    assert mask == -(-stored * bits // 8) + 64 * 256 // 8 + 64 * 8 + 16


def test_coverage_is_counted_per_fibre():
    nonzero = torch.zeros(64, 128, dtype=torch.bool)
    nonzero[:32, ::2] = True  # the first row block has every other vector
    (one,) = (one for one in found_for(nonzero) if one.name == "vector 32x1")
    assert one.per_fibre.tolist() == [64, 0] and one.count == 64
    assert one.coverage == 0.25 and one.fibre_coverage == (0.0, 0.0, 0.5)
    (row,) = (one for one in found_for(nonzero, formats=["vector"], tiles=[(1, 64)]) if one.name == "vector 1x64")
    assert row.per_fibre.tolist() == [32, 32] and row.fibre_coverage == (0.5, 0.5, 0.5)


def test_only_what_is_asked_for():
    nonzero = MASKS["random 50"]
    assert {one.format for one in found_for(nonzero, formats=["block"])} == {"dense", "block"}
    assert {one.format for one in found_for(nonzero, formats=["sparse-24-bitmask"])} == {"dense"}
    assert [one.format for one in found_for(nonzero, formats=["tiled-csl"])] == ["dense", "tiled-csl"]
    named = found_for(nonzero, tiles=[(8, 1), (8, 8)])
    assert {"vector 8x1", "block 8x8"} <= {one.name for one in named}
    assert choose(found_for(zeros_in_tiles((64, 128), (8, 1), 0.7), tiles=[(8, 1)])).name == "vector 8x1"


@pytest.mark.parametrize(
    ("bits", "columns", "format", "tile", "expected"),
    [
        (16, 1 << 20, "sparse-bitmask", None, 0.0625),
        (16, 512, "sparse-bitmask", None, 0.0703125),
        (8, 1 << 20, "sparse-bitmask", None, 0.125),
        (4, 1 << 20, "sparse-bitmask", None, 0.25),
        (2, 64, "sparse-bitmask", None, 1.0),
        (16, 4096, "sparse-24-bitmask", None, 0.5),
        (2, 4096, "sparse-24-bitmask", None, 1.0),
        (16, 4096, "tiled-csl", None, 0.5),
        (16, 4096, "vector", (32, 1), 2 / 66),
        (4, 4096, "vector", (16, 1), 0.2),
        (16, 4096, "block", (16, 16), 2 / 514),
    ],
)
def test_break_even(bits, columns, format, tile, expected):
    assert break_even(bits, columns, format, tile) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("format", ["sparse-bitmask", "vector"])
def test_break_even_is_where_sizes_cross(format):
    tile = (32, 1) if format == "vector" else None
    point = break_even(16, 512, format, tile)
    for sparsity, smaller in ((point - 0.01, False), (point + 0.01, True)):
        nonzero = torch.ones(1024, 512, dtype=torch.bool)
        if tile is None:
            nonzero[:, : round(sparsity * 512)] = False
        else:
            nonzero.view(32, 32, 512)[:, :, : round(sparsity * 512)] = False
        found = {one.kind: one.nbytes for one in found_for(nonzero, formats=[format])}
        assert (found[format, tile] < found["dense", None]) == smaller


def test_a_format_without_tiles_has_no_break_even():
    with pytest.raises(ValueError, match="vector"):
        break_even(16, 512, "vector")


def made_up_costs(shape: tuple[int, int], faster: dict) -> TileCosts:
    costs = TileCosts("a device", "float32")
    for tokens in (1, 16):
        for kind in KINDS:
            costs.points[kind, shape, tokens] = Points((0.0,), (0.0,), (faster.get(kind, 2.0) * tokens,))
    costs.points[("dense", None), shape, 1] = Points((0.0,), (0.0,), (1.0,))
    costs.points[("dense", None), shape, 16] = Points((0.0,), (0.0,), (16.0,))
    return costs


def test_the_fastest_where_times_were_measured():
    nonzero = MASKS["vector"]
    found = found_for(nonzero)
    slow = timed(found, made_up_costs((128, 256), {}), (128, 256), [1, 16])
    assert choose(slow, "time").format == "dense" and choose(slow).name == "vector 32x1"
    quick = timed(found, made_up_costs((128, 256), {("sparse-bitmask", None): 0.5}), (128, 256), [1, 16])
    assert choose(quick, "time").name == "sparse-bitmask"
    with pytest.raises(ValueError, match="measured"):
        choose(found, "time")
    with pytest.raises(ValueError, match="beauty"):
        choose(found, "beauty")


def test_tiles_that_were_not_timed_are_not_the_fastest():
    found = found_for(zeros_in_tiles((128, 256), (8, 1), 0.9), tiles=[(8, 1)])
    known = timed(found, made_up_costs((128, 256), {("sparse-bitmask", None): 0.5}), (128, 256), [1])
    (named,) = (one for one in known if one.name == "vector 8x1")
    assert named.seconds == {} and choose(known).name == "vector 8x1"
    assert choose(known, "time").name == "sparse-bitmask"


def test_plan_tells_choice_gain_and_runner_up(tmp_path):
    found = found_for(MASKS["vector"])
    chosen = choose(found)
    costs = made_up_costs((128, 256), {("vector", (32, 1)): 0.25})
    entries = {
        "bytes.weight": plan_entry(found, chosen),
        "timed.weight": plan_entry(found, chosen, costs, [1, 16], "time"),
        "dense.weight": plan_entry(found_for(MASKS["dense"]), choose(found_for(MASKS["dense"]))),
    }
    entry = entries["timed.weight"]
    assert (entry["format"], entry["tile"], entry["axis"], entry["kernel"]) == ("vector", [32, 1], "K", "tile_matmul")
    assert entry["bytes"] == chosen.nbytes and entry["dense_bytes"] == 2 * 128 * 256 and entry["fibres"] == 4
    assert entry["predicted"][1] == {"tokens": 16, "seconds": 4.0, "dense_seconds": 16.0, "gain": 4.0}
    assert entry["runner_up"]["format"] == "dense"  # the other kernels are slower
    assert entries["bytes.weight"]["predicted"] == [] and entries["bytes.weight"]["runner_up"]["format"] == "vector"
    assert entries["dense.weight"]["kernel"] == "matmul"
    write_plan(tmp_path, "time", "a device", entries)
    content = read_plan(tmp_path / "plan.json")
    assert content["schema"] == "tersor.sparse-plan/1" and content["tensors"] == entries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "tersor.policy/1"}, "schema"),
        ({"goal": "beauty"}, "goal"),
        ({"device": 3}, "device"),
        ({"tensors": []}, "tensors"),
        ({"tensors": {"a": 1}}, "'a'.*not an object"),
        ({"format": "zip"}, "format"),
        ({"format": []}, "format"),
        ({"tile": None}, "tile"),
        ({"tile": [0, 1]}, "tile"),
        ({"shape": [1]}, "shape"),
        ({"bytes": -1}, "bytes"),
        ({"dense_bytes": "many"}, "dense_bytes"),
        ({"coverage": 2}, "coverage"),
        ({"coverage_per_fibre": None}, "coverage"),
        ({"predicted": None}, "predicted"),
        ({"predicted": [{"tokens": 1}]}, "predicted"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(change, words, tmp_path):
    found = found_for(MASKS["vector"])
    write_plan(tmp_path, "size", None, {"a.weight": plan_entry(found, choose(found))})
    path = tmp_path / "plan.json"
    content = json.loads(path.read_text())
    if next(iter(change)) in content:
        content |= change
    else:
        content["tensors"]["a.weight"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(TersorError, match=words):
        read_plan(path)

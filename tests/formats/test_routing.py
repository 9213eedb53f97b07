"""Routing files: traces, counts and what `profile --collect` saves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tersor.formats.errors import TersorError
from tersor.formats.routing import from_trace, read_expert_map, read_routing, write_expert_map
from tersor.formats.statistics import StatisticsWriter


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(3, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_counts_of_a_trace_are_those_of_a_loop(tokens, layers, k, experts, seed):
    trace = np.random.default_rng(seed).integers(0, experts, (tokens, layers, k))
    found = from_trace(trace, experts)
    counts, transitions = np.zeros((layers, experts)), np.zeros((layers - 1, experts, experts))
    for token in trace:
        for layer in range(layers):
            for expert in token[layer]:
                counts[layer, expert] += 1
                for other in token[layer + 1] if layer < layers - 1 else ():
                    transitions[layer, expert, other] += 1
    assert (found.counts == counts).all() and (found.transitions == transitions).all()
    assert (found.layers, found.tokens, found.experts) == (layers, tokens, experts)


@pytest.mark.parametrize("kind", ["int64", "int32", "int16", "uint8"])
@pytest.mark.parametrize("name", ["trace", "routing"])
def test_a_trace_is_read(tmp_path, kind, name):
    trace = np.random.default_rng(0).integers(0, 8, (50, 3, 2)).astype(kind)
    save_file({name: trace}, tmp_path / "t.safetensors")
    found = read_routing(tmp_path / "t.safetensors", 8)
    assert (found.trace == trace).all() and found.transitions.sum() == 50 * 2 * 4
    first, last = found.split(0.2)
    assert (first.tokens, last.tokens) == (40, 10) and (last.trace == trace[40:]).all()
    assert read_routing(tmp_path / "t.safetensors").experts == trace.max() + 1


def test_one_expert_a_token_needs_no_third_dimension(tmp_path):
    save_file({"trace": np.array([[0, 1], [1, 0]])}, tmp_path / "t.safetensors")
    assert read_routing(tmp_path / "t.safetensors", 2).transitions.tolist() == [[[0, 1], [1, 0]]]


def test_counts_are_read(tmp_path):
    steps = np.arange(18).reshape(2, 3, 3)
    save_file({"transitions": steps, "counts": np.ones((3, 3), np.int64)}, tmp_path / "c.safetensors")
    found = read_routing(tmp_path / "c.safetensors", 3)
    assert (found.transitions == steps).all() and found.trace is None and found.layers == 3
    save_file({"transitions": steps}, tmp_path / "c.safetensors")
    assert (read_routing(tmp_path / "c.safetensors").counts == [*steps.sum(2), steps[1].sum(0)]).all()
    with pytest.raises(TersorError, match="not tokens"):
        found.split()


def test_statistics_are_read_in_the_order_of_the_layers(tmp_path):
    """As StatisticsWriter writes them, with a layer 10 behind layer 9."""
    names = [f"model.layers.{layer}.mlp.experts" for layer in (9, 10, 11)]
    facts = {"fingerprint": "x", "calibration": "x", "samples": 1, "seq_len": 1, "seed": 0, "kinds": ["routing"]}
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (3, 4), generator=generator)
    steps = torch.randint(0, 9, (3, 4, 4), generator=generator)
    with StatisticsWriter(tmp_path / "stats.safetensors", {}, dict.fromkeys(names, 4), facts) as writer:
        for index in (1, 0, 2):
            writer.add_routing(names[index], counts[index], steps[index] if index else None)
    found = read_routing(tmp_path)
    assert found.modules == tuple(names)
    assert (found.counts == counts.numpy()).all() and (found.transitions == steps[1:].numpy()).all()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"trace": np.array([[[0, 9]]])}, "names expert 9, the model has 8"),
        ({"trace": np.array([[[0, -1]]])}, "names expert -1"),
        ({"trace": np.zeros((4, 2, 2), np.float32)}, "is none"),
        ({"trace": np.zeros((0, 2, 2), np.int64)}, "is none"),
        ({"trace": np.zeros((2, 2, 2), bool)}, "dtype BOOL"),
        ({"weights": np.zeros(3)}, "holds no routing"),
        ({"transitions": np.zeros((2, 8, 4))}, "has shape"),
        ({"transitions": np.zeros((2, 4, 4))}, "4 experts, the model has 8"),
        ({"transitions": np.full((2, 8, 8), np.nan)}, "no counts"),
        ({"transitions": np.full((2, 8, 8), -1)}, "no counts"),
        ({"transitions": np.zeros((2, 8, 8)), "counts": np.zeros((2, 8))}, "'transitions' say"),
        ({"a.0.counts": np.zeros(8), "a.1.counts": np.zeros(8)}, "a.1.transitions"),
        ({"a.0.counts": np.zeros(8), "a.1.counts": np.zeros(4)}, "4 and 8 experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_routing_is_named(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(TersorError, match=words):
        read_routing(tmp_path / "bad.safetensors", 8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TersorError, match=r"none\.safetensors"):
        read_routing(tmp_path / "none.safetensors")


def test_a_short_trace_cannot_be_split():
    with pytest.raises(TersorError, match="1 tokens"):
        from_trace(np.zeros((1, 2, 1), int), 2).split()


def test_the_expert_map_comes_back(tmp_path):
    orders = {"model.layers.0.mlp.experts": [2, 0, 1], "model.layers.1.mlp.experts": [0, 1, 2]}
    write_expert_map(tmp_path / "expert_map.json", orders, 3, 1)
    assert read_expert_map(tmp_path / "expert_map.json") == orders
    for content in ({"schema": "x", "layers": {}}, {"schema": "tersor.experts/1", "layers": {"a": [0, 0]}}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(TersorError):
            read_expert_map(tmp_path / "bad.json")

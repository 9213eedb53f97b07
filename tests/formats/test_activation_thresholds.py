"""activation_sparsity.json: written, read back, carried along, and refused where it does not fit the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tersor.formats.activation_thresholds import FILE_NAME, Threshold, description, read, refuse, threshold_of
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError

UP, DOWN, NORM = "model.layers.0.up.weight", "model.layers.11.down.weight", "model.layers.0.norm.weight"
ENTRIES = {UP: Threshold(0.03125, 0.5), DOWN: Threshold(0.0, 0.25)}


@pytest.fixture
def folder(tmp_path) -> Path:
    tensors = {UP: torch.ones(8, 4), DOWN: torch.ones(4, 8), NORM: torch.ones(4), "lm_head.weight": torch.ones(9, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def put(folder: Path, content: object) -> Checkpoint:
    (folder / FILE_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    return Checkpoint(folder)


def changed(**entry) -> dict:
    """The description with other values in the entry of UP."""
    content = description(0.5, ENTRIES)
    content["tensors"][UP] |= entry
    return content


def test_round_trip(folder):
    checkpoint = put(folder, description(0.5, ENTRIES))
    assert read(checkpoint) == ENTRIES
    assert threshold_of(checkpoint) == {UP: 0.03125, DOWN: 0.0}


def test_without_the_file(folder):
    assert read(Checkpoint(folder)) == {}
    assert read(Checkpoint(folder / "model.safetensors")) == {}
    refuse(Checkpoint(folder), "no thresholds")


def test_integers_are_numbers(folder):
    assert read(put(folder, changed(threshold=2, sparsity=1)))[UP] == Threshold(2.0, 1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not readable"]),
        ([], ["not a JSON object"]),
        ({"schema": "tersor.activations/2"}, ["tersor.activations/2"]),
        ({}, ["schema"]),
        (description(0.5, ENTRIES) | {"tensors": [UP]}, ["'tensors'"]),
        *(
            (description(0.5, ENTRIES) | {"target": bad}, ["'target'"])
            for bad in (None, 0, 1, -0.5, math.nan, "0.5", True)
        ),
        (description(0.5, {"model.layers.1.up.weight": Threshold(1.0, 0.5)}), ["model.layers.1.up.weight", "removed"]),
        (description(0.5, {NORM: Threshold(1.0, 0.5)}), [NORM, "linear"]),
        (description(0.5, {"lm_head.weight": Threshold(1.0, 0.5)}), ["lm_head.weight", "block"]),
        (description(0.5, ENTRIES) | {"tensors": {UP: 0.5}}, [UP]),
        (description(0.5, ENTRIES) | {"tensors": {UP: {"threshold": 1.0}}}, [UP, "sparsity"]),
        *((changed(threshold=bad), [UP, "threshold"]) for bad in (-1e-9, math.nan, math.inf, "1", True, None, 10**400)),
        *((changed(sparsity=bad), [UP, "sparsity"]) for bad in (-0.1, 1.1, math.nan, [], "1")),
    ],
)
def test_refused(content, words, folder):
    with pytest.raises(TersorError) as caught:
        read(put(folder, content))
    for word in [*words, FILE_NAME]:
        assert word in str(caught.value)
    assert "--activations" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entry=st.dictionaries(st.sampled_from(["threshold", "sparsity", "other"]), JSON),
    name=st.sampled_from([UP, NORM, "x"]),
)
def test_any_entry_is_read_or_refused(entry, name, folder):
    checkpoint = put(folder, description(0.5, {}) | {"tensors": {name: entry}})
    try:
        found = read(checkpoint)
    except TersorError:
        return
    assert found.keys() == {UP}
    assert 0 <= found[UP].threshold < math.inf
    assert 0 <= found[UP].sparsity <= 1


def test_refuse_says_why_and_what_to_do(folder):
    with pytest.raises(TersorError, match="layers get other numbers") as caught:
        refuse(put(folder, "{"), "layers get other numbers")
    assert FILE_NAME in caught.value.hint


def test_travels_with_quantized_weights(family, tmp_path):
    """Byte for byte, and the names are those of the dense weights."""
    import shutil

    from tersor.ops.quantize.run import Request, quantize

    folder = shutil.copytree(family("llama"), tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    text = json.dumps(description(0.5, {name: Threshold(0.25, 0.5)}))
    (folder / FILE_NAME).write_text(text)
    quantize(Request(str(folder), tmp_path / "out", group_size=32))
    assert (tmp_path / "out" / FILE_NAME).read_text() == text
    quantized = Checkpoint(tmp_path / "out")
    assert name not in quantized.tensors
    assert threshold_of(quantized) == {name: 0.25}

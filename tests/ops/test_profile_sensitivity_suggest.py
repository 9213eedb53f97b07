"""Budgets and the mix of schemes that meets them."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import load_hardware
from tersor.ops.model.facts import facts
from tersor.ops.model.operators import operators
from tersor.ops.model.roofline import total_seconds
from tersor.ops.model.schemes import scheme_from_name
from tersor.ops.model.stored import stored_weights
from tersor.ops.profile.headers.roofline import middle_step
from tersor.ops.profile.request import Workload
from tersor.ops.profile.sensitivity.page import sections
from tersor.ops.profile.sensitivity.step_time import step_time
from tersor.ops.profile.sensitivity.suggest import Target, parse_target, policy_of, suggest

BITS = {"w2a16-g64": 2.25, "w4a16-g64": 4.25, "w8a16-g128": 8.125, "w8a8": 8.1}
SHAPE = [64, 128]
WEIGHTS = 64 * 128


def layer(unit: str, sensitivity: float) -> dict:
    """Damage falls fourfold with each bit."""
    schemes = {
        label: {
            "settings": {"scheme": label.partition("-")[0]}
            | ({"group_size": int(label[-2:])} if "g64" in label else {}),
            "bits": bits,
            "bytes": int(bits * WEIGHTS / 8),
            "damage": sensitivity * 4**-bits,
            "sqnr_db": 6 * bits,
            "relative_mse": 4**-bits,
        }
        for label, bits in BITS.items()
    }
    schemes["2:4"] = {"settings": {"sparsity": 0.5}, "damage": sensitivity, "sqnr_db": 3.0, "relative_mse": 0.5}
    return {
        "unit": unit, "shape": SHAPE, "bytes": 2 * WEIGHTS, "schemes": schemes, "kurtosis": 3.0, "format_choice": "INT8",
        "formats_sqnr_db": {"INT8": 40.0, "E4M3": 31.0, "E5M2": 25.0},
    }  # fmt: skip


def found(sensitivities=(1.0, 1.0, 300.0), units="abc") -> dict:
    names = [f"model.layers.{index}.up_proj.weight" for index in range(len(sensitivities))]
    return {
        "damage_is": "nats per token",
        "other_bytes": 1000,
        "weights": WEIGHTS * len(sensitivities),
        "tensors": {
            name: layer(*pair) for name, pair in zip(names, zip(units, sensitivities, strict=True), strict=True)
        },
        "blocks": [],
        "routing": {},
        "warnings": [],
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("4.25bits", Target("bits", 4.25)),
        ("4bit", Target("bits", 4)),
        ("2.5GB", Target("bytes", 2.5e9)),
        ("1GiB", Target("bytes", 2**30)),
        ("700b", Target("bytes", 700)),
        ("30ms", Target("seconds", 0.03)),
        ("1.5 s", Target("seconds", 1.5)),
    ],
)
def test_targets(text, expected):
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["", "4", "bits", "-3bits", "0bits", "4.25 bytes please", "1e3MB"])
def test_no_targets(text):
    with pytest.raises(TersorError, match="is no budget"):
        parse_target(text)


def test_the_sensitive_layer_gets_the_bits():
    chosen = suggest(found(), "6bits")
    labels = list(chosen["labels"].values())
    assert labels[2] == "w8a16-g128" and set(labels[:2]) == {"w4a16-g64"}
    assert chosen["bits_per_weight"] <= 6
    assert chosen["uniform"]["label"] == "w4a16-g64"
    assert chosen["damage"] < chosen["uniform"]["damage"]


def test_nothing_better_fits():
    """Against all mixes there are."""
    data = found((1.0, 7.0, 300.0))
    options = ["keep", "w2a16-g64", "w4a16-g64", "w8a16-g128"]
    tensors = list(data["tensors"].values())

    def totals(labels):
        kept = [(numbers["bytes"], 0.0) if label == "keep" else (numbers["schemes"][label]["bytes"], numbers["schemes"][label]["damage"]) for numbers, label in zip(tensors, labels, strict=True)]  # fmt: skip
        return sum(row[0] for row in kept), sum(row[1] for row in kept)

    for bits in (2.3, 3.5, 5.0, 9.0):
        budget = bits * 3 * WEIGHTS / 8
        best = min(damage for nbytes, damage in map(totals, itertools.product(options, repeat=3)) if nbytes <= budget)
        assert suggest(data, f"{bits}bits")["damage"] == pytest.approx(best)


def test_bytes_count_the_whole_checkpoint():
    data = found()
    chosen = suggest(data, "14000B")
    assert chosen["checkpoint_bytes"] <= 14000
    assert chosen["checkpoint_bytes"] == chosen["linear_bytes"] + 1000
    everything = suggest(data, "1GB")
    assert set(everything["labels"].values()) == {"keep"} and everything["damage"] == 0


@pytest.mark.parametrize("text, smallest", [("2bits", "2.25bits"), ("7000B", "7912B"), ("1ms", "6.5ms")])
def test_impossible_budgets_name_the_smallest(text, smallest):
    with pytest.raises(TersorError, match="less than any mix") as caught:
        suggest(found(), text, lambda name, shape, nbytes, scheme: 0.002 if scheme else 0.004, other_seconds=0.0005)
    assert smallest in caught.value.hint


def test_the_smallest_that_is_named_is_possible():
    with pytest.raises(TersorError) as caught:
        suggest(found(), "7000B")
    smallest = re.search(r"\((\d+B)\)", caught.value.hint)[1]
    assert set(suggest(found(), smallest)["labels"].values()) == {"w2a16-g64"}


def test_layers_with_one_input_get_one_scheme():
    chosen = suggest(found((1.0, 300.0, 2.0), units="aab"), "7bits")
    first, second, _ = chosen["labels"].values()
    assert first == second


def test_time_is_asked_of_whoever_predicts_it():
    seen = []

    def cost(name, shape, nbytes, scheme):
        seen.append((shape, nbytes, scheme))
        return 0.01 if scheme is None else scheme.bits / 1000

    chosen = suggest(found(), "20ms", cost, other_seconds=0.002)
    spent = 0.002 + sum(0.01 if label == "keep" else int(label[1]) / 1000 for label in chosen["labels"].values())
    assert spent <= 0.02 + 1e-12
    assert (tuple(SHAPE), int(8.125 * WEIGHTS / 8), scheme_from_name("w8a16")) in seen
    assert (tuple(SHAPE), 2 * WEIGHTS, None) in seen


def test_time_without_a_prediction():
    with pytest.raises(TersorError, match="needs a prediction"):
        suggest(found(), "20ms")


def test_the_policy_names_every_layer_exactly():
    data = found()
    policy = policy_of(data, suggest(data, "9bits")["labels"])
    assert policy["schema"] == "tersor.policy/1"
    for pattern, name in zip(policy["tensors"], data["tensors"], strict=True):
        assert re.fullmatch(pattern, name) and not re.fullmatch(pattern, name.replace(".", "x"))
    assert policy["tensors"][re.escape("model.layers.2.up_proj.weight")] in ({"keep": True}, {"scheme": "w8a16"})


def test_the_page_says_what_was_chosen():
    data = found()
    data["suggestion"] = suggest(data, "6bits")
    page = sections(data)
    assert [section.title for section in page][-1] == "Suggested mix"
    assert "less damage than w4a16-g64" in page[-1].lead
    assert page[-1].items[1].columns == ["layers", "w4a16-g64", "w8a16-g128"]


def test_time_of_a_real_model(family):
    """What the roofline says of the whole model is what its parts add up to; fewer bits take less time."""
    checkpoint, hardware = Checkpoint(family("llama")), load_hardware("h100")
    data = found(units="abc")
    names = [name for name in checkpoint.tensors if "down_proj" in name or "up_proj" in name][:3]
    for name, numbers in zip(names, data["tensors"].values(), strict=True):
        numbers["shape"] = list(checkpoint.tensors[name].shape)
        numbers["bytes"] = checkpoint.tensors[name].nbytes
    data["tensors"] = dict(zip(names, data["tensors"].values(), strict=True))
    cost, other = step_time(checkpoint, data, hardware, Workload())
    weights = stored_weights(checkpoint)
    model = facts(checkpoint, weights)
    whole = total_seconds(model, operators(model, weights), middle_step(Workload()), hardware)
    dense = sum(
        cost(name, tuple(data["tensors"][name]["shape"]), data["tensors"][name]["bytes"], None) for name in names
    )
    assert other + dense == pytest.approx(whole)
    slow = replace(hardware, memory_gbps=0.001, kernel_floor_seconds=0.0)
    cost, _ = step_time(checkpoint, data, slow, Workload())
    big, small = cost(names[0], (96, 64), 12288, None), cost(names[0], (96, 64), 3072, scheme_from_name("w4a16"))
    assert small < big / 2


def test_for_gptq_a_layer_counts_by_what_it_would_leave():
    data = found((300.0, 1.0, 300.0))
    for numbers, share in zip(data["tensors"].values(), (1.0, 1.0, 0.0001), strict=True):
        numbers["gptq_share"] = share
    chosen = suggest(data, "6bits", method="gptq")
    assert list(chosen["labels"].values()) == ["w8a16-g128", "w4a16-g64", "w4a16-g64"]
    assert chosen["method"] == "gptq"

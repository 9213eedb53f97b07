"""Profiles from headers of published models: their known numbers, memory, bad input, and what the page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import header_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import load_hardware
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table
from tersor.ops.model.facts import facts
from tersor.ops.model.stored import stored_weights
from tersor.ops.profile.headers.page import sections
from tersor.ops.profile.headers.run import profile_headers
from tersor.ops.profile.request import Workload

TINY = models.TINY_LLAMA


def profile(folder: Path, hardware: str = "h100", **workload) -> dict:
    return profile_headers(Checkpoint(folder), load_hardware(hardware), Workload(**workload))


def kinds(data: dict) -> dict[str, dict]:
    return {row["kind"]: row for row in data["modules"]}


def codes(data: dict) -> set[str]:
    return {warning["code"] for warning in data["warnings"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(name) -> profile of a published model on an H100, each made once."""
    root = tmp_path_factory.mktemp("published")
    made = {
        "llama-8b": lambda path: models.write_model(path, models.LLAMA_8B, models.llama_shapes(models.LLAMA_8B)),
        "llama-405b": lambda path: models.write_model(
            path, models.LLAMA_405B, models.llama_shapes(models.LLAMA_405B), shard_bytes=3_000_000_000
        ),
        "mixtral": lambda path: models.write_model(path, models.MIXTRAL, models.llama_shapes(models.MIXTRAL)),
        "deepseek-v3": lambda path: models.write_model(
            path, models.DEEPSEEK_V3, models.deepseek_shapes(models.DEEPSEEK_V3), shard_bytes=5_000_000_000
        ),
        "gemma3-27b": lambda path: models.write_model(path, models.GEMMA3_27B, models.gemma3_shapes(models.GEMMA3_27B)),
        "gemma3-4b": lambda path: models.write_model(path, models.GEMMA3_4B, models.gemma3_4b_shapes()),
    }
    found: dict[str, dict] = {}

    def get(name: str) -> dict:
        if name not in found:
            found[name] = profile(made[name](root / name))
        return found[name]

    return get


# Parameters as the model cards give them; cache per token from heads, or from the latent of the DeepSeek-V3 report.
@pytest.mark.parametrize(
    ("name", "params", "cache_bytes"),
    [
        ("llama-8b", 8_030_261_248, 128 * 1024),
        ("llama-405b", 405_853_388_800, 126 * 2 * 8 * 128 * 2),
        ("mixtral", 46_702_792_704, 128 * 1024),
        ("deepseek-v3", 671_026_419_200, 61 * (512 + 64) * 2),
        ("gemma3-27b", None, 62 * 2 * 16 * 128 * 2),
        ("gemma3-4b", None, 34 * 2 * 4 * 256 * 2),
    ],
)
def test_published_models(published, name, params, cache_bytes):
    data = published(name)
    assert params is None or data["params"] == params
    assert data["kv_cache"]["bytes_per_token"] == cache_bytes
    assert sum(row["stored_bytes"] for row in data["modules"]) == data["stored_bytes"] == 2 * data["params"]


def test_active_parameters(published):
    """37 B of DeepSeek-V3 work on a token, 12.9 B of Mixtral counting its embedding, all of a dense model but a table."""
    active = {name: published(name)["model"]["active_params"] for name in ("deepseek-v3", "mixtral", "llama-405b")}
    assert round(active["deepseek-v3"] / 1e9) == 37
    assert (active["mixtral"] + 32000 * 4096) / 1e9 == pytest.approx(12.9, abs=0.05)
    norms = (2 * 126 + 1) * 16384
    assert active["llama-405b"] == 405_853_388_800 - 128256 * 16384 - norms


def test_kinds_of_a_mixture_of_experts(published):
    rows = kinds(published("deepseek-v3"))
    assert list(rows) == ["attention", "router", "experts", "shared experts", "mlp", "norms", "embedding", "head"]
    assert rows["experts"]["params"] == 58 * 256 * 3 * 7168 * 2048
    assert rows["shared experts"]["params"] == 58 * 3 * 7168 * 2048
    assert rows["mlp"]["params"] == 3 * 3 * 7168 * 18432
    assert rows["router"]["params"] == 58 * (256 * 7168 + 256)
    assert rows["norms"]["tensors"] == 61 * 4 + 1


def test_windows_of_gemma(published):
    cache = published("gemma3-27b")["kv_cache"]
    layers = {row["kind"]: row for row in cache["layers"]}
    assert (layers["sliding"]["layers"], layers["full"]["layers"]) == (52, 10)
    assert layers["sliding"]["window_tokens"] == 1024
    assert cache["bytes_per_token_past_windows"] == 10 * 2 * 16 * 128 * 2
    small = published("gemma3-4b")  # whose text_config leaves heads, their width and the pattern to its class
    assert small["model"]["attention_layers"] == {"sliding": 29, "full": 5}
    assert (small["model"]["heads"], small["model"]["kv_heads"], small["model"]["head_dim"]) == (8, 4, 256)
    assert small["model"]["tied_head"] and small["model"]["vocab"] == 262208
    assert kinds(small)["image and audio tower"]["tensors"] == 3


MEASURE = """
import re, sys
from pathlib import Path
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import load_hardware
from tersor.ops.profile.request import Workload
from tersor.ops.profile.headers.run import profile_headers
from tersor.ops.profile.headers.page import sections
data = profile_headers(Checkpoint(sys.argv[1]), load_hardware("h100"), Workload())
assert sections(data)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]  # ru_maxrss has the parent's in it
print(data["files"], data["params"], int("torch" in sys.modules), peak)
"""


@pytest.mark.parametrize(
    ("config", "shapes"), [(models.LLAMA_405B, models.llama_shapes), (models.DEEPSEEK_V3, models.deepseek_shapes)]
)
def test_hundreds_of_files_in_100_mb_without_torch(tmp_path, config, shapes):
    folder = models.write_model(tmp_path / "model", config, shapes(config), shard_bytes=4_000_000_000)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    files, params, torch, kilobytes = map(int, out.split())
    assert files > 200 and params > 400e9
    assert not torch
    assert kilobytes * 1024 < 100e6


def test_a_bare_file_tells_what_is_stored(tmp_path):
    folder = models.write_model(tmp_path / "m", None, models.llama_shapes(TINY))
    data = profile_headers(Checkpoint(folder / "model.safetensors"), load_hardware("h100"), Workload())
    assert data["model"] is None and data["params"] == sum(row["params"] for row in data["modules"])
    assert {"attention", "mlp", "norms", "embedding", "head"} == set(kinds(data))
    assert [section.title for section in sections(data)] == ["Where the bytes are"]


def test_two_stacks_are_weighed_and_not_predicted(tmp_path):
    folder = models.write_model(tmp_path / "m", TINY | {"is_encoder_decoder": True}, models.llama_shapes(TINY))
    data = profile(folder)
    assert data["model"] is None and codes(data) == {"not-predicted"} and data["stored_bytes"] == 2 * data["params"]
    assert any(isinstance(item, Notes) for item in sections(data)[0].items)
    with pytest.raises(TersorError, match="an encoder and a decoder"):
        facts(Checkpoint(folder), stored_weights(Checkpoint(folder)))


def test_layers_with_a_state_are_named(tmp_path):
    changes = {"layer_types": ["linear_attention", "full_attention"]}
    data = profile(models.write_model(tmp_path / "m", TINY | changes, models.llama_shapes(TINY)))
    assert "state-not-counted" in codes(data)
    assert data["kv_cache"]["bytes_per_token"] == 2 * 2 * 16 * 2


def test_draft_layers_are_stored_and_do_not_run(tmp_path):
    shapes = models.llama_shapes(TINY)
    extra = {name.replace("layers.1", "layers.2"): shape for name, shape in shapes.items() if "layers.1" in name}
    plain = profile(models.write_model(tmp_path / "plain", TINY, shapes))
    data = profile(models.write_model(tmp_path / "draft", TINY, shapes | extra))
    assert kinds(data)["draft layers"]["params"] == data["params"] - plain["params"] > 0
    assert (
        data["flops"] == plain["flops"] and data["kv_cache"]["bytes_per_token"] == plain["kv_cache"]["bytes_per_token"]
    )


def test_layers_without_attention_have_no_cache(tmp_path):
    shapes = {name: shape for name, shape in models.llama_shapes(TINY).items() if "layers.1.self_attn" not in name}
    data = profile(models.write_model(tmp_path / "m", TINY, shapes))
    assert data["kv_cache"]["bytes_per_token"] == 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("hidden_size", "hidden_size"), ("num_hidden_layers", "num_hidden_layers"),
        ("num_attention_heads", "num_attention_heads"),
    ],
)  # fmt: skip
def test_a_missing_key_is_named(tmp_path, key, named):
    config = {name: value for name, value in TINY.items() if name not in (key, "model_type")}
    with pytest.raises(TersorError, match=rf"config\.json: no {named}"):
        profile(models.write_model(tmp_path / "m", config, models.llama_shapes(TINY)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**30}, "layers, there are tensors of 2"),
        ({"num_hidden_layers": 3}, "says 3 layers, there are tensors of 2"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
        ({"kv_lora_rank": 8}, "no qk_nope_head_dim"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "awq", "bits": 5}}, "5 bits"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(TersorError, match=message) as error:
        profile(models.write_model(tmp_path / "m", TINY | changes, models.llama_shapes(TINY)))
    assert error.value.hint


def test_experts_whose_number_per_token_is_not_told(tmp_path):
    config = {key: value for key, value in models.MIXTRAL.items() if key != "num_experts_per_tok"} | {
        "num_hidden_layers": 1
    }
    folder = models.write_model(tmp_path / "m", config | {"model_type": "own"}, models.llama_shapes(config))
    with pytest.raises(TersorError, match="num_experts_per_tok"):
        profile(folder)
    del config["num_local_experts"]
    folder = models.write_model(tmp_path / "n", config, models.llama_shapes(models.MIXTRAL | {"num_hidden_layers": 1}))
    with pytest.raises(TersorError, match="num_local_experts"):
        profile(folder)


@pytest.mark.parametrize(("key", "value"), [("batch", 0), ("prompt", 0), ("generate", -1), ("trials", 0)])
def test_workloads_that_are_none(tmp_path, key, value):
    folder = models.write_model(tmp_path / "m", TINY, models.llama_shapes(TINY))
    with pytest.raises(TersorError, match=f"--{key} {value}"):
        profile(folder, **{key: value})


JUNK = st.sampled_from([None, True, False, -1, 0, 1, 3, 10**30, 0.5, "", "x", [], ["x"], [1, 2], {}, {"a": 1}])
KEYS = (
    *TINY, "text_config", "head_dim", "layer_types", "sliding_window", "sliding_window_pattern", "use_sliding_window",
    "max_window_layers", "attention_chunk_size", "num_local_experts", "num_experts_per_tok", "kv_lora_rank", "image_size",
    "patch_size", "is_decoder", "is_encoder_decoder", "vision_config", "multi_query",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3))
def test_any_config_is_profiled_or_refused_by_name(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("junk")
    models.write_model(folder, TINY | changes, models.llama_shapes(TINY))
    try:
        data = profile(folder)
    except TersorError as error:
        assert str(error) and error.hint
    else:
        assert sections(data) and json.dumps(data)


def test_images_that_are_no_squares(tmp_path):
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": [32, 16], "patch_size": 8,
    }  # fmt: skip
    shapes = {"embeddings.patch_embeddings.projection.weight": (64, 3, 8, 8)}
    shapes |= {f"encoder.layer.0.attention.{name}.weight": (64, 64) for name in ("query", "key", "value", "output")}
    data = profile(models.write_model(tmp_path / "m", config, shapes))
    assert data["model"]["image_tokens"] == 4 * 2 + 1
    assert data["flops"]["prefill_square_flops"] == 2 * (8 * 64 * 192 + 9 * 4 * 64 * 64 + 2 * 4 * 16 * 81)
    assert data["kv_cache"] is None and data["serving"]["decode"] is None
    assert [section.title for section in sections(data)][-1] == "Other formats"


def texts(section: Section) -> list[str]:
    found = [section.title, section.lead]
    for item in section.items:
        match item:
            case Facts(pairs):
                found += [text for pair in pairs for text in pair]
            case Notes(lines):
                found += lines
            case Table():
                assert all(len(row) == len(item.columns) for row in item.rows)
                found += [item.title, item.note, *item.columns, *(cell for row in item.rows for cell in row)]
            case Bars():
                found += [item.title, item.note, *(text for row in item.rows for text in row[:2])]
            case Plot():
                found += [item.title, item.note, *item.curves, *item.points]
                found += [dot[2] for dots in item.points.values() for dot in dots]
                assert all(
                    x > 0 and y > 0 for line in (*item.curves.values(), *item.points.values()) for x, y, *_ in line
                )
    assert all(isinstance(text, str) for text in found)
    return found


@pytest.mark.parametrize("name", ["llama-8b", "llama-405b", "mixtral", "deepseek-v3", "gemma3-27b"])
def test_the_page(published, name):
    found = sections(published(name))
    titles = [
        "Model and speed",
        "Where the bytes are",
        "Where the time goes",
        "Context",
        "Other formats",
        "Long and many answers",
    ]
    assert [section.title for section in found] == titles
    for section in found:
        assert section.lead.endswith(".")
        words = " ".join(texts(section))
        assert not re.search(r"\b(nan|None|inf|True|False)\b", words)
    assert json.loads(json.dumps(published(name)))  # a report holds it


def test_dots_stay_under_the_roof(published):
    for name in ("llama-8b", "mixtral", "deepseek-v3"):
        plot = next(item for section in sections(published(name)) for item in section.items if isinstance(item, Plot))
        bandwidth = plot.curves["bf16 peak"][0][1] / plot.curves["bf16 peak"][0][0]
        peak = plot.curves["bf16 peak"][1][1]
        for dots in plot.points.values():
            assert all(y <= min(peak, x * bandwidth) for x, y, _ in dots)

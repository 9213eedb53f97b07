"""convert: the same codes in another encoding, or the decoded weights; what would lose something is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.convert.run import Request, convert
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.verify.run import verify

UP = "model.layers.1.mlp.up_proj"
ENCODINGS = ["compressed-tensors", "gptq"]


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """made(family, encoding, **settings) -> folder of a quantized tiny model, built once."""
    built = {}

    def get(name: str, encoding: str = "compressed-tensors", dtype: str = "bfloat16", **settings) -> Path:
        key = (name, encoding, dtype, *sorted(settings.items()))
        if key not in built:
            out = tmp_path_factory.mktemp("made") / encoding
            size = {} if settings.get("scheme", "").startswith(("fp8", "w8a8")) else {"group_size": 32}
            quantize(QuantizeRequest(str(family(name, dtype)), out, format=encoding, **size | settings))
            built[key] = out
        return built[key]

    return get


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    view = DenseView(Checkpoint(folder))
    return {name: view.read(name) for name in view.tensors}


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_tensors(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(_bits(left[name]), _bits(right[name])) for name in left
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def other(encoding: str) -> str:
    return next(name for name in ENCODINGS if name != encoding)


# --- between the encodings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ENCODINGS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"symmetric": False}),
        ("llama", {"scheme": "w8a16"}),
        ("llama", {"scheme": "w8a16", "symmetric": False}),
        ("llama", {"scheme": "w3a16", "symmetric": False}),
        ("llama", {"scheme": "w2a16"}),
        ("llama", {"group_size": -1}),
        ("llama-tied", {}),
        ("llama-bias", {}),
        ("mixtral", {}),
        ("opt", {}),
    ],
)
def test_there_and_back(start, name, settings, made, tmp_path):
    """Every weight decodes to the same bits in the other encoding, and the way back gives the same file."""
    first = made(name, start, **settings)
    there, back = tmp_path / "there", tmp_path / "back"
    convert(Request(str(first), there, other(start)))
    assert same_tensors(decoded(there), decoded(first))
    assert verify(str(there)).problems == []
    assert config(there)["quantization_config"]["quant_method"] == other(start)
    convert(Request(str(there), back, start))
    stored = load_file(first / "model.safetensors")
    returned = load_file(back / "model.safetensors")
    assert same_tensors(returned, stored)
    assert config(back) == config(first)


def test_mixed_schemes(family, made, tmp_path):
    """Layers that differ, by policy: the exceptions keep their bits and groups on both sides."""
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps(
            {
                "schema": "tersor.policy/1",
                "tensors": {
                    r"model\.layers\.0\.mlp\..*": {"scheme": "w8a16", "group_size": 16},
                    r".*\.k_proj\.weight": {"keep": True},
                    r"model\.layers\.1\.self_attn\.q_proj\.weight": {"symmetric": False},
                },
            }
        )
    )
    first, there, back = tmp_path / "first", tmp_path / "there", tmp_path / "back"
    quantize(QuantizeRequest(str(family("llama")), first, group_size=32, policy=policy))
    assert len(set(entry.scheme for entry in DenseView(Checkpoint(first)).tensors.values())) == 4
    convert(Request(str(first), there, "gptq"))
    convert(Request(str(there), back, "compressed-tensors"))
    assert same_tensors(decoded(there), decoded(first))
    assert same_tensors(load_file(back / "model.safetensors"), load_file(first / "model.safetensors"))
    assert verify(str(there)).problems == verify(str(back)).problems == []


def test_quantize_config_beside_gptq(made, tmp_path):
    convert(Request(str(made("llama")), tmp_path / "out", "gptq"))
    beside = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert beside == config(tmp_path / "out")["quantization_config"]
    convert(Request(str(tmp_path / "out"), tmp_path / "back", "compressed-tensors"))
    assert not (tmp_path / "back" / "quantize_config.json").exists()


def test_other_keys_and_files_travel(made, tmp_path):
    """config.json is edited, not rebuilt; the tokenizer is copied byte for byte."""
    first = shutil.copytree(made("llama"), tmp_path / "first")
    edited = config(first) | {"my_key": {"a": [1, 2]}}
    (first / "config.json").write_text(json.dumps(edited))
    (first / "code").mkdir()
    (first / "code" / "modeling_mine.py").write_text("x = 1\n")
    convert(Request(str(first), tmp_path / "out", "gptq"))
    result = config(tmp_path / "out")
    assert list(result) == list(edited)
    assert {key: value for key, value in result.items() if key != "quantization_config"} == {
        key: value for key, value in edited.items() if key != "quantization_config"
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "code/modeling_mine.py"):
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()


def gptq_v2(folder: Path) -> Path:
    """The same weights as GPTQ v2 stores them: zero points as they are, not less one."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        raw = tensors[name].contiguous().view(torch.uint8)
        low, high = (raw + 1) & 15, ((raw >> 4) + 1) & 15
        tensors[name] = (low | (high << 4)).view(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edited = config(folder)
    edited["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(edited))
    for name in ("report.json", "report.html"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_v2(symmetric, made, tmp_path):
    v1 = made("llama", "gptq", symmetric=symmetric)
    v2 = gptq_v2(shutil.copytree(v1, tmp_path / "v2"))
    assert same_tensors(decoded(v2), decoded(v1))
    convert(Request(str(v2), tmp_path / "v1", "gptq"))
    assert same_tensors(load_file(tmp_path / "v1" / "model.safetensors"), load_file(v1 / "model.safetensors"))
    convert(Request(str(v2), tmp_path / "packed", "compressed-tensors"))
    assert same_tensors(decoded(tmp_path / "packed"), decoded(v1))


# --- to dense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoding", "settings"),
    [
        ("llama", "compressed-tensors", {}),
        ("llama", "compressed-tensors", {"symmetric": False, "scheme": "w3a16"}),
        ("llama", "compressed-tensors", {"scheme": "w8a8"}),
        ("llama", "compressed-tensors", {"scheme": "fp8"}),
        ("llama", "compressed-tensors", {"scheme": "fp8-block"}),
        ("llama", "gptq", {"symmetric": False}),
        ("llama-tied", "compressed-tensors", {}),
        ("llama-bias", "gptq", {}),
        ("gpt2", "gptq", {}),
        ("gpt2", "gptq", {"symmetric": False}),
        ("mixtral", "compressed-tensors", {}),
        ("bert", "compressed-tensors", {}),
    ],
)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_dense_is_the_decoded(name, encoding, settings, dtype, made, family, tmp_path):
    """Names, shapes and order of the original, values of our decode, and transformers loads them as they are."""
    from transformers import AutoModel

    first, out = made(name, encoding, **settings), tmp_path / "dense"
    convert(Request(str(first), out, "dense", dtype))
    original = load_file(family(name) / "model.safetensors")
    dense, expected = load_file(out / "model.safetensors"), decoded(first)
    stored = torch.float32 if dtype else torch.bfloat16
    assert {key: value.shape for key, value in dense.items()} == {key: value.shape for key, value in original.items()}
    for key, value in dense.items():
        assert value.dtype == stored
        assert torch.equal(value, expected[key].to(stored)), key
    assert "quantization_config" not in config(out)
    assert config(out)["dtype"] == (dtype or "bfloat16")
    assert not (out / "quantize_config.json").exists()
    _, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]


def test_desc_act_decodes_by_its_index(made, family, tmp_path):
    """Groups that are not runs of columns: dense follows g_idx; no other encoding can hold them."""
    folder = shutil.copytree(made("llama", "gptq"), tmp_path / "act")
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    name = f"{UP}.g_idx"
    tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edited = config(folder)
    edited["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(edited))
    convert(Request(str(folder), tmp_path / "dense", "dense", "float32"))
    words = tensors[f"{UP}.qweight"].contiguous()
    codes = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=1).reshape(64, 96)
    scales = tensors[f"{UP}.scales"].float()[tensors[name].long()]
    expected = ((codes - 8).float() * scales).T
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")[f"{UP}.weight"], expected)
    with pytest.raises(TersorError, match="desc_act") as caught:
        convert(Request(str(folder), tmp_path / "out", "compressed-tensors"))
    assert "--to dense" in caught.value.hint
    gptq_v2(folder)
    with pytest.raises(TersorError, match="desc_act"):
        convert(Request(str(folder), tmp_path / "out", "gptq"))
    assert not (tmp_path / "out").exists()


def test_older_config_names_its_dtype_otherwise(made, tmp_path):
    first = shutil.copytree(made("llama"), tmp_path / "first")
    edited = config(first)
    edited["torch_dtype"] = edited.pop("dtype")
    (first / "config.json").write_text(json.dumps(edited))
    convert(Request(str(first), tmp_path / "out", "dense", "float16"))
    assert config(tmp_path / "out")["torch_dtype"] == "float16"
    assert "dtype" not in config(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.weight"].dtype == torch.float16


# --- refused ----------------------------------------------------------------------------------------------------------


def assert_refused(request: Request, *words: str) -> None:
    with pytest.raises(TersorError) as caught:
        convert(request)
    for word in words:
        assert word in f"{caught.value} {caught.value.hint}"
    assert caught.value.hint
    assert not request.output.exists()
    assert not request.output.with_name(request.output.name + ".partial").exists()


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block", "w8a8"])
def test_gptq_cannot_hold(scheme, made, tmp_path):
    words = ["model.layers.0.", "gptq", "--to dense"]
    assert_refused(Request(str(made("llama", scheme=scheme)), tmp_path / "out", "gptq"), *words)


def test_conv1d_is_for_gptq(made, tmp_path):
    """compressed-tensors readers look for Linear layers and would leave these at random values."""
    words = ["transformer.h.0.attn.c_attn", "Conv1D", "--to dense"]
    assert_refused(Request(str(made("gpt2", "gptq")), tmp_path / "out", "compressed-tensors"), *words)


def test_gptq_cannot_hold_odd_sides(family, tmp_path):
    odd = family("llama", intermediate_size=80)
    quantize(QuantizeRequest(str(odd), tmp_path / "first", group_size=16))
    request = Request(str(tmp_path / "first"), tmp_path / "out", "gptq")
    assert_refused(request, "mlp.", "multiples of 32", "--to dense")


def test_scales_that_fp16_would_round(made, tmp_path):
    """float32 scales, as a float32 model gets them."""
    request = Request(str(made("llama", dtype="float32")), tmp_path / "out", "gptq")
    assert_refused(request, "model.layers.0.", "F32", "F16", "--to dense")


def test_scales_too_large_for_fp16(made, tmp_path):
    folder = shutil.copytree(made("llama"), tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight_scale"].fill_(2.0**17)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(Request(str(folder), tmp_path / "out", "gptq"), UP)
    assert_refused(Request(str(folder), tmp_path / "out", "dense", "float16"), f"{UP}.weight", "F16", "bfloat16")


def test_kept_tensor_too_large_for_fp16(made, tmp_path):
    folder = shutil.copytree(made("llama"), tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(Request(str(folder), tmp_path / "out", "dense", "float16"), "model.norm.weight", "F16")


def test_zero_points_in_a_symmetric_checkpoint(made, tmp_path):
    folder = shutil.copytree(made("llama", "gptq", symmetric=False), tmp_path / "first")
    edited = config(folder)
    edited["quantization_config"]["sym"] = True
    (folder / "config.json").write_text(json.dumps(edited))
    assert_refused(Request(str(folder), tmp_path / "out", "compressed-tensors"), "zero points", "symmetric")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_to_convert(encoding, made, family, tmp_path):
    assert_refused(Request(str(made("llama", encoding)), tmp_path / "out", encoding), f"stored as {encoding} already")
    assert_refused(Request(str(family("llama")), tmp_path / "out", encoding), "dense already")


@pytest.mark.parametrize(
    ("to", "dtype", "word"),
    [("awq", None, "awq"), ("gptq", "float16", "--to dense"), ("dense", "int8", "int8"), ("dense", "F16", "bfloat16")],
)
def test_nonsense(to, dtype, word, made, tmp_path):
    assert_refused(Request(str(made("llama")), tmp_path / "out", to, dtype), word)


@pytest.mark.parametrize("to", ["dense", "other"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damaged_scale(encoding, to, made, tmp_path):
    folder = shutil.copytree(made("llama", encoding), tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{'scales' if encoding == 'gptq' else 'weight_scale'}"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(Request(str(folder), tmp_path / "out", other(encoding) if to == "other" else to), UP)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_missing_part(encoding, made, tmp_path):
    folder = shutil.copytree(made("llama", encoding), tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.{'scales' if encoding == 'gptq' else 'weight_scale'}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(Request(str(folder), tmp_path / "out", "dense"), UP, "missing")


def test_nan_in_a_kept_tensor(made, tmp_path):
    folder = shutil.copytree(made("llama"), tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "float32"):
        assert_refused(Request(str(folder), tmp_path / "out", "dense", dtype), "model.norm.weight", "NaN")


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_counts_what_is_on_disk(made, tmp_path):
    first = made("llama", symmetric=False)
    for to in ("gptq", "dense"):
        report = convert(Request(str(first), tmp_path / to, to))
        before, after = (Checkpoint(folder).nbytes for folder in (first, tmp_path / to))
        totals = report.totals()
        assert (totals["bytes_before"], totals["bytes_after"]) == (before, after)
        assert [entry.name for entry in report.tensors] == list(DenseView(Checkpoint(first)).tensors)
        assert [step["command"] for step in report.history] == ["quantize"]

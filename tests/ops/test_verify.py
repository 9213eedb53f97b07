"""verify: a sound checkpoint passes, and each kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.cli.main import app
from tersor.formats.errors import TersorError
from tersor.ops.convert.run import Request as ConvertRequest
from tersor.ops.convert.run import convert
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.verify.run import verify
from typer.testing import CliRunner

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """made(family, encoding, **settings) -> folder of a quantized tiny model, built once."""
    built = {}

    def get(name: str, encoding: str = "compressed-tensors", **settings) -> Path:
        key = (name, encoding, *sorted(settings.items()))
        if key not in built:
            out = tmp_path_factory.mktemp("made") / encoding
            size = {} if settings.get("scheme", "").startswith(("fp8", "w8a8")) else {"group_size": 32}
            quantize(QuantizeRequest(str(family(name)), out, format=encoding, **size | settings))
            built[key] = out
        return built[key]

    return get


@pytest.fixture
def copy(made, tmp_path):
    """A quantized model of one's own to damage."""
    return lambda *arguments, **settings: shutil.copytree(made(*arguments, **settings), tmp_path / "model")


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def forget(folder: Path) -> Path:
    """A checkpoint of someone else: no report beside it."""
    for name in ("report.json", "report.html"):
        (folder / name).unlink()
    return folder


def assert_unsound(folder: Path, *words: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(folder), "-q"])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    hints = [line for line in result.stderr.splitlines() if line.startswith("hint: ")]
    assert errors
    assert len(hints) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert any(word in error for error in errors), result.stderr


# --- sound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoding", "settings"),
    [
        ("llama", "compressed-tensors", {}),
        ("llama", "compressed-tensors", {"symmetric": False}),
        ("llama", "compressed-tensors", {"scheme": "w3a16"}),
        ("llama", "compressed-tensors", {"scheme": "w8a8"}),
        ("llama", "compressed-tensors", {"scheme": "fp8"}),
        ("llama", "compressed-tensors", {"scheme": "fp8-block"}),
        ("llama", "gptq", {}),
        ("llama", "gptq", {"symmetric": False, "scheme": "w8a16"}),
        ("llama-tied", "compressed-tensors", {}),
        ("llama-bias", "gptq", {}),
        ("gpt2", "gptq", {}),
        ("mixtral", "compressed-tensors", {}),
        ("bert", "compressed-tensors", {}),
    ],
)
def test_sound(name, encoding, settings, made, family):
    folder = made(name, encoding, **settings)
    result = verify(str(folder), against=str(family(name)))
    assert result.problems == []
    assert result.quantized_modules > 0


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert-mlm"])
def test_dense_input_is_sound(name, family):
    result = verify(str(family(name)))
    assert (result.problems, result.quantized_modules) == ([], 0)


def test_bare_file(family):
    assert verify(str(family("llama") / "model.safetensors")).problems == []


def test_prints_the_path_or_a_report(made):
    folder = made("llama")
    assert CliRunner().invoke(app, ["verify", str(folder)]).stdout == f"{folder}\n"
    found = json.loads(CliRunner().invoke(app, ["verify", str(folder), "--json"]).stdout)
    assert found["schema"] == "tersor.verify/1"
    assert found["quantized_modules"] == 14
    assert found["problems"] == []


def test_largest_finite_values_are_sound(family, tmp_path):
    """Their sum is not finite, they are: masks hold the lowest number there is."""
    folder = shutil.copytree(family("llama"), tmp_path / "model")
    lowest = torch.finfo(torch.bfloat16).min
    change(folder, lambda tensors: tensors.update(mask=torch.full((64, 64), lowest, dtype=torch.bfloat16)))
    assert verify(str(folder)).problems == []


def test_a_copy_of_tied_embeddings_is_sound(family, tmp_path):
    """Some tools save the head although it is tied. Loaders drop it, which changes nothing, and quantize carries it on."""
    folder = shutil.copytree(family("llama-tied"), tmp_path / "model")
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert verify(str(folder)).problems == []
    quantize(QuantizeRequest(str(folder), tmp_path / "out", group_size=32))
    assert verify(str(tmp_path / "out")).problems == []
    change(folder, lambda tensors: tensors["lm_head.weight"].zero_())
    assert "lm_head.weight" in verify(str(folder)).problems[0]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_flipped_bytes(copy):
    """Flipped codes decode to plausible numbers: only the fingerprint of the report tells."""
    folder = copy("llama")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x11
    path.write_bytes(data)
    assert_unsound(folder, "changed since report.json")


def test_changed_config(copy):
    folder = copy("llama")
    change_config(folder, lambda config: config.update(rope_theta=1.0))
    assert_unsound(folder, "config.json")


def test_truncated(copy):
    folder = copy("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert_unsound(folder, "truncated")


@pytest.mark.parametrize(
    ("encoding", "suffix"),
    [
        ("compressed-tensors", "weight_packed"),
        ("compressed-tensors", "weight_scale"),
        ("compressed-tensors", "weight_shape"),
        ("compressed-tensors", "weight_zero_point"),
        ("gptq", "qweight"),
        ("gptq", "qzeros"),
        ("gptq", "scales"),
        ("gptq", "g_idx"),
    ],
)
def test_missing_part(encoding, suffix, copy):
    folder = forget(copy("llama", encoding, symmetric=False))
    change(folder, lambda tensors: tensors.pop(f"{UP}.{suffix}"))
    # Without its codes a layer is not recognised as quantized; then what is left of it is named.
    left = {"weight_packed": "weight", "qweight": ""}
    assert_unsound(folder, f"{UP}.{left.get(suffix, suffix)}")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_missing_tensor(name, copy):
    folder = copy("llama")
    change(folder, lambda tensors: tensors.pop(name))
    assert_unsound(folder, name)


def test_missing_layer(copy):
    folder = copy("llama")

    def remove(tensors):
        for name in [name for name in tensors if name.startswith(UP)]:
            del tensors[name]

    change(folder, remove)
    assert_unsound(folder, f"{UP}.weight")


def test_extra_tensor(copy):
    folder = copy("llama")
    change(folder, lambda tensors: tensors.update({"model.surprise": torch.zeros(3)}))
    assert_unsound(folder, "model.surprise")


@pytest.mark.parametrize("encoding", ["compressed-tensors", "gptq"])
def test_dense_beside_quantized(encoding, copy):
    folder = forget(copy("llama", encoding))
    change(folder, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(96, 64)}))
    assert_unsound(folder, f"{UP}.weight", "twice")


@pytest.mark.parametrize(("encoding", "scale"), [("compressed-tensors", "weight_scale"), ("gptq", "scales")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_is_not_finite(encoding, scale, value, copy):
    folder = forget(copy("llama", encoding))
    change(folder, lambda tensors: tensors[f"{UP}.{scale}"][1].fill_(value))
    assert_unsound(folder, f"{UP}.weight", f"{UP}.{scale}")


def test_nan_in_a_dense_tensor(family, tmp_path):
    folder = shutil.copytree(family("llama"), tmp_path / "model")
    change(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(float("nan")))
    assert_unsound(folder, "model.norm.weight")


@pytest.mark.parametrize(
    ("encoding", "name", "edit"),
    [
        ("compressed-tensors", f"{UP}.weight_scale", lambda tensor: tensor[:, :1].clone()),
        ("compressed-tensors", f"{UP}.weight_packed", lambda tensor: tensor[:, :-1].clone()),
        ("compressed-tensors", f"{UP}.weight_shape", lambda tensor: tensor * 0),
        ("compressed-tensors", f"{UP}.weight_shape", lambda tensor: tensor + 8),
        ("gptq", f"{UP}.scales", lambda tensor: tensor[:1].clone()),
        ("gptq", f"{UP}.scales", lambda tensor: tensor.reshape(-1)),
        ("gptq", f"{UP}.qzeros", lambda tensor: tensor[:, 1:].clone()),
        ("gptq", f"{UP}.qweight", lambda tensor: tensor[:-4].clone()),
        ("gptq", f"{UP}.g_idx", lambda tensor: tensor[1:].clone()),
    ],
)  # fmt: skip
def test_wrong_shape(encoding, name, edit, copy):
    folder = forget(copy("llama", encoding))
    change(folder, lambda tensors: tensors.update({name: edit(tensors[name])}))
    assert_unsound(folder, f"{UP}.")


def test_wrong_shape_of_a_dense_tensor(copy):
    folder = copy("llama")
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63, dtype=torch.bfloat16)}))
    assert_unsound(folder, "model.norm.weight", "[63]", "[64]")


@pytest.mark.parametrize("value", [-1, 2, 1000])
def test_g_idx_out_of_range(value, copy):
    folder = forget(copy("llama", "gptq"))
    change(folder, lambda tensors: tensors[f"{UP}.g_idx"][5].fill_(value))
    assert_unsound(folder, f"{UP}.g_idx", "0 … 1")


def test_ignore_list_incomplete(copy):
    folder = forget(copy("llama"))
    change_config(folder, lambda config: config["quantization_config"].update(ignore=[]))
    assert_unsound(folder, "lm_head", "does not ignore it")


def test_config_leaves_out_a_quantized_module(copy):
    folder = forget(copy("llama"))
    change_config(folder, lambda config: config["quantization_config"]["ignore"].append(UP))
    assert_unsound(folder, UP)


def test_config_without_quantization(copy):
    folder = forget(copy("llama"))
    change_config(folder, lambda config: config.pop("quantization_config"))
    assert_unsound(folder, "quantization_config")


def test_index_missing(family, tmp_path):
    folder = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    assert_unsound(folder, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": "tersor.report/1"}', '{"schema": "other/1"}'],
    ids=["torn", "list", "short", "other"],
)
def test_report_that_is_none(content, copy):
    folder = copy("llama")
    (folder / "report.json").write_text(content)
    assert_unsound(folder, "report.json")


def test_every_problem_is_printed(copy):
    folder = forget(copy("llama", "gptq"))

    def damage(tensors):
        tensors[f"{UP}.scales"][0, 0] = float("nan")
        tensors["model.layers.0.self_attn.q_proj.g_idx"][0] = 99

    change(folder, damage)
    assert_unsound(folder, f"{UP}.weight", "model.layers.0.self_attn.q_proj.g_idx")
    result = CliRunner().invoke(app, ["verify", str(folder), "-q", "--json"])
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["problems"]) >= 2


def test_torn_report_of_a_killed_run_does_not_stop_resume(family, tmp_path):
    """A kill while the report is written leaves half of it in the partial folder; it is written again."""
    from tersor.formats.writer import CheckpointWriter

    out = tmp_path / "out"
    request = QuantizeRequest(str(family("llama")), out, group_size=32)
    original = CheckpointWriter.commit

    def killed(self):
        (self.partial / "report.json").write_text('{"schema": "ters')
        raise KeyboardInterrupt

    CheckpointWriter.commit = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize(request)
    finally:
        CheckpointWriter.commit = original
    request.resume = True
    quantize(request)
    assert verify(str(out)).problems == []


# --- against ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_errors_are_as_reported(method, family, text, tmp_path):
    """The figures of the report, computed here again from the decoded weights."""
    original, out = family("llama"), tmp_path / "out"
    calibration = {} if method == "rtn" else {"calib": str(text), "samples": 4, "seq_len": 32}
    report = quantize(QuantizeRequest(str(original), out, method=method, group_size=32, **calibration))
    assert verify(str(out), against=str(original)).problems == []
    convert(ConvertRequest(str(out), tmp_path / "dense", "dense", "float32"))
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for entry in report.tensors:
        if entry.action == "quantize" and "inputs scaled" not in entry.reason:
            weight = before[entry.name].double()
            expected = float((after[entry.name].double() - weight).square().sum() / weight.square().sum())
            assert entry.error["relative_mse"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("encoding", ["compressed-tensors", "gptq"])
def test_error_is_not_as_reported(encoding, copy, family):
    """Codes of one group shifted: it decodes well, and is further from the original than the report says."""
    folder = copy("llama", encoding)
    name, index = (f"{UP}.weight_packed", (0, 0)) if encoding == "compressed-tensors" else (f"{UP}.qweight", (0, 0))
    change(folder, lambda tensors: tensors[name].__setitem__(index, tensors[name][index] ^ 0x77777777))
    problems = verify(str(folder), against=str(family("llama"))).problems
    assert any(f"{UP}.weight" in problem and "the report says" in problem for problem in problems)


def test_against_another_model(made, family):
    problems = verify(str(made("llama")), against=str(family("llama-bias"))).problems
    assert any("model.layers.0.mlp.up_proj.bias" in problem and "original" in problem for problem in problems)
    other = verify(str(made("llama")), against=str(family("llama", intermediate_size=128))).problems
    assert any(f"{UP}.weight" in problem and "shape" in problem for problem in other)


def test_against_nothing(made, tmp_path):
    with pytest.raises(TersorError, match="no such file"):
        verify(str(made("llama")), against=str(tmp_path / "nothing"))


def test_weight_of_zeros(family, tmp_path):
    """0/0 is no error when zeros stayed zeros."""
    folder = shutil.copytree(family("llama"), tmp_path / "zeros")
    change(folder, lambda tensors: tensors[f"{UP}.weight"].zero_())
    quantize(QuantizeRequest(str(folder), tmp_path / "out", group_size=32))
    assert verify(str(tmp_path / "out"), against=str(folder)).problems == []

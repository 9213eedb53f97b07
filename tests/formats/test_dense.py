"""A checkpoint seen as dense weights, whatever it is stored in."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tersor.formats import compressed_tensors, encodings, gptq
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.dense import DenseTensor, DenseView
from tersor.formats.encodings import QuantizedWeight, dequantize
from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

MODULES = {"model.layers.0.up": (64, 96), "model.layers.0.down": (96, 64), "model.layers.1.up": (64, 96)}
DENSE = {
    "model.embed_tokens.weight": torch.randn(10, 64).bfloat16(),
    "model.norm.weight": torch.ones(64),
    "model.layers.0.up.bias": torch.randn(64).half(),
    "lm_head.weight": torch.randn(10, 64).bfloat16(),
}
SCHEMES = {
    "compressed-tensors": [
        Scheme(4, group_size=32),
        Scheme(3, "int", False, "group", 32),
        Scheme(8, "int", True, "channel", activations="int8"),
        Scheme(8, "float", strategy="channel", activations="fp8"),
        Scheme(8, "float", strategy="tensor", activations="fp8"),
        Scheme(8, "float", strategy="block", block=(128, 128), activations="fp8-group"),
    ],
    "gptq": [Scheme(4, group_size=32), Scheme(3, "int", False, "group", 32), Scheme(8, strategy="channel")],
}
CASES = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]


def random_weight(scheme: Scheme, shape: tuple[int, int], seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (scheme.bits - 1)
    if scheme.kind == "float":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)
    grid = compressed_tensors._scale_shape(shape, scheme)
    zero_point = torch.randint(1 - half, half, grid, dtype=torch.int8, generator=generator)
    scale = (torch.rand(grid, generator=generator) + 0.5).half()
    return QuantizedWeight(codes, scale, None if scheme.symmetric else zero_point)


def save(folder: Path, tensors: dict, config: dict | None) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def quantized(folder: Path, name: str, schemes: dict[str, Scheme], config: dict | None = None):
    """A checkpoint and the weights that it holds."""
    module = encodings.encoding(name)
    weights = {m: random_weight(scheme, MODULES[m], seed) for seed, (m, scheme) in enumerate(schemes.items())}
    tensors = dict(DENSE)
    for m, weight in weights.items():
        tensors |= module.encode(m, weight, schemes[m])
    settings = {"quantization_config": module.quantization_config(schemes, ["lm_head"])}
    return save(folder, tensors, settings | (config or {})), weights


def test_a_dense_checkpoint_is_itself(tmp_path):
    for config in (None, {"model_type": "llama"}):
        view = DenseView(save(tmp_path / str(config is None), DENSE, config))
        assert not view.is_quantized
        assert view.tensors.keys() == DENSE.keys()
        for name, tensor in DENSE.items():
            assert view.tensors[name].scheme is None
            assert torch.equal(view.read(name), tensor)
            assert view.read(name).dtype == view.map(name).dtype == tensor.dtype
            assert torch.equal(view.map(name), tensor)
        with pytest.raises(TersorError, match="no tensor"):
            view.read("nothing")


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_quantized_modules_have_the_names_and_shapes_they_had(name, scheme, tmp_path):
    checkpoint, weights = quantized(tmp_path / "m", name, dict.fromkeys(MODULES, scheme))
    view = DenseView(checkpoint)
    assert view.is_quantized
    assert view.tensors.keys() == DENSE.keys() | {f"{module}.weight" for module in MODULES}
    for module, weight in weights.items():
        entry = view.tensors[f"{module}.weight"]
        assert entry == DenseTensor("F16", MODULES[module], scheme, module, False)
        expected = dequantize(weight, scheme)
        assert view.read(f"{module}.weight").dtype == torch.float32
        assert torch.equal(view.read(f"{module}.weight"), expected)
        assert torch.equal(view.map(f"{module}.weight"), expected)
        assert torch.equal(view.codes(module).codes.float(), weight.codes.float())
    for dense, tensor in DENSE.items():
        assert torch.equal(view.read(dense), tensor)
        assert view.tensors[dense].scheme is None


@pytest.mark.parametrize("name", encodings.NAMES)
def test_every_module_with_a_scheme_of_its_own(name, tmp_path):
    schemes = dict(zip(MODULES, SCHEMES[name], strict=False))
    checkpoint, weights = quantized(tmp_path / "m", name, schemes)
    view = DenseView(checkpoint)
    for module, scheme in schemes.items():
        assert view.tensors[f"{module}.weight"].scheme == scheme
        assert torch.equal(view.read(f"{module}.weight"), dequantize(weights[module], scheme))


def test_codes_move_between_the_encodings_without_loss(tmp_path):
    scheme = Scheme(4, "int", False, "group", 32)
    first, weights = quantized(tmp_path / "ct", "compressed-tensors", dict.fromkeys(MODULES, scheme))
    tensors = dict(DENSE)
    for module in MODULES:
        tensors |= gptq.encode(module, DenseView(first).codes(module), scheme)
    config = {"quantization_config": gptq.quantization_config(dict.fromkeys(MODULES, scheme), ["lm_head"])}
    view = DenseView(save(tmp_path / "gptq", tensors, config))
    for module, weight in weights.items():
        for ours, theirs in zip(view.codes(module), weight, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_config_and_tensors_that_disagree(tmp_path):
    schemes = dict.fromkeys(MODULES, Scheme(4, group_size=32))
    checkpoint, _ = quantized(tmp_path / "m", "compressed-tensors", schemes)
    config = checkpoint.config
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TersorError, match="no quantization_config"):
        DenseView(Checkpoint(tmp_path / "m"))
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(TersorError, match="no quantization_config"):
        DenseView(Checkpoint(tmp_path / "m" / "model.safetensors"))
    config["quantization_config"]["ignore"].append("model.layers.0.up")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TersorError, match=r"'model.layers.0.up'.*leaves it out"):
        DenseView(Checkpoint(tmp_path / "m"))


@pytest.mark.parametrize("name", encodings.NAMES)
def test_incomplete_modules_are_named(name, tmp_path):
    checkpoint, _ = quantized(tmp_path / "m", name, dict.fromkeys(MODULES, Scheme(4, group_size=32)))
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    module = "model.layers.0.up"
    for key in encodings.encoding(name).tensor_names(module, tensors):
        if key.endswith("g_idx"):
            continue
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        with pytest.raises(TersorError, match=re.escape(f"{module}.")):
            DenseView(save(tmp_path / key, rest, checkpoint.config)).read(f"{module}.weight")


# Conv1D, stored [in, out]


def test_transposed_families(tmp_path):
    tensors = {
        "h.0.attn.c_attn.weight": torch.randn(32, 96),
        "h.0.attn.c_attn.bias": torch.randn(96),
        "h.0.ln.weight": torch.ones(32),
    }
    for family, transposed in [("gpt2", True), ("llama", False), (None, False)]:
        checkpoint = save(tmp_path / str(family), tensors, {"model_type": family})
        assert is_transposed(checkpoint, "h.0.attn.c_attn.weight") is transposed
        assert not is_transposed(checkpoint, "h.0.ln.weight")
    bare = Checkpoint(tmp_path / "llama" / "model.safetensors")
    assert is_transposed(bare, "h.0.attn.c_attn.weight")  # its bias proves it
    turned = tensors | {"h.0.attn.c_attn.weight": torch.randn(96, 32)}
    save(tmp_path / "turned", turned, None)
    assert not is_transposed(Checkpoint(tmp_path / "turned" / "model.safetensors"), "h.0.attn.c_attn.weight")
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    assert not is_transposed(save(tmp_path / "no-bias", without, None), "h.0.attn.c_attn.weight")


@pytest.mark.parametrize("name", encodings.NAMES)
def test_quantized_conv1d_is_turned_back(name, tmp_path):
    """Quantized modules hold `[out, in]`; the dense view gives the `[in, out]` that the family's code expects."""
    scheme, module = Scheme(4, group_size=32), "h.0.attn.c_attn"
    weight = random_weight(scheme, (96, 32), 0)
    encoding = encodings.encoding(name)
    config = {"model_type": "gpt2", "quantization_config": encoding.quantization_config({module: scheme}, [])}
    tensors = encoding.encode(module, weight, scheme) | {f"{module}.bias": torch.zeros(96)}
    view = DenseView(save(tmp_path / "m", tensors, config))
    entry = view.tensors[f"{module}.weight"]
    assert entry.transposed
    assert entry.shape == (32, 96)
    assert torch.equal(view.read(f"{module}.weight"), dequantize(weight, scheme).T)
    assert view.read(f"{module}.weight").is_contiguous()
    assert torch.equal(view.codes(module).codes, weight.codes)

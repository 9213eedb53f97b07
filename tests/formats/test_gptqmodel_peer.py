"""What we write as gptq loads in GPTQModel, and gives the logits of our own decode.

Needs `gptqmodel` (pip install gptqmodel), which is not a dependency: pytest -m peer tests/formats/test_gptqmodel_peer.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.ops.convert.run import Request as ConvertRequest
from tersor.ops.convert.run import convert
from tersor.ops.quantize.run import Request, quantize

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")


@torch.no_grad()
def logits_of_decode(folder: Path, dense: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    convert(ConvertRequest(str(folder), dense, "dense", "float32"))
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(ids).logits


def name_a_padding_token(folder: Path) -> None:
    """The peer refuses a tokenizer without one; the tiny models' has 256 bytes and nothing else."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def assert_loads(peer, folder: Path, dense: Path) -> None:
    """Every quantized layer is a peer's quantized layer with the weights of our decode, and the model computes the same."""
    name_a_padding_token(folder)
    model = peer.GPTQModel.load(str(folder), backend=peer.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    view = DenseView(Checkpoint(folder))
    modules = dict(model.named_modules())
    quantized = [entry for entry in view.tensors.values() if entry.scheme is not None]
    assert quantized
    for entry in quantized:
        layer = modules[entry.module]
        assert hasattr(layer, "qweight"), f"{entry.module} is a {type(layer).__name__}"
        weight = layer.dequantize_weight().float().T  # the peer's is [in, out]
        ours = view.read(f"{entry.module}.weight")
        ours = ours.T if entry.transposed else ours
        assert torch.allclose(weight, ours, rtol=1e-3, atol=1e-6), entry.module  # fp16 products there
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = logits_of_decode(folder, dense, ids)
    difference = torch.linalg.vector_norm(model(ids).logits.float() - expected) / torch.linalg.vector_norm(expected)
    assert difference < 5e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"scheme": "w8a16"}),
        ("llama", {"scheme": "w3a16"}),
        ("llama", {"scheme": "w2a16"}),
        ("llama", {"group_size": -1}),
        ("llama-tied", {}),
        ("llama-bias", {}),
        ("gpt2", {}),
        ("qwen3", {}),
    ],
)
def test_quantized_as_gptq(name, settings, peer, family, tmp_path):
    out = tmp_path / "out"
    quantize(Request(str(family(name)), out, **{"format": "gptq", "group_size": 32} | settings))
    assert_loads(peer, out, tmp_path / "dense")


def call_it_its_own(folder: Path) -> None:
    """The peer takes asymmetric v1 files only from itself: those of others may hold zero points that overflowed."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["meta"]["quantizer"].append("gptqmodel:7.0.0")
    for name, content in (("config.json", config), ("quantize_config.json", config["quantization_config"])):
        (folder / name).write_text(json.dumps(content))


def test_asymmetric(peer, family, tmp_path):
    """What the peer refuses by the name of its maker is right byte for byte."""
    quantize(Request(str(family("llama")), tmp_path / "out", format="gptq", group_size=32, symmetric=False))
    call_it_its_own(tmp_path / "out")
    assert_loads(peer, tmp_path / "out", tmp_path / "dense")


def test_converted_to_gptq(peer, family, tmp_path):
    quantize(Request(str(family("llama")), tmp_path / "first", group_size=32))
    convert(ConvertRequest(str(tmp_path / "first"), tmp_path / "out", "gptq"))
    assert_loads(peer, tmp_path / "out", tmp_path / "dense")


def test_layers_that_differ(peer, family, tmp_path):
    """Dense layers inside blocks and layers of other bits go into `dynamic`."""
    policy = tmp_path / "policy.json"
    policy.write_text(
        '{"schema": "tersor.policy/1", "tensors": {'
        r'".*down_proj\\.weight": {"scheme": "w8a16", "group_size": 32}, ".*\\.0\\..*k_proj\\.weight": {"keep": true}}}'
    )
    quantize(Request(str(family("llama")), tmp_path / "out", format="gptq", group_size=32, policy=policy))
    assert_loads(peer, tmp_path / "out", tmp_path / "dense")

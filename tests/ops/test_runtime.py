"""`tersor.ops.model.load`: whatever a checkpoint is stored as, it computes what its decoded weights compute."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats import activation_thresholds
from tersor.formats.activation_thresholds import Threshold
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.low_rank import Factors
from tersor.formats.scheme import Scheme
from tersor.formats.sparse.packed import Packed
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.convert.run import Request as ConvertRequest
from tersor.ops.convert.run import convert
from tersor.ops.model import choose_linear, load
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.linears import DenseLinear, Int8Linear, StoredLinear, rounded
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.sparsify.request import Request as SparsifyRequest
from tersor.ops.sparsify.run import sparsify

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(input_ids=IDS)[0].float()


def kinds(model) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, StoredLinear)}


def decoded(folder: Path, tmp_path: Path):
    """transformers' model of our own decode, each layer rounding its input as its scheme says."""
    convert(ConvertRequest(str(folder), tmp_path / "decoded", "dense", "float32"))
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "decoded", dtype=torch.float32).eval()
    for entry in DenseView(open_checkpoint(folder)).tensors.values():
        if entry.scheme is not None and entry.scheme.activations and ".experts." not in entry.module:
            model.get_submodule(entry.module).register_forward_pre_hook(
                lambda _, x, how=entry.scheme.activations: rounded(x[0].flatten(0, -2), how).view(x[0].shape)
            )
    return model


def quantized(model: Path, out: Path, scheme: str = "w4a16", **settings) -> Path:
    quantize(QuantizeRequest(str(model), out, scheme=scheme, **settings))
    return out


def pruned(model: Path, out: Path, pattern: str = "unstructured", sparsity: float = 0.5) -> Path:
    prune(PruneRequest(str(model), out, method="magnitude", pattern=pattern, sparsity=sparsity))
    return out


def sparse(model: Path, out: Path, form: str = "auto", **settings) -> Path:
    sparsify(SparsifyRequest(str(model), out, format=form, device="cpu", **settings))
    return out


def agree(folder: Path, tmp_path: Path, packed: set[str]) -> None:
    """All ways to keep the weights give the logits of the decoded ones; `packed` are the layers of the stored form.

    Where inputs are rounded to codes too, one that lies between two of them may go either way.
    """
    wanted = output(decoded(folder, tmp_path))
    schemes = [entry.scheme for entry in DenseView(open_checkpoint(folder)).tensors.values() if entry.scheme]
    tolerance = 2e-2 if any(scheme.activations for scheme in schemes) else 1e-5
    for keep_packed in (None, True, False):
        model = load(folder, "cpu", keep_packed=keep_packed)
        assert not model.training
        assert next(model.parameters()).dtype == torch.float32
        assert torch.linalg.vector_norm(output(model) - wanted) < tolerance * torch.linalg.vector_norm(wanted)
        if keep_packed is True:
            assert kinds(model) == packed
        if keep_packed is False:
            assert kinds(model) <= {"DenseLinear"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "bert-mlm", "qwen3-moe", "mixtral"])
def test_dense_and_pruned(name, family, tmp_path):
    """Nothing to unpack: as transformers loads it."""
    folder = pruned(family(name, dtype="float32"), tmp_path / "pruned")
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    wanted = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    model = load(folder, "cpu", keep_packed=True)
    assert type(model) is type(wanted)
    assert not kinds(model)
    assert torch.equal(output(model), output(wanted))


def label(value) -> str:
    """An id that is the same in every test process: the order of a set is not."""
    return " ".join(sorted(value)) if isinstance(value, set) else str(value)


QUANTIZED = [
    ("llama", "w4a16", {"group_size": 32}, {"Int4Linear"}),
    ("llama-tied", "w4a16", {"group_size": -1, "symmetric": False}, {"Int4Linear"}),
    ("llama-bias", "w4a16", {"group_size": 16}, {"DequantizedLinear"}),  # a group that the kernel does not take
    ("llama", "w8a16", {"group_size": 32, "symmetric": False}, {"DequantizedLinear"}),
    ("gemma3", "w3a16", {"group_size": 32}, {"DequantizedLinear"}),
    ("phi3", "w2a16", {"group_size": 32}, {"DequantizedLinear"}),
    ("gpt2", "w4a16", {"group_size": 32, "format": "gptq"}, {"Int4Linear"}),
    ("llama", "w3a16", {"group_size": 32, "format": "gptq"}, {"DequantizedLinear"}),
    ("qwen3-moe", "w4a16", {"group_size": 32}, {"Int4Linear"}),
    ("mixtral", "w8a8", {}, {"Int8Linear", "DequantizedLinear"}),  # experts take inputs as they are
    ("opt", "w8a8", {}, {"Int8Linear"}),
    ("bert-mlm", "fp8", {}, {"Fp8Linear"}),
    ("llama-bias", "fp8-block", {}, {"Fp8Linear"}),
]


@pytest.mark.parametrize(("name", "scheme", "settings", "packed"), QUANTIZED, ids=label)
def test_quantized(name, scheme, settings, packed, family, tmp_path):
    agree(quantized(family(name), tmp_path / "small", scheme, **settings), tmp_path, packed)


@pytest.mark.parametrize(("method", "packed"), [("svd", "LowRankLinear"), ("kronecker", "KroneckerLinear")])
@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "qwen3-moe"])
def test_factors(name, method, packed, family, tmp_path):
    request = PruneRequest(str(family(name, dtype="float32")), tmp_path / "thin", "ranks", method, 0.3)
    prune(request)
    agree(request.output, tmp_path, {packed})
    assert kinds(load(request.output, "cpu")) == {packed}  # faster as they are


SPARSE = [
    ("llama", "unstructured", "sparse-bitmask", {"BitmapLinear"}),
    ("gpt2", "unstructured", "sparse-bitmask", {"BitmapLinear"}),
    ("qwen3-moe", "unstructured", "sparse-bitmask", {"BitmapLinear"}),
    ("llama-bias", "2:4", "sparse-24-bitmask", {"SemiStructuredLinear"}),
    ("opt", "vector:32x1", "vector", {"TileLinear"}),
    ("llama-tied", "vector:1x32", "vector:1x32", {"TileLinear"}),
    ("gpt2", "block:16x16", "block", {"TileLinear"}),
]


@pytest.mark.parametrize(("name", "pattern", "form", "packed"), SPARSE, ids=label)
def test_sparse(name, pattern, form, packed, family, tmp_path):
    folder = pruned(family(name), tmp_path / "zeros", pattern, 0.5 if pattern == "2:4" else 0.7)
    agree(sparse(folder, tmp_path / "sparse", form), tmp_path, packed)


SPARSE_QUANTIZED = [
    ("llama", "unstructured", "w4a16", {"group_size": 32}, "sparse-bitmask", {"BitmapLinear"}),
    ("llama-bias", "unstructured", "w4a16", {"group_size": -1, "symmetric": False}, "sparse-bitmask", {"BitmapLinear"}),
    ("gpt2", "unstructured", "w4a16", {"group_size": 32, "format": "gptq"}, "sparse-bitmask", {"BitmapLinear"}),
    ("llama", "2:4", "w8a16", {"group_size": -1}, "sparse-24-bitmask", {"SemiStructuredLinear"}),
    ("opt", "2:4", "w4a16", {"group_size": 32}, "sparse-24-bitmask", {"SemiStructuredLinear"}),
    ("mixtral", "unstructured", "w3a16", {"group_size": 32}, "sparse-bitmask", {"BitmapLinear"}),
    ("llama", "unstructured", "w8a8", {}, "sparse-bitmask", {"BitmapLinear"}),
    ("opt", "unstructured", "fp8", {}, "sparse-bitmask", {"BitmapLinear"}),
    ("llama", "block:16x16", "w4a16", {"group_size": 32}, "block", {"TileLinear"}),
]


@pytest.mark.parametrize(
    ("name", "pattern", "scheme", "settings", "form", "packed"), SPARSE_QUANTIZED, ids=lambda value: str(value)
)
def test_sparse_over_quantized(name, pattern, scheme, settings, form, packed, family, tmp_path):
    zeros = pruned(family(name), tmp_path / "zeros", pattern, 0.5 if pattern == "2:4" else 0.7)
    folder = sparse(quantized(zeros, tmp_path / "small", scheme, **settings), tmp_path / "sparse", form)
    agree(folder, tmp_path, packed)


@pytest.mark.parametrize("keep_packed", [None, True, False])
def test_generates(keep_packed, family, tmp_path):
    folder = quantized(family("llama"), tmp_path / "small", group_size=32)
    wanted = decoded(folder, tmp_path).generate(IDS, max_new_tokens=6, do_sample=False)
    found = load(folder, "cpu", keep_packed=keep_packed).generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)


def test_settings_of_generation_come_along(family, tmp_path):
    shutil.copytree(family("llama"), tmp_path / "model")
    transformers.GenerationConfig(max_new_tokens=3, eos_token_id=7).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", "cpu")
    assert model.generation_config.max_new_tokens == 3
    assert model.generation_config.eos_token_id == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, family, tmp_path):
    folder = quantized(family("llama-bias"), tmp_path / "small", group_size=32)
    wanted = output(decoded(folder, tmp_path))
    for keep_packed in (None, True):
        model = load(folder, "cpu", dtype, keep_packed)
        assert model(input_ids=IDS).logits.dtype == dtype
        assert torch.linalg.vector_norm(output(model) - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


def test_what_is_kept_packed_is_small(family, tmp_path):
    folder = quantized(family("llama"), tmp_path / "small", group_size=32)
    held = {}
    for keep_packed in (True, False):
        blocks = load(folder, "cpu", keep_packed=keep_packed).model.layers
        held[keep_packed] = sum(tensor.nbytes for tensor in (*blocks.parameters(), *blocks.buffers()))
    assert held[True] < 0.2 * held[False]


def test_removed_branches_add_nothing(family, text, tmp_path):
    model = family("llama", dtype="float32", num_hidden_layers=4)
    for remove in ("attention", "mlp"):
        request = PruneRequest(
            str(model), tmp_path / remove, remove, sparsity=0.5, calib=str(text), samples=2, seq_len=32
        )
        prune(request)
        config = json.loads((request.output / "config.json").read_text())
        dropped = config["drop_attn_list" if remove == "attention" else "drop_mlp_list"]
        assert len(dropped) == 2
        wanted = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        for index in dropped:
            block = wanted.model.layers[index]
            last = block.self_attn.o_proj if remove == "attention" else block.mlp.down_proj
            torch.nn.init.zeros_(last.weight)
        found = load(request.output, "cpu")
        torch.testing.assert_close(output(found), output(wanted), rtol=1e-5, atol=1e-5)
        small = quantized(request.output, tmp_path / f"{remove}-small", group_size=32)
        assert torch.isfinite(output(load(small, "cpu", keep_packed=True))).all()


def test_folded_norms(family, tmp_path):
    model = family("llama", dtype="float32")
    prune(PruneRequest(str(model), tmp_path / "folded", "norms", sparsity=None))
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["folded_norms"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.testing.assert_close(output(load(tmp_path / "folded", "cpu")), output(wanted), rtol=1e-4, atol=1e-4)


def with_thresholds(folder: Path, name: str, threshold: float = 0.3) -> list[str]:
    """Give one to every linear layer whose name holds `name`."""
    found = [key for key in DenseView(open_checkpoint(folder)).tensors if re.search(name, key)]
    content = activation_thresholds.description(0.5, dict.fromkeys(found, Threshold(threshold, 0.5)))
    (folder / activation_thresholds.FILE_NAME).write_text(json.dumps(content))
    return found


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama-bias", None), ("gpt2", None), ("llama", "w4a16"), ("opt", "w8a8")]
)
def test_inputs_below_thresholds_are_zero(name, scheme, family, tmp_path):
    folder = tmp_path / "model"
    if scheme is None:
        shutil.copytree(family(name, dtype="float32"), folder)
    else:
        quantized(family(name), folder, scheme)
    wanted = load(folder, "cpu", keep_packed=False) if scheme is None else decoded(folder, tmp_path)
    plain = output(wanted)
    layers = with_thresholds(folder, r"(q_proj|up_proj|down_proj|c_attn|mlp.c_proj|fc1|fc2)\.weight")
    assert len(layers) >= 4
    for layer in layers:
        module = wanted.get_submodule(prefixed(wanted, layer))
        module.register_forward_pre_hook(lambda _, x: (torch.nn.functional.hardshrink(x[0], 0.3),), prepend=True)
    expected = output(wanted)
    assert torch.linalg.vector_norm(expected - plain) > 0.1 * torch.linalg.vector_norm(plain)
    for keep_packed in (None, True, False):
        model = load(folder, "cpu", keep_packed=keep_packed)
        error = torch.linalg.vector_norm(output(model) - expected)
        assert error < 0.05 * torch.linalg.vector_norm(expected)  # one that lies at a threshold may go either way
        assert ("ActiveLinear" in kinds(model)) == (scheme is None or (scheme == "w4a16" and not keep_packed))


def prefixed(model, weight: str) -> str:
    """The module of a checkpoint's weight; GPT-2's are stored without the name of its body."""
    module = weight.removesuffix(".weight")
    return module if module in dict(model.named_modules()) else f"{model.base_model_prefix}.{module}"


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_thresholds_of_experts(name, family, tmp_path):
    """As the blocks of `evaluate` run them."""
    folder = tmp_path / "model"
    shutil.copytree(family(name, dtype="float32"), folder)
    plain = output(load(folder, "cpu"))
    with_thresholds(folder, r"experts\.\d+\.(up_proj|w1|down_proj|w2)\.weight", 0.2)
    skeleton = Skeleton(DenseView(open_checkpoint(folder)), torch.device("cpu"))
    run = BlockPass(skeleton, IDS)
    for index in range(len(run)):
        with skeleton.filled(index) as block:
            run.run(index, block)
    wanted = torch.cat([logits for _, logits in run.logits(0)], dim=1)
    found = output(load(folder, "cpu"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.linalg.vector_norm(found - plain) > 0.01 * torch.linalg.vector_norm(plain)


def test_thresholds_for_other_weights_are_refused(family, tmp_path):
    shutil.copytree(family("llama"), tmp_path / "model")
    with_thresholds(tmp_path / "model", "embed_tokens")
    with pytest.raises(TersorError, match=r"embed_tokens.weight' .*no .*linear layer"):
        load(tmp_path / "model", "cpu")


def test_vision(family, tmp_path):
    from tiny_models import build

    folder = quantized(build("vit", tmp_path / "vit"), tmp_path / "small", group_size=32)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (load(folder, "cpu", keep_packed=kept)(images).logits for kept in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_a_cpu_runs_packed(monkeypatch):
    def tiles(count: int, side: int = 2048) -> Packed:
        return Packed("a.weight", "block", "BF16", (side, side), side, side, 16, count, tile=(32, 32))

    faster, int8 = choose_linear.faster_on_cpu, Scheme(8, strategy="channel", activations="int8")
    assert faster(None, tiles(64 * 64 // 10), None)
    assert not faster(None, tiles(64 * 64 // 2), None)
    assert not faster(None, tiles(6, side=256), None)  # the cache holds it
    assert faster(None, None, Factors("a", "low_rank", 4, (64, 64), "BF16"))
    assert not faster(Scheme(4, group_size=32), None, None)
    assert faster(Scheme(4, group_size=32), None, None, torch.bfloat16)
    assert not faster(Scheme(4, group_size=48), None, None, torch.bfloat16)
    for side, half in ((2048, True), (64, False)):
        bitmap = Packed("a.weight", "sparse-bitmask", "BF16", (side, side), side, side, 16, 9)
        assert [faster(None, bitmap, None, dtype) for dtype in (torch.float32, torch.bfloat16)] == [False, half]
    for exact in (True, False):
        monkeypatch.setattr(choose_linear, "int_mm_is_exact", lambda exact=exact: exact)
        assert faster(int8, None, None) == exact


def test_without_int8_products_activations_are_rounded_all_the_same(family, tmp_path, monkeypatch):
    folder = quantized(family("llama"), tmp_path / "small", "w8a8")
    monkeypatch.setattr(choose_linear, "int_mm_is_exact", lambda: False)
    plain = load(folder, "cpu")
    monkeypatch.setattr(choose_linear, "int_mm_is_exact", lambda: True)
    fast = load(folder, "cpu")
    assert (kinds(plain), kinds(fast)) == ({"DenseLinear"}, {"Int8Linear"})
    layer = next(module for module in plain.modules() if isinstance(module, DenseLinear))
    exact = next(module for module in fast.modules() if isinstance(module, Int8Linear))
    assert torch.equal(layer.weight, exact.weight)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), exact(x), rtol=1e-5, atol=1e-5)


def broken(family, folder: Path, change) -> Path:
    """A quantized model after `change(tensors, config)`."""
    quantized(family("llama"), folder, group_size=32)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FIRST = "model.layers.0.mlp.up_proj"
DAMAGE = {
    "scales gone": (lambda t, c: t.pop(f"{FIRST}.weight_scale"), "weight_scale' is missing"),
    "another shape": (lambda t, c: t.update({f"{FIRST}.weight_shape": torch.tensor([9, 9])}), FIRST),
    "a norm gone": (lambda t, c: t.pop("model.norm.weight"), "'model.norm.weight' is missing for a LlamaForCausalLM"),
    "a head gone": (lambda t, c: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
    "a layer too many": (lambda t, c: c.update(num_hidden_layers=1), "has no place in a LlamaForCausalLM"),
    "another width": (lambda t, c: c.update(intermediate_size=80), "cannot load this model|does not fit"),
    "foreign": (lambda t, c: c.update(quantization_config={"quant_method": "awq"}), "quant_method 'awq'"),
    "no such model": (
        lambda t, c: c.update(model_type="nonsense", architectures=["Nonsense"]),
        "cannot load this model",
    ),
}


@pytest.mark.parametrize("keep_packed", [None, True])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what, keep_packed, family, tmp_path):
    change, message = DAMAGE[what]
    with pytest.raises(TersorError, match=message):
        load(broken(family, tmp_path / "broken", change), "cpu", keep_packed=keep_packed)


@pytest.mark.parametrize("keep_packed", [None, True])
def test_a_damaged_bitmap_is_named(keep_packed, family, tmp_path):
    folder = sparse(pruned(family("llama"), tmp_path / "zeros"), tmp_path / "sparse", "sparse-bitmask")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".bitmask"))
    tensors[name][3] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TersorError, match=name.removesuffix("bitmask")):
        load(folder, "cpu", keep_packed=keep_packed)


def test_other_folders_are_named(family, tmp_path):
    with pytest.raises(TersorError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "bare.safetensors")
    with pytest.raises(TersorError, match=r"no config\.json"):
        load(tmp_path / "bare.safetensors")
    with pytest.raises(TersorError, match="--device abacus"):
        load(family("llama"), "abacus")


def test_the_package_does_not_import_torch():
    code = "import sys; from tersor.ops.model import load; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_checkpoint_is_closed_for_writing(family, tmp_path):
    """Weights are read, not mapped: a folder can be replaced while its model is in use."""
    shutil.copytree(family("llama"), tmp_path / "model")
    model = load(tmp_path / "model", "cpu")
    before = output(model)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    assert torch.equal(output(model), before)
    with pytest.raises(TersorError):
        Checkpoint(tmp_path / "model")

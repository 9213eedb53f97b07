"""AWQ: scales are folded only where that leaves the function alone, and rounding errors count for less afterwards."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.encodings import dequantize
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.scheme import Scheme
from tersor.ops.convert.run import Request as Convert
from tersor.ops.convert.run import convert
from tersor.ops.model import blocks
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import load_windows
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.schemes import scheme_from_name
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.statistics import InputStatistics
from tersor.ops.quantize import awq
from tersor.ops.quantize.awq import AWQ, search_scale, storable_scale
from tersor.ops.quantize.plan import build_plan
from tersor.ops.quantize.run import Request, quantize

IDS = torch.randint(5, 250, (6, 24), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


@pytest.fixture
def any_scale(monkeypatch):
    """A scale from 1/2 to 2, whatever the statistics say: folding must be right for all of them."""

    def search(weights, statistics, schemes, clip):
        generator = torch.Generator().manual_seed(weights[0].shape[1])
        return 2 ** (2 * torch.rand(weights[0].shape[1], generator=generator) - 1), 0.5

    monkeypatch.setattr(awq, "search_scale", search)


def folded(folder, exclude=None):
    """Fold every block without rounding. Returns (logits by blocks, {producer: consumers} of the first block)."""
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(DenseView(checkpoint), CPU)
    run = BlockPass(skeleton, IDS)
    method, plan = AWQ(), build_plan(checkpoint, scheme_from_name("w4a16", 32), exclude=exclude)
    folds = {}
    for index in range(len(run)):
        with skeleton.filled(index) as block:
            layers = {name: layer for name, layer in skeleton.linears(index).items() if name in plan.steps}
            statistics: dict[str, InputStatistics] = {}
            run.run_staged(index, block, layers, AWQ.needs, statistics.__setitem__, keep_inputs=True)
            changed, scaled = method.fold(run, index, block, layers, statistics, plan)
            if index == 0:
                prefix = skeleton.block_name(0) + "."
                for name in scaled:
                    producer = method.notes[name].rpartition(" ")[2]
                    folds.setdefault(producer, set()).add(name.removeprefix(prefix).removesuffix(".weight"))
                assert set(folds) == changed
            run.run(index, block)
    return torch.cat(
        [torch.cat([part for _, part in run.logits(batch)], 1) for batch in range(len(run.batches))]
    ), folds


def whole_model(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
LLAMA = {
    "input_layernorm": ATTENTION,
    "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
    "mlp.up_proj": {"mlp.down_proj"},
}
VALUES = {"self_attn.v_proj": {"self_attn.o_proj"}}  # where each head has keys and values of its own
GEMMA3 = {key: value for key, value in LLAMA.items() if key != "post_attention_layernorm"}
FOLDS = [
    ("llama", {}, LLAMA),
    ("llama", {"num_key_value_heads": 4}, LLAMA | VALUES),
    ("llama-bias", {}, LLAMA),
    ("mistral", {}, LLAMA),
    ("qwen2", {}, LLAMA),
    ("qwen3", {}, LLAMA),
    ("gemma", {}, LLAMA),
    ("gemma3", {}, GEMMA3 | {"pre_feedforward_layernorm": {"mlp.gate_proj", "mlp.up_proj"}}),
    ("phi3", {}, {"input_layernorm": {"self_attn.qkv_proj"}, "post_attention_layernorm": {"mlp.gate_up_proj"}}),
    # ReLU lets a positive scale through, GELU does not.
    (
        "opt", {},
        {"self_attn_layer_norm": ATTENTION, "self_attn.v_proj": {"self_attn.out_proj"}, "final_layer_norm": {"fc1"}, "fc1": {"fc2"}},
    ),
    ("gpt2", {}, {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}}),
    # Phi's attention and MLP read one norm side by side: scaling it for one would break the other.
    ("phi", {}, {"self_attn.v_proj": {"self_attn.dense"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "expected"), FOLDS, ids=lambda value: str(value)[:24].replace(" ", ""))
def test_function_is_preserved(name, changes, expected, family, any_scale):
    """Before any rounding, the folded model gives the logits of the original, and every provable fold is found."""
    folder = family(name, dtype="float32", **changes)
    logits, folds = folded(folder)
    assert folds == expected
    torch.testing.assert_close(logits, whole_model(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe"])
def test_experts(name, family, any_scale):
    """Inside an expert, up feeds down. The norm before the experts feeds the router too, and is left alone."""
    folder = family(name, dtype="float32")
    logits, folds = folded(folder)
    torch.testing.assert_close(logits, whole_model(folder), rtol=1e-4, atol=1e-4)
    assert folds.pop("input_layernorm") == ATTENTION
    assert folds.pop("mlp.shared_expert.up_proj", None) == (
        {"mlp.shared_expert.down_proj"} if name == "qwen2-moe" else None
    )
    assert folds and all(".experts." in f".{producer}" for producer in folds)
    for producer, consumers in folds.items():
        (consumer,) = consumers
        assert producer.split(".")[-2] == consumer.split(".")[-2]  # of one and the same expert
        assert producer.split(".")[-1] in ("w3", "up_proj") and consumer.split(".")[-1] in ("w2", "down_proj")


def test_expert_that_the_first_batch_misses_is_folded(family, any_scale, monkeypatch):
    """What is proved for one expert holds for all; those with too few tokens are left alone."""
    monkeypatch.setattr(blocks, "TOKENS_PER_BATCH", 24)
    folder = family("qwen3-moe", dtype="float32", num_experts=16, num_experts_per_tok=1)
    logits, folds = folded(folder)
    torch.testing.assert_close(logits, whole_model(folder), rtol=1e-4, atol=1e-4)
    found = {int(producer.split(".")[-2]) for producer in folds if ".up_proj" in producer}
    assert 0 < len(found) < 16
    assert found == {number for number, tokens in routed(folder).items() if tokens >= 16}


def routed(folder) -> dict[int, int]:
    """Expert -> tokens it gets in the first block."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: chosen.append(arguments[1].flatten()))
    with torch.no_grad():
        model(input_ids=IDS)
    counts = torch.cat(chosen).bincount(minlength=16)
    return dict(enumerate(counts.tolist()))


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_function_is_preserved_in_bfloat16(name, family, any_scale):
    """Norms are stored in bfloat16: the scale is the one that their new weights express exactly. The bias of OPT's
    norms is not exact, which is why only its logits may differ by a rounding."""
    folder = family(name)
    logits, folds = folded(folder)
    assert folds
    torch.testing.assert_close(logits, whole_model(folder), rtol=1e-4, atol=1e-4)


def test_fold_is_refused_where_not_all_readers_are_scaled(family, any_scale):
    """A reader that stays dense would see the scaled tensor."""
    folder = family("llama", dtype="float32")
    logits, folds = folded(folder, exclude=["q_proj", "gate_proj"])
    assert folds == {"mlp.up_proj": {"mlp.down_proj"}}
    torch.testing.assert_close(logits, whole_model(folder), rtol=1e-4, atol=1e-4)


# ---- the scale


def outliers(columns: int = 64, tokens: int = 400):
    """Inputs of which a few channels are far louder than the rest, as those of language models are."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, torch.randperm(columns, generator=generator)[:4]] *= 25
    statistics = InputStatistics(AWQ.needs)
    statistics.add(inputs)
    return torch.randn(48, columns, generator=generator) * 0.05, inputs, statistics


SCHEMES = [Scheme(4, group_size=32), Scheme(3, group_size=64, symmetric=False), Scheme(2, group_size=16)]


def output_errors(scheme, clip) -> dict[str, float]:
    """Of AWQ, of rounding on the same grid search weighted by the energies, and of rounding without data."""
    weight, inputs, statistics = outliers()
    energy = statistics.column_norms.square()
    scale, _ = search_scale([weight], statistics, [(scheme, torch.float32)], clip)
    decoded = {
        "weighted": dequantize(round_to_nearest(weight, scheme, torch.float32, energy, clip), scheme),
        "rtn": dequantize(round_to_nearest(weight, scheme, torch.float32, None, clip), scheme),
    }
    statistics.rescale(1 / scale)
    decoded["awq"] = dequantize(AWQ(clip).quantize(weight * scale, statistics, scheme, torch.float32), scheme) / scale
    return {name: float(((matrix - weight) @ inputs.T).square().sum()) for name, matrix in decoded.items()}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("clip", [True, False])
def test_output_error_is_less_than_of_rounding(scheme, clip):
    errors = output_errors(scheme, clip)
    assert errors["awq"] <= errors["weighted"] * 1.001
    assert errors["awq"] < 0.65 * errors["rtn"]


def test_error_of_the_search_is_that_of_the_outputs():
    """tr(D H D^T) is what multiplying the inputs out would give: the search takes the best of its grid."""
    weight, inputs, statistics = outliers()
    scheme = Scheme(3, group_size=32)
    found, exponent = search_scale([weight], statistics, [(scheme, torch.float32)], clip=False)
    assert 0 < exponent < 1
    errors = {}
    for step in range(awq.GRID):
        scale = inputs.abs().mean(0).clamp(min=1e-4) ** (step / awq.GRID)
        scale = scale / (scale.max() * scale.min()).sqrt()
        decoded = dequantize(round_to_nearest(weight * scale, scheme, torch.float32, clip=False), scheme) / scale
        errors[step / awq.GRID] = float(((decoded - weight) @ inputs.T).square().sum())
    assert errors[exponent] <= min(errors.values()) * 1.001
    assert found.max() * found.min() == pytest.approx(1, rel=1e-4)


def test_quiet_and_even_inputs_need_no_scale():
    """A dead input gets a finite scale; where all inputs are alike, nothing is to be gained."""
    weight, inputs, _ = outliers()
    statistics = InputStatistics(AWQ.needs)
    statistics.add(inputs.sign())
    scale, exponent = search_scale([weight], statistics, [(Scheme(4, group_size=32), torch.float32)])
    assert exponent == 0 and (scale == 1).all()
    inputs[:, 7] = 0
    statistics = InputStatistics(AWQ.needs)
    statistics.add(inputs)
    scale, _ = search_scale([weight], statistics, [(Scheme(4, group_size=32), torch.float32)])
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm", "GemmaRMSNorm"])
def test_storable_scale(kind, stored):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    classes = {"LayerNorm": torch.nn.LayerNorm, "LlamaRMSNorm": LlamaRMSNorm, "GemmaRMSNorm": GemmaRMSNorm}
    norm = classes[kind](64).requires_grad_(False)
    norm.weight.copy_((torch.randn(64) * 0.3 + (kind != "GemmaRMSNorm")).to(stored))
    wanted = 2 ** (2 * torch.rand(64) - 1)
    scale = storable_scale(norm, wanted, stored)
    torch.testing.assert_close(scale, wanted, rtol=0.1, atol=0)
    x = torch.randn(3, 64)
    expected = norm(x)
    awq.apply_scale(norm, [], scale)
    torch.testing.assert_close(norm.weight, norm.weight.to(stored).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm(x) * scale, expected, rtol=1e-4, atol=1e-4)


# ---- the whole run


def request(model, out, text, **options) -> Request:
    settings = {"method": "awq", "scheme": "w8a16", "group_size": 32, "calib": str(text), "samples": 6, "seq_len": 32}
    return Request(str(model), out, device="cpu", **settings | options)


def decoded_logits(folder):
    out = folder.with_name(folder.name + "-dense")
    convert(Convert(str(folder), out, "dense", "float32"))
    return whole_model(out)


EXCLUDED = [("llama", r"up_proj"), ("mixtral", r"\.w3\."), ("opt", r"fc1"), ("qwen3-moe", r"up_proj")]
RUNS = [(name, None) for name in ("llama", "qwen3", "mistral", "gemma", "phi", "opt", "gpt2", "mixtral", "qwen2-moe")]


@pytest.mark.parametrize(("name", "exclude"), [*RUNS, *EXCLUDED])
def test_run_with_any_scale(name, exclude, family, text, tmp_path, any_scale):
    """In 8 bits little is lost by rounding, so a wrong fold would show. Layers that are to stay dense are not scaled."""
    folder = family(name)
    report = quantize(request(folder, tmp_path / "out", text, exclude=[exclude] if exclude else []))
    expected = whole_model(folder)
    assert (decoded_logits(tmp_path / "out") - expected).square().mean().sqrt() < 0.04 * expected.std()
    notes = [entry.reason for entry in report.tensors if "inputs scaled" in (entry.reason or "")]
    assert notes and all("exponent 0.50, folded into" in note for note in notes)
    if exclude:
        before, after = DenseView(Checkpoint(folder)), DenseView(Checkpoint(tmp_path / "out"))
        kept = [tensor for tensor in before.tensors if re.search(exclude, tensor)]
        assert kept and all(torch.equal(before.read(tensor), after.read(tensor)) for tensor in kept)


def test_what_a_run_leaves_alone(family, text, tmp_path, any_scale):
    """Only norms that took a scale change; they keep their dtype. Embeddings, heads and other norms are the same bytes."""
    quantize(request(family("llama"), tmp_path / "out", text))
    before, after = DenseView(Checkpoint(family("llama"))), DenseView(Checkpoint(tmp_path / "out"))
    for name, entry in after.tensors.items():
        if entry.scheme is not None:
            continue
        found = after.read(name)
        assert found.dtype == getattr(torch, TORCH_DTYPES[before.tensors[name].dtype])
        in_a_block = ".layers." in name
        assert torch.equal(found, before.read(name)) != in_a_block, name


def test_run_is_nearer_than_rounding(family, text, tmp_path):
    """With loud channels in the residual stream, as language models have them."""
    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[:3] *= 12
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = load_windows(folder, str(text), 6, 32, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    errors = {}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for method in ("awq", "rtn"):
            quantize(request(folder, tmp_path / method, text, method=method, scheme="w3a16"))
            convert(Convert(str(tmp_path / method), tmp_path / f"{method}-dense", "dense", "float32"))
            decoded = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / f"{method}-dense", dtype=torch.float32
            )
            errors[method] = float((decoded(input_ids=ids).logits - expected).square().mean())
    assert errors["awq"] < 0.9 * errors["rtn"]


def test_pruned_zeros_stay(family, text, tmp_path, any_scale):
    folder = tmp_path / "model"
    shutil.copytree(family("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[:, ::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(request(folder, tmp_path / "out", text, scheme="w4a16", symmetric=False))
    view = DenseView(Checkpoint(tmp_path / "out"))
    assert all((view.read(name)[:, ::2] == 0).all() for name in tensors if "_proj" in name)

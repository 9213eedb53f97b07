"""`prune --remove ranks`: the checkpoints that come out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.report import Report
from tersor.ops.convert.run import Request as ConvertRequest
from tersor.ops.convert.run import convert
from tersor.ops.evaluate.run import Request as EvaluateRequest
from tersor.ops.evaluate.run import evaluate
from tersor.ops.model import load
from tersor.ops.model.linears import KroneckerLinear, LowRankLinear
from tersor.ops.prune import run as frame
from tersor.ops.prune.request import Request
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.verify.run import verify

METHODS = ("svd", "whitened", "kronecker")
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prune(model: Path, out: Path, text: Path | None = None, **changes) -> Report:
    request = {"remove": "ranks", "sparsity": 0.3, "samples": 4, "seq_len": 32} | changes
    return frame.prune(Request(str(model), out, calib=str(text) if text else None, **request))


def plan(model: Path, **changes):
    return frame.plan(Request(str(model), Path("unused"), **({"remove": "ranks", "sparsity": 0.3} | changes)))[1]


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(input_ids=IDS)[0].float()


def files(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith("report.")
    }


FAMILIES = ("llama-tied", "llama-bias", "gpt2", "phi3", "mixtral", "qwen3-moe", "bert-mlm", "opt")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, family, text, tmp_path):
    """Sound, smaller, and run through its factors it gives what the folded weights give."""
    model = family(name, dtype="float32")
    method = METHODS[FAMILIES.index(name) % 3]
    out, dense = tmp_path / "out", tmp_path / "dense"
    report = prune(model, out, text, method=method)
    assert verify(str(out), against=str(model)).problems == []
    source, made = Checkpoint(model), Checkpoint(out)
    view = DenseView(made)
    assert list(view.tensors) == list(source.tensors)
    assert {key: entry.shape for key, entry in view.tensors.items()} == {
        key: info.shape for key, info in source.tensors.items()
    }
    changed = [entry for entry in report.tensors if entry.action == "factorise"]
    assert len(changed) == report.quality["factorised_layers"] == sum(not e.is_stored for e in view.tensors.values())
    for entry in changed:
        assert entry.after["shape"] == entry.before["shape"]
        assert entry.after["params"] <= 0.7 * source.tensors[entry.name].params
        assert 0 < entry.error["relative_mse"] < 1
        assert 0 < entry.error["kept_energy"] < 1
    totals = report.totals()
    assert totals["params_before"] == sum(info.params for info in source.tensors.values())
    assert totals["params_after"] == sum(info.params for info in made.tensors.values())
    assert totals["bytes_after"] == made.nbytes < source.nbytes
    assert 0.3 <= report.quality["parameters_removed_share"] < 0.4
    convert(ConvertRequest(str(out), dense, "dense"))
    loaded = load(out, "cpu")
    kinds = {type(module) for module in loaded.modules()} & {LowRankLinear, KroneckerLinear}
    assert kinds == {KroneckerLinear if method == "kronecker" else LowRankLinear}
    wanted = output(type(loaded).from_pretrained(dense, dtype=torch.float32).eval())
    torch.testing.assert_close(output(loaded), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_in_the_dtype_of_the_weight(dtype, family, text, tmp_path):
    model = family("llama", dtype=dtype)
    prune(model, tmp_path / "out", text)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert verify(str(tmp_path / "out"), against=str(model)).problems == []
    convert(ConvertRequest(str(tmp_path / "out"), tmp_path / "dense", "dense"))
    loaded = load(tmp_path / "out", "cpu", getattr(torch, dtype))
    assert next(loaded.parameters()).dtype == getattr(torch, dtype)
    wanted = output(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    error = torch.linalg.vector_norm(output(load(tmp_path / "out", "cpu")) - wanted)
    assert error < 0.02 * torch.linalg.vector_norm(wanted)  # the products are rounded once


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_convert_fold_back_alike(name, family, text, tmp_path):
    model = family(name)
    prune(model, tmp_path / "factors", text)
    report = prune(model, tmp_path / "merged", text, merge=True)
    assert any("no smaller" in warning for warning in report.warnings)
    assert report.totals()["params_after"] == report.totals()["params_before"]
    convert(ConvertRequest(str(tmp_path / "factors"), tmp_path / "dense", "dense"))
    for folder in (tmp_path / "merged", tmp_path / "dense"):
        assert not (folder / "lowrank.json").exists()
        assert not DenseView(Checkpoint(folder)).is_factorised
        assert verify(str(folder)).problems == []
        _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert verify(str(tmp_path / "merged"), against=str(model)).problems == []
    if name == "llama":  # the first layers, which have seen the same text
        merged, dense = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "dense"))
        first = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(merged[first], dense[first])
        singular = torch.linalg.svdvals(merged[first].float())
        assert int((singular > 0.02 * singular[0]).sum()) <= 22  # 0.7 * 64 * 64 / 128, and the rounding


def test_whitened_beats_plain_on_the_text(family, text, tmp_path):
    model = family("llama", dtype="float32")
    scores = {}
    for method in ("svd", "whitened"):
        prune(model, tmp_path / method, text, method=method, samples=8)
        request = EvaluateRequest(str(tmp_path / method), str(text), 32, max_windows=8, compare=str(model))
        scores[method] = evaluate(request).quality["kl_divergence"]
    assert scores["whitened"] < 0.5 * scores["svd"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("name", "method"), [("gemma3", "whitened"), ("mixtral", "whitened"), ("llama", "svd")])
def test_resume_gives_the_same_bytes(name, method, merge, family, text, tmp_path):
    model = family(name)
    prune(model, tmp_path / "whole", text, method=method, merge=merge)

    def stop(stage: str, done: int, total: int) -> None:
        if stage in ("blocks", "tensors") and done == total // 2:
            raise KeyboardInterrupt

    request = Request(
        str(model), tmp_path / "out", "ranks", method, 0.3, merge=merge, calib=str(text), samples=4, seq_len=32
    )
    with pytest.raises(KeyboardInterrupt):
        frame.prune(request, stop)
    assert not request.output.exists()
    request.resume = True
    report = frame.prune(request)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert report.quality == Report.load(tmp_path / "whole").quality


@pytest.mark.parametrize("method", ["svd", "kronecker"])
def test_a_bare_file_needs_no_model(method, tmp_path):
    tensors = {"a.0.up.weight": random(33, 17).float(), "a.0.up.bias": random(33).float(), "norm": torch.ones(17)}
    save_file(tensors, tmp_path / "bare.safetensors")
    prune(tmp_path / "bare.safetensors", tmp_path / "out", method=method)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lowrank.json", "model.safetensors", "report.html", "report.json",
    ]  # fmt: skip
    assert verify(str(tmp_path / "out"), against=str(tmp_path / "bare.safetensors")).problems == []
    convert(ConvertRequest(str(tmp_path / "out"), tmp_path / "dense", "dense"))
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == tensors.keys()
    with pytest.raises(TersorError, match=r"no config\.json"):
        plan(tmp_path / "bare.safetensors", method="whitened")


def test_a_bare_conv1d_file_stays_transposed(tmp_path):
    tensors = {"h.0.attn.c_attn.weight": random(32, 96).float(), "h.0.attn.c_attn.bias": random(96).float()}
    save_file(tensors, tmp_path / "bare.safetensors")
    prune(tmp_path / "bare.safetensors", tmp_path / "out", method="svd")
    view = DenseView(Checkpoint(tmp_path / "out"))
    assert view.tensors["h.0.attn.c_attn.weight"].shape == (32, 96)
    assert view.checkpoint.tensors["h.0.attn.c_attn.lr_a"].shape[0] == 96


def test_later_commands_refuse_and_name_the_way_out(family, text, tmp_path):
    out = tmp_path / "out"
    prune(family("llama"), out, text)
    for remove in ("ranks", "weights"):
        with pytest.raises(TersorError, match="stored as factors") as error:
            frame.prune(Request(str(out), tmp_path / "x", remove))
        assert "--to dense" in error.value.hint
    with pytest.raises(TersorError, match="stored as factors") as error:
        quantize(QuantizeRequest(str(out), tmp_path / "x"))
    assert "--to dense" in error.value.hint
    with pytest.raises(TersorError, match="holds factors"):
        convert(ConvertRequest(str(out), tmp_path / "x", "gptq"))
    assert not (tmp_path / "x").exists()
    convert(ConvertRequest(str(out), tmp_path / "dense", "dense"))
    quantize(QuantizeRequest(str(tmp_path / "dense"), tmp_path / "x", group_size=32))
    assert [step["command"] for step in Report.load(tmp_path / "x").history] == ["prune", "convert"]
    assert not (tmp_path / "x" / "lowrank.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.99}, "no tensor is left to factorise"),
        ({"multiple_of": 64}, "no tensor is left to factorise"),
        ({"multiple_of": 0}, "--multiple-of 0"),
        ({"include": ["nowhere"]}, "matches no tensor"),
        ({"exclude": ["layers"]}, "no tensor is left"),
        ({"allocate": "rd"}, "--allocate rd"),
        ({"pattern": "2:4"}, "has no --pattern"),
        ({"rounds": 3}, "--rounds 3"),
        ({"keep_shape": True}, "--keep-shape"),
        ({"sparsity": 1.0}, "not in"),
        ({"method": "wanda"}, "has no method"),
    ],
)
def test_bad_requests(changes, message, family):
    with pytest.raises(TersorError, match=message):
        plan(family("llama"), **changes)


def test_what_is_too_small_is_kept_with_its_reason(family):
    found = plan(family("llama"), sparsity=0.96)  # rank 1 of 64x64 and larger; k_proj [32, 64] is past it
    actions = {name.rsplit(".", 2)[1]: action for name, action in found.actions.items() if ".layers.0." in name}
    assert actions["q_proj"].action == "factorise"
    assert actions["q_proj"].reason.startswith("rank 1 of 64")
    assert actions["k_proj"].action == "keep"
    assert "the budget of sparsity 0.96 is less" in actions["k_proj"].reason


def test_ranks_are_multiples(family):
    found = plan(family("llama"), multiple_of=8)
    assert {factors.count % 8 for factors in found.details.values()} == {0}


def test_sparsity_zero_copies(family, text, tmp_path):
    model = family("llama-tied")
    report = prune(model, tmp_path / "out", text, sparsity=0.0)
    assert any("removes nothing" in warning for warning in report.warnings)
    assert any("past the break-even" in entry.reason for entry in report.tensors)
    assert files(tmp_path / "out")["model.safetensors"] == files(model)["model.safetensors"]


def policy(tmp_path: Path, tensors: dict) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"schema": "tersor.policy/1", "tensors": tensors}))
    return path


def test_policy(family, tmp_path):
    path = policy(
        tmp_path, {r".*q_proj\.weight": {"sparsity": 0.75}, r".*layers\.1\..*": {"keep": True}, ".*norm.*": {}}
    )
    found = plan(family("llama"), policy=path)
    assert found.details["model.layers.0.self_attn.q_proj.weight"].count == 8
    assert found.details["model.layers.0.self_attn.o_proj.weight"].count == 22
    assert not any(".layers.1." in name for name in found.details)
    assert any("changes nothing" in warning for warning in found.warnings)
    for entry, message in (
        ({"bits": 4}, "unknown keys"), ({"sparsity": "half"}, "sparsity 'half' is not in"), ({"sparsity": 1}, "not in"),
        ({"sparsity": True}, "sparsity True is not in"),
    ):  # fmt: skip
        with pytest.raises(TersorError, match=message):
            plan(family("llama"), policy=policy(tmp_path, {".*q_proj.weight": entry}))
    with pytest.raises(TersorError, match="matches no whole tensor name"):
        plan(family("llama"), policy=policy(tmp_path, {"q_proj": {"keep": True}}))


def test_heads_outside_the_blocks(family, text, tmp_path):
    report = prune(family("llama"), tmp_path / "out", text, include=["lm_head"])
    head = next(entry for entry in report.tensors if entry.name == "lm_head.weight")
    assert head.action == "factorise"
    assert "outside the blocks, plain SVD" in head.reason
    loaded = load(tmp_path / "out", "cpu")
    assert isinstance(loaded.lm_head, LowRankLinear)
    assert bool(torch.isfinite(output(loaded)).all())


def test_a_tied_head_is_kept(family, tmp_path):
    folder = tmp_path / "tied"
    folder.mkdir()
    source = family("llama-tied")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    assert plan(folder, include=["lm_head", "q_proj"]).actions["lm_head.weight"].action == "keep"


def test_a_factor_of_unknown_origin(tmp_path):
    save_file({"a.0.b.weight": torch.ones(32, 32), "a.0.b.lr_a": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(TersorError, match=r"a.0.b.lr_a' is a factor, but there is no lowrank.json"):
        plan(tmp_path / "odd.safetensors", method="svd")


def test_damaged_weight(tmp_path):
    weight = random(32, 32).float()
    weight[3, 4] = torch.nan
    save_file({"a.0.b.weight": weight}, tmp_path / "nan.safetensors")
    with pytest.raises(TersorError, match=r"a.0.b.weight.*NaN"):
        prune(tmp_path / "nan.safetensors", tmp_path / "out", method="svd")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_lost_zeros_are_reported(tmp_path):
    weight = random(32, 32).float()
    weight[:, ::2] = 0.0
    weight[0, :] = 0.0
    save_file({"a.0.b.weight": weight}, tmp_path / "sparse.safetensors")
    report = prune(tmp_path / "sparse.safetensors", tmp_path / "out", method="svd")
    assert any("52% zeros" in warning for warning in report.warnings)


def test_load_refuses_what_does_not_fit(family, text, tmp_path):
    out = tmp_path / "out"
    prune(family("llama"), out, text, method="svd", include=["q_proj"])
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(TersorError, match=r"layers.1.mlp.up_proj.weight' is missing"):
        load(out, "cpu")


def test_planning_does_not_import_torch(family):
    code = (
        "import sys; from pathlib import Path; from tersor.ops.prune.run import plan\n"
        "from tersor.ops.prune.request import Request\n"
        "plan(Request(sys.argv[1], Path('unused'), 'ranks'))\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(family("llama"))], check=True, capture_output=True)

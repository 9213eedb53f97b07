"""Students of dense, pruned, factorised and packed checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.build import build
from tersor.ops.distill.students.student import Student
from tersor.ops.model import load
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tersor.ops.quantize.run import Request as QuantizeRequest
from tersor.ops.quantize.run import quantize
from tersor.ops.sparsify.request import Request as SparsifyRequest
from tersor.ops.sparsify.run import sparsify

CPU = torch.device("cpu")
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))
FAMILIES = ["llama", "llama-tied", "qwen3", "gemma", "gpt2", "opt", "phi3", "mixtral", "qwen2-moe", "bert", "bert-mlm"]


def student_of(folder: Path, **settings) -> Student:
    return build(DenseView(open_checkpoint(folder)), Request(str(folder), folder / "out", **settings), CPU)


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(input_ids=IDS)[0].float()


def train(student: Student, steps: int = 3, lr: float = 0.03) -> None:
    """Large steps, with all that an optimizer may do to a weight: decay, moments, and noise on top."""
    optimizer = torch.optim.AdamW(student.trainable().values(), lr=lr, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        out = student.model(input_ids=IDS)[0]
        (out * torch.randn(out.shape, generator=generator)).mean().mul(100).backward()
        student.before_step()
        optimizer.step()
        with torch.no_grad():
            for parameter in student.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        student.after_step()
        optimizer.zero_grad()


def write(student: Student, source: Path, folder: Path) -> Path:
    """What a student exports, as a folder. Names, dtypes and shapes have to be those of the layout."""
    tensors = dict(student.export())
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    checkpoint = student.view.checkpoint
    assert found == {name: (checkpoint.read(name).dtype, info.shape) for name, info in checkpoint.tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    for side in ("lowrank.json", "activation_sparsity.json"):
        if (source / side).is_file():
            shutil.copy(source / side, folder / side)
    return folder


def same_bytes(student: Student) -> None:
    """Nothing has trained: every tensor is given back bit for bit."""
    names = []
    for name, tensor in student.export():
        wanted = student.view.checkpoint.read(name)
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name
        names.append(name)
    assert names == list(student.view.checkpoint.tensors)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(found - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def zeros_in(folder: Path) -> dict[str, torch.Tensor]:
    """Where linear layers are zero, of those where a hundredth is."""
    view = DenseView(open_checkpoint(folder))
    weights = {
        name: view.read(name).float()
        for name, entry in view.tensors.items()
        if len(entry.shape) == 2 and not any(table in name for table in ("embed", "wte", "wpe"))
    }
    return {name: weight == 0 for name, weight in weights.items() if (weight == 0).float().mean() >= 0.01}


def pruned(model: Path, out: Path, pattern: str = "unstructured", sparsity: float = 0.5) -> Path:
    prune(PruneRequest(str(model), out, method="magnitude", pattern=pattern, sparsity=sparsity))
    return out


def factorised(model: Path, out: Path, method: str = "svd") -> Path:
    prune(PruneRequest(str(model), out, "ranks", method, 0.3))
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_dense(name, family, tmp_path):
    """Same function before, same bytes without training, and after training a checkpoint that gives what was trained."""
    folder = family(name, dtype="float32")
    student = student_of(folder)
    assert student.model.training
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    before = output(load(folder, "cpu"))
    close(output(student.model), before, 1e-6)
    same_bytes(student)
    train(student)
    after = output(student.model)
    assert (after - before).abs().max() > 1e-2
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), after, 1e-5)
    assert student.changed.keys() == student.view.checkpoint.tensors.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_rounded_once(name, family, tmp_path):
    folder = family(name)
    student = student_of(folder)
    same_bytes(student)
    train(student, 1)
    for tensor, parameter in student.changed.items():
        if student.view.checkpoint.tensors[tensor].shape == student.trainable()[parameter].shape:
            assert torch.equal(dict(student.export())[tensor], student.trainable()[parameter].detach().bfloat16())
            break
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), output(student.model), 0.03)


def test_dropout_is_off(family):
    student = student_of(family("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5))
    assert torch.equal(output(student.model), output(student.model))


def test_ties_hold(family, tmp_path):
    folder = family("llama-tied", dtype="float32")
    student = student_of(folder)
    assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    assert "lm_head.weight" not in student.trainable()
    train(student)
    weight, bias = student.head()
    assert weight is student.model.model.embed_tokens.weight and bias is None
    exported = dict(student.export())
    assert torch.equal(exported["model.embed_tokens.weight"], weight.detach())
    assert "lm_head.weight" not in exported


def test_a_head_that_is_stored_alone_fills_the_table_it_is_tied_to(family, tmp_path):
    """Files may hold either of two tied tensors."""
    folder = shutil.copytree(family("llama-tied", dtype="float32"), tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    student = student_of(folder)
    close(output(student.model), output(load(family("llama-tied", dtype="float32"), "cpu")), 1e-6)
    train(student)
    assert torch.equal(dict(student.export())["lm_head.weight"], student.model.model.embed_tokens.weight)


PRUNED = [
    *((name, "unstructured", 0.5) for name in FAMILIES),
    ("llama", "2:4", 0.5),
    ("gpt2", "block:16x16", 0.5),
    ("mixtral", "2:4", 0.5),
    ("llama", "unstructured", 0.02),
]


@pytest.mark.parametrize(("name", "pattern", "sparsity"), PRUNED)
def test_zeros_stay(name, pattern, sparsity, family, tmp_path):
    folder = pruned(family(name, dtype="float32"), tmp_path / "pruned", pattern, sparsity)
    zeros = zeros_in(folder)
    assert len(zeros) >= 8
    student = student_of(folder)
    same_bytes(student)
    close(output(student.model), output(load(folder, "cpu")), 1e-6)
    train(student)
    trained = write(student, folder, tmp_path / "trained")
    after = zeros_in(trained)
    assert after.keys() == zeros.keys()
    for tensor, mask in zeros.items():
        assert torch.equal(after[tensor], mask), tensor  # neither fewer nor more
    close(output(load(trained, "cpu")), output(student.model), 1e-5)


def test_zeros_get_no_gradient(family, tmp_path):
    student = student_of(pruned(family("mixtral", dtype="float32"), tmp_path / "pruned"))
    student.model(input_ids=IDS)[0].square().sum().backward()
    assert len(student.zeros) == 2 * 6  # four projections of attention, and the experts in two tensors
    loose = {path: student.trainable()[path].grad[zeros].abs().sum() for path, zeros in student.zeros.items()}
    assert all(total > 0 for total in loose.values())
    student.before_step()
    for path, zeros in student.zeros.items():
        gradient = student.trainable()[path].grad
        assert not gradient[zeros].any() and gradient[~zeros].any()


def test_zeros_are_free_without_keep_zeros(family, tmp_path):
    folder = pruned(family("llama", dtype="float32"), tmp_path / "pruned")
    student = student_of(folder, keep_zeros=False)
    assert not student.zeros
    train(student)
    assert not zeros_in(write(student, folder, tmp_path / "trained"))
    few = pruned(family("llama", dtype="float32"), tmp_path / "few", sparsity=0.005)
    assert not student_of(few).zeros  # less than one in a hundred is chance


@pytest.mark.parametrize("method", ["svd", "kronecker"])
@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "qwen3-moe"])
def test_factors(name, method, family, tmp_path):
    """They train as factors, those of experts too."""
    folder = factorised(family(name, dtype="float32"), tmp_path / "thin", method)
    student = student_of(folder)
    same_bytes(student)
    close(output(student.model), output(load(folder, "cpu")), 1e-5)
    factors = [tensor for tensor in student.view.checkpoint.tensors if tensor.endswith(("lr_a", "kron_b"))]
    assert factors and student.changed.keys() >= set(factors)
    train(student, lr=0.003)
    trained = write(student, folder, tmp_path / "trained")
    close(output(load(trained, "cpu")), output(student.model), 1e-4)
    before, after = load_file(folder / "model.safetensors"), load_file(trained / "model.safetensors")
    assert all(not torch.equal(before[tensor], after[tensor]) for tensor in factors)


SPARSE = [
    ("llama", "unstructured", "sparse-bitmask"),
    ("opt", "2:4", "sparse-24-bitmask"),
    ("gpt2", "block:16x16", "block"),
    ("qwen2-moe", "unstructured", "sparse-bitmask"),
]


@pytest.mark.parametrize(("name", "pattern", "form"), SPARSE)
def test_packed(name, pattern, form, family, tmp_path):
    """Unpacked, and their pattern kept."""
    zeros = pruned(family(name, dtype="float32"), tmp_path / "zeros", pattern, 0.5 if pattern == "2:4" else 0.7)
    folder = tmp_path / "sparse"
    sparsify(SparsifyRequest(str(zeros), folder, format=form, device="cpu"))
    assert open_checkpoint(folder).packed
    student = student_of(folder)
    same_bytes(student)
    close(output(student.model), output(load(zeros, "cpu")), 1e-6)
    wanted = zeros_in(folder)
    train(student)
    after = zeros_in(write(student, folder, tmp_path / "trained"))
    assert after.keys() == wanted.keys() and all(torch.equal(after[tensor], wanted[tensor]) for tensor in wanted)


def trained_tensors(student: Student) -> set[str]:
    """Train, and look at what has changed in the file."""
    train(student)
    changed = {name for name, tensor in student.export() if not torch.equal(tensor, student.view.checkpoint.read(name))}
    assert changed == set(student.changed)
    return changed


def test_include_and_exclude(family):
    student = student_of(family("llama"), include=[r"layers\.1\."], exclude=["norm", "q_proj"])
    changed = trained_tensors(student)
    assert len(changed) == 6
    assert all("layers.1." in name and "norm" not in name and "q_proj" not in name for name in changed)


def test_some_experts_alone(family, tmp_path):
    """Then experts are layers of their own; what they compute is the same."""
    folder = family("mixtral", dtype="float32")
    student = student_of(folder, include=[r"layers\.0\..*experts\.[01]\."])
    close(output(student.model), output(load(folder, "cpu")), 1e-5)
    same_bytes(student)
    changed = trained_tensors(student)
    assert len(changed) == 2 * 3
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), output(student.model), 1e-5)


@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("gpt2", 10), ("qwen3", 9), ("bert", 10), ("mixtral", 5)])
def test_norms_alone(name, count, family):
    changed = trained_tensors(student_of(family(name), train="norms"))
    assert len(changed) == count
    assert all("norm" in tensor.lower() or "ln_" in tensor for tensor in changed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"include": ["nothing"]}, "matches no tensor"),
        ({"exclude": ["("]}, "not a regular expression"),
        ({"exclude": ["."]}, "nothing to train"),
        ({"train": "scales"}, "nothing in it is quantized"),
        ({"train": "biases"}, "not known"),
    ],
)
def test_refused(settings, words, family):
    with pytest.raises(TersorError, match=words):
        student_of(family("llama"), **settings)


def test_a_missing_tensor_is_named(family, tmp_path):
    folder = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TersorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        student_of(folder)


def test_removed_branches_stay_removed(family, text, tmp_path):
    model = family("llama", dtype="float32", num_hidden_layers=4)
    folder = tmp_path / "cut"
    prune(PruneRequest(str(model), folder, "attention", sparsity=0.5, calib=str(text), samples=2, seq_len=32))
    student = student_of(folder)
    same_bytes(student)
    close(output(student.model), output(load(folder, "cpu")), 1e-5)
    train(student)
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), output(student.model), 1e-4)


def test_folded_norms_are_no_parameters_of_the_checkpoint(family, tmp_path):
    folder = tmp_path / "folded"
    prune(PruneRequest(str(family("llama", dtype="float32")), folder, "norms"))
    student = student_of(folder)
    assert not any("layernorm" in path for path in student.trainable())
    same_bytes(student)
    close(output(student.model), output(load(folder, "cpu")), 1e-5)
    train(student)
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), output(student.model), 1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_thresholds_count_in_training(name, family, text, tmp_path):
    folder = tmp_path / "sparse"
    model = family(name, dtype="float32")
    sparsify(SparsifyRequest(str(model), folder, activations=0.4, calib=str(text), samples=2, seq_len=64, device="cpu"))
    student = student_of(folder)
    same_bytes(student)
    wanted = output(load(folder, "cpu"))
    assert (output(load(model, "cpu")) - wanted).abs().max() > 1e-2
    close(output(student.model), wanted, 1e-5)
    train(student)
    close(output(load(write(student, folder, tmp_path / "trained"), "cpu")), output(student.model), 1e-4)


SHARDED = """
import sys, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from test_distill_students import plain_steps, student_of
from safetensors.torch import save_file
dist.init_process_group("gloo")
for folder, result in zip(sys.argv[2::2], sys.argv[3::2]):
    student = student_of(Path(folder))
    for block in student.model.model.layers:
        fully_shard(block)
    fully_shard(student.model)
    tensors = plain_steps(student)
    if dist.get_rank() == 0:
        save_file(tensors, result)
dist.destroy_process_group()
"""


def plain_steps(student: Student) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(student.trainable().values(), lr=0.01)
    for _ in range(2):
        student.model(input_ids=IDS)[0].square().mean().backward()
        student.before_step()
        optimizer.step()
        student.after_step()
        optimizer.zero_grad()
    return dict(student.export())


def test_two_ranks_give_what_one_gives(family, tmp_path):
    """Parameters in shards (FSDP2): masks and export are those of the whole."""
    folder, small, script = tmp_path / "pruned", tmp_path / "small", tmp_path / "sharded.py"
    pruned(family("llama", dtype="float32"), folder)
    quantize(QuantizeRequest(str(folder), small, group_size=32))
    script.write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    results = {path: tmp_path / f"{path.name}.safetensors" for path in (folder, small)}
    pairs = [str(path) for pair in results.items() for path in pair]
    subprocess.run([*launch, str(Path(__file__).parent), *pairs], check=True, capture_output=True)
    for path, result in results.items():
        found, wanted, zeros = load_file(result), plain_steps(student_of(path)), zeros_in(path)
        assert found.keys() == wanted.keys() and zeros
        for name, tensor in wanted.items():
            if tensor.dtype == torch.int32:  # codes of weights that lie between two of them may differ
                assert (found[name] != tensor).float().mean() < 0.01
                continue
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
            assert name not in zeros or torch.equal(found[name] == 0, zeros[name])

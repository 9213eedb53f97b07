"""prune --remove experts: the choice, the cut and the merge."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.errors import TersorError
from tersor.formats.report import Report
from tersor.ops.prune.experts.choose import at_random, average_shares, by_score, merge_groups
from tersor.ops.prune.experts.routing import RoutingStatistics
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tiny_models import BASE, byte_tokenizer

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(3))
GROUPED = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip


def request(model, out, text=None, **settings) -> Request:
    settings = {"remove": "experts", "sparsity": 0.5, "samples": 4, "seq_len": 32} | settings
    return Request(model=str(model), output=out, calib=text and str(text), **settings)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A model with a bias on its router, groups of experts, a shared expert and a first layer without experts."""
    folder = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**BASE | GROUPED))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(8) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_of(family, deepseek):
    return lambda name: deepseek if name == "deepseek" else family(name, dtype="float32")


def load(folder):
    """The model as a user loads it; anything missing or unexpected is an error."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def mask(model, kept: list[list[int]]):
    """Give every router -inf for the removed experts, where it makes its logits or compares its scores."""
    routers = [module for module in model.modules() if type(module).__name__.endswith(("TopKRouter", "TopkRouter"))]
    assert len(routers) == len(kept)
    for router, stay in zip(routers, kept, strict=True):
        removed = [expert for expert in range(router.weight.shape[0]) if expert not in stay]
        weight = router.weight

        def forward(*arguments, router=router, removed=removed, weight=weight, **keywords):
            original = torch.nn.functional.linear

            def linear(x, w, bias=None):
                result = original(x, w, bias)
                if w.shape == weight.shape and w.data_ptr() == weight.data_ptr():
                    result = result.index_fill(-1, torch.tensor(removed), -torch.inf)
                return result

            torch.nn.functional.linear = linear
            try:
                return type(router).forward(router, *arguments, **keywords)
            finally:
                torch.nn.functional.linear = original

        router.forward = forward
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe"])
@pytest.mark.parametrize("method", ["frequency", "random"])
def test_sliced_equals_masked(name, method, model_of, text, tmp_path):
    source = model_of(name)
    report = prune(request(source, tmp_path / "out", text, method=method))
    quality = report.quality["experts"]
    config = json.loads((source / "config.json").read_text())
    (key,) = {"num_experts", "num_local_experts"} & config.keys()
    assert quality["config_key"] == key and quality["kept"] * 2 == quality["experts"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, key: quality["kept"]}
    masked = mask(load(source), [layer["kept"] for layer in quality["layers"]])
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(masked), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(load(tmp_path / "out")), logits(load(source)), atol=1e-3)


def test_router_bias_and_shared_experts(deepseek, text, tmp_path):
    """Groups of 4 experts become groups of 3; the correction bias goes with its rows, the shared expert stays."""
    report = prune(request(deepseek, tmp_path / "out", text, sparsity=0.25))
    before, after = load_file(deepseek / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    (layer,) = report.quality["experts"]["layers"]
    kept, prefix = layer["kept"], "model.layers.1.mlp"
    assert len(kept) == 6
    for part in ("weight", "e_score_correction_bias"):
        assert torch.equal(after[f"{prefix}.gate.{part}"], before[f"{prefix}.gate.{part}"][kept])
    for place, expert in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(
                after[f"{prefix}.experts.{place}.{part}.weight"], before[f"{prefix}.experts.{expert}.{part}.weight"]
            )
    assert not any(".experts.6." in name for name in after)
    shared = [name for name in before if "shared_experts" in name or "layers.0.mlp" in name]
    assert shared and all(torch.equal(after[name], before[name]) for name in shared)
    load(tmp_path / "out")


def test_calibration_routes_as_transformers_does(deepseek, text, tmp_path):
    """The token counts of the report are those of the model itself, its correction bias included."""
    from tersor.ops.model.calibration import load_windows

    report = prune(request(deepseek, tmp_path / "out", text, sparsity=0.25))
    model = load(deepseek)
    chosen = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, arguments: chosen.append(arguments[1]))
    with torch.no_grad():
        model(input_ids=load_windows(deepseek, str(text), 4, 32))
    counts = torch.bincount(torch.cat(chosen).flatten(), minlength=8).tolist()
    assert report.quality["experts"]["layers"][0]["tokens"] == counts


def test_scores_by_their_definition():
    """Sum over the tokens routed to an expert of gate weight times the norm of its output."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 4, generator=generator)
    hidden = torch.randn(5, 4, generator=generator)
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    gates = torch.rand(5, 2, generator=generator)

    def experts(x, chosen, gate):
        return sum(
            gate[:, k, None] * torch.einsum("ti,toi->to", x, weights[chosen[:, k]]) for k in range(gate.shape[1])
        )

    found = RoutingStatistics(3, sample=True)
    torch.testing.assert_close(found.forward(experts, hidden, index, gates), experts(hidden, index, gates))
    for expert in range(3):
        wanted = mass = 0.0
        for token in range(5):
            for k in range(2):
                if index[token, k] == expert:
                    wanted += float(gates[token, k] * (weights[expert] @ hidden[token]).norm())
                    mass += float(gates[token, k])
        assert float(found.scores[expert]) == pytest.approx(wanted, rel=1e-5)
        assert float(found.mass[expert]) == pytest.approx(mass, rel=1e-5)
    assert found.tokens.tolist() == [5, 5, 0]
    outputs = torch.stack([hidden @ weight.T for weight in weights]).flatten(1)
    torch.testing.assert_close(
        found.similarity(), torch.nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1)
    )


def test_choices():
    assert by_score(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2) == [1, 2]
    assert at_random(8, 3, seed=0, layer=1) == at_random(8, 3, seed=0, layer=1)
    assert len({tuple(at_random(8, 3, seed, 0)) for seed in range(20)}) > 5
    similarity = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])
    assert merge_groups(similarity, [0, 1]) == {0: [2]}
    assert average_shares(torch.tensor([3, 9, 1]), {0: [2]}) == {0: 0.75, 2: 0.25}
    assert average_shares(torch.tensor([0, 9, 0]), {0: [2]}) == {0: 1.0, 2: 0.0}


def twins(folder, out):
    """Make experts 1 and 3 copies of 0 and 2, router rows as well."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) % 2:
            number = int(name.split(".experts.")[1].split(".")[0])
            tensors[name] = tensors[name.replace(f".experts.{number}.", f".experts.{number - 1}.")].clone()
        elif ".gate." in name:
            tensors[name][1::2] = tensors[name][0::2]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_merging_twins_loses_nothing(family, text, tmp_path):
    """With one expert a token and a router that cannot tell the two apart, one of them is enough."""
    source = twins(family("mixtral", dtype="float32", num_experts_per_tok=1), tmp_path / "twins")
    report = prune(request(source, tmp_path / "out", text, method="merge"))
    for layer in report.quality["experts"]["layers"]:
        merged = {(int(centre), *others) for centre, others in layer["merged_into"].items()}
        assert all(max(pair) // 2 == min(pair) // 2 for pair in merged) and len(merged) == 2
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(source)), rtol=1e-5, atol=1e-5)


def test_merge_is_the_weighted_average(family, text, tmp_path):
    source = family("mixtral", dtype="bfloat16")
    report = prune(request(source, tmp_path / "out", text, method="merge"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for number, layer in enumerate(report.quality["experts"]["layers"]):
        for place, centre in enumerate(layer["kept"]):
            group = [centre, *layer["merged_into"].get(str(centre), [])]
            total = sum(layer["tokens"][expert] for expert in group)
            name = next(name for name in before if f"layers.{number}." in name and f".experts.{centre}.w1" in name)
            parts = [before[name.replace(f"s.{centre}.w1", f"s.{expert}.w1")].float() for expert in group]
            wanted = sum(layer["tokens"][expert] / total * part for expert, part in zip(group, parts, strict=True))
            torch.testing.assert_close(
                after[name.replace(f"s.{centre}.w1", f"s.{place}.w1")], wanted.bfloat16(), rtol=0, atol=1e-3
            )
    load(tmp_path / "out")


def test_same_bytes_twice(family, text, tmp_path):
    for out in ("a", "b"):
        prune(request(family("qwen3-moe"), tmp_path / out, text))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_pruning_twice(family, text, tmp_path):
    prune(request(family("qwen3-moe"), tmp_path / "a", text, sparsity=0.34))
    report = prune(request(tmp_path / "a", tmp_path / "b", text, sparsity=0.5))
    assert (report.quality["experts"]["experts"], report.quality["experts"]["kept"]) == (4, 2)
    assert len(Report.load(tmp_path / "b").history) == 1
    load(tmp_path / "b")


def test_dry_run_knows_the_bytes(family, text, tmp_path):
    _, steps = plan(request(family("mixtral"), tmp_path / "out"))
    prune(request(family("mixtral"), tmp_path / "out", text))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert steps.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert {name: list(shape) for name, (_, shape) in steps.layout.items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {}, "has no experts"),
        ("mixtral", {"sparsity": 0.75}, "leaves 1 of 4 experts, and each token takes 2"),
        ("mixtral", {"sparsity": 0.1}, "is less than one"),
        ("mixtral", {"multiple_of": 4}, "leaves all 4 experts"),
        ("mixtral", {"include": ["layers.0"]}, "choose no experts"),
        ("deepseek", {"sparsity": 0.38}, "the router does not work with n_routed_experts 5"),
    ],
)
def test_bad_input(name, settings, message, family, deepseek, text, tmp_path):
    source = deepseek if name == "deepseek" else family(name)
    with pytest.raises(TersorError, match=message):
        prune(request(source, tmp_path / "out", text, **settings))
    assert not list(tmp_path.iterdir())


def interrupt_at(stage: str, count: int):
    """A progress callback that stops the run as Ctrl-C does."""

    def progress(found: str, done: int, total: int) -> None:
        if (found, done) == (stage, count):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("target", ["experts", "norms", "vocab"])
def test_resume_gives_the_same_bytes(target, family, text, tmp_path):
    """The three targets that decide first and then write tensor by tensor."""
    settings = {"remove": target, "sparsity": 0.5, "multiple_of": 1}
    source = family("mixtral", dtype="float32")
    if target == "vocab":  # every token of a tiny model is a byte, which stays; rows beyond them go
        source = family("mixtral", dtype="float32", vocab_size=320)
        settings["sparsity"] = 0.15
    prune(request(source, tmp_path / "whole", text, **settings))
    with pytest.raises(KeyboardInterrupt):
        prune(request(source, tmp_path / "out", text, **settings), interrupt_at("write", 7))
    assert not (tmp_path / "out").exists()
    prune(request(source, tmp_path / "out", text, resume=True, **settings))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

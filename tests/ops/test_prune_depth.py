"""`prune --remove layers`: the output is the model that skips those blocks, and loads as any other."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.model.block_importance import evenly_spaced
from tersor.ops.model.calibration import load_windows
from tersor.ops.prune.depth.knapsack import least_loss
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import plan, prune
from tersor.ops.verify.run import verify
from tiny_models import FAMILIES, build

LAYERS = {"gpt2": {"n_layer": 5}, "gemma3": {"num_hidden_layers": 7}}
IDS = torch.randint(5, 256, (2, 20), generator=torch.Generator().manual_seed(1))


def folder_of(family, name):
    return family(name, "float32", **LAYERS.get(name, {"num_hidden_layers": 5}))


def request(folder, out, text=None, **settings) -> Request:
    settings = {"remove": "layers", "method": "cosine", "sparsity": 0.4, "samples": 4, "seq_len": 32} | settings
    return Request(str(folder), out, calib=None if text is None else str(text), **settings)


def load(folder):
    """The model as transformers loads it; nothing may be missing or too much."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


@torch.no_grad()
def outputs(model, **inputs):
    return model(**(inputs or {"input_ids": IDS}))[0]


def skipping(model, blocks):
    """The model in which some blocks hand on what they are given."""

    def hook(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for index in blocks:
        blocks_of(model)[index].register_forward_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "name", ["llama-tied", "gemma3", "gpt2", "opt", "phi", "falcon", "mixtral", "qwen3-moe", "bert-mlm"]
)
def test_is_the_model_that_skips(name, family, text, tmp_path):
    folder = folder_of(family, name)
    report = prune(request(folder, tmp_path / "out", text))
    gone = report.quality["removed_from_blocks"]
    assert len(gone) == round(0.4 * len(blocks_of(load(folder))))
    smaller = load(tmp_path / "out")
    assert torch.equal(outputs(smaller), outputs(skipping(load(folder), gone)))
    assert len(blocks_of(smaller)) == len(blocks_of(load(folder))) - len(gone)
    assert verify(str(tmp_path / "out")).problems == []
    assert report.totals()["bytes_after"] == Checkpoint(tmp_path / "out").nbytes < report.totals()["bytes_before"]
    actions = {entry.action for entry in report.tensors}
    assert actions <= {"keep", "move", "drop"} and "drop" in actions


def test_image_model(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    report = prune(request(tmp_path / "vit", tmp_path / "out", method="even"))
    assert report.quality["removed_from_blocks"] == [1, 3]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        outputs(load(tmp_path / "out"), pixel_values=pixels),
        outputs(skipping(load(tmp_path / "vit"), [1, 3]), pixel_values=pixels),
    )
    for method in ("cosine", "knapsack"):
        with pytest.raises(TersorError, match="pixel_values") as error:
            plan(request(tmp_path / "vit", tmp_path / "no", method=method))
        assert "even" in error.value.hint


def settings_after(text, tmp_path, name, **changes) -> tuple[dict, dict, list[int]]:
    folder = build(name, tmp_path / name, "float32", **{"num_hidden_layers": 5} | LAYERS.get(name, {}) | changes)
    report = prune(request(folder, tmp_path / "out", text))
    gone = report.quality["removed_from_blocks"]
    assert torch.equal(outputs(load(tmp_path / "out")), outputs(skipping(load(folder), gone)))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    return before, after, [index for index in range(before["num_hidden_layers"]) if index not in gone]


def test_lists_of_layers(text, tmp_path):
    before, after, kept = settings_after(text, tmp_path, "gemma3")
    assert after["layer_types"] == [before["layer_types"][index] for index in kept]
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"num_hidden_layers", "layer_types"}


def test_lists_of_layer_numbers(text, tmp_path):
    dense = {"mlp_only_layers": [0, 3, 4], "intermediate_size": 96}
    before, after, kept = settings_after(text, tmp_path, "qwen3-moe", **dense)
    assert after["mlp_only_layers"] == [kept.index(index) for index in before["mlp_only_layers"] if index in kept]


def test_first_layers_of_another_kind(text, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    before, after, kept = settings_after(text, tmp_path, "qwen2", **window)
    assert after["max_window_layers"] == sum(index < 3 for index in kept)
    assert after["layer_types"] == [before["layer_types"][index] for index in kept]


def test_a_list_that_only_has_the_length_stays(text, tmp_path):
    before, after, _ = settings_after(text, tmp_path, "llama", eos_token_id=[1, 2, 3, 4, 0])
    assert after["eos_token_id"] == before["eos_token_id"]
    assert after["num_key_value_heads"] == before["num_key_value_heads"]


def test_names_in_the_config_are_renumbered(tmp_path):
    """Of norms whose gain was folded away, which have no tensor."""
    folder = build("llama", tmp_path / "llama", "float32", num_hidden_layers=5)
    tensors = load_file(folder / "model.safetensors")
    folded = [f"model.layers.{index}.input_layernorm.weight" for index in (1, 4)] + ["model.norm.weight"]
    save_file({name: value for name, value in tensors.items() if name not in folded}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"folded_norms": folded}
    (folder / "config.json").write_text(json.dumps(config))
    prune(request(folder, tmp_path / "out", method="even"))
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["folded_norms"] == ["model.layers.2.input_layernorm.weight", "model.norm.weight"]
    assert verify(str(tmp_path / "out")).problems == []


def test_settings_that_depend_on_the_number(tmp_path):
    folder = build("gpt2", tmp_path / "gpt2", "float32", n_layer=5, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(TersorError, match=r"attn\.scaling is .* instead of") as error:
        prune(request(folder, tmp_path / "out", method="even"))
    assert "--keep-shape" in error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
    prune(request(folder, tmp_path / "out", method="even", keep_shape=True))
    same = (outputs(load(tmp_path / "out")), outputs(skipping(load(folder), [1, 3])))
    assert torch.allclose(*same, atol=1e-6)


def test_blocks_that_compute_with_their_number(family, tmp_path, monkeypatch):
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def scaled(self, *args, **kwargs):
        output, weights = forward(self, *args, **kwargs)
        return output / (1 + self.layer_idx), weights

    monkeypatch.setattr(attention, "forward", scaled)
    with pytest.raises(TersorError, match="computes with its own number"):
        plan(request(folder_of(family, "llama"), tmp_path / "out", method="even"))


def test_blocks_that_are_called_by_their_number(family, tmp_path, monkeypatch):
    model = transformers.models.gemma3.modeling_gemma3.Gemma3TextModel
    forward = model.forward

    def by_number(self, *args, **kwargs):  # the list of attention types says nothing about the blocks' own settings
        if len(self.layers) == 5:
            self.config.layer_types[0] = "full_attention"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", by_number)
    with pytest.raises(TersorError, match="would be called with something else"):
        plan(request(folder_of(family, "gemma3"), tmp_path / "out", method="even", sparsity=0.3))


def test_attention_types_of_gpt_neo_are_refused(tmp_path):
    config = transformers.GPTNeoConfig(
        vocab_size=256, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    with pytest.raises(TersorError, match=r"config\.json cannot say that 2 of 4 blocks are left"):
        plan(request(tmp_path / "neo", tmp_path / "out", method="even", sparsity=0.5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-moe"])
def test_keep_shape(name, family, text, tmp_path):
    folder = folder_of(family, name)
    report = prune(request(folder, tmp_path / "out", text, keep_shape=True))
    gone = report.quality["removed_from_blocks"]
    masked = outputs(skipping(load(folder), gone))
    assert torch.allclose(outputs(load(tmp_path / "out")), masked, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    zeroed = [entry for entry in report.tensors if entry.action == "mask"]
    assert zeroed and all(entry.sparsity == 1.0 for entry in zeroed)
    assert verify(str(tmp_path / "out"), str(folder)).problems == []


def test_zeros_are_no_bert_block(family, tmp_path):
    with pytest.raises(TersorError, match="still changes what it is given"):
        plan(request(folder_of(family, "bert"), tmp_path / "out", method="even", keep_shape=True))


def test_cosine_is_the_published_score(family, text, tmp_path):
    folder = folder_of(family, "llama")
    report = prune(request(folder, tmp_path / "out", text))
    model = load(folder)
    windows = load_windows(folder, str(text), 4, 32)
    with torch.no_grad():
        states = model(input_ids=windows, output_hidden_states=True).hidden_states
    for index in range(4):  # the last of `hidden_states` has gone through the last norm
        cosine = torch.nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert report.quality["scores"][str(index)] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    scores = {int(index): score for index, score in report.quality["scores"].items()}
    assert report.quality["removed_from_blocks"] == sorted(sorted(scores, key=scores.get)[:2])


def test_knapsack_measures_what_removal_does(family, text, tmp_path):
    folder = folder_of(family, "llama")
    quality = prune(request(folder, tmp_path / "out", text, method="knapsack")).quality
    windows = load_windows(folder, str(text), 4, 32)

    def last_states(model):
        with torch.no_grad():
            return model.base_model(input_ids=windows)[0]

    dense = last_states(load(folder))

    def loss(blocks):
        changed = last_states(skipping(load(folder), blocks)) - dense
        return float(changed.square().sum() / dense.square().sum())

    for index in range(5):
        assert quality["scores"][str(index)] == pytest.approx(loss([index]), rel=1e-4)
    gone = quality["removed_from_blocks"]
    assert quality["measured_output_loss"] == pytest.approx(loss(gone), rel=1e-4)
    assert quality["predicted_output_loss"] == pytest.approx(sum(quality["scores"][str(index)] for index in gone))
    ratio = quality["measured_output_loss"] / quality["predicted_output_loss"]
    assert quality["measured_over_predicted"] == pytest.approx(ratio)


@pytest.mark.parametrize("remove", ["layers", "mlp"])
def test_waiting_on_disk_changes_nothing(remove, family, text, tmp_path, monkeypatch):
    from tersor.ops.model import blocks, spill
    from tersor.ops.prune.depth import run

    monkeypatch.setattr(blocks, "TOKENS_PER_BATCH", 64)
    asked = {"remove": remove, "method": "knapsack"}
    inside = prune(request(folder_of(family, "llama"), tmp_path / "a", text, **asked)).quality
    pools = []

    class NoRoom(spill.SpillPool):
        def __init__(self, space):
            super().__init__(0)
            pools.append(self)

    monkeypatch.setattr(run, "SpillPool", NoRoom)
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 1)
    assert prune(request(folder_of(family, "llama"), tmp_path / "b", text, **asked)).quality == inside
    assert all(pool.peak_spilled_bytes > 0 for pool in pools)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_knapsack_against_brute_force(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=7))
    losses = data.draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)))
    least = data.draw(st.integers(1, sum(sizes) - min(sizes)))
    chosen = least_loss(losses, sizes, least)
    every = (set_ for count in range(len(sizes)) for set_ in combinations(range(len(sizes)), count))
    enough = [set_ for set_ in every if sum(sizes[index] for index in set_) >= least]
    best = min(sum(losses[index] for index in set_) for set_ in enough)
    assert len(chosen) < len(sizes) and sum(sizes[index] for index in chosen) >= least
    assert sum(losses[index] for index in chosen) <= best + 1e-9


def test_knapsack_that_needs_everything():
    with pytest.raises(ValueError, match="every candidate"):
        least_loss([1.0, 2.0], [3, 4], 5)


@given(st.integers(3, 100), st.data())
def test_even_spacing(total, data):
    count = data.draw(st.integers(1, total - 2))
    chosen = evenly_spaced(total, count)
    assert len(set(chosen)) == count and chosen == sorted(chosen) and chosen[0] > 0 and chosen[-1] < total - 1
    gaps = [after - before for before, after in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.95}, "leaves the model none"),
        ({"sparsity": 0.09}, "rounds to none"),
        ({"sparsity": 0.0}, "rounds to none"),
        ({"sparsity": 0.8, "method": "even"}, "keeps the first and the last of 5 blocks, and 4"),
        ({"include": ["nothing"]}, "'nothing' matches no tensor"),
        ({"exclude": ["layers"]}, "no block is left to remove"),
        ({"allocate": "owl"}, "--allocate"),
    ],
)
def test_bad_input(settings, message, family, tmp_path):
    with pytest.raises(TersorError) as error:
        prune(request(folder_of(family, "llama"), tmp_path / "out", **settings))
    assert message in f"{error.value} {error.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_single_block(family, tmp_path):
    folder = family("llama", "float32", num_hidden_layers=1)
    with pytest.raises(TersorError, match="leaves the model none"):
        prune(request(folder, tmp_path / "out", sparsity=0.9))


def test_patterns_choose_the_candidates(family, text, tmp_path):
    folder = folder_of(family, "llama")
    quality = prune(
        request(folder, tmp_path / "out", text, sparsity=0.5, include=[r"\.[0-2]\."], exclude=[r"layers\.1\.mlp"])
    ).quality
    assert set(quality["scores"]) == {"0", "2"} and len(quality["removed_from_blocks"]) == 1


def test_plan_without_text(family, tmp_path):
    folder = folder_of(family, "llama")
    _, steps = plan(request(folder, tmp_path / "out"))
    assert "cosine chooses" in steps.warnings[0]
    _, exact = plan(request(folder, tmp_path / "out", method="even"))
    assert exact.nbytes == steps.nbytes < Checkpoint(folder).nbytes and exact.warnings == []


def test_same_bytes_again_and_after_an_interruption(family, text, tmp_path, monkeypatch):
    folder = folder_of(family, "llama")
    prune(request(folder, tmp_path / "a", text))
    from tersor.ops.prune.depth import run

    copied = []
    copy_tensor = run.copy_tensor

    def interrupted(checkpoint, name, writer, new_name):
        copied.append(name)
        if len(copied) == 15:
            raise KeyboardInterrupt
        copy_tensor(checkpoint, name, writer, new_name)

    monkeypatch.setattr(run, "copy_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(request(folder, tmp_path / "b", text))
    first = copied.copy()
    prune(request(folder, tmp_path / "b", text, resume=True))
    assert first[0] not in copied[len(first) :]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_not_finite(tensor, family, text, tmp_path):
    import shutil

    shutil.copytree(folder_of(family, "llama"), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(TersorError, match=tensor):
        prune(request(tmp_path / "bad", tmp_path / "out", text))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_all_families_are_numbered(family, tmp_path):
    for name in FAMILIES:
        _, steps = plan(request(folder_of(family, name), tmp_path / "out", method="even", sparsity=0.2))
        blocks = {
            action.outputs and int(next(part for part in output.split(".") if part.isdigit()))
            for action in steps.actions.values()
            for output in action.outputs
            if action.action == "move"
        }
        assert blocks and 0 not in blocks

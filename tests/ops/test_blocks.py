"""The block-by-block pass gives what the whole model gives, for every family and with activations on disk."""

from __future__ import annotations

import pytest
import torch
import transformers
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.model import blocks, spill
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.skeleton import Skeleton, weight_matrix
from tersor.ops.model.spill import SpillPool
from tiny_models import FAMILIES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(spill, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(blocks, "TOKENS_PER_BATCH", 64)


def whole_model(folder, ids):
    model_class = getattr(transformers, FAMILIES[folder.name][0])
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def by_blocks(run: BlockPass, logits: bool):
    if logits:
        return torch.cat([torch.cat([part for _, part in run.logits(i, chunk=7)], 1) for i in range(len(run.batches))])
    return torch.cat([run.hidden.take(i) for i in range(len(run.batches))])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["plain", "staged", "spilled"])
def test_same_as_whole_model(name, way, family, tmp_path):
    folder = family(name)
    ids = torch.randint(5, 256, (7, 20), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(DenseView(Checkpoint(folder)), CPU)
    pool = SpillPool(0, tmp_path) if way == "spilled" else SpillPool(None)
    run = BlockPass(skeleton, ids, pool)
    seen: dict[str, int] = {}
    for index in range(len(run)):
        with skeleton.filled(index) as block:
            if way == "plain":
                run.run(index, block)
            else:
                layers = skeleton.linears(index)

                def ready(name, statistics, layers=layers):
                    seen[name] = statistics.tokens
                    layers[name].weight = torch.nn.Parameter(layers[name].weight.clone(), requires_grad=False)

                unreached = run.run_staged(index, block, layers, {"hessian"}, ready)
                assert set(layers) == set(unreached) | {layer for layer in seen if layer in layers}
    expected = whole_model(folder, ids)
    assert torch.allclose(by_blocks(run, expected.shape[-1] == 256), expected, atol=2e-5, rtol=1e-4)
    if way != "plain":
        assert all(tokens == ids.numel() for layer, tokens in seen.items() if ".experts." not in layer)
        experts = [tokens for layer, tokens in seen.items() if ".experts." in layer and ".0.w1" not in layer]
        assert all(0 < tokens <= ids.numel() for tokens in experts)
    if way == "spilled":
        assert pool.peak_spilled_bytes > 0


def test_spill_holds_only_what_fits(family, tmp_path):
    skeleton = Skeleton(DenseView(Checkpoint(family("llama"))), CPU)
    ids = torch.randint(5, 256, (8, 32), generator=torch.Generator().manual_seed(1))
    outputs = []
    for cap in (None, 20_000):
        pool = SpillPool(cap, tmp_path)
        run = BlockPass(skeleton, ids, pool)
        peak = 0

        def ready(name, statistics, pool=pool):
            nonlocal peak
            peak = max(peak, pool.resident_bytes)

        for index in range(len(run)):
            with skeleton.filled(index) as block:
                run.run_staged(index, block, skeleton.linears(index), {"hessian"}, ready)
        outputs.append(by_blocks(run, logits=True))
        if cap is not None:
            assert peak <= cap
            assert pool.peak_spilled_bytes > cap
    assert torch.equal(*outputs)


def test_statistics_are_those_of_the_input(family):
    """X^T X collected at a pause equals the one from a hook on the whole model."""
    folder = family("llama")
    ids = torch.randint(5, 256, (6, 16), generator=torch.Generator().manual_seed(2))
    skeleton = Skeleton(DenseView(Checkpoint(folder)), CPU)
    run = BlockPass(skeleton, ids)
    found = {}
    for index in range(len(run)):
        with skeleton.filled(index) as block:
            run.run_staged(
                index,
                block,
                skeleton.linears(index),
                {"hessian", "column_norms", "column_means", "samples"},
                found.__setitem__,
            )
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids)
    assert set(found) == {f"{name}.weight" for name in inputs}
    for name, x in inputs.items():
        statistics = found[f"{name}.weight"]
        assert torch.allclose(statistics.hessian, x.T @ x / len(x), atol=1e-4)
        assert torch.allclose(statistics.column_norms, x.norm(dim=0), rtol=1e-4)
        assert torch.allclose(statistics.column_means, x.abs().mean(dim=0), rtol=1e-4)
        assert torch.allclose(statistics.samples, x[:512], atol=1e-5)
    assert found["model.layers.0.self_attn.q_proj.weight"] is found["model.layers.0.self_attn.v_proj.weight"]
    assert found["model.layers.0.mlp.gate_proj.weight"] is found["model.layers.0.mlp.up_proj.weight"]


def test_changes_reach_later_layers(family):
    """A weight changed at its pause is the one the rest of the pass runs with."""
    skeleton = Skeleton(DenseView(Checkpoint(family("llama"))), CPU)
    ids = torch.randint(5, 256, (4, 16), generator=torch.Generator().manual_seed(2))
    run = BlockPass(skeleton, ids)
    before = torch.cat([run.hidden.take(i).clone() for i in range(len(run.batches))])
    with skeleton.filled(0) as block:
        layers = skeleton.linears(0)

        def ready(name, statistics):
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight_matrix(layers[name]).zero_()

        run.run_staged(0, block, layers, set(), ready)
    after = torch.cat([run.hidden.take(i) for i in range(len(run.batches))])
    assert torch.equal(before, after)  # both branches deliver nothing, the residual is left


def test_encoder_decoder_is_refused(tmp_path):
    config = transformers.T5Config(vocab_size=256, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(TersorError, match="encoder-decoder"):
        Skeleton(DenseView(Checkpoint(tmp_path)), CPU)


def test_wrong_shape_and_missing_tensor_are_named(family, tmp_path):
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(family("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with (
        pytest.raises(TersorError, match=r"mlp\.\w+_proj\.weight"),
        Skeleton(DenseView(Checkpoint(folder)), CPU).filled(0),
    ):
        pass
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TersorError, match=r"layers\.1\.mlp\.up_proj"):
        Skeleton(DenseView(Checkpoint(folder)), CPU)

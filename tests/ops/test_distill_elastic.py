"""Elastic training: sorting keeps the function, sub-networks are what they say."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.elastic import FILE, KEYS, from_json, kept_count
from tersor.formats.errors import TersorError
from tersor.ops.distill.elastic.elastic import Elastic
from tersor.ops.distill.elastic.order import rank_blocks, sort_units
from tersor.ops.distill.nested import nest
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.build import build
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.prune.request import Request as PruneRequest
from tersor.ops.prune.run import prune
from tiny_models import FAMILIES

NAMES = ("llama-tied", "qwen3", "gemma", "gpt2", "opt", "mixtral")
IDS = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(5, 200, (4, 32), generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")
SHARES = {"neurons": (1, 0.5), "heads": (1, 0.5), "depth": (1, 0.75, 0.5)}


def folder_of(family, name, layers=4):
    return family(name, "float32", **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers})


def prepare(folder, **settings):
    """An elastic run and the student that is built from it."""
    elastic = Elastic(DenseView(Checkpoint(folder)), CPU, WINDOWS, **{"shares": SHARES, "steps": 10} | settings)
    student = build(elastic.view, Request(student=str(folder), output=folder / "out"), CPU)
    elastic.bind(student.model)
    return elastic, student


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def close(found, expected, tolerance=2e-6):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("windows", [WINDOWS, None], ids=["activation", "magnitude"])
def test_sorting_keeps_the_function(family, name, windows):
    folder = folder_of(family, name)
    view = DenseView(Checkpoint(folder))
    elastic = Elastic(view, CPU, windows, shares=SHARES)
    assert not elastic.order.reasons and {group.kind for group in elastic.order.nesting.groups} == {"neurons", "heads"}
    student = build(elastic.view, Request(student=str(folder), output=folder / "out"), CPU)
    before = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder, dtype=torch.float32)
    assert close(logits(student.model), logits(before))
    moved = [name for name in view.tensors if not torch.equal(view.read(name), elastic.view.read(name))]
    assert len(moved) >= 3 * len(elastic.order.skeleton.blocks)


def test_order_is_by_importance(family):
    """By magnitude the norms of the sorted neurons descend; by activation, the product with what they put out does."""
    folder = folder_of(family, "llama")
    view = Elastic(DenseView(Checkpoint(folder)), CPU, None, shares=SHARES).view
    prefix = "model.layers.2.mlp."
    rows = [view.read(f"{prefix}{name}.weight").float() for name in ("gate_proj", "up_proj")]
    norms = sum(row.square().sum(1) for row in rows) + view.read(f"{prefix}down_proj.weight").float().square().sum(0)
    assert bool((norms.diff() <= 1e-5).all())

    student = prepare(folder)[1]
    inputs = []
    layer = student.model.model.layers[2].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        student.model.eval()(input_ids=WINDOWS)
    product = inputs[0].square().mean(0) * layer.weight.square().sum(0)
    assert bool((product.diff() <= 1e-5 * product.max()).all())


def test_sorted_checkpoint_reads_rows_and_maps(family):
    folder = folder_of(family, "llama")
    checkpoint = Elastic(DenseView(Checkpoint(folder)), CPU, None, shares=SHARES).view.checkpoint
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(checkpoint.read(name)[3:9], checkpoint.read(name, (3, 9)))
        assert torch.equal(checkpoint.map(name), checkpoint.read(name))


def test_blocks_are_ranked():
    assert rank_blocks(5, {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.0}) == [0, 4, 2, 3, 1]
    assert rank_blocks(1, {}) == [0]
    order = rank_blocks(13, {})
    for kept, largest in (
        (12, 2),
        (10, 2),
        (9, 2),
        (8, 3),
        (5, 3),
        (3, 6),
    ):  # nested, so that not each can be quite even
        gaps = [b - a for a, b in pairwise(sorted(order[:kept]))]
        assert max(gaps) == largest, (kept, gaps)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_kept_part_only(family, name):
    """Nothing for the tail of what is not kept, nothing at all for blocks that are left out; the rest has some."""
    elastic, student = prepare(folder_of(family, name))
    nesting, skeleton = elastic.order.nesting, elastic.order.skeleton
    network = nesting.network(0.5, 0.5, 0.75)
    with elastic.running(network):
        student.model(input_ids=IDS, labels=IDS).loss.backward()
    (gone,) = set(range(4)) - set(nesting.kept_blocks(0.75))
    places = elastic_places(student, elastic)
    seen = 0
    for kind, groups in elastic.order.units.items():
        for group in groups:
            for slot in group.slots:
                gradient = student.model.get_parameter(skeleton.sources[slot.name].parameter).grad
                if group.block == gone:
                    assert gradient is None
                    continue
                mine = places[slot.name].of(gradient)
                kept = nesting.kept_units(group.count, 0.5)
                head, tail = slot.of_units(mine)[:kept], slot.of_units(mine)[kept:]
                assert not bool(tail.any()), slot.name
                seen += bool(head.any())
        assert seen, kind
    assert seen > 10


def elastic_places(student, elastic):
    from tersor.ops.distill.students.places import places

    shapes = {name: entry.shape for name, entry in elastic.view.tensors.items()}
    return places(student.model, elastic.order.skeleton.sources, shapes)


def test_leaving_the_context_leaves_nothing_behind(family):
    elastic, student = prepare(folder_of(family, "mixtral"))
    before = {name: value.clone() for name, value in student.model.named_parameters()}
    expected = logits(student.model)
    with elastic.running(elastic.space.smallest):
        assert not close(logits(student.model), expected, 1e-2)
    with pytest.raises(ZeroDivisionError), elastic.running(elastic.space.smallest):
        logits(student.model)
        1 / 0  # noqa: B018
    assert torch.equal(logits(student.model), expected)
    assert all(torch.equal(before[name], value) for name, value in student.model.named_parameters())
    for module in student.model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks


def test_layers_that_keep_less_are_masked_too(family):
    """The nested feed-forward layers multiply with a weight themselves; recomputed blocks are the sub-network again."""
    elastic, student = prepare(folder_of(family, "llama"))
    network = elastic.order.nesting.network(0.5, 0.5, 0.75)

    def gradients():
        student.model.zero_grad(set_to_none=True)
        with elastic.running(network):
            student.model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {name: value.grad for name, value in student.model.named_parameters() if value.grad is not None}

    expected = gradients()
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert nest(student.model) == 4
    found = gradients()
    for other in (again, found):
        assert other.keys() == expected.keys()
        assert all(close(other[name], expected[name], 1e-5) for name in expected)


def test_a_layer_that_is_not_called_is_noticed(family):
    elastic, student = prepare(folder_of(family, "llama"))
    layer = student.model.model.layers[1].mlp
    gate, up, down = layer.gate_proj, layer.up_proj, layer.down_proj
    type(layer).forward, own = (
        lambda self, x: x * 0 + (down.weight.sum() + gate.weight.sum() + up.weight.sum()) * 0,
        type(layer).forward,
    )
    try:
        with pytest.raises(TersorError, match="was not called"), elastic.running(elastic.order.nesting.network(0.5)):
            logits(student.model)
    finally:
        type(layer).forward = own


def test_sizes_are_those_of_the_extracted_checkpoint(family, tmp_path):
    elastic, _ = prepare(folder_of(family, "llama"))
    space = elastic.space
    assert space.costs.parameters(space.largest) == sum(
        v.numel() for v in load_file(folder_of(family, "llama") / "model.safetensors").values()
    )
    flops = [space.costs.flops(network) for network in space.uniform]
    assert flops == sorted(flops) and len(flops) == 12
    assert space.uniform[0] == space.smallest and space.uniform[-1] == space.largest
    # per token: 2 x weights of 2 blocks, head 256 x 64, attention of one KV head group (32 columns) over 128 tokens
    weights = (32 * 64 + 2 * 16 * 64 + 64 * 32) + 3 * 48 * 64
    assert space.costs.flops(space.smallest) == 2 * 256 * 64 + 2 * (2 * weights + 4 * 32 * 128)


def test_experts_cost_what_a_token_uses(family):
    elastic, _ = prepare(folder_of(family, "mixtral"))
    narrow, wide = (elastic.order.nesting.network(share) for share in (0.5, 1))
    difference = elastic.space.costs.flops(wide) - elastic.space.costs.flops(narrow)
    assert difference == 4 * 2 * (3 * 48 * 64) * 2  # blocks, FLOPs, weights, experts of 4 that a token goes to


def test_options_that_keep_the_same_are_one(family):
    elastic, _ = prepare(folder_of(family, "llama"), shares={"heads": (0.75, 0.5)})
    assert elastic.space.options == {"neurons": (1.0, 0.75, 0.5), "heads": (1.0, 0.5), "depth": (1.0, 0.75, 0.5)}
    with pytest.raises(TersorError, match="one network only"):
        prepare(folder_of(family, "llama"), shares={key: (1,) for key in KEYS})
    with pytest.raises(TersorError, match="not a share"):
        prepare(folder_of(family, "llama"), shares={"depth": (2,)})


def test_what_cannot_be_sorted_is_refused(family, tmp_path):
    """Codes; and heads of models whose config.json could not say that there are fewer, unless they are asked for."""
    from tersor.ops.quantize.run import Request as QuantizeRequest
    from tersor.ops.quantize.run import quantize

    quantize(QuantizeRequest(str(folder_of(family, "llama")), tmp_path / "q", scheme="w8a16"))
    with pytest.raises(TersorError, match="codes or factors"):
        sort_units(DenseView(Checkpoint(tmp_path / "q")), CPU)
    elastic, _ = prepare(folder_of(family, "gpt2"), shares={"neurons": (1, 0.5)})
    assert "heads" not in elastic.order.units and "config.json cannot say" in elastic.warnings[0]


@given(st.integers(1, 500), st.floats(0.01, 1), st.integers(1, 64))
@hypothesis_settings(max_examples=60, deadline=None)
def test_kept_count(count, share, multiple):
    kept = kept_count(count, share, multiple)
    assert 1 <= kept <= count and (kept % multiple == 0 or kept == count)
    assert kept >= min(count, round(count * share - 0.5)) and kept_count(count, 1.0, multiple) == count
    assert kept == count or kept - multiple < count * share


def test_document_round_trip(family, tmp_path):
    elastic, _ = prepare(folder_of(family, "llama"), per_block=True)
    for _ in range(4):
        draws = elastic.sample()
        elastic.record([2.0, *(2 + 0.1 * sum(draw.network.heads) for draw in draws[1:])])
    document = json.loads(json.dumps(elastic.document()))
    nesting = from_json(document, tmp_path / FILE)
    assert nesting.to_json() == document
    assert nesting.groups == elastic.order.nesting.groups and nesting.networks["smallest"] == elastic.space.smallest
    assert {f"level{entry['level']}" for entry in nesting.bank} <= nesting.networks.keys()
    assert elastic.report()["networks"]["largest"]["parameters"] == elastic.space.costs.parameters(
        elastic.space.largest
    )
    for damage in (
        {"schema": "other"},
        {"blocks": [0, 0, 1, 2]},
        {"groups": [{}]},
        {"space": None},
        {"networks": {"x": {"depth": 3}}},
    ):
        with pytest.raises(TersorError):
            from_json(document | damage, tmp_path / FILE)


def test_resumed_and_continued_runs_have_the_same_order(family, tmp_path):
    folder = folder_of(family, "llama")
    first, student = prepare(folder)
    first.record([1.0, 1.1, 1.2, 1.3])
    state = json.loads(json.dumps(first.state_dict()))
    second = Elastic(DenseView(Checkpoint(folder)), CPU, None, shares=SHARES, steps=10, state=state)
    assert second.sample() == first.sample()
    assert all(torch.equal(first.view.read(name), second.view.read(name)) for name in first.view.tensors)
    # A checkpoint that is elastic already is not sorted again, not even from a saved state.
    trained = save(first, student, tmp_path / "trained")
    for state in (None, second.state_dict()):
        third = Elastic(DenseView(Checkpoint(trained)), CPU, WINDOWS, shares=SHARES, state=state)
        assert not third.order.fold.names and third.order.nesting.groups == first.order.nesting.groups
    other = folder_of(family, "llama", layers=3)
    with pytest.raises(TersorError, match="of another model"):
        Elastic(DenseView(Checkpoint(other)), CPU, None, state=second.state_dict())


def save(elastic, student, folder):
    """What a training loop writes, without its report."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(dict(student.export()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(elastic.view.config))
    (folder / FILE).write_text(json.dumps(elastic.document()))
    return folder


def test_training_nested_networks(family, tmp_path):
    """A few steps of the sandwich: all sub-networks learn, and what is extracted is what was trained."""
    elastic, student = prepare(folder_of(family, "llama"), steps=12)
    optimizer = torch.optim.AdamW(student.trainable().values(), lr=2e-3)
    before = {}
    for name, network in elastic.sampler.best().items():
        with elastic.running(network), torch.no_grad():
            before[name] = float(student.model(input_ids=IDS, labels=IDS).loss)
    for _ in range(12):
        losses = []
        for draw in elastic.sample():
            with elastic.running(draw.network):
                loss = student.model(input_ids=IDS, labels=IDS).loss
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        elastic.record(losses)
    for name in ("largest", "smallest"):
        with elastic.running(elastic.sampler.best()[name]), torch.no_grad():
            assert float(student.model(input_ids=IDS, labels=IDS).loss) < before[name] - 1
    trained = save(elastic, student, tmp_path / "trained")
    prune(PruneRequest(str(trained), tmp_path / "small", extract="smallest"))
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with elastic.running(elastic.space.smallest):
        assert close(logits(small), logits(student.model))
    assert Skeleton(DenseView(Checkpoint(tmp_path / "small")), CPU).blocks[0].mlp.up_proj.out_features == 48

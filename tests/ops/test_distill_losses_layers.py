"""Losses on blocks: hidden states, attention relations, and where queries, keys and values are made."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.ops.distill.losses.attention import reference_relations, relation_heads, relation_loss
from tersor.ops.distill.losses.capture import Capture, attends_causally
from tersor.ops.distill.losses.heads import final_states, read_head
from tersor.ops.distill.losses.hidden import HiddenLoss
from tersor.ops.distill.losses.layer_map import layer_map
from tersor.ops.distill.losses.logits import LogitTargets
from tersor.ops.distill.losses.objective import Objective, States
from tersor.ops.distill.losses.parse import parse_loss
from tersor.ops.distill.losses.projections import (
    Projection,
    find_projections,
    projections_of_model,
    projections_of_skeleton,
)
from tersor.ops.model.linears import LowRankLinear
from tersor.ops.model.skeleton import Skeleton, find_blocks
from tiny_models import BASE, FAMILIES
from torch import nn

B, T = 2, 7
NEOX = (
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {key: value for key, value in BASE.items() if key != "num_key_value_heads"},
)
IDS = torch.randint(5, 256, (B, T), generator=torch.Generator().manual_seed(2))
KEEP = torch.rand(B, T, generator=torch.Generator().manual_seed(8)) < 0.7


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def model_of(kind, seed=0, **changes):
    model_class, config_class, settings = FAMILIES[kind] if isinstance(kind, str) else kind
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def blocks_of(model):
    return dict(enumerate(find_blocks(model)[1]))


# ---------------------------------------------------------------- hidden states


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [8, 12, 5])
def test_hidden_is_the_definition(width, exponent):
    """Three student blocks against five of the teacher's, of another width."""
    pairs = layer_map(None, 3, 5).outputs
    loss = HiddenLoss(pairs, 8, width, exponent).double()
    student = {index: draw(B, T, 8, seed=index).requires_grad_() for index in range(3)}
    teacher = {index: draw(B, T, width, seed=10 + index, scale=1 + index) for index in range(5)}
    want = 0.0
    for s, t in pairs:
        for b, position in KEEP.nonzero().tolist():
            x, y = student[s][b, position], teacher[t][b, position]
            x = x if loss.projection is None else loss.projection.weight @ x
            want = want + (x - y).square().sum() / y.norm() ** exponent / len(pairs)
    found = loss(student, teacher, KEEP)
    torch.testing.assert_close(found, want)
    inputs = [*student.values(), *loss.parameters()]
    assert len(inputs) == 3 + (width != 8)
    for got, right in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(got, right)
    halves = [
        loss(*({key: value[b : b + 1] for key, value in side.items()} for side in (student, teacher)), KEEP[b : b + 1])
        for b in range(B)
    ]
    torch.testing.assert_close(sum(halves), found)


def test_hidden_is_zero_when_equal_and_scale_free():
    loss = HiddenLoss(((0, 0), (1, 1)), 8, 8)
    states = {index: draw(B, T, 8, seed=index) for index in range(2)}
    assert loss(states, states, KEEP).item() == 0
    moved = {index: value + draw(B, T, 8, seed=5, scale=0.1) for index, value in states.items()}
    more = {index: value + draw(B, T, 8, seed=5, scale=0.3) for index, value in states.items()}
    near, far = (loss(other, states, KEEP).item() for other in (moved, more))
    assert 0 < near < far
    assert loss(
        *({index: 100 * value for index, value in side.items()} for side in (moved, states)), KEEP
    ).item() == pytest.approx(near)


def test_projection_keeps_lengths_at_first_and_repeats():
    first, again = (HiddenLoss(((0, 0),), 6, 9, seed=3).projection.weight for _ in range(2))
    assert torch.equal(first, again) and first.shape == (9, 6)
    torch.testing.assert_close(first.T @ first, torch.eye(6))
    assert not torch.equal(first, HiddenLoss(((0, 0),), 6, 9, seed=4).projection.weight)


# ---------------------------------------------------------------- attention relations


def relations_by_hand(student, teacher, heads, causal):
    """`[B, T]`; token by token."""
    losses = torch.zeros(student.shape[:2], dtype=torch.float64)
    s, t = relation_heads(student, heads), relation_heads(teacher, heads)
    for b in range(len(s)):
        for row in range(s.shape[2]):
            seen = row + 1 if causal else s.shape[2]
            for head in range(heads):
                p, q = (torch.softmax(x[b, head, :seen] @ x[b, head, row] / math.sqrt(x.shape[-1]), 0) for x in (s, t))
                losses[b, row] += (q * (q / p).log()).sum() / heads
    return losses


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "others", "common"), [(4, 4, 4), (6, 4, 2), (3, 2, 1)])
def test_relations_are_the_definition(heads, others, common, causal):
    student, teacher = draw(B, T, heads, 4, seed=1).requires_grad_(), draw(B, T, others, 6, seed=2)
    by_hand = relations_by_hand(student, teacher, common, causal)
    reference = reference_relations(relation_heads(student, common), relation_heads(teacher, common), causal)
    torch.testing.assert_close(reference, by_hand)
    for budget in (1, 3 * B * common * T * 8, 1 << 20):
        loss = relation_loss(student, teacher, KEEP, causal, budget)
        torch.testing.assert_close(loss, by_hand[KEEP].sum())
        found, right = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, by_hand[KEEP].sum()))
        torch.testing.assert_close(found, right)
    halves = [relation_loss(student[b : b + 1], teacher[b : b + 1], KEEP[b : b + 1], causal) for b in range(B)]
    torch.testing.assert_close(sum(halves), loss)


def test_relations_are_zero_when_equal():
    same = draw(B, T, 4, 4, seed=1)
    values = [
        relation_loss((same + draw(B, T, 4, 4, seed=3, scale=scale)).requires_grad_(), same, KEEP, True).item()
        for scale in (0.0, 0.05, 0.5)
    ]
    assert abs(values[0]) < 1e-12 < values[1] < values[2]


# ---------------------------------------------------------------- where queries, keys and values are made


def by_name(model, kind):
    """Names and rows of q, k and v in the tiny models, as their code has them."""
    rows = torch.arange(192)
    if kind == "gpt2":
        return {name: ("attn.c_attn", rows[64 * i : 64 * (i + 1)]) for i, name in enumerate("qkv")}
    if kind == "phi3":
        return {"q": ("self_attn.qkv_proj", rows[:64]), "k": ("self_attn.qkv_proj", rows[64:96]),
                "v": ("self_attn.qkv_proj", rows[96:128])}  # fmt: skip
    if kind == "falcon":  # one key and value head for all queries
        return {"q": ("self_attention.query_key_value", rows[:64]), "k": ("self_attention.query_key_value", rows[64:80]),
                "v": ("self_attention.query_key_value", rows[80:96])}  # fmt: skip
    if kind == "neox":  # q, k and v of a head lie together
        return {
            name: ("attention.query_key_value", rows.view(4, 3, 16)[:, i].flatten()) for i, name in enumerate("qkv")
        }
    if kind.startswith("bert"):
        names = {"q": "query", "k": "key", "v": "value"}
        return {name: (f"attention.self.{leaf}", rows[:64]) for name, leaf in names.items()}
    widths = {
        name: model.get_submodule(f"{find_blocks(model)[0]}.0.self_attn.{name}_proj").out_features for name in "qkv"
    }
    return {name: (f"self_attn.{name}_proj", rows[:width]) for name, width in widths.items()}


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "llama-bias",
        "qwen3",
        "gemma3",
        "gpt2",
        "opt",
        "phi",
        "phi3",
        "falcon",
        "neox",
        "mixtral",
        "bert",
        "bert-mlm",
    ],
)
def test_finds_queries_keys_and_values(kind):
    model = model_of(NEOX if kind == "neox" else kind).train()
    found = projections_of_model(model, blocks_of(model))
    want = by_name(model, kind)
    assert found.keys() == blocks_of(model).keys()
    for projections in found.values():
        for name, (module, rows) in want.items():
            assert projections[name].module == module
            at = projections[name].rows
            assert torch.equal(torch.arange(at.start, at.stop) if isinstance(at, slice) else at, rows)
            assert len(rows) % projections[name].heads == 0
        assert projections["q"].heads == 4
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_captured_attention_makes_what_the_block_makes():
    """GPT-NeoX's fused layout: the keys of head h, by hand from the weight."""
    model = model_of(NEOX)
    projections = projections_of_model(model, blocks_of(model))
    with Capture(blocks_of(model), [0], projections) as seen:
        model(input_ids=IDS)
    block = find_blocks(model)[1][0]
    x = block.input_layernorm(model.get_input_embeddings()(IDS))
    layer = block.attention.query_key_value
    for part, kind in enumerate("qkv"):
        heads = (x @ layer.weight.T + layer.bias).view(B, T, 4, 3, 16)[:, :, :, part]
        torch.testing.assert_close(seen.attention[0][kind], heads)


def test_layers_of_other_kinds(family):
    """Factors in the place of a matrix, and heads of keys that are fewer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(family("llama", "float32"))
    layer = model.model.layers[0].self_attn
    layer.k_proj = LowRankLinear(torch.randn(32, 8), torch.randn(8, 64))
    (found,) = projections_of_model(model, {0: model.model.layers[0]}).values()
    assert [found[kind].module for kind in "qkv"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert [found[kind].heads for kind in "qkv"] == [4, 2, 2]


def test_gates_are_no_queries():
    """Queries and a gate for the result in one layer, values that a first factor makes: only what attention reads counts."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_and_gate, self.key = nn.Linear(32, 64), nn.Linear(32, 16)
            self.down, self.up, self.out = nn.Linear(32, 8), nn.Linear(8, 16), nn.Linear(32, 32)

        def forward(self, x):
            q, gate = self.query_and_gate(x).chunk(2, -1)
            k, v = self.key(x), self.up(self.down(x))
            q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return x + self.out(y.transpose(1, 2).flatten(2) * gate.sigmoid())

    block = Gated()
    found = find_projections(block, lambda count: block(torch.randn(1, count, 32)), heads=4)
    assert found == {
        "q": Projection("query_and_gate", slice(0, 32), 4), "k": Projection("key", slice(0, 16), 2),
        "v": Projection("up", slice(0, 16), 2),
    }  # fmt: skip


def test_streamed_block(family):
    folder = family("phi3", "float32")
    skeleton = Skeleton(DenseView(Checkpoint(folder)), torch.device("cpu"))
    with skeleton.filled(1) as block:
        found = projections_of_skeleton(skeleton, 1, block)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert found == projections_of_model(model, blocks_of(model))[1]


def test_a_block_without_attention(family):
    model = transformers.AutoModelForCausalLM.from_pretrained(family("llama", "float32"))

    class Constant(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states * 0, None

    model.model.layers[0].self_attn = Constant()
    with pytest.raises(TersorError, match="passes nothing between tokens") as error:
        projections_of_model(model, blocks_of(model))
    assert "hidden" in error.value.hint


@pytest.mark.parametrize(("kind", "causal"), [("llama", True), ("gpt2", True), ("gemma3", True), ("bert", False)])
def test_sees_whether_attention_is_causal(kind, causal):
    assert attends_causally(model_of(kind)) is causal


# ---------------------------------------------------------------- capture, and all together


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "falcon"])
def test_captures_what_transformers_calls_hidden_states(kind):
    model = model_of(kind, **({"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}))
    with Capture(blocks_of(model), [0, 1]) as seen:
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    for index in (0, 1):
        assert torch.equal(seen.outputs[index], states[index + 1]) and seen.outputs[index].requires_grad
    model(input_ids=IDS.flip(1))
    assert torch.equal(seen.outputs[0], states[1])  # nothing is collected outside


def test_capture_notices_changes_in_place():
    blocks = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(TersorError, match="in place"), Capture({0: blocks[0]}, [0]):
        blocks[0](torch.ones(1, 4)).add_(1)


def sides(student, teacher, objective, ids=IDS, keep=KEEP):
    """Loss of a micro-batch, the way a training loop gets it."""
    heads = read_head(student), read_head(teacher)
    causal = attends_causally(student)
    assert causal == (objective.attention is None or objective.attention.causal)
    captures = []
    for side, model in enumerate((student, teacher)):
        blocks = blocks_of(model)
        wanted = {pair[side]: blocks[pair[side]] for pair in objective.compared.attention}
        outputs = {pair[side] for pair in objective.compared.outputs}
        captures.append(Capture(blocks, outputs, projections_of_model(model, wanted)))
    with captures[0]:
        hidden = final_states(student, heads[0], input_ids=ids)
    with torch.no_grad(), captures[1]:
        target = LogitTargets(final_states(teacher, heads[1], input_ids=ids), heads[1])
    states = [States(capture.outputs, capture.attention) for capture in captures]
    return objective(ids, keep, hidden, heads[0], target, *states)


TEXT = "kl=1,reverse-kl=0.3,next=0.1,hidden=0.5,attention:2=0.25"
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 5}


def test_objective_with_unequal_students():
    """Depth, width and heads differ, and both have grouped queries; against the definition, with gradients."""
    student, teacher = model_of("llama"), model_of("llama", seed=1, **WIDE)
    keep = KEEP.clone()
    keep[:, -1] = False
    objective = Objective(parse_loss(TEXT), layers=layer_map(None, 2, 5), widths=(64, 96))
    assert objective.compared.outputs == ((0, 2), (1, 4)) and [len(p) for p in objective.parameters()] == [96]
    loss, parts = sides(student, teacher, objective, keep=keep)
    assert list(parts) == ["kl", "reverse-kl", "next", "hidden", "attention"]
    torch.testing.assert_close(
        loss.detach(), sum(objective.terms[name].weight * part.float() for name, part in parts.items())
    )
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    projection = objective.hidden.projection.weight.grad.clone()
    student.zero_grad(), objective.zero_grad()
    mine, theirs = (model(input_ids=IDS, output_hidden_states=True) for model in (student, teacher))
    p, q = (side.logits[keep].log_softmax(-1) for side in (mine, theirs))
    want = (q.exp() * (q - p)).sum() + 0.3 * (p.exp() * (p - q)).sum()
    want = want + 0.1 * nn.functional.cross_entropy(
        mine.logits[:, :-1][keep[:, :-1]], IDS[:, 1:][keep[:, :-1]], reduction="sum"
    )
    inside = [], []
    for side, model in zip(inside, (student, teacher), strict=True):
        for block in find_blocks(model)[1]:
            block.register_forward_hook(lambda _, args, out, side=side: side.append(out))
        model(input_ids=IDS)
    for s, t in objective.compared.outputs:
        x, y = objective.hidden.projection(inside[0][s][keep]), inside[1][t][keep].detach()
        want = want + 0.5 / 2 * ((x - y).square().sum(1) / y.square().sum(1)).sum()
    for s, t in objective.compared.attention:
        for name, common in (("q", 2), ("k", 1), ("v", 1)):
            outputs = []
            for index, model, head_dim in ((s, student, 16), (t, teacher, 16)):
                block = find_blocks(model)[1][index]
                x = inside[model is teacher][index - 1] if index else model.get_input_embeddings()(IDS)
                made = block.self_attn.get_submodule(f"{name}_proj")(block.input_layernorm(x))
                outputs.append(relation_heads(made.unflatten(-1, (-1, head_dim)), common))
            losses = reference_relations(outputs[0], outputs[1].detach(), True)
            want = want + 0.25 / 2 / 3 * losses[keep].sum()
    torch.testing.assert_close(loss.detach(), want.detach(), rtol=1e-4, atol=1e-4)
    want.backward()
    for name, parameter in student.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    torch.testing.assert_close(projection, objective.hidden.projection.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-mlm"])
def test_objective_is_zero_at_the_teacher_and_grows(kind):
    text = "kl,reverse-kl,js,bd-kd,mse,top-k-kl,hidden,attention:2"
    student, teacher = model_of(kind), model_of(kind)
    objective = Objective(
        parse_loss(text), top_k=9, layers=layer_map(None, 2, 2), widths=(64, 64), causal=kind != "bert-mlm"
    )
    values = []
    for noise in (0.0, 0.02, 0.05):
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
        values.append({name: float(part) for name, part in sides(student, teacher, objective)[1].items()})
    for name in values[0]:
        assert abs(values[0][name]) < 1e-3 * values[1][name] < 1e-3 * values[2][name], name


def test_objective_of_pieces_adds_up():
    student, teacher = model_of("gpt2"), model_of("llama", seed=1, **WIDE)
    objective = Objective(parse_loss(TEXT), layers=layer_map("0:1,1:4", 2, 5), widths=(64, 96))
    whole, _ = sides(student, teacher, objective)
    pieces = [sides(student, teacher, objective, IDS[b : b + 1], KEEP[b : b + 1])[0] for b in range(B)]
    torch.testing.assert_close(sum(pieces), whole, rtol=1e-5, atol=1e-4)

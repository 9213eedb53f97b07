"""The cheapest way to cut a block: Megatron-LM's column and row pattern comes out of it, for families of every kind."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import inf

import pytest
from header_models import (
    DEEPSEEK_V3,
    GEMMA3_27B,
    LLAMA_8B,
    MIXTRAL,
    TINY_LLAMA,
    deepseek_shapes,
    gemma3_shapes,
    llama_shapes,
    write_model,
)
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.dependencies.collectives import block_collectives
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.transform import choose as chooser_module
from tersor.ops.plan_parallel.transform.annotation import R
from tersor.ops.plan_parallel.transform.choose import Chooser, Device, choose
from tersor.ops.plan_parallel.transform.inside import weight_bytes
from tersor.ops.plan_parallel.transform.operators import block_operators, structure

H100 = Device(4e14, 3e12)
TOKENS = 8192
COLUMN_ROW = {
    "keys": "g", "values": "g", "queries": "g", "scores and values": "g", "output": "g", "mlp.up": "f", "mlp.down": "f",
}  # fmt: skip


def nvlink(collective: str, nbytes: float, group) -> float:
    passes = {"all_reduce": 2, "all_to_all": 1 / group.ranks}.get(collective, 1)
    return 1e-5 + passes * (group.ranks - 1) / group.ranks * nbytes / 3e11


def of(folder, config, shapes) -> PlanModel:
    return PlanModel(Checkpoint(write_model(folder, config, shapes)))


def cut(model: PlanModel, n: int, piece: int = -2, streams=(R, 1), room: float = 1.2):
    """On ranks that have room for little more than their share."""
    nodes = block_operators(model, model.pieces[piece], 1, TOKENS, n)
    return choose(nodes, Chooser(n, nvlink, H100), room * weight_bytes(nodes) / n, streams)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LLAMA_8B | {"num_hidden_layers": 2}
    return of(tmp_path_factory.mktemp("llama") / "m", config, llama_shapes(config))


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_column_then_row(llama, n):
    """With sixteen ranks every head of keys and values is on two of them."""
    along = cut(llama, n).along()
    assert along.items() >= (COLUMN_ROW | {"mlp.gate": "f", "mlp.product": "f"}).items()


def test_what_lies_between_is_cut_along_the_sequence(llama):
    chosen = cut(llama, 8)
    assert {chosen.along()[name] for name in ("attention.norm", "attention.residual", "mlp.norm", "mlp.residual")} == {
        "s"
    }


def test_collectives_are_those_of_sequence_parallelism(llama):
    """Which `block_collectives` has written down, the ones that hide excepted."""
    found = Counter()
    for _, _, phase, path in cut(llama, 8, streams=(1,)).paths:
        for step in path.steps:
            if step.nbytes:
                found[step.collective, phase, step.nbytes] += 1
    written = Counter()
    for entry in block_collectives(llama, llama.pieces[-2], Layout(tp=8), TOKENS):
        if not entry.overlappable:
            written[entry.name, entry.phase, entry.nbytes] += entry.count
    assert found == written


def test_biases_follow_their_layers(tmp_path):
    config = TINY_LLAMA | {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 4096,
    }
    shapes = llama_shapes(config)
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if "proj" in name}
    model = of(tmp_path / "m", config, shapes)
    assert structure(model, model.pieces[1]).attention_bias
    along = cut(model, 4).along()
    assert along.items() >= (COLUMN_ROW | {"queries.bias": "g", "mlp.up.bias": "f"}).items()
    assert along["output.bias"] in ("s", None, "partial") and along["mlp.down.bias"] in ("s", None, "partial")


def test_a_fused_matrix_is_cut_by_heads(tmp_path):
    block = "transformer.h.0"
    config = {
        "model_type": "falcon", "new_decoder_architecture": True, "hidden_size": 1024, "num_hidden_layers": 1,
        "num_attention_heads": 16, "num_kv_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    shapes = {
        "transformer.word_embeddings.weight": (512, 1024),
        f"{block}.self_attention.query_key_value.weight": (1536, 1024), f"{block}.self_attention.dense.weight": (1024, 1024),
        f"{block}.mlp.dense_h_to_4h.weight": (4096, 1024), f"{block}.mlp.dense_4h_to_h.weight": (1024, 4096),
    }  # fmt: skip
    assert cut(of(tmp_path / "m", config, shapes), 4).along().items() >= COLUMN_ROW.items()


def test_experts_are_dealt_out_or_cut(tmp_path):
    config = MIXTRAL | {"num_hidden_layers": 2}
    model = of(tmp_path / "m", config, llama_shapes(config))
    along = cut(model, 8).along()
    assert (along["experts.up"], along["experts.down"], along["output"]) == ("x", "x", "g")
    along = cut(model, 16).along()  # more ranks than experts
    assert (along["experts.up"], along["experts.down"]) == ("f", "f")


@pytest.mark.parametrize("piece", [1, -2])
def test_latent_attention(tmp_path, piece):
    config = DEEPSEEK_V3 | {"num_hidden_layers": 4}
    model = of(tmp_path / "m", config, deepseek_shapes(config))
    along = cut(model, 8, piece).along()
    assert [along[name] for name in ("queries", "keys", "values", "output")] == ["g"] * 4
    assert [along[name] for name in ("mlp.up", "mlp.gate")] == ["f"] * 2
    assert structure(model, model.pieces[-2]).expert_width == 2048


def test_narrow_heads_are_gathered(tmp_path):
    """Gemma 3 27B: its heads are 4,096 numbers wide, the hidden states 5,376, so that gathering before the output projection
    moves less than reducing after it. By time, not by pattern."""
    config = GEMMA3_27B | {"num_hidden_layers": 2}
    along = cut(of(tmp_path / "m", config, gemma3_shapes(config)), 8).along()
    assert along.items() >= (COLUMN_ROW | {"output": "e"}).items()


def test_with_room_weights_stay_whole(llama):
    """Where weights cost nothing to keep, all is cut along the sequence; attention by heads after an all-to-all, as in
    DeepSpeed-Ulysses, or with the keys and values of everyone."""
    nodes = block_operators(llama, llama.pieces[-2], 1, TOKENS, 8)
    chosen = choose(nodes, Chooser(8, nvlink, H100, micro_batches=10**9), inf, (1,))
    along = chosen.along()
    assert along.pop("scores and values") in ("g", "s") and set(along.values()) == {"s"}
    assert chosen.weight_bytes == weight_bytes(nodes)


def test_nothing_fits_is_said(llama):
    nodes = block_operators(llama, llama.pieces[-2], 1, TOKENS, 8)
    with pytest.raises(TersorError, match="no way to cut the block over 8 ranks"):
        choose(nodes, Chooser(8, nvlink, H100), weight_bytes(nodes) / 16)


@pytest.mark.parametrize("room", [1.05, 100])
def test_equals_trying_every_choice(tmp_path, monkeypatch, room):
    model = of(tmp_path / "m", TINY_LLAMA, llama_shapes(TINY_LLAMA))
    nodes = block_operators(model, model.pieces[1], 1, 64, 2)[-5:]  # the feed-forward part, without its norm
    nodes = [
        node._replace(inputs=tuple("x" if name in ("mlp.in", "attention.done") else name for name in node.inputs))
        for node in nodes
    ]
    chooser, limit = Chooser(2, nvlink, H100, 4), room * weight_bytes(nodes) / 2
    best = choose(nodes, chooser, limit, (1,))
    every = [chooser_module.splits(node.annotation, node.sizes, 2) for node in nodes]
    tried = []
    for combination in product(*every):
        waiting = iter(combination)
        monkeypatch.setattr(chooser_module, "splits", lambda *_, waiting=waiting: [next(waiting)])
        try:
            tried.append(choose(nodes, chooser, limit, (1,)).seconds)
        except TersorError:
            continue
        finally:
            monkeypatch.undo()
    assert best.seconds == pytest.approx(min(tried))
